"""What happened in a run, told from its windows: phases, handovers between components, and how sure they are."""
