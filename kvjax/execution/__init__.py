"""What running a program over a run's checkpoints needs: inputs, load-ahead, memory plan, lifting, unbucketing."""
