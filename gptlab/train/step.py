"""What one optimiser step is made of: accumulated gradients, and their application."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.train.state import TrainState

# (params, microbatch, rng) -> (loss sum, (weight, sums of metrics))
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]
LARGEST = "_max"  # how metrics end that are no sums: of microbatches, the largest counts. Never < 0


def jit_step(step: Callable[..., Any], shardings: Any, mesh: Mesh) -> Any:
    """A step (state, ...) -> (state, metrics), compiled: state in place, metrics replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, out_shardings=(shardings, whole), donate_argnums=0)


def accumulate(
    loss_fn: LossFn, params: Any, batch: Any, accumulation_steps: int, rng: jax.Array
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Gradients, loss and metrics of a batch, computed in microbatches one after the other.

    loss = sum of losses / sum of weights over the *whole* batch, so the result does not depend on
    how many microbatches there are, even when the mask leaves them unequal weights.

    Args:
      loss_fn: gives sums and their weight; a metric is divided by the same weight as the loss, but
        for the LARGEST.
      params: any pytree of float32 arrays.
      batch: pytree of arrays [B, ...]; B must be a multiple of accumulation_steps.
      accumulation_steps: number of microbatches.
      rng: key; microbatch i gets fold_in(rng, i).

    Returns:
      (gradients like params, loss, metrics).
    """

    def sums(microbatch: Any, key: jax.Array) -> Any:
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, microbatch, key)
        return grads, loss, *aux

    if accumulation_steps == 1:
        grads, loss, weight, metrics = sums(batch, jax.random.fold_in(rng, 0))
    else:
        microbatches = jax.tree.map(lambda x: _split(x, accumulation_steps), batch)

        def body(total: Any, inputs: Any) -> tuple[Any, None]:
            index, microbatch = inputs
            found = sums(microbatch, jax.random.fold_in(rng, index))
            *added, metrics = jax.tree.map(jnp.add, total, found)
            largest = {k: jnp.maximum(total[-1][k], found[-1][k]) for k in _largest(metrics)}
            return (*added, metrics | largest), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(sums, first, rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, loss, weight, metrics), _ = jax.lax.scan(
            body, zeros, (jnp.arange(accumulation_steps), microbatches)
        )
    scale = 1.0 / jnp.maximum(weight, 1e-8)  # a batch without a single weighted token: loss 0
    return (
        jax.tree.map(lambda g: g * scale, grads),
        loss * scale,
        {k: m * scale for k, m in metrics.items()} | {k: metrics[k] for k in _largest(metrics)},
    )


def _largest(metrics: dict[str, jax.Array]) -> list[str]:
    return [name for name in metrics if name.endswith(LARGEST)]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...]; microbatch i takes rows i, i + parts, ...

    A device holds a contiguous block of rows. Taking every parts-th row gives each microbatch a
    share of every device's rows, so nothing moves between devices.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def apply_updates(
    state: TrainState, grads: Any, tx: optax.GradientTransformation, on_nonfinite: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step.

    Args:
      state: the state before the step.
      grads: like state.params.
      tx: the optimiser.
      on_nonfinite: 'skip' leaves parameters and optimiser as they were when a gradient is not
        finite (the step still counts); 'stop' applies it: the loop then stops by the loss.

    Returns:
      (state, {train/grad_norm, train/param_norm, and with 'skip' train/skipped_steps, all so far}).
    """
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"train/grad_norm": grad_norm}
    if on_nonfinite == "skip":
        finite = jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics["train/skipped_steps"] = state.step + 1 - applied_updates(opt_state)
    metrics["train/param_norm"] = optax.tree.norm(params)
    return TrainState(state.step + 1, params, opt_state), metrics


def applied_updates(opt_state: Any) -> jax.Array:
    """How many updates an optimiser of make_optimizer has made, int32 []: skipped steps are none.

    The schedule counts these, so the learning rate of the next update is schedule(this).
    """
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]
