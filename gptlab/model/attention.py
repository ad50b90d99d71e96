"""Attention and rotary position embeddings, as pure functions.

Training and decoding call the same `attention`: only the mask and the length of the keys differ.
Where training does without a mask of the whole square, `self_attention` chooses by the config.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gptlab.model import context, kernels

# Finite, so that a query with nothing to attend to (padding) gives numbers, not NaN.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 and later stretch RoPE to a longer window (arXiv 2407.21783, section 3.4.2).

    Wavelengths above original_max_len / low_freq_factor are multiplied by `factor`, those below
    original_max_len / high_freq_factor stay, and between the two the change is gradual.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int  # the window before it was stretched


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Radians a position, float32 [K/2]: theta^(-2i/K), stretched as `scaling` says."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_len * frequencies / (2 * math.pi)  # within the original window
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_tables(
    positions: jax.Array,
    max_len: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
        positions: int32 [B, T], below max_len.
        max_len: the context window.
        head_dim: K, even.
        theta: the base of the geometric sequence of wavelengths.
        scaling: of a stretched window, or None.

    Returns:
        Two float32 arrays [B, T, K/2]. (Su et al. 2021, arXiv 2104.09864, eq. 15.)
    """
    frequencies = rope_frequencies(head_dim, theta, scaling)
    if positions.size <= max_len:
        angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
        return jnp.cos(angles), jnp.sin(angles)
    # The window has fewer angles than the batch, and what is looked up in a table is computed
    # once; XLA's CPU backend computes cosines anew wherever a layer and head use them.
    angles = jnp.arange(max_len, dtype=jnp.float32)[:, None] * frequencies[None]
    cos, sin = (jnp.take(f(angles), positions, axis=0) for f in (jnp.cos, jnp.sin))
    return cos, sin


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + K/2) of x [B, T, H, K]: the half-rotated form of Llama and Qwen."""
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, K/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_mask(segment_ids: jax.Array | None, length: int) -> jax.Array:
    """What each position of a packed row may see: earlier, of its own segment, and not padding.

    Args:
        segment_ids: int [B, T], 0 on padding; None when rows hold one unpadded sequence each.
        length: T.

    Returns:
        bool [B or 1, T, T], query by key.
    """
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is None:
        return causal
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, None, :]


def visibility(segment_ids: jax.Array | None, x: jax.Array, implementation: str) -> jax.Array:
    """What `self_attention` has to know of packed rows.

    Args:
        segment_ids: int [B, T], 0 on padding; None when rows hold one unpadded sequence each.
        x: [B, T, D], what the first layer reads.
        implementation: 'xla', 'splash' or 'cudnn'.

    Returns:
        A mask bool [B or 1, T, T], query by key; or, where nothing as large may exist, which is in
        the kernels and when the sequence is split over `context`, the segment ids int32 [B, T].
    """
    if implementation == "xla" and not context.splits(x):
        return causal_mask(segment_ids, x.shape[1])
    return jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, implementation: str
) -> jax.Array:
    """`attention` of rows to themselves, by the implementation that the config names.

    Args:
        q: [B, T, H, K].
        k: [B, Hkv, T, K].
        v: [B, Hkv, T, K].
        visible: from `visibility`.
        implementation: 'xla', which splits the sequence where the mesh has a `context` axis;
            'splash' (TPU) or 'cudnn' (GPU). All agree but for the output on padding.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    if visible.ndim == 3:
        return attention(q, k, v, visible)
    if implementation == "xla":
        return context.attention(q, k, v, visible)
    return kernels.attention(q, k, v, visible, implementation)


def cache_mask(positions: jax.Array, slots: int) -> jax.Array:
    """bool [B, T, S]: the query at position p sees cache slots 0..p (slot = position)."""
    return jnp.arange(slots)[None, None] <= positions[:, :, None]


@dataclasses.dataclass(frozen=True)
class Reach:
    """Up to where a cache is read: what long windows have in the place of a mask.

    positions: int32 [B, T], of the queries.
    slots: int32 [], as many cache slots are read; a query that sees more gets a wrong output.
    block: that many are read at once; static.
    """

    positions: jax.Array
    slots: jax.Array
    block: int


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention with grouped queries; softmax in float32.

    Query head h reads key head h // (H / Hkv): key heads are *repeated*, not tiled. They are never
    copied: the H / Hkv queries of one key head are rows of one product.

    Args:
        q: [B, T, H, K].
        k: [B, Hkv, S, K], heads first, as the cache keeps it.
        v: [B, Hkv, S, K].
        mask: bool [B or 1, T, S], True where attended.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = jnp.einsum("btngk,bnsk->bngts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B, Hkv, G, T, S]
    out = jnp.einsum("bngts,bnsk->btngk", weights, v)
    return out.reshape(batch, length, heads, head_dim)


def blockwise_attention(
    q: jax.Array, cache: tuple[jax.Array, jax.Array], reach: Reach, row: jax.Array | None = None
) -> jax.Array:
    """`attention` to a cache, block after block: work grows with what is read, not with the window.

    The softmax is summed up as the blocks come, relative to the largest score so far (Milakov and
    Gimelshein 2018, arXiv 1805.02867, algorithm 3). A block that a query sees nothing of changes
    nothing, not a bit, so a row's output doesn't depend on how far others make us read.

    Args:
        q: [B, T, H, K].
        cache: keys and values, each [B, Hkv, S, K].
        reach: what of it is read.
        row: int32 []: q, with B = 1, attends to this one row of a cache of more.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = cache[0].shape[1:3]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5

    def read(x: jax.Array, begin: jax.Array) -> jax.Array:
        at = (0 if row is None else row, 0, begin, 0)
        return jax.lax.dynamic_slice(x, at, (batch, kv_heads, reach.block, head_dim))

    def add(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry  # [B, Hkv, G, T], the same, [B, Hkv, G, T, K]
        first = number * reach.block
        begin = jnp.minimum(first, slots - reach.block)  # the last may begin in the one before it
        k, v = (read(x, begin) for x in cache)
        own = begin + jnp.arange(reach.block, dtype=jnp.int32)[None, None]
        seen = (own <= reach.positions[:, :, None]) & (own >= first)  # [B, T, block]
        scores = jnp.einsum("btngk,bnsk->bngts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        now = jnp.maximum(largest, scores.max(-1))
        weights = jnp.exp(scores - now[..., None])
        kept = jnp.exp(largest - now)
        more = jnp.einsum(
            "bngts,bnsk->bngtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return now, total * kept + weights.sum(-1), out * kept[..., None] + more

    shape = (batch, kv_heads, heads // kv_heads, length)
    # Every query sees slot 0, so that the first block's largest score is a real one.
    zeros = jnp.zeros(shape, jnp.float32)
    begin = zeros + _MASKED, zeros, jnp.zeros((*shape, head_dim), jnp.float32)
    blocks = (jnp.maximum(reach.slots, 1) + reach.block - 1) // reach.block
    _, total, out = jax.lax.fori_loop(0, blocks, add, begin)
    out = jnp.moveaxis(out / total[..., None], 3, 1)  # [B, T, Hkv, G, K]
    return out.reshape(batch, length, heads, head_dim).astype(q.dtype)


def write_cache(
    cache: tuple[jax.Array, jax.Array],
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    row: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Puts T new keys and values of each row into its slots start[b] .. start[b] + T - 1.

    Args:
        cache: keys and values, each [B, Hkv, S, K].
        k: [B, Hkv, T, K].
        v: [B, Hkv, T, K].
        start: int32 [B], with start + T <= S (a larger start would be moved back to fit).
        row: int32 []: k, v and start are of this one row of a larger cache.

    Returns:
        The updated cache. XLA writes in place when it is donated or carried by a loop.
    """
    keys, values = cache
    k, v = k.astype(keys.dtype), v.astype(values.dtype)
    if row is None:
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
        return write(keys, k, start), write(values, v, start)
    at = (row, 0, start[0], 0)
    return jax.lax.dynamic_update_slice(keys, k, at), jax.lax.dynamic_update_slice(values, v, at)


def read_cache(
    cache: tuple[jax.Array, jax.Array], row: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all rows, or of one [1, Hkv, S, K]."""
    if row is None:
        return cache
    keys, values = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in cache)
    return keys, values
