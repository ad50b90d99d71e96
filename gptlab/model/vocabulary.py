"""What a model says of given tokens, without float32 logits of the whole vocabulary.

Losses and log-probabilities need four numbers a position and no logits: log Z, the logit of the
given token, the largest logit and the mean one. `of_logits` reads them from logits, `of_hidden`
from the final norm's output: it goes through the vocabulary in chunks, forward and backward, so
what exists at once is [B, T, chunk]. The sum of exponentials runs along (Milakov and Gimelshein
2018, arXiv 1805.02867), and the backward pass computes a chunk's logits again from the saved log Z.

Chunks of the vocabulary and not of the tokens: a chunk of the table is gathered over `fsdp` when it
is its turn, and its gradient is scattered at once, so that no device ever holds the whole table or
its gradient; each row of it travels once a pass, as without chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptlab.model import sharding


@flax.struct.dataclass
class TokenStats:
    """Of the distribution softmax(logits) at each position, and of the token that came there."""

    log_z: jax.Array  # float32 [B, T], log sum_v exp(logit_v)
    logit: jax.Array  # float32 [B, T], of the given token
    max_logit: jax.Array  # float32 [B, T]; no gradient
    mean_logit: jax.Array  # float32 [B, T], sum_v p_v logit_v; no gradient

    @property
    def logprob(self) -> jax.Array:
        """Of the given token, float32 [B, T]."""
        return self.logit - self.log_z

    @property
    def entropy(self) -> jax.Array:
        """Of the distribution, in nats, float32 [B, T]; without a gradient."""
        return jax.lax.stop_gradient(self.log_z) - self.mean_logit


def of_logits(logits: jax.Array, targets: jax.Array) -> TokenStats:
    """Logits float32 [B, T, V] and tokens int [B, T]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    # A comparison with an iota fuses into the reduction, forward and backward, and stays local when
    # the vocabulary is sharded; a gather's gradient is a scatter into [B, T, V].
    hit = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
    logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    still = jax.lax.stop_gradient(logits)
    probs = jnp.exp(still - jax.lax.stop_gradient(log_z)[..., None])
    return TokenStats(log_z, logit, jnp.max(still, axis=-1), jnp.sum(probs * still, axis=-1))


def of_hidden(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int, temperature: float
) -> TokenStats:
    """`of_logits(hidden @ table.T / temperature, targets)`, a part of the vocabulary at a time.

    Args:
        hidden: [B, T, D] in the compute dtype, in which the products are made.
        table: float32 [V, D], the unembedding.
        targets: int [B, T].
        chunk: rows of the table that a device takes at once (of its own share); at most, because
            chunks are made equal.
        temperature: positive.
    """
    layout = _Layout.of(hidden, table, chunk)
    log_z, logit, top, mean = _stats(hidden, table, targets, layout, temperature)
    return TokenStats(log_z, logit, jax.lax.stop_gradient(top), jax.lax.stop_gradient(mean))


def cut(rows: int, chunk: int) -> tuple[int, int]:
    """(chunks, rows of each) of a device's share of the table: equal, and none above `chunk`."""
    chunks = math.ceil(rows / min(chunk, rows))
    return chunks, math.ceil(rows / chunks)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How arrays lie on the mesh in use, and how a device cuts its rows of the table."""

    hidden: PartitionSpec  # [B, T, D]
    table: PartitionSpec  # [V, D]
    sizes: tuple[tuple[str, int], ...]  # of the mesh's axes; empty where nothing is split
    chunks: int
    rows: int  # of a chunk

    @classmethod
    def of(cls, hidden: jax.Array, table: jax.Array, chunk: int) -> "_Layout":
        if not sharding.splits(hidden):
            rows, specs, sizes = table.shape[0], (PartitionSpec(None, None),) * 2, {}
        else:
            specs = (
                sharding.activation_spec(hidden.shape, ("batch", "length", "act_embed")),
                sharding.activation_spec(table.shape, ("vocab", "embed")),
            )
            sizes = sharding.mesh_sizes()
            rows = table.shape[0] // math.prod(sizes[name] for name in _names(specs[1][0], sizes))
        return cls(*specs, tuple(sizes.items()), *cut(rows, chunk))

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that rows and tokens are split over."""
        sizes = dict(self.sizes)
        return _names(self.hidden[0], sizes) + _names(self.hidden[1], sizes)

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Those that rows of the table are split over."""
        return _names(self.table[0], dict(self.sizes))

    @property
    def embed_axes(self) -> tuple[str, ...]:
        """Those that columns of the table are split over."""
        return _names(self.table[1], dict(self.sizes))

    def run(self, fn: Any, in_specs: Any, out_specs: Any, *args: jax.Array) -> Any:
        """Calls `fn` with each device's shards, or where nothing is split, with everything."""
        if not self.sizes:
            return fn(*args)
        mapped = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*args)


def _names(entry: Any, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of one entry of a spec, without those of size 1."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if sizes.get(name, 1) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stats(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, layout: _Layout, temperature: float
) -> tuple[jax.Array, ...]:
    """(log_z, logit, max_logit, mean_logit), each float32 [B, T]."""
    tokens = PartitionSpec(*layout.hidden[:2])
    local = functools.partial(_forward_local, layout=layout, temperature=temperature)
    return layout.run(
        local, (layout.hidden, layout.table, tokens), (tokens,) * 4, hidden, table, targets
    )


def _forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, layout: _Layout, temperature: float
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    out = _stats(hidden, table, targets, layout, temperature)
    return out, (hidden, table, targets, out[0])


def _backward(layout: _Layout, temperature: float, saved: Any, cotangents: Any) -> Any:
    hidden, table, targets, log_z = saved
    tokens = PartitionSpec(*layout.hidden[:2])
    local = functools.partial(_backward_local, layout=layout, temperature=temperature)
    specs = (layout.hidden, layout.table, *(tokens,) * 4)
    args = (hidden, table, targets, log_z, *cotangents[:2])
    d_hidden, d_table = layout.run(local, specs, (layout.hidden, layout.table), *args)
    return d_hidden, d_table, None


_stats.defvjp(_forward, _backward)


def _chunk(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, i: jax.Array, layout: _Layout
) -> tuple[jax.Array, ...]:
    """Chunk i of a device's rows of the table.

    Returns:
        (first row, rows [C, D] in the compute dtype, logits float32 [B, T, C], whether a column is
        the target bool [B, T, C], whether a row was in no chunk before float32 [1, 1, C]). The last
        chunk is moved back to fit; the rows it shares with the one before count once.
    """
    own = table.shape[0]
    start = jnp.minimum(i * layout.rows, own - layout.rows)
    part = jax.lax.dynamic_slice_in_dim(table, start, layout.rows).astype(hidden.dtype)
    if layout.embed_axes:
        part = jax.lax.all_gather(part, layout.embed_axes, axis=1, tiled=True)
    logits = jnp.einsum("btd,cd->btc", hidden, part, preferred_element_type=jnp.float32)
    local = start + jnp.arange(layout.rows)
    fresh = local >= i * layout.rows
    first = jax.lax.axis_index(layout.vocab_axes) * own if layout.vocab_axes else 0
    hit = targets[..., None] == (first + local)[None, None]
    return start, part, logits, hit & fresh[None, None], fresh.astype(jnp.float32)[None, None]


def _forward_local(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, *, layout: _Layout, temperature: float
) -> tuple[jax.Array, ...]:
    def body(carry: Any, i: jax.Array) -> tuple[Any, None]:
        top, total, weighted, logit = carry  # total and weighted are in units of exp(top)
        _, _, logits, hit, fresh = _chunk(hidden, table, targets, i, layout)
        logits = logits / temperature
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        exps = jnp.exp(logits - higher[..., None]) * fresh
        old = jnp.exp(top - higher)
        total = total * old + jnp.sum(exps, axis=-1)
        weighted = weighted * old + jnp.sum(exps * logits, axis=-1)
        logit = logit + jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return (higher, total, weighted, logit), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full(targets.shape, -jnp.inf, jnp.float32), zeros, zeros, zeros)
    (top, total, weighted, logit), _ = jax.lax.scan(body, start, jnp.arange(layout.chunks))
    if layout.vocab_axes:
        highest = jax.lax.pmax(top, layout.vocab_axes)
        units = jnp.exp(top - highest)
        sums = jnp.stack([total * units, weighted * units, logit])
        total, weighted, logit = jax.lax.psum(sums, layout.vocab_axes)
        top = highest
    return top + jnp.log(total), logit, top, weighted / total


def _backward_local(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    log_z: jax.Array,
    d_log_z: jax.Array,
    d_logit: jax.Array,
    *,
    layout: _Layout,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """d logits = (d_log_z softmax + d_logit [v = target]) / temperature, a chunk at a time."""
    scattered = tuple(name for name in layout.embed_axes if name in layout.token_axes)
    summed = tuple(name for name in layout.token_axes if name not in scattered)

    def body(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[Any, None]:
        d_hidden, d_table = carry
        start, part, logits, hit, fresh = _chunk(hidden, table, targets, i, layout)
        probs = jnp.exp(logits / temperature - log_z[..., None]) * fresh
        d_logits = probs * d_log_z[..., None] + jnp.where(hit, d_logit[..., None], 0.0)
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        d_hidden += jnp.einsum("btc,cd->btd", d_logits, part, preferred_element_type=jnp.float32)
        # As in model/product.py: in the compute dtype it travels, in float32 it is added up.
        d_part = jnp.einsum("btc,btd->cd", d_logits, hidden)
        for name in layout.embed_axes:
            if name in scattered:
                d_part = jax.lax.psum_scatter(d_part, name, scatter_dimension=1, tiled=True)
            else:
                width = d_part.shape[1] // jax.lax.axis_size(name)
                d_part = jax.lax.dynamic_slice_in_dim(
                    d_part, jax.lax.axis_index(name) * width, width, 1
                )
        before = jax.lax.dynamic_slice_in_dim(d_table, start, layout.rows)
        after = before + d_part.astype(jnp.float32)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, after, start, 0)), None

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    (d_hidden, d_table), _ = jax.lax.scan(body, zeros, jnp.arange(layout.chunks))
    d_hidden = d_hidden.astype(hidden.dtype)
    if layout.vocab_axes:
        d_hidden = jax.lax.psum(d_hidden, layout.vocab_axes)
    if summed:
        d_table = jax.lax.psum(d_table, summed)
    return d_hidden, d_table
