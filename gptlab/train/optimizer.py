"""The optimiser that a config fragment describes: clip, AdamW or Muon, schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from gptlab.run.errors import UserError

# Scanned layers are stored stacked, with a leading layer axis, below this name.
STACKED = "layers"
# Gains and biases by name: a head-shaped bias [H, K] has two axes and still is a bias.
NEVER_DECAYED = ("bias", "scale")
# Of the second it would stand still: it moves by a share of 1 - b2, less than bfloat16's digits.
MU_DTYPES = ("float32", "bfloat16")

Schedule = Callable[[Any], Any]


def make_optimizer(
    config: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser as one optax transformation, and its learning-rate schedule.

    Args:
      config: name ('adamw', arXiv 1711.05101, or 'muon'), lr, betas, eps, weight_decay, clip_norm
        (None = no clipping), schedule, warmup_steps, final_fraction, decay_fraction (wsd only);
        adamw also adam_eps_style and mu_dtype (of the first moment: 'bfloat16' saves a quarter of
        the moments' memory); muon also adam_lr and momentum.
      total_steps: the step at which the schedule ends.

    Raises:
      UserError: a value that is unknown or has no meaning beside another one.
    """
    makers = {"adamw": _adamw, "muon": _muon}
    if config.name not in makers:
        raise UserError(f"config.optimizer.name={config.name!r} is unknown: use 'adamw' or 'muon'")
    schedule = make_schedule(config, total_steps)
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(*parts, *makers[config.name](config, schedule)), schedule


def _adamw(config: ConfigDict, schedule: Schedule) -> list[optax.GradientTransformation]:
    b1, b2 = config.betas
    if config.mu_dtype not in MU_DTYPES:
        raise UserError(
            f"config.optimizer.mu_dtype={config.mu_dtype!r} is unknown: use one of {MU_DTYPES}"
        )
    if config.adam_eps_style == "torch":
        moments = optax.scale_by_adam(b1, b2, config.eps, mu_dtype=config.mu_dtype)
    elif config.adam_eps_style == "tensorflow":
        moments = scale_by_tensorflow_adam(b1, b2, config.eps, config.mu_dtype)
    else:
        raise UserError(
            f"config.optimizer.adam_eps_style={config.adam_eps_style!r} is unknown: "
            "use 'torch' or 'tensorflow'"
        )
    parts = [moments]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask))
    return [*parts, optax.scale_by_learning_rate(schedule)]


def _muon(config: ConfigDict, schedule: Schedule) -> list[optax.GradientTransformation]:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the layers' matrices.

    Their momentum is orthogonalised by Newton-Schulz iterations, one matrix of a layer at a time.
    Embeddings, gains and biases get Adam, with Nesterov momentum as optax pairs the two, and a rate
    of adam_lr / lr times the schedule.
    """
    b1, b2 = config.betas
    rest_rate = lambda step: schedule(step) * (config.adam_lr / config.lr)  # noqa: E731
    return [
        optax.contrib.muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_matrices,
            adam_b1=b1,
            adam_b2=b2,
            eps=config.eps,
            adam_learning_rate=rest_rate,
        )
    ]


def muon_matrices(params: Any) -> Any:
    """For each tensor its axes [in, out] if it is a layer's matrix, else None (Adam's)."""

    def axes(path: tuple[Any, ...], x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(key, "key", key)) for key in path]
        is_matrix = STACKED in names and names[-1] not in NEVER_DECAYED and x.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def make_schedule(config: ConfigDict, total_steps: int) -> Schedule:
    """Learning rate of the update that follows `step` finished ones.

    Warm-up is linear and reaches lr at update number warmup_steps (the first update is never zero).
    Then 'constant'; 'linear' or 'cosine' to final_fraction * lr at the last update; or 'wsd'
    (warm-up, stable, decay; arXiv 2404.06395): constant, and linear over the last decay_fraction.
    """
    name, lr, warmup = config.schedule, config.lr, config.warmup_steps
    if name not in ("constant", "linear", "cosine", "wsd"):
        raise UserError(
            f"config.optimizer.schedule={name!r} is unknown: "
            "use 'constant', 'linear', 'cosine' or 'wsd'"
        )
    if name == "constant" and config.final_fraction != 1:
        raise UserError(
            f"config.optimizer.final_fraction={config.final_fraction} has no meaning with "
            "schedule 'constant': set it to 1.0"
        )
    if (name == "wsd") != (config.decay_fraction is not None):
        raise UserError(
            "config.optimizer.decay_fraction belongs to schedule 'wsd' alone: set both or "
            f"neither (schedule={name!r}, decay_fraction={config.decay_fraction})"
        )
    if not 0 <= warmup <= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} does not fit into the "
            f"{total_steps} steps of this run"
        )
    end = config.final_fraction
    decay = (
        total_steps - warmup
        if name != "wsd"
        else min(round(config.decay_fraction * total_steps), total_steps - warmup)
    )
    start = total_steps - decay

    def schedule(step: Any) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1
        ramp = jnp.minimum(1.0, update / max(warmup, 1))
        fraction = jnp.clip((update - start) / max(decay, 1), 0.0, 1.0)
        if name == "constant":
            shape = jnp.ones((), jnp.float32)
        elif name == "cosine":
            shape = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
        else:
            shape = 1 - (1 - end) * fraction
        return lr * ramp * shape

    return schedule


def decay_mask(params: Any) -> Any:
    """True for the tensors that weight decay applies to: matrices, as one layer sees them.

    The layer axis of stacked layers does not count: a stacked bias [L, D] is no matrix.
    """

    def decayed(path: tuple[Any, ...], x: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] not in NEVER_DECAYED and x.ndim - (STACKED in names) >= 2

    return jax.tree_util.tree_map_with_path(decayed, params)


def scale_by_tensorflow_adam(
    b1: float, b2: float, eps: float, mu_dtype: str
) -> optax.GradientTransformation:
    """Adam with epsilon added to the *uncorrected* sqrt(v), as TensorFlow's Adam does.

    u = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps): the formulation just before section 2.1
    of arXiv 1412.6980. It equals torch's with eps / sqrt(1 - b2^t), so in the first steps epsilon
    weighs up to 1 / sqrt(1 - b2) times as much.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, optax.tree.zeros_like(params))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m.astype(g.dtype) + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        t = count.astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(init, update)
