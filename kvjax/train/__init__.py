"""Training: many seeds as one program, evaluated on full splits while they train."""
