"""From a rollout to what the losses read: rewards, advantages and returns, in that order."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gptlab.rl import advantages as advantages_lib
from gptlab.rl import kl, rewards
from gptlab.rl.rollout import Rollout, Samples
from gptlab.train import losses


@flax.struct.dataclass
class Episodes:
    """What the losses read; rows are cut into minibatches."""

    samples: Samples
    old_logprobs: jax.Array  # float32 [B, R]
    old_values: jax.Array  # float32 [B, R]
    advantages: jax.Array  # float32 [B, R]
    returns: jax.Array  # float32 [B, R]
    value_mask: jax.Array  # float32 [B, R]


def prepare(
    data: Rollout, kl_coef: jax.Array, config: ConfigDict
) -> tuple[Episodes, dict[str, jax.Array]]:
    """From a rollout to what the losses read: rewards, advantages, returns."""
    samples, mask = data.samples, data.samples.response_mask
    # (1) Rewards: KL on every token, the score on one.
    paid = rewards.assemble(
        data.scores,
        data.old_logprobs,
        data.ref_logprobs,
        mask,
        samples.finished,
        kl_coef,
        no_eos_score=config.no_eos_score,
        position=config.score_position,
        whiten=config.whiten_rewards,
    )
    # (2) Advantages and, from them unwhitened, returns: [B, R] both.
    advantages, returns = advantages_lib.gae(
        paid.total, data.values, paid.value_mask, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages == "rollout":
        advantages = advantages_lib.whiten(advantages, mask, keep_mean=False)
    old_values = data.values * paid.value_mask
    episodes = Episodes(
        samples, data.old_logprobs, old_values, advantages, returns, paid.value_mask
    )
    per_response = lambda x: jnp.mean(jnp.sum(x, axis=1))  # noqa: E731
    metrics = {
        "score": jnp.mean(paid.scores),
        "raw_score": jnp.mean(data.scores),
        "non_score_reward": per_response(paid.non_score),
        "kl": kl.sequence_kl(data.old_logprobs, data.ref_logprobs, mask),
        "kl_k3": kl.sequence_kl(data.old_logprobs, data.ref_logprobs, mask, "k3"),
        "kl_coef": kl_coef,
        "entropy": losses.masked_mean(data.entropy, mask),
        "response_len": per_response(mask),
        "eos_rate": jnp.mean(samples.finished.astype(jnp.float32)),
        "value_explained_var": advantages_lib.explained_variance(
            data.values, returns, paid.value_mask
        ),
        "rollout_logprob_diff": losses.masked_mean(
            jnp.abs(samples.decode_logprobs - data.old_logprobs), mask
        ),
    }
    return episodes, metrics
