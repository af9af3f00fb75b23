"""The product of activations with a kernel: its own gradient is that of the plain product, in every mode."""

import chex
import jax
import jax.numpy as jnp
import pytest

from kvjax.model.products import token_product


def plain(x, kernel):
    return jnp.sin(jnp.matmul(x, kernel, precision="highest")).sum()


def ours(x, kernel):
    return jnp.sin(token_product(x, kernel, None, precision="highest")).sum()


MODES = {
    "value": lambda f: f,
    "reverse": lambda f: jax.grad(f, (0, 1)),
    "forward": lambda f: lambda x, k: jax.jvp(f, (x, k), (x, k)),
    "forward over reverse": lambda f: lambda x, k: jax.jvp(lambda k: jax.grad(f, 1)(x, k), (k,), (k,)),
    "reverse over reverse": lambda f: lambda x, k: jax.grad(lambda k: (jax.grad(f, 1)(x, k) ** 2).sum())(k),
    "many kernels": lambda f: lambda x, k: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(x, jnp.stack([k, 2 * k])),
    "many of both": lambda f: lambda x, k: jax.vmap(jax.grad(f, (0, 1)))(jnp.stack([x, -x]), jnp.stack([k, 2 * k])),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=["wider", "narrower"])
@pytest.mark.parametrize("tokens", [(3, 5), (2, 3, 5)])
def test_modes_of_products(mode, shape, tokens):
    """Every mode equals the plain product."""
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], (*tokens, shape[0])), jax.random.normal(keys[1], shape)
    chex.assert_trees_all_close(MODES[mode](ours)(x, kernel), MODES[mode](plain)(x, kernel), rtol=1e-4, atol=1e-4)
