"""Losses, as pure functions of arrays.

Sums and their weights are returned, not means, wherever a batch may be cut into microbatches:
only the division by the *total* weight gives the gradient of the large batch. Everything is
float32. B batch, T tokens, V vocabulary, N candidates, R response tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptlab.model.vocabulary import TokenStats

Scalar = Float[Array, ""]
Metrics = dict[str, Float[Array, ""]]


def cross_entropy_sums(
    stats: TokenStats, mask: Float[Array, "B T"], z_loss: float
) -> tuple[Scalar, Scalar, Metrics]:
    """Next-token cross-entropy, summed over the tokens that the mask selects.

    sum_bt mask (log Z - logits[target] + z_loss (log Z)^2), Z = sum_v exp(logits). The z term
    (arXiv 2204.02311, section 5; 1e-4 there) keeps log Z near 0; its gradient adds
    2 z_loss log Z softmax.

    Args:
      stats: of the targets, from `LanguageModel.score`.
      mask: weight of each token.
      z_loss: weight of the z term.

    Returns:
      (loss sum, weight = sum of the mask, sums of: nll (without the z term), accuracy).
    """
    _check(stats.log_z, 2, jnp.float32)
    _check(mask, 2, jnp.float32)
    nll = mask * (stats.log_z - stats.logit)
    loss = jnp.sum(nll) + z_loss * jnp.sum(mask * jnp.square(stats.log_z))
    correct = stats.logit >= stats.max_logit
    return loss, jnp.sum(mask), {"nll": jnp.sum(nll), "accuracy": jnp.sum(mask * correct)}


def ranking_loss_sums(
    rewards: Float[Array, "B N"],
    ranks: Int[Array, "B N"],
    weight: Float[Array, "B"],
) -> tuple[Scalar, Scalar, Metrics]:
    """K-wise ranking loss (InstructGPT, arXiv 2203.02155, equation 1), a mean *within* each prompt.

    l_b = -1/P_b sum_{i better than j} log sigmoid(r_bi - r_bj), P_b the strict pairs of prompt b.
    A prompt with many candidates counts as much as one with two. Ties carry no loss; rank 0 marks
    an absent candidate; a prompt without a strict pair has weight 0.

    Args:
      rewards: one scalar a candidate.
      ranks: 1 = best, equal = tie, 0 = absent.
      weight: how much each prompt counts beside the others; 0 for padding rows.

    Returns:
      (loss sum over prompts, weight, sums of: accuracy (strict pairs ordered rightly, half for
      equal rewards, mean within a prompt), margin (mean r_better - r_worse), pairs).
    """
    _check(rewards, 2, jnp.float32)
    present = ranks > 0
    strict = (
        present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    ).astype(jnp.float32)  # [B, N, N] i over j
    pairs = jnp.sum(strict, axis=(1, 2))  # [B]
    weight = jnp.where(pairs > 0, weight.astype(jnp.float32), 0.0)
    margin = rewards[:, :, None] - rewards[:, None, :]  # [B, N, N]
    per_pair = strict / jnp.maximum(pairs, 1.0)[:, None, None] * weight[:, None, None]
    right = (margin > 0).astype(jnp.float32) + 0.5 * (margin == 0).astype(jnp.float32)
    # Absent candidates hold arbitrary rewards: select before the product, or inf * 0 is nan.
    margin = jnp.where(strict > 0, margin, 0.0)
    loss = -jnp.sum(per_pair * jax.nn.log_sigmoid(margin))
    metrics = {
        "accuracy": jnp.sum(per_pair * right),
        "margin": jnp.sum(per_pair * margin),
        "pairs": jnp.sum(pairs * (weight > 0)),
    }
    return loss, jnp.sum(weight), metrics


def ppo_policy_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    clip: float,
) -> tuple[Scalar, Metrics]:
    """Clipped surrogate of PPO (arXiv 1707.06347, equation 7), a mean over the mask's tokens.

    mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(logprobs - old_logprobs).

    Returns:
      (loss, {ratio_dev_max: max |rho - 1|, clip_frac: share of tokens where the clipped term
      is the larger, approx_kl: mean (rho - 1) - log rho}).
    """
    _check(logprobs, 2, jnp.float32)
    # Padding may hold any log-prob, and exp of a large difference is inf: select first.
    log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    advantages = jnp.where(mask > 0, jax.lax.stop_gradient(advantages), 0.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    metrics = {
        "clip_frac": masked_mean((clipped > plain).astype(jnp.float32), mask),
        "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask),
        "ratio_dev_max": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return (
        masked_mean(jnp.maximum(plain, clipped), mask),
        jax.tree.map(jax.lax.stop_gradient, metrics),
    )


def ppo_value_loss(
    values: Float[Array, "B R"],
    old_values: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    clip: float,
) -> tuple[Scalar, Metrics]:
    """Clipped value loss of lm-human-preferences (arXiv 1909.08593; arXiv 2403.17031, detail 21).

    1/2 mean max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2), G the returns.

    Returns:
      (loss, {value_clip_frac: share of tokens where the clipped term is the larger}).
    """
    _check(values, 2, jnp.float32)
    keep = mask > 0
    values, old_values, returns = (
        jnp.where(keep, x, 0.0) for x in (values, old_values, jax.lax.stop_gradient(returns))
    )
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    frac = jax.lax.stop_gradient(masked_mean((clipped > plain).astype(jnp.float32), mask))
    return 0.5 * masked_mean(jnp.maximum(plain, clipped), mask), {"value_clip_frac": frac}


def masked_mean(x: Float[Array, "..."], mask: Float[Array, "..."]) -> Scalar:
    """sum(x mask) / sum(mask), and 0 for an empty mask."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def _check(x: jax.Array, rank: int, dtype: jnp.dtype) -> None:
    """Broadcasting would change what a loss means, bfloat16 its digits: both are refused."""
    if x.ndim != rank or x.dtype != dtype:
        raise TypeError(f"expected {jnp.dtype(dtype).name} of rank {rank}, got {x.dtype} {x.shape}")
