"""The sweep: one compiled program that measures every checkpoint and every ablation, and the tables it fills."""
