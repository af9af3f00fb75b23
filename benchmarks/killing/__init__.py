"""What `benchmarks/kill.py` kills, and how it is recorded."""
