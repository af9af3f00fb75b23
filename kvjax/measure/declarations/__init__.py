"""The declared measures, a module per subject; `kvjax.measure.registry` collects them."""
