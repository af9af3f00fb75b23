"""The decoder, its sites, interventions as data, and the transforms that lift them."""
