"""The device's part of serving: S slots of one KV cache, and the functions of fixed shapes on them.

`step` advances every running slot by one token. `prefill` computes one chunk of W tokens of one
prompt in one slot, and draws the first token of the reply after the last chunk. Who is where,
and for how long, is engine.py's business.

What a row draws depends on nothing but its own prompt and settings, bit for bit: shapes never
change, a prompt is always cut at multiples of W, and only whole chunks that `prefill` computed are
ever used again. The cache is read block by block, as far as the longest running row needs, and a
block that a row sees nothing of adds exactly nothing to it. Rows that are done write to the
window's last position. Nobody reads it: the token there can be drawn, but never has to be fed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gptlab.model import decode
from gptlab.model.sharding import constrain
from gptlab.model.transformer import LanguageModel, ModelConfig


@flax.struct.dataclass
class Slots:
    """What the device knows of all slots. S slots, L positions each."""

    cache: decode.Cache  # per layer: keys and values [S, Hkv, L, K]
    tokens: jax.Array  # int32 [S], drawn but not yet in the cache
    positions: jax.Array  # int32 [S], where they stand
    left: jax.Array  # int32 [S], how many may still be drawn
    done: jax.Array  # bool [S], nothing more is drawn
    keys: jax.Array  # typed keys [S], one per request
    sampling: decode.RowSampling  # of [S]
    wants: jax.Array  # bool [S], the request wants to see the likeliest tokens


@flax.struct.dataclass
class Drawn:
    """One token of each of B rows; meaningless where a row was done."""

    tokens: jax.Array  # int32 [B]
    logprobs: jax.Array  # float32 [B]
    top_tokens: jax.Array  # int32 [B, A], the likeliest first; 0 unless a row of [B] wants them
    top_logprobs: jax.Array  # float32 [B, A]


@flax.struct.dataclass
class Chunk:
    """W tokens of a prompt for one slot, as arrays of the host. Settings count in the last one."""

    tokens: Any  # int32 [W], anything after the first `count`
    # int32 [8]: slot, start, count, is it the last, max_tokens, top_k, wants, index
    numbers: Any
    shape: Any  # float32 [2]: temperature, top_p
    seed: Any  # uint32 [2]


def init(config: ModelConfig, slots: int, length: int) -> Slots:
    """All done and empty. To be jitted under the mesh."""
    zeros = jnp.zeros((slots,), jnp.int32)
    settings = decode.RowSampling(
        jnp.zeros((slots,), jnp.float32), zeros, jnp.ones((slots,), jnp.float32)
    )
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), slots)
    no = jnp.zeros((slots,), bool)
    cache = decode.init_cache(config, slots, length)
    return _placed(Slots(cache, zeros, zeros, zeros, ~no, keys, settings, no))


def _placed(slots: Slots) -> Slots:
    """Slots over the data axes, heads over `tensor`; all that is small, everywhere."""
    cache = jax.tree.map(
        lambda x: constrain(x, "decoding_batch", "act_heads", "kv_length", None), slots.cache
    )
    rest = jax.tree.map(lambda x: constrain(x, None), dataclasses.replace(slots, cache=()))
    return dataclasses.replace(rest, cache=cache)


def _draw(
    logits: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    sampling: decode.RowSampling,
    wants: jax.Array,
    alternatives: int,
) -> Drawn:
    """A token of each row of logits [B, V], for `positions` [B], and A alternatives to it."""
    logits = constrain(logits, None, None)
    tokens, logprobs = decode.sample(logits, keys, positions, sampling)

    def likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = decode.tempered(logits, sampling)
        values, ids = jax.lax.top_k(logits, alternatives)
        return ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def none(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (logits.shape[0], alternatives)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return Drawn(tokens, logprobs, *jax.lax.cond(wants.any(), likeliest, none, logits))


@functools.partial(
    jax.jit, static_argnames=("model", "alternatives", "block"), donate_argnames=("slots",)
)
def step(
    model: LanguageModel,
    params: Mapping[str, Any],
    slots: Slots,
    keep: np.ndarray,
    ends: jax.Array,
    alternatives: int,
    block: int,
) -> tuple[Slots, Drawn]:
    """Feeds each running slot's newest token and draws the one after it.

    Args:
        model: the model; static.
        params: its parameters, from `decode.unstack_layers`.
        slots: donated.
        keep: bool [S]; a slot that is not kept is done from now on.
        ends: bool [V], the tokens that end a reply.
        alternatives: A; static.
        block: how many positions are read at once (`decode.extend`); static.

    Returns:
        (slots, what was drawn [S]).
    """
    done = slots.done | ~keep
    last = slots.cache[0][0].shape[2] - 1
    positions = jnp.where(done, last, slots.positions)
    tokens = jnp.where(done, 0, slots.tokens)
    # What is done must not make the others wait for a filter.
    sampling = decode.RowSampling(
        slots.sampling.temperature,
        jnp.where(done, 0, slots.sampling.top_k),
        jnp.where(done, 1.0, slots.sampling.top_p),
    )
    reach = jnp.max(jnp.where(done, 0, positions)) + 1
    cache, x = decode.extend(
        model, params, slots.cache, tokens[:, None], positions, reach=reach, block=block
    )
    logits = decode.next_logits(model, params, x[:, 0])
    drawn = _draw(logits, slots.keys, positions + 1, sampling, slots.wants & ~done, alternatives)
    left = slots.left - 1
    slots = dataclasses.replace(
        slots,
        cache=cache,
        tokens=drawn.tokens,
        positions=slots.positions + 1,
        left=left,
        done=done | ends[drawn.tokens] | (left <= 0),
    )
    return _placed(slots), drawn


@functools.partial(
    jax.jit, static_argnames=("model", "alternatives", "block"), donate_argnames=("slots",)
)
def prefill(
    model: LanguageModel,
    params: Mapping[str, Any],
    slots: Slots,
    chunk: Chunk,
    ends: jax.Array,
    alternatives: int,
    block: int,
) -> tuple[Slots, Drawn]:
    """Computes one chunk of a prompt in its slot, after the chunks before it.

    Args:
        model: the model; static.
        params: its parameters, from `decode.unstack_layers`.
        slots: donated.
        chunk: its start is a multiple of W, and L is one.
        ends: bool [V], the tokens that end a reply.
        alternatives: A; static.
        block: how many positions are read at once (`decode.extend`); static.

    Returns:
        (slots, the token [1] after the chunk: the reply's first if the chunk is the last one).
        From the last chunk on the slot is running.
    """
    slot, start, count, is_last, limit, top_k, wants, index = chunk.numbers
    reach = start + chunk.tokens.shape[0]
    cache, x = decode.extend(
        model, params, slots.cache, chunk.tokens[None], start[None], slot, reach, block
    )
    seed = jax.random.wrap_key_data(chunk.seed, impl="threefry2x32")
    key = jax.random.fold_in(seed, index)
    sampling = decode.RowSampling(chunk.shape[:1], top_k[None], chunk.shape[1:])
    x = jax.lax.dynamic_index_in_dim(x[0], count - 1, keepdims=True)  # [1, D]
    logits = decode.next_logits(model, params, x)
    at = start + count
    drawn = _draw(logits, key[None], at[None], sampling, wants[None] > 0, alternatives)
    token = drawn.tokens[0]
    ended = (is_last == 0) | ends[token] | (limit <= 1)
    put = lambda x, value: x.at[slot].set(value)  # noqa: E731
    slots = Slots(
        cache=cache,
        tokens=put(slots.tokens, token),
        positions=put(slots.positions, at),
        left=put(slots.left, limit - 1),
        done=put(slots.done, ended),
        keys=put(slots.keys, key),
        sampling=decode.RowSampling(
            put(slots.sampling.temperature, chunk.shape[0]),
            put(slots.sampling.top_k, top_k),
            put(slots.sampling.top_p, chunk.shape[1]),
        ),
        wants=put(slots.wants, wants > 0),
    )
    return _placed(slots), drawn


@functools.partial(jax.jit, donate_argnames=("slots",))
def copy(slots: Slots, pair: np.ndarray) -> Slots:
    """Copies the cache of slot pair[0] into slot pair[1] (int32 [2]); `slots` is donated."""
    source, target = pair

    def one(x: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, 0)

    return _placed(dataclasses.replace(slots, cache=jax.tree.map(one, slots.cache)))
