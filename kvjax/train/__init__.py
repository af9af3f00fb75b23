"""Training: many runs as one program, evaluated on full splits while they train."""
