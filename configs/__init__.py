"""The configs that ship with the package, as `kvjax.configs`; commands find them by name."""
