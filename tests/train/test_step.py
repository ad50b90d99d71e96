"""Accumulation equals the large batch; one step follows the policy for what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gptlab.train import step as step_lib
from gptlab.train.optimizer import make_optimizer
from gptlab.train.state import TrainState

KEY = jax.random.key(0)
PARAMS = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.3]]), "bias": jnp.array([0.1, 0.2])}


def loss_fn(params, batch, rng):
    del rng
    error = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"][None]) - batch["y"]
    loss = jnp.sum(batch["mask"][:, None] * error**2)
    return loss, (jnp.sum(batch["mask"]), {"absolute": jnp.sum(batch["mask"] * abs(error[:, 0]))})


def example_batch(rows=12):
    rng = np.random.default_rng(0)
    # Ragged weights: a mean of microbatch means would be wrong.
    mask = (np.arange(rows) % 5 > 1) * rng.random(rows)
    arrays = {"x": rng.normal(size=(rows, 2)), "y": rng.normal(size=(rows, 2)), "mask": mask}
    return {name: jnp.array(x, jnp.float32) for name, x in arrays.items()}


@pytest.mark.parametrize("steps", [2, 3, 12])
def test_microbatches_equal_the_large_batch(steps):
    batch = example_batch()
    whole = step_lib.accumulate(loss_fn, PARAMS, batch, 1, KEY)
    parts = jax.jit(lambda b: step_lib.accumulate(loss_fn, PARAMS, b, steps, KEY))(batch)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
    jax.tree.map(close, whole, parts)
    weights = np.asarray(batch["mask"])
    grads = jax.grad(lambda p: loss_fn(p, batch, KEY)[0] / weights.sum())(PARAMS)
    jax.tree.map(close, parts[0], grads)


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_a_maximum_is_that_of_the_large_batch_and_no_mean_of_maxima(steps):
    def with_largest(params, batch, rng):
        loss, (weight, metrics) = loss_fn(params, batch, rng)
        return loss, (weight, metrics | {"x_max": jnp.max(abs(batch["x"]))})

    batch = example_batch()
    _, _, metrics = step_lib.accumulate(with_largest, PARAMS, batch, steps, KEY)
    assert metrics["x_max"] == jnp.max(abs(batch["x"]))


def test_every_microbatch_has_its_own_key():
    def noise(params, batch, rng):
        draw = jax.random.uniform(rng)
        return draw * params, (jnp.ones(()), {"square": draw**2})

    _, mean, metrics = step_lib.accumulate(noise, jnp.ones(()), jnp.zeros((4, 1)), 4, KEY)
    assert metrics["square"] - mean**2 > 1e-4, "equal draws have no variance"


def test_a_microbatch_holds_rows_of_every_device():
    x = jnp.arange(8)
    np.testing.assert_array_equal(step_lib._split(x, 2), [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_batch_without_weight_gives_zeros_and_not_nan():
    batch = example_batch() | {"mask": jnp.zeros((12,))}
    grads, loss, _ = step_lib.accumulate(loss_fn, PARAMS, batch, 3, KEY)
    assert loss == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def fresh_state(clip_norm=1.0):
    tx, _ = make_optimizer(common.adamw(0.1, clip_norm=clip_norm), 10)
    return TrainState(jnp.zeros((), jnp.int32), PARAMS, tx.init(PARAMS)), tx


def test_apply_updates_moves_the_parameters_and_reports_norms():
    state, tx = fresh_state()
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    new, metrics = step_lib.apply_updates(state, grads, tx, "stop")
    assert new.step == 1 and step_lib.applied_updates(new.opt_state) == 1
    np.testing.assert_allclose(metrics["train/grad_norm"], np.sqrt(6), rtol=1e-6)
    squares = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(new.params))
    np.testing.assert_allclose(metrics["train/param_norm"], np.sqrt(squares), rtol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), new.params, PARAMS)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_skip_leaves_parameters_and_optimiser_alone_and_counts(bad):
    state, tx = fresh_state()
    good = jax.tree.map(jnp.ones_like, PARAMS)
    state, _ = step_lib.apply_updates(state, good, tx, "skip")
    poisoned = good | {"bias": jnp.array([0.0, bad])}
    after, metrics = step_lib.apply_updates(state, poisoned, tx, "skip")
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert after.step == 2 and metrics["train/skipped_steps"] == 1
    after, metrics = step_lib.apply_updates(after, good, tx, "skip")
    assert after.step == 3 and metrics["train/skipped_steps"] == 1
    assert step_lib.applied_updates(after.opt_state) == 2
