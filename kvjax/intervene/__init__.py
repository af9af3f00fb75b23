"""Interventions inside a birth window: what carries the behaviour, and how information flows."""
