"""A study's stages, from benchmark to interventions: what each needs, whether it is current, how it runs."""
