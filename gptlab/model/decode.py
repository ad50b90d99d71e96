"""Sampling from a language model with a KV cache: one step, used by rollouts, collecting and chat.

A row's cache slot *is* the position of its token, so right-padded prompts of any lengths share a
batch: a reply is written directly after its own prompt, over the padding. The draw at a position
uses the key `fold_in(request_key, position)`, so what a request receives depends neither on the
other rows of its batch nor on how far its prompt was padded.

The layers are the training `Block`s, run one by one over slices of the stacked parameters: each
layer's cache is a buffer of its own, which XLA updates in place inside the loop. On a mesh, the
`context` axis has no sequence to split here, so it splits rows too.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import path_aware_map

from gptlab.model import attention as attn
from gptlab.model import sharding
from gptlab.model.sharding import constrain
from gptlab.model.transformer import Backbone, Block, LanguageModel, ModelConfig, logical_axes
from gptlab.run.errors import UserError

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # per layer: keys and values [B, Hkv, S, K]
KEY_BLOCK = 256  # cache slots that `extend` reads at once when it is told how far to read


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable, so it is static under jit."""

    temperature: float  # 0: the most likely token
    top_k: int  # only the k most likely tokens; 0: off
    top_p: float  # only the most likely tokens that hold this probability together; 1: off
    max_new_tokens: int
    stop_tokens: tuple[int, ...]  # the reply is finished by one of these
    halt_tokens: tuple[int, ...] = ()  # nor can it go on after one of these, but it is unfinished

    def __post_init__(self) -> None:
        """Refuses values without a meaning."""
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative (0 switches it off)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")


@flax.struct.dataclass
class RowSampling:
    """How each row's tokens are drawn: any mixture of samplings is one compiled function."""

    temperature: jax.Array  # float32 [B]; as in Sampling
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]


@flax.struct.dataclass
class Generation:
    """Replies to a batch of prompts. N = max_new_tokens."""

    tokens: jax.Array  # int32 [B, N]; the stop or halt token is included, pad_id after it
    lengths: jax.Array  # int32 [B]; tokens before the padding
    logprobs: jax.Array  # float32 [B, N]; of log softmax(logits / temperature), 0 on padding
    finished: jax.Array  # bool [B]; it ends with a stop token
    halted: jax.Array  # bool [B]; it ends with a halt token


@sharding.decoding()
def unstack_layers(
    config: ModelConfig, params: Mapping[str, Any], gather: bool = True
) -> Mapping[str, Any]:
    """Parameters as decoding reads them: `layers` a tuple of L trees, matrices in compute dtype.

    On a mesh they are split over `tensor` alone: each of its devices holds that part of all
    weights; with `gather=False` they stay where they are. `prefill` and `decode_step` take either
    form; this one, which is returned as it is, saves them slicing, casting and gathering at every
    call.
    """
    if isinstance(params["backbone"]["layers"], tuple):
        return params
    axes = logical_axes(config)

    def ready(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        x = x.astype(config.dtype)
        return constrain(x, *axes.get(path, (None,) * x.ndim)) if gather else x

    backbone = dict(params["backbone"])
    stacked = backbone.pop("layers")
    layers = tuple(jax.tree.map(operator.itemgetter(i), stacked) for i in range(config.num_layers))
    each = lambda tree: path_aware_map(ready, tree)  # noqa: E731
    return {"backbone": {**each(backbone), "layers": tuple(map(each, layers))}}


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for each of `batch` rows."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.dtype)  # noqa: E731
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


@sharding.decoding()
def extend(
    model: LanguageModel,
    params: Mapping[str, Any],
    cache: Cache,
    tokens: jax.Array,
    start: jax.Array,
    row: jax.Array | None = None,
    reach: jax.Array | None = None,
    block: int = KEY_BLOCK,
) -> tuple[Cache, jax.Array]:
    """Runs T more tokens of each row through the layers, reading and filling the cache.

    Args:
        model: the model.
        params: its parameters (stacked, or from `unstack_layers`).
        cache: S slots, of which row b's first start[b] are filled.
        tokens: int32 [B, T], at positions start[b] .. start[b] + T - 1 <= S - 1.
        start: int32 [B].
        row: int32 []: tokens and start, with B = 1, are of this one row of a cache of more.
        reach: int32 []: that many slots are read, `block` by block; None: all, at once. A row
            that stands further on gets an output without a meaning.
        block: static; a cache no longer than that is read at once in any case.

    Returns:
        The cache and the last layer's output [B, T, D] (before the final norm).
    """
    config = model.config
    backbone = unstack_layers(config, params)["backbone"]
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    variables = {"params": {k: v for k, v in backbone.items() if k != "layers"}}
    x, rope = Backbone(config).apply(variables, tokens, positions, method="embed")
    size = cache[0][0].shape[2]
    mask: jax.Array | attn.Reach = attn.cache_mask(positions, size)
    if reach is not None and size > block:
        mask = attn.Reach(positions, reach, block)
    module, filled = Block(config), []
    for layer, slots in zip(backbone["layers"], cache, strict=True):
        x, slots = module.apply({"params": layer}, x, mask, rope, slots, start, row)
        filled.append(slots)
    return tuple(filled), x


@sharding.decoding()
def next_logits(model: LanguageModel, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The last layer's output at one position of each row, [B, D] -> logits float32 [B, V]."""
    variables = {"params": {k: v for k, v in params["backbone"].items() if k != "layers"}}
    head = Backbone(model.config)
    hidden = head.apply(variables, x[:, None], method="normalize")
    return head.apply(variables, hidden, method="logits")[:, 0]


def prefill(
    model: LanguageModel,
    params: Mapping[str, Any],
    prompts: jax.Array,
    lengths: jax.Array,
    slots: int,
) -> tuple[Cache, jax.Array]:
    """Reads right-padded prompts in one forward pass.

    Args:
        model: the model.
        params: its parameters.
        prompts: int32 [B, P], right padded.
        lengths: int32 [B], real tokens of each row.
        slots: S >= P, the size of the cache to return.

    Returns:
        The cache, and the logits float32 [B, V] after each row's last real token.
    """
    batch, width = prompts.shape
    # Padding is cached too, but a slot after the prompt is overwritten before it is ever attended.
    cache, x = extend(
        model,
        params,
        init_cache(model.config, batch, width),
        prompts,
        jnp.zeros((batch,), jnp.int32),
    )
    last = jnp.maximum(lengths - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]  # [B, D]
    room = ((0, 0), (0, 0), (0, slots - width), (0, 0))
    cache = jax.tree.map(lambda kv: jnp.pad(kv, room), cache)
    return cache, next_logits(model, params, x)


def _threshold(probs: jax.Array, enough: Any) -> jax.Array:
    """The largest t [B] for which `enough(probs >= t)` holds, found by bisection on float bits.

    Non-negative floats are ordered as their bit patterns are, so 31 halvings find t exactly, with
    passes over [B, V] only; sorting the vocabulary costs several times more.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low, not at high
        middle = low + (high - low) // 2
        t = jax.lax.bitcast_convert_type(middle, jnp.float32)
        keep = enough(probs >= t[:, None])
        return jnp.where(keep, middle, low), jnp.where(keep, high, middle)

    low = jnp.zeros(probs.shape[:1], jnp.int32)
    high = jnp.full(probs.shape[:1], 0x3F800001, jnp.int32)  # the float after 1.0
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _keep_k(logits: jax.Array, top_k: jax.Array | int) -> jax.Array:
    """Logits [B, V] with all but the k >= 1 most likely set to -inf, k one number or [B]."""
    probs = jax.nn.softmax(logits, axis=-1)
    t = _threshold(probs, lambda kept: kept.sum(-1) >= top_k)
    return jnp.where(probs >= t[:, None], logits, -jnp.inf)


def _keep_p(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The same for the most likely that hold this probability together."""
    probs = jax.nn.softmax(logits, axis=-1)
    t = _threshold(probs, lambda kept: (probs * kept).sum(-1) >= top_p)
    return jnp.where(probs >= t[:, None], logits, -jnp.inf)


def _restrict(logits: jax.Array, sampling: Sampling | RowSampling) -> jax.Array:
    """Logits [B, V] with what top-k, then top-p of the rest, exclude set to -inf; ties stay.

    Rows without a filter keep their logits, bit for bit, whatever the other rows ask for.
    """
    if isinstance(sampling, RowSampling):
        for keep, bound, asked in (
            (_keep_k, jnp.maximum(sampling.top_k, 1), sampling.top_k > 0),
            (_keep_p, sampling.top_p, sampling.top_p < 1),
        ):
            logits = jax.lax.cond(
                asked.any(),
                lambda x, keep=keep, bound=bound, asked=asked: jnp.where(
                    asked[:, None], keep(x, bound), x
                ),
                lambda x: x,
                logits,
            )
        return logits
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _keep_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = _keep_p(logits, sampling.top_p)
    return logits


def _invert(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token [B] at which softmax(logits)'s distribution function exceeds `uniform` [B].

    One random number a row, where the Gumbel trick takes one a token: for 2,048 tokens on a CPU
    that is the larger part of a decoding step. Float32 sums of 100k probabilities are off by about
    1e-6, far less than what a temperature of 0.999 changes.
    """
    below = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)  # [B, V], non-decreasing
    # uniform is at most 1 - 2^-23, so the product stays below the total, and a token of
    # probability 0 adds nothing: it is never drawn.
    return (below <= uniform[:, None] * below[:, -1:]).sum(axis=-1)


def tempered(logits: jax.Array, sampling: Sampling | RowSampling) -> jax.Array:
    """Logits [B, V] over the temperature; as they are where that is 0."""
    if isinstance(sampling, RowSampling):
        return logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    return logits / sampling.temperature if sampling.temperature > 0 else logits


def sample(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, sampling: Sampling | RowSampling
) -> tuple[jax.Array, jax.Array]:
    """Draws each row's next token.

    Args:
        logits: float32 [B, V].
        keys: typed keys [B], one per request.
        positions: int32 [B], where the drawn tokens will stand.
        sampling: temperature, top_k and top_p, of all rows or of each.

    Returns:
        Tokens int32 [B] and their log-probabilities float32 [B] under softmax(logits / temperature)
        of the *whole* vocabulary (what RL needs; at temperature 0, under softmax(logits)).
    """
    rows = isinstance(sampling, RowSampling)
    if rows or sampling.temperature > 0:
        logits = tempered(logits, sampling)
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
        uniform = jax.vmap(jax.random.uniform)(keys)  # float32 [B], in [0, 1)
        tokens = _invert(_restrict(logits, sampling), uniform)
        if rows:
            tokens = jnp.where(sampling.temperature > 0, tokens, jnp.argmax(logits, axis=-1))
    else:
        tokens = jnp.argmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), logprobs - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("model", "sampling"), donate_argnames=("cache",), inline=True
)
def decode_step(
    model: LanguageModel,
    params: Mapping[str, Any],
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    reach: jax.Array | None = None,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Feeds each row's newest token and draws the one after it.

    Args:
        model: the model.
        params: its parameters; from `unstack_layers` when called often.
        cache: filled up to positions - 1; donated.
        tokens: int32 [B].
        positions: int32 [B], where those tokens stand.
        keys: typed keys [B], one per request.
        sampling: how to draw.
        reach: int32 []: as in `extend`.

    Returns:
        (cache, next tokens int32 [B] for positions + 1, their log-probabilities float32 [B]).
    """
    cache, x = extend(model, params, cache, tokens[:, None], positions, reach=reach)
    logits = next_logits(model, params, x[:, 0])
    return cache, *sample(logits, keys, positions + 1, sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "pad_id", "gather"))
def generate(
    model: LanguageModel,
    params: Mapping[str, Any],
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    pad_id: int = 0,
    gather: bool = True,
) -> Generation:
    """Replies to right-padded prompts: one prefill, then one loop until every row is done.

    Args:
        model: the model; static.
        params: its parameters {'backbone': ...}.
        prompts: int32 [B, P].
        prompt_lengths: int32 [B]; a row of length 0 is padding and gets an empty reply.
        keys: typed keys [B], one per request.
        sampling: how to draw, for how long and where to stop; static.
        pad_id: fills `tokens` after a reply's end.
        gather: False: weights that are split over `fsdp` stay so. Slower by far, for where the rest
            of a training state leaves no room for all of them; static.

    Raises:
        UserError: P + max_new_tokens does not fit the context window.
    """
    (batch, width), new = prompts.shape, sampling.max_new_tokens
    if width + new > model.config.max_len:
        raise UserError(
            f"prompts of {width} tokens and {new} new tokens do not fit the context window: "
            f"max_len={model.config.max_len}"
        )
    params = unstack_layers(model.config, params, gather)
    cache, logits = prefill(model, params, prompts, prompt_lengths, width + new)
    token, logprob = sample(logits, keys, prompt_lengths, sampling)
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    halts = jnp.asarray(sampling.halt_tokens, jnp.int32)

    def record(step, out, done, token, logprob):
        """Writes column `step` of the reply: the drawn token where the row is still going."""
        stopped = ~done & jnp.isin(token, stops)
        halted = ~done & jnp.isin(token, halts)
        token = jnp.where(done, pad_id, token)
        logprob = jnp.where(done, 0.0, logprob)
        out = Generation(
            tokens=jax.lax.dynamic_update_slice(out.tokens, token[:, None], (0, step)),
            lengths=out.lengths + ~done,
            logprobs=jax.lax.dynamic_update_slice(out.logprobs, logprob[:, None], (0, step)),
            finished=out.finished | stopped,
            halted=out.halted | halted,
        )
        return out, done | stopped | halted, token

    def unfinished(carry):
        step, _, done, _, _ = carry
        return (step < new) & ~done.all()

    def body(carry):
        step, out, done, token, cache = carry
        at = prompt_lengths + step - 1
        cache, token, logprob = decode_step(model, params, cache, token, at, keys, sampling)
        out, done, token = record(step, out, done, token, logprob)
        return step + 1, out, done, token, cache

    empty = Generation(
        tokens=jnp.full((batch, new), pad_id, jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        logprobs=jnp.zeros((batch, new), jnp.float32),
        finished=jnp.zeros((batch,), bool),
        halted=jnp.zeros((batch,), bool),
    )
    out, done, token = record(0, empty, prompt_lengths == 0, token, logprob)
    carry = (jnp.int32(1), out, done, token, cache)
    return jax.lax.while_loop(unfinished, body, carry)[1]
