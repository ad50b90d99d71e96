"""The product's own gradient is the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.model.product import product


@pytest.mark.parametrize("dtype, out, tolerance", [
    ("float32", "float32", 1e-6), ("bfloat16", "bfloat16", 2e-2), ("bfloat16", "float32", 2e-2),
])  # fmt: skip
def test_gradients_are_those_of_matmul(dtype, out, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, 7), dtype)
    kernel = jax.random.normal(keys[1], (7, 3), dtype)
    weight = jax.random.normal(keys[2], (2, 5, 3), jnp.float32)

    def ours(x, kernel):
        y = product(x, kernel, out)
        assert y.dtype == out
        return jnp.sum(weight * y)

    def plain(x, kernel):
        return jnp.sum(weight * jnp.matmul(x, kernel, preferred_element_type=out))

    for a, b in zip(jax.grad(ours, (0, 1))(x, kernel), jax.grad(plain, (0, 1))(x, kernel)):
        assert a.dtype == b.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
