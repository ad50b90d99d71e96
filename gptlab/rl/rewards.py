"""Rewards of one rollout: the KL penalty on every token, the score of the whole reply on one of them."""

from __future__ import annotations

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptlab.rl import advantages, kl

SCORE_POSITIONS = ("last", "after_last")


@flax.struct.dataclass
class Rewards:
    """What the policy is paid, aligned with the response."""

    total: Array  # float32 [B, R], what GAE reads
    non_score: Array  # float32 [B, R], the KL penalty alone, before any whitening
    scores: Array  # float32 [B], after unfinished replies got theirs replaced
    value_mask: Array  # float32 [B, R], where rewards, values and returns exist


def replace_unfinished(
    scores: Float[Array, "B"], finished: Bool[Array, "B"], no_eos_score: float | None
) -> Float[Array, "B"]:
    """The score of a reply that never ended is *replaced* by `no_eos_score`, not shifted by it.

    A reward model has only seen whole replies, so what it says of half a one means nothing. None keeps it.
    """
    if no_eos_score is None:
        return scores
    return jnp.where(finished, scores, jnp.asarray(no_eos_score, jnp.float32))


def score_index(mask: Float[Array, "B R"], position: str) -> Int[Array, "B"]:
    """Index of the response token that is paid the score.

    'last' is the last real token (Ziegler 2019). 'after_last' is the slot after it (Huang 2024), where the
    critic has seen the whole reply; a response that fills all R slots has none and is paid at its last.
    """
    if position not in SCORE_POSITIONS:
        raise ValueError(f"position {position!r} is none of {SCORE_POSITIONS}")
    lengths = jnp.sum(mask, axis=1).astype(jnp.int32)
    last = lengths - (1 if position == "last" else 0)
    return jnp.clip(last, 0, mask.shape[1] - 1)


def value_mask(mask: Float[Array, "B R"], position: str) -> Float[Array, "B R"]:
    """The policy mask, one slot longer when the score is paid after the last token.

    Without that slot the score would be paid where GAE does not look.
    """
    slots = jnp.arange(mask.shape[1])[None, :]
    return (slots <= score_index(mask, position)[:, None]).astype(jnp.float32)


def assemble(
    scores: Float[Array, "B"],
    logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    finished: Bool[Array, "B"],
    kl_coef: Float[Array, ""],
    *,
    no_eos_score: float | None,
    position: str,
    whiten: bool,
) -> Rewards:
    """Per-token rewards (InstructGPT 2203.02155, eq. 2, with the KL as Ziegler 2019 pays it).

        r_t = -beta (log pi_old - log pi_ref)_t + [t = score index] score

    Args:
      scores: the reward model's score of each truncated reply.
      logprobs: log pi_old of each response token, from the scoring forward at the sampling temperature.
      ref_logprobs: the same from the reference, by the same function.
      mask: 1 on the response's real tokens.
      finished: whether the reply ended by itself.
      kl_coef: beta, one number.
      no_eos_score: the score of a reply that did not end; None keeps the reward model's.
      position: where the score is paid, 'last' or 'after_last'.
      whiten: scale the rewards to unit variance, keeping their mean.
    """
    non_score = -kl_coef * kl.k1(logprobs, ref_logprobs) * mask  # [B, R]
    scores = replace_unfinished(scores, finished, no_eos_score)  # [B]
    index = score_index(mask, position)  # [B]
    rows = jnp.arange(mask.shape[0])
    total = non_score.at[rows, index].add(scores)  # [B, R]
    exists = value_mask(mask, position)  # [B, R]
    if whiten:
        total = advantages.whiten(total, exists, keep_mean=True)
    return Rewards(total=total, non_score=non_score, scores=scores, value_mask=exists)
