"""Causal attention over a sequence that is split over the mesh axis `context`.

Keys and values are gathered, queries stay where they are. Causality would leave the device with the
last tokens most of the work, so halves of the shares change places first: of 2c chunks, c devices,
device i takes the queries of chunks i and 2c - 1 - i (the order of Llama 3's context parallelism,
arXiv 2407.21783, section 3.3.2). These attend to i + 1 and 2c - i chunks of keys: together 2c + 1
blocks of chunk by chunk on *every* device, of the 4c that the whole rectangle has. The softmax runs
along the blocks and the backward pass computes their weights again (FlashAttention-2, arXiv
2307.08691), so no device ever holds scores or a mask of more than one block.

Dimensions: b rows, n key heads, g queries of each, h = n g, t tokens, T = c t, C = t/2 a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptlab.model import sharding

AXIS = "context"
_MASKED = -1e30


def splits(x: jax.Array) -> bool:
    """Whether the mesh in use splits the tokens of x [B, T, D], and into equal chunks."""
    return cuts(x.shape[1], sharding.mesh_sizes().get(AXIS, 1)) and sharding.splits(x)


def cuts(length: int, ways: int) -> bool:
    """Whether so many tokens make two equal chunks for each of several devices."""
    return ways > 1 and length % (2 * ways) == 0


def pairs(length: int, ways: int) -> int:
    """Pairs of query and key whose score is computed, on all devices of the axis together."""
    if not cuts(length, ways):
        return length * length
    return ways * _count(ways) * (length // (2 * ways)) ** 2


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Each token attends to those before it and to itself, within its segment. Reverse mode only.

    Args:
        q: [B, T, H, K], T as `splits` wants it.
        k: [B, Hkv, T, K].
        v: [B, Hkv, T, K].
        segment_ids: int32 [B, T]. Padding (0) attends to padding, which nobody reads.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    return _forward(q, k, v, segment_ids)[0]


def _specs(q: jax.Array, k: jax.Array) -> tuple[PartitionSpec, ...]:
    """Of queries, of keys, of segment ids, and of what `_forward_local` gives per chunk."""
    queries = sharding.activation_spec(q.shape, ("batch", "length", "act_heads", None))
    keys = sharding.activation_spec(k.shape, ("batch", "act_heads", "length", None))
    chunks = PartitionSpec(None, keys[0], keys[1], None, AXIS)
    return queries, keys, PartitionSpec(*queries[:2]), chunks


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> Any:
    queries, keys, tokens, chunks = _specs(q, k)
    local = jax.shard_map(
        _forward_local,
        in_specs=(queries, keys, keys, tokens),
        out_specs=(queries, chunks),
        check_vma=False,
    )
    out, log_z = local(q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, out, log_z)


def _backward(saved: Any, d_out: jax.Array) -> Any:
    queries, keys, tokens, chunks = _specs(*saved[:2])
    local: Any = jax.shard_map(
        _backward_local,
        in_specs=(queries, keys, keys, tokens, queries, chunks, queries),
        out_specs=(queries, keys, keys),
        check_vma=False,
    )
    return *local(*saved, d_out), None


attention.defvjp(_forward, _backward)


def _exchange(ways: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where each device's first and second chunk goes: chunk j to device j, or to 2c - 1 - j."""
    pairs = [(d, min(j, 2 * ways - 1 - j)) for d in range(ways) for j in (2 * d, 2 * d + 1)]
    return pairs[::2], pairs[1::2]


def _balanced(x: jax.Array) -> jax.Array:
    """A device's [b, t, ...] of the sequence -> its chunks i and 2c - 1 - i: [2, b, C, ...]."""
    even, odd = _exchange(jax.lax.axis_size(AXIS))
    first, second = jnp.split(x, 2, axis=1)
    # Chunk i is even where i is, and 2c - 1 - i then is odd.
    pair = jnp.stack([jax.lax.ppermute(first, AXIS, even), jax.lax.ppermute(second, AXIS, odd)])
    return jnp.where(jax.lax.axis_index(AXIS) % 2, pair[::-1], pair)


def _in_order(pair: jax.Array) -> jax.Array:
    """The inverse of `_balanced`."""
    even, odd = ([(to, d) for d, to in moves] for moves in _exchange(jax.lax.axis_size(AXIS)))
    first, second = jnp.where(jax.lax.axis_index(AXIS) % 2, pair[::-1], pair)
    parts = [jax.lax.ppermute(first, AXIS, even), jax.lax.ppermute(second, AXIS, odd)]
    return jnp.concatenate(parts, axis=1)


def _chunk(x: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _count(ways: int) -> int:
    """Blocks of chunk by chunk that each device computes."""
    return 2 * ways + 1


def _blocks(scan: Any, start: Any) -> Any:
    """Runs `scan(carry, which of the two chunks of queries, chunk of queries, chunk of keys)`."""
    ways, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
        second = step > i  # the first i + 1 blocks are chunk i's
        which = second.astype(jnp.int32)
        query = jnp.where(second, 2 * ways - 1 - i, i)
        key = jnp.where(second, step - i - 1, step)
        return scan(carry, which, query, key), None

    return jax.lax.scan(body, start, jnp.arange(_count(ways)))[0]


def _scores(
    q: jax.Array, k: jax.Array, segments: jax.Array, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Of one block, float32 [b, n, g, C, C]: q [b, C, n, g, K] is scaled, k [b, n, C, K]."""
    size = q.shape[1]
    scores = jnp.einsum("btngk,bnsk->bngts", q, k, preferred_element_type=jnp.float32)
    at = jnp.arange(size)
    causal = (query * size + at)[:, None] >= (key * size + at)[None]
    of_query, of_key = (_chunk(segments, index, size, 1) for index in (query, key))
    visible = causal[None] & (of_query[:, :, None] == of_key[:, None, :])  # [b, C, C]
    return jnp.where(visible[:, None, None], scores, _MASKED)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[..., h, K] -> [..., n, g, K]."""
    return x.reshape(*x.shape[:-2], kv_heads, x.shape[-2] // kv_heads, x.shape[-1])


def _forward_local(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One device's output [b, t, h, K], and of its two chunks log Z float32 [2, b, n, g, C]."""
    queries = _grouped(_balanced(q) * q.shape[-1] ** -0.5, k.shape[1])  # [2, b, C, n, g, K]
    size = queries.shape[2]
    keys, values = (jax.lax.all_gather(x, AXIS, axis=2, tiled=True) for x in (k, v))
    segments = jax.lax.all_gather(segment_ids, AXIS, axis=1, tiled=True)

    def block(carry: Any, which: jax.Array, query: jax.Array, key: jax.Array) -> Any:
        top, total, out = (x[which] for x in carry)
        scores = _scores(queries[which], _chunk(keys, key, size, 2), segments, query, key)
        higher = jnp.maximum(top, scores.max(-1))  # [b, n, g, C]
        # A row that sees nothing of its first blocks has weights 1 there, and all of it is taken
        # back (times exp(-1e30 - x)) when it comes to its own token at the latest.
        weights = jnp.exp(scores - higher[..., None])
        old = jnp.exp(top - higher)
        part = jnp.einsum(
            "bngts,bnsk->bngtk", weights.astype(v.dtype), _chunk(values, key, size, 2),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        new = higher, total * old + weights.sum(-1), out * old[..., None] + part
        return tuple(x.at[which].set(y) for x, y in zip(carry, new, strict=True))

    _, b, _, n, g, width = queries.shape
    rows = (2, b, n, g, size)
    start = (
        jnp.full(rows, _MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    top, total, out = _blocks(block, start)
    out = jnp.moveaxis(out / total[..., None], 4, 2)  # [2, b, C, n, g, K]
    out = out.reshape(2, b, size, n * g, width).astype(q.dtype)
    return _in_order(out), top + jnp.log(total)


def _backward_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    out: jax.Array,
    log_z: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of one device's q, k and v."""
    scale, n = q.shape[-1] ** -0.5, k.shape[1]
    queries = _grouped(_balanced(q) * scale, n)  # [2, b, C, n, g, K]
    d_outs = _grouped(_balanced(d_out), n)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    inners = jnp.moveaxis(_grouped(_balanced(inner), n)[..., 0], 2, 4)  # [2, b, n, g, C]
    size = queries.shape[2]
    keys, values = (jax.lax.all_gather(x, AXIS, axis=2, tiled=True) for x in (k, v))
    segments = jax.lax.all_gather(segment_ids, AXIS, axis=1, tiled=True)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add(x: jax.Array, part: jax.Array, key: jax.Array) -> jax.Array:
        part += _chunk(x, key, size, 2)
        return jax.lax.dynamic_update_slice_in_dim(x, part, key * size, 2)

    def block(carry: Any, which: jax.Array, query: jax.Array, key: jax.Array) -> Any:
        d_q, d_k, d_v = carry
        q_, d_o, k_, v_ = (
            queries[which],
            d_outs[which],
            *(_chunk(x, key, size, 2) for x in (keys, values)),
        )
        weights = jnp.exp(_scores(q_, k_, segments, query, key) - log_z[which][..., None])
        d_weights = einsum("btngk,bnsk->bngts", d_o, v_)
        d_scores = (weights * (d_weights - inners[which][..., None])).astype(q.dtype)
        d_v = add(d_v, einsum("bngts,btngk->bnsk", weights.astype(q.dtype), d_o), key)
        d_k = add(d_k, einsum("bngts,btngk->bnsk", d_scores, q_), key)
        return d_q.at[which].add(einsum("bngts,bnsk->btngk", d_scores, k_)), d_k, d_v

    start = [jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values)]
    d_q, d_k, d_v = _blocks(block, tuple(start))
    d_q = (d_q * scale).astype(q.dtype).reshape(*d_q.shape[:3], q.shape[2], q.shape[3])
    d_k, d_v = (
        jax.lax.psum_scatter(x.astype(k.dtype), AXIS, scatter_dimension=2, tiled=True)
        for x in (d_k, d_v)
    )
    return _in_order(d_q), d_k, d_v
