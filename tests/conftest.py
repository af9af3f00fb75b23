"""Strict numerics for every test: no silent rank promotion, no NaN that nobody asked for."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _no_progress_of_flags_between_tests():
    """Command tests share absl's global flags; each starts from the defaults."""
    from absl import flags

    yield
    for name in list(flags.FLAGS):
        flag = flags.FLAGS[name]
        if flag.present:
            flag.unparse()
