"""Rollouts: sample replies, then read every log-prob and value from one scoring forward.

Shapes: B episodes, P prompt slots, R response slots, T = P + R. Prompts are right padded and a
row's response stands directly after its prompt, so `tokens` [B, T] is an ordinary right-padded
batch. Arrays [B, R] are aligned with the response: index t belongs to response token t, which the
model predicts at sequence position prompt_length - 1 + t.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptlab.data import chat
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import decode, sharding
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel
from gptlab.run.errors import UserError


@flax.struct.dataclass
class Samples:
    """Replies drawn from the policy, cut after their first stop token."""

    tokens: Array  # int32 [B, T], prompt + response, right padded
    prompt_lengths: Array  # int32 [B]
    lengths: Array  # int32 [B], prompt + response
    scored_lengths: Array  # int32 [B], of them what is text, or its end: without a halt token
    response: Array  # int32 [B, R], stop or halt token included, padded after it
    response_mask: Array  # float32 [B, R]
    finished: Array  # bool [B], ended with a stop token
    decode_logprobs: Array  # float32 [B, R], from the decoder: only ever compared, never trained on


@flax.struct.dataclass
class Rollout:
    """Samples with all that the update needs to know of the moment they were drawn."""

    samples: Samples
    old_logprobs: Array  # float32 [B, R], policy
    entropy: Array  # float32 [B, R], of the policy's distribution at each response token
    ref_logprobs: Array  # float32 [B, R], reference
    values: Array  # float32 [B, R], critic, before each response token
    scores: Array  # float32 [B], reward of the whole reply


def check_sampling(sampling: decode.Sampling) -> None:
    """UserError unless replies are drawn from softmax(logits / T), the distribution that is scored.

    Under top-k or top-p the policy that acts is not the one whose log-probs enter the ratio: tokens
    outside the support at sampling time would have ratio x / 0.
    """
    if sampling.temperature <= 0:
        raise UserError(
            f"temperature is {sampling.temperature}: a policy gradient needs samples, so it must "
            "be positive"
        )
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        raise UserError(
            f"top_p={sampling.top_p}, top_k={sampling.top_k}: rollouts need top_p=1 "
            "and top_k=0, because the probability ratio is undefined for tokens that "
            "truncated sampling excludes"
        )


def halt_tokens(tokenizer: Tokenizer, num_rows: int) -> tuple[int, ...]:
    """Control tokens that no reply can contain: what draws one has broken its reply off.

    A model's unused rows, up to num_rows in all, are among them.

    Sampling goes no further, so a reply's ids hold no forged header; its text would lose it, and
    the reward model, which is trained on texts, would not know what it reads.
    """
    controls = np.flatnonzero(tokenizer.token_bytes == 0).tolist()
    unused = range(tokenizer.vocab_size, num_rows)
    stops = chat.stop_tokens(tokenizer)
    return tuple(i for i in (*controls, *unused) if i not in stops)


def join(
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    response: Int[Array, "B R"],
    response_mask: Float[Array, "B R"],
    pad_id: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Writes each response directly after its prompt; returns tokens [B, P+R] and lengths [B]."""
    total = prompts.shape[1] + response.shape[1]
    lengths = prompt_lengths + jnp.sum(response_mask, axis=1).astype(jnp.int32)
    slot = jnp.arange(total)[None, :]  # [1, T]
    in_response = slot - prompt_lengths[:, None]  # [B, T], index into the response
    from_prompt = jnp.pad(prompts, ((0, 0), (0, response.shape[1])), constant_values=pad_id)
    from_response = jnp.take_along_axis(
        response, jnp.clip(in_response, 0, response.shape[1] - 1), axis=1
    )
    tokens = jnp.where(in_response < 0, from_prompt, from_response)
    return jnp.where(slot < lengths[:, None], tokens, pad_id), lengths


def sample(
    model: LanguageModel,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    key: jax.Array,
    sampling: decode.Sampling,
    pad_id: int,
) -> Samples:
    """One reply to each row's prompt; row b draws with fold_in(key, b), whatever the batch size.

    A halt token is an action like any other: it has its log-prob and its share of the gradient. But
    it is no text, so no reward model reads it: they read what ranked replies look like.
    """
    check_sampling(sampling)
    rows = jnp.arange(prompts.shape[0])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    generation = decode.generate(model, params, prompts, prompt_lengths, keys, sampling, pad_id)
    response, slots = generation.tokens, jnp.arange(sampling.max_new_tokens)[None, :]
    mask = (slots < generation.lengths[:, None]).astype(jnp.float32)
    tokens, lengths = join(prompts, prompt_lengths, response, mask, pad_id)
    samples = Samples(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        scored_lengths=lengths - generation.halted,
        response=response,
        response_mask=mask,
        finished=generation.finished,
        decode_logprobs=generation.logprobs,
    )
    # Decoding may have spread the rows further; each process reads those of its prompts.
    return jax.tree.map(sharding.split_rows, samples)


def layout(lengths: Int[Array, "B"], width: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Positions and segment ids of right-padded rows: both from the mask, 0 on padding."""
    slots = jnp.arange(width, dtype=jnp.int32)[None, :]
    real = slots < lengths[:, None]
    return jnp.where(real, slots, 0), real.astype(jnp.int32)


def at_response(
    x: Float[Array, "B T *D"], prompt_lengths: Int[Array, "B"], response_tokens: int
) -> Float[Array, "B R *D"]:
    """Entries of x where each response token is *predicted*: [prompt - 1 : prompt - 1 + R]."""
    index = prompt_lengths[:, None] - 1 + jnp.arange(response_tokens)[None, :]  # [B, R]
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def response_logprobs(
    model: LanguageModel, params: Any, samples: Samples, temperature: float
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-prob of each response token under softmax(logits / T), and that distribution's entropy
    (nats).

    The scoring forward: rollout, reference and update all come here, so an untouched policy has a
    KL of exactly 0 and a ratio of 1, and no place can forget the temperature. The hidden states
    are cut to the response before they meet the vocabulary, which is most of the work of a small
    model. Both are 0 outside the response.
    """
    positions, segment_ids = layout(samples.lengths, samples.tokens.shape[1])
    hidden = model.apply(
        {"params": params}, samples.tokens, positions, segment_ids, method=model.hidden
    )
    hidden = at_response(hidden, samples.prompt_lengths, samples.response.shape[1])  # [B, R, D]
    stats: Any = model.apply(
        {"params": params}, hidden, samples.response, temperature, method=model.token_stats
    )  # of [B, R]
    mask = samples.response_mask
    return stats.logprob * mask, stats.entropy * mask


def token_scalars(
    model: ScalarModel,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T"]:
    """The scalar head at every position of right-padded rows; reward model and critic both come
    here.

    Dropout is on when a key for it is given: never in RL, where old and new values must be one
    function's.
    """
    positions, segment_ids = layout(lengths, tokens.shape[1])
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return model.apply(
        {"params": params}, tokens, positions, segment_ids, dropout_key is None, rngs=rngs
    )


def at_last(x: Float[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    """The entry at the last *real* token, whatever the padding: where a reward model is read."""
    return jnp.take_along_axis(x, lengths[:, None] - 1, axis=1)[:, 0]


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of a global array, in order: what the host decodes into text."""
    if x.is_fully_addressable:
        return np.asarray(x)
    blocks = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])
