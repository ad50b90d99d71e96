"""Attention over a split sequence: equal results, equal work everywhere, no full square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptlab.model import attention as attn
from gptlab.model import context, sharding
from tests import hlo

B, T, H, N, K = 2, 48, 4, 2, 8
# (data, context, tensor), all 8 devices.
MESHES = [(4, 2, 1), (2, 2, 2), (2, 4, 1), (1, 8, 1)]


def make_mesh(data, ways, tensor):
    shape = (1, data, 1, ways, tensor)
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5)


@functools.cache
def example():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, H, K))
    k, v = (jax.random.normal(key, (B, N, T, K)) for key in keys[1:3])
    weights = jax.random.normal(keys[3], (B, T, H, K))
    # Packed rows: segments that begin in one device's share and end in another's, and padding.
    at = jnp.arange(T)
    rows = [1 + (at >= 5) + (at >= 29), jnp.where(at < 40, 1 + (at >= 31), 0)]
    return q, k, v, jnp.stack(rows).astype(jnp.int32), weights


def gradients(attend):
    """(output, gradients) of a sum over what is no padding."""

    def loss(q, k, v, segments, weights):
        out = attend(q, k, v, segments)
        real = (segments > 0)[:, :, None, None]
        return jnp.sum(jnp.where(real, out * weights, 0.0)), jnp.where(real, out, 0.0)

    def both(*args):
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)
        return out, grads

    return jax.jit(both)


def plain(q, k, v, segments):
    return attn.attention(q, k, v, attn.causal_mask(segments, q.shape[1]))


def on_mesh(sizes, args):
    """(result, HLO) of context attention; queries' rows are left whole where they do not divide."""
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        spec = sharding.activation_spec
        specs = [
            spec(args[0].shape, ("batch", "length", "act_heads", None)),
            *[spec(args[1].shape, ("batch", "act_heads", "length", None))] * 2,
            spec(args[3].shape, ("batch", "length")),
            PartitionSpec(),
        ]
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs)]
        compiled = gradients(context.attention).lower(*placed).compile()
        return compiled(*placed), compiled.as_text()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_it_equals_attention_on_one_device(sizes):
    args = example()
    got, text = on_mesh(sizes, args)
    want = gradients(plain)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    counts = hlo.collective_counts(text)
    # Queries, their order and their gradient travel to a neighbour; keys and values are gathered
    # and their gradients scattered.
    assert counts["collective-permute"] and counts["all-gather"] and counts["reduce-scatter"]
    _, ways, tensor = sizes
    rows, chunk = max(B // sizes[0], 1) if B % sizes[0] == 0 else B, T // (2 * ways)
    # The largest array is a gathered key, or one block's scores: never a square of the sequence.
    assert max(hlo.sizes(text)) <= max(2 * rows * T * H * K, rows * H // tensor * chunk**2)
    assert all(size < T * T for size in hlo.sizes(text, "pred"))


def test_every_device_has_the_same_number_of_blocks_and_they_cover_the_past():
    for ways in (2, 3, 4, 8):
        owned = [{i, 2 * ways - 1 - i} for i in range(ways)]
        assert set.union(*owned) == set(range(2 * ways))
        assert {sum(chunk + 1 for chunk in pair) for pair in owned} == {2 * ways + 1}
        # What goes to a device is what it owns, one chunk of each parity.
        even, odd = context._exchange(ways)
        for moves, parity in ((even, 0), (odd, 1)):
            assert sorted(to for _, to in moves) == list(range(ways))
            for source, to in moves:
                assert 2 * source + parity in owned[to]


def test_a_sequence_that_does_not_divide_is_attended_to_as_a_whole():
    with jax.set_mesh(make_mesh(4, 2, 1)):
        shapes = {}

        def look(x):
            shapes[x.shape[1]] = attn.visibility(None, x, "xla").ndim
            return x

        for length in (48, 46, 1):
            jax.eval_shape(look, jax.ShapeDtypeStruct((4, length, 8), jnp.float32))
    assert shapes == {48: 2, 46: 3, 1: 3}


def test_outside_jit_and_without_a_context_axis_it_is_not_used():
    x = jnp.zeros((4, 48, 8))
    with jax.set_mesh(make_mesh(4, 2, 1)):
        assert not context.splits(x)
    with jax.set_mesh(make_mesh(8, 1, 1)):
        jax.eval_shape(lambda x: pytest.fail() if context.splits(x) else x, x)
