"""KL between policy and reference: estimators from samples, and the coefficient's controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptlab.run.errors import UserError


def k1(logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """d = log pi - log ref at sampled tokens: unbiased, of high variance, negative at times."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """d^2 / 2: biased, never negative; its gradient is the gradient of the KL."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(-d) - 1 + d: unbiased, never negative (Schulman 2020, Approximating KL divergence)."""
    difference = logprobs - ref_logprobs
    return jnp.expm1(-difference) + difference


ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(
    logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    estimator: str = "k1",
) -> Float[Array, ""]:
    """Nats per *response*: the estimator summed over a response's tokens, then the mean over
    responses.

    This is the KL whose target the adaptive controller holds, and the x axis of reward-against-KL
    plots.
    """
    return jnp.mean(jnp.sum(ESTIMATORS[estimator](logprobs, ref_logprobs) * mask, axis=1))


@dataclasses.dataclass(frozen=True)
class FixedKL:
    """A constant penalty coefficient (InstructGPT: 0.02)."""

    coef: float

    def initial(self) -> Float[Array, ""]:
        """The coefficient before the first iteration."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(
        self, coef: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """Returns `coef` as it is."""
        del kl, episodes
        return coef


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """A proportional controller that holds the sequence KL near `target` (Ziegler 2019, section
    2.2).

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

    applied once *after* a rollout batch of n episodes has been used with the old beta.
    """

    coef: float
    target: float  # nats per response
    horizon: int  # episodes

    def initial(self) -> Float[Array, ""]:
        """The coefficient before the first iteration."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(
        self, coef: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """The next step's coefficient, from this batch's sequence KL and number of episodes.

        A KL that is not finite leaves it: a batch that is skipped must not end the run by it.
        """
        error = jnp.clip(kl / self.target - 1.0, -0.2, 0.2)
        return jnp.where(jnp.isfinite(kl), coef * (1.0 + error * (episodes / self.horizon)), coef)


def make_controller(spec: Mapping[str, Any]) -> FixedKL | AdaptiveKL:
    """The controller of `config.kl` = {kind, coef, target, horizon}; UserError if senseless."""
    if spec["coef"] < 0:
        raise UserError(f"config.kl.coef is {spec['coef']}: a KL penalty cannot be negative")
    if spec["kind"] == "fixed":
        return FixedKL(spec["coef"])
    if spec["kind"] != "adaptive":
        raise UserError(f"config.kl.kind is {spec['kind']!r}: write 'fixed' or 'adaptive'")
    for name in ("coef", "target", "horizon"):
        if spec[name] <= 0:
            raise UserError(
                f"config.kl.{name} is {spec[name]}: an adaptive coefficient needs it positive"
            )
    return AdaptiveKL(spec["coef"], spec["target"], spec["horizon"])
