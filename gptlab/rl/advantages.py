"""Advantages from rewards and values: GAE, and whitening over the tokens that exist.

Every array is aligned with the response: index t of a [B, R] array belongs to the t-th response
token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptlab.train.losses import masked_mean

_WHITEN_EPS = 1e-8  # inside the square root, as in lm-human-preferences


def gae(
    rewards: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Generalised advantage estimation over one response, zero bootstrap after its end.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    (Schulman et al. 2016, arXiv 1506.02438, eq. 16.) V is 0 wherever `mask` is 0, so an episode
    ends at its last unmasked token and whatever the critic says about padding cannot leak in. With
    gamma = lam = 1 an advantage is the reward-to-go minus the value.

    Args:
      rewards: reward of each response token; entries outside the mask are ignored.
      values: critic's value of the state *before* each response token.
      mask: 1 on the tokens of the episode (the value mask: one token longer than the policy mask
        when the score is paid one after the last token).
      gamma: discount per token.
      lam: weight of longer estimates.

    Returns:
      advantages, and returns = advantages + values, both 0 outside the mask. Advantages are not
      whitened: returns must come from raw advantages, so whiten afterwards.
    """
    _check_aligned(rewards=rewards, values=values, mask=mask)
    rewards, values = rewards * mask, values * mask
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))  # [B, R], the end is worth 0
    deltas = (rewards + gamma * next_values - values) * mask

    def backward(carry: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + gamma * lam * carry
        return advantage, advantage

    start = jnp.zeros(rewards.shape[:1], jnp.float32)
    _, advantages = jax.lax.scan(backward, start, deltas.T, reverse=True)
    advantages = advantages.T * mask  # [B, R]
    return advantages, advantages + values


def whiten(
    x: Float[Array, "*S"], mask: Float[Array, "*S"], *, keep_mean: bool
) -> Float[Array, "*S"]:
    """Unit variance over the unmasked entries, and zero mean unless `keep_mean`; 0 outside the
    mask.

    The variance is the biased one (divided by n, not n - 1) and eps 1e-8 stands inside the square
    root, as in lm-human-preferences. Rewards are whitened with their mean kept: shifting every
    token's reward would pay or charge for length.
    """
    if x.shape != mask.shape:
        raise ValueError(f"x {x.shape} and mask {mask.shape} differ in shape")
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    whitened = (x - mean) * jax.lax.rsqrt(variance + _WHITEN_EPS)
    if keep_mean:
        whitened = whitened + mean
    return whitened * mask


def explained_variance(
    values: Float[Array, "B R"], returns: Float[Array, "B R"], mask: Float[Array, "B R"]
) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns) over real tokens: 0 for a constant critic."""
    error = returns - values
    error_variance = masked_mean(jnp.square(error - masked_mean(error, mask)), mask)
    variance = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
    return 1.0 - error_variance / jnp.maximum(variance, _WHITEN_EPS)


def _check_aligned(**arrays: jax.Array) -> None:
    """Equal [B, R] shapes and float32: in the dtype of token ids a reward is rounded away."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"expected arrays of one shape [B, R], got {shapes}")
    wrong = {name: array.dtype for name, array in arrays.items() if array.dtype != jnp.float32}
    if wrong:
        raise TypeError(f"expected float32 arrays, got {wrong}")
