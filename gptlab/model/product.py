"""The product of activations and a weight matrix, with a gradient that is fast on a CPU too."""

import functools

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """x [..., I] @ kernel [I, O], of one dtype, -> [..., O] in `dtype`. Reverse mode only.

    JAX's own gradient of the kernel is (dy^T x)^T. XLA's CPU backend transposes a product's left
    side in strides of a whole row, here together with whatever computes dy, which is thus computed
    twice. x^T dy transposes x instead, which stands in memory: the same sums, and the quickstart's
    feed-forward layers go backward in half the time.
    """
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _forward(x: jax.Array, kernel: jax.Array, dtype: str) -> tuple[jax.Array, Pair]:
    return product(x, kernel, dtype), (x, kernel)


def _backward(dtype: str, saved: Pair, dy: jax.Array) -> Pair:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    tokens = tuple(range(x.ndim - 1))
    return dy @ kernel.T, jnp.tensordot(x, dy, (tokens, tokens))


product.defvjp(_forward, _backward)
