"""Rewards: reading a reward model, and paying its score and the KL penalty token by token."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gptlab.model.heads import ScalarModel, scalar_from_language
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import advantages, kl, rollout
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.train import checkpoint
from gptlab.train import state as state_lib

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

    A reward model has seen whole replies above all, so what it says of half a one means little.
    None keeps it.
    """
    if no_eos_score is None:
        return scores
    return jnp.where(finished, scores, jnp.asarray(no_eos_score, jnp.float32))


def score_index(mask: Float[Array, "B R"], position: str) -> Int[Array, "B"]:
    """Index of the response token that is paid the score.

    'last' is the last real token (Ziegler 2019). 'after_last' is the slot after it (Huang 2024),
    where the critic has seen the whole reply; a response that fills all R slots has none and is
    paid at its last.
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
      logprobs: log pi_old of each response token, from the scoring forward at the sampling
        temperature.
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


def candidate_rewards(
    model: ScalarModel, params: Any, batch: Any, dropout_key: jax.Array | None = None
) -> Float[Array, "B N"]:
    """Raw reward of every candidate, read at its last real token: K forwards for K candidates.

    `batch` is a ComparisonBatch. An absent candidate's entry means nothing. Dropout is on when a
    key for it is given.
    """
    rows, candidates, width = batch.tokens.shape
    tokens = batch.tokens.reshape(rows * candidates, width)  # [B N, T]
    lengths = batch.last_index.reshape(-1) + 1  # [B N]
    scalars = rollout.token_scalars(model, params, tokens, lengths, dropout_key)  # [B N, T]
    return rollout.at_last(scalars, lengths).reshape(rows, candidates)


def reward_model_config(
    workdir: str | os.PathLike[str], policy: ModelConfig, compute: Mapping[str, Any]
) -> ModelConfig:
    """The network of the reward model that is to pay a policy, before anything is loaded.

    Raises:
      UserError: it is not finished, holds no reward model, or one of another vocabulary.
    """
    _normalisation(workdir)
    config = ModelConfig.build(checkpoint.load_model_config(workdir), compute)
    if config.vocab_size != policy.vocab_size:
        raise UserError(
            f"config.inputs.reward has a vocabulary of {config.vocab_size}, "
            f"config.inputs.init of {policy.vocab_size}: they don't belong together"
        )
    return config


def _normalisation(workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
    manifest = artifact.read_manifest(workdir)
    if "normalisation" not in manifest["results"]:
        raise UserError(f"{workdir} holds a run of {manifest['stage']}, not a reward model")
    return manifest["results"]["normalisation"]


def load_reward_model(
    workdir: str | os.PathLike[str], mesh: Mesh, compute: Mapping[str, Any]
) -> tuple[ScalarModel, Any, float, float]:
    """The reward model that `reward` trained or `convert` imported, and its frozen normalisation.

    Args:
      workdir: a finished run of one of the two.
      mesh: where the parameters go.
      compute: `config.compute` of the stage that reads it.

    Returns:
      (model, params, gain, bias): a reply's score is gain * reward at its last real token + bias.
      `fold_normalisation` puts the two into the parameters.

    Raises:
      UserError: it is not finished, or holds no reward model.
    """
    normalisation = _normalisation(workdir)
    model = ScalarModel(ModelConfig.build(checkpoint.load_model_config(workdir), compute))
    params = checkpoint.load_params(workdir, mesh, functools.partial(init_params, model))
    return model, params, normalisation["gain"], normalisation["bias"]


def fold_normalisation(params: Any, gain: float, bias: float) -> Any:
    """Parameters whose raw output is the normalised score: the head is linear, so gain and bias fit
    into it.

    With these a critic starts as the very function that pays it (InstructGPT initialises its value
    function from the reward model), and no later step can forget the normalisation.
    """
    head = {
        "kernel": params["head"]["kernel"] * gain,
        "bias": params["head"]["bias"] * gain + bias,
    }
    return {**params, "head": head}


def load_critic(
    workdir: str | None,
    policy_workdir: str,
    policy_config: ModelConfig,
    mesh: Mesh,
    compute: Mapping[str, Any],
) -> tuple[ScalarModel, Any]:
    """The critic as PPO starts it.

    With a reward model, it is that one, normalisation included: what pays has the same parameters.
    Without one (a program pays), it is the policy's trunk under a zero head: its first values are 0
    and no noise.

    Args:
      workdir: of the reward model, or None.
      policy_workdir: of the policy that PPO starts from.
      policy_config: of that policy.
      mesh: where the parameters go.
      compute: `config.compute`.

    Returns:
      (model, parameters).
    """
    if workdir is not None:
        model, params, gain, bias = load_reward_model(workdir, mesh, compute)
        return model, jax.jit(fold_normalisation)(params, gain, bias)
    model = ScalarModel(policy_config, "zero")
    language = functools.partial(init_params, LanguageModel(policy_config))
    trunk = checkpoint.load_params(policy_workdir, mesh, language)
    _, shardings = state_lib.param_shardings(functools.partial(init_params, model), mesh)
    head = {"kernel": jnp.zeros((policy_config.d_model, 1)), "bias": jnp.zeros((1,))}
    return model, scalar_from_language(trunk, jax.device_put(head, shardings["head"]))
