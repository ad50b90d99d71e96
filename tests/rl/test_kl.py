"""KL estimators against the exact KL of a categorical; the controller's trajectory by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.rl import kl
from gptlab.run.errors import UserError
from tests.signatures import checked

k2, k3, sequence_kl = checked(kl.k2), checked(kl.k3), checked(kl.sequence_kl)
adapt, keep = checked(kl.AdaptiveKL.update), checked(kl.FixedKL.update)


@pytest.mark.parametrize("name,unbiased", [("k1", True), ("k3", True), ("k2", False)])
def test_expectations_under_the_policy(name, unbiased):
    """Exact expectation over 11 outcomes, so no sampling noise hides a wrong sign."""
    rng = np.random.default_rng(0)
    logp = jax.nn.log_softmax(jnp.asarray(rng.normal(size=11), jnp.float32))
    ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=11), jnp.float32))
    exact = float(jnp.sum(jnp.exp(logp) * (logp - ref)))
    expected = float(jnp.sum(jnp.exp(logp) * checked(kl.ESTIMATORS[name])(logp, ref)))
    assert (abs(expected - exact) < 1e-5) == unbiased


def test_k2_and_k3_are_never_negative_and_agree_near_zero():
    d = jnp.linspace(-3.0, 3.0, 101)
    assert jnp.all(k2(d, 0 * d) >= 0) and jnp.all(k3(d, 0 * d) >= 0)
    small = jnp.asarray([1e-2, -1e-2])
    np.testing.assert_allclose(k3(small, 0 * small), k2(small, 0 * small), rtol=1e-2)


def test_sequence_kl_sums_tokens_and_averages_responses():
    logp = jnp.asarray([[1.0, 2.0, 50.0], [1.0, 1.0, 1.0]])
    ref = jnp.zeros((2, 3))
    mask = jnp.asarray([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert float(sequence_kl(logp, ref, mask)) == 3.0
    k3_rows = [np.exp(-1) + np.exp(-2) - 2 + 3, 3 * np.exp(-1)]
    assert abs(float(sequence_kl(logp, ref, mask, "k3")) - np.mean(k3_rows)) < 1e-6


def test_adaptive_coefficient_trajectory_by_hand():
    """Target 6, horizon 100, n = 50 episodes; errors clipped at +-0.2."""
    controller = kl.AdaptiveKL(coef=0.2, target=6.0, horizon=100)
    coef = controller.initial()
    trajectory = []
    for observed in (12.0, 6.6, 6.0, 0.0):
        coef = adapt(controller, coef, jnp.asarray(observed), episodes=50)
        trajectory.append(float(coef))
    # clip(1, +-.2) -> x 1.1; 0.1 -> x 1.05; 0 -> x 1; clip(-1) -> x 0.9
    np.testing.assert_allclose(trajectory, [0.22, 0.231, 0.231, 0.2079], rtol=1e-6)


def test_episodes_not_iterations_drive_the_controller():
    """Twice the episodes in a batch moves twice as far."""
    controller = kl.AdaptiveKL(coef=1.0, target=6.0, horizon=1000)
    one = adapt(controller, jnp.asarray(1.0), jnp.asarray(9.0), episodes=100)
    two = adapt(controller, jnp.asarray(1.0), jnp.asarray(9.0), episodes=200)
    np.testing.assert_allclose([one - 1, two - 1], [0.02, 0.04], rtol=1e-4)


@pytest.mark.parametrize("observed", [np.nan, np.inf])
def test_a_kl_that_is_not_finite_leaves_the_coefficient(observed):
    controller = kl.AdaptiveKL(coef=0.1, target=6.0, horizon=100)
    coef = adapt(controller, controller.initial(), jnp.asarray(observed), episodes=50)
    assert float(coef) == np.float32(0.1)


def test_fixed_coefficient_stays():
    controller = kl.make_controller({"kind": "fixed", "coef": 0.02, "target": 6.0, "horizon": 10})
    coef = keep(controller, controller.initial(), jnp.asarray(50.0), episodes=8)
    assert float(coef) == np.float32(0.02)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"kind": "adaptve"}, "config.kl.kind"),
        ({"coef": -0.1}, "config.kl.coef"),
        ({"target": 0.0}, "config.kl.target"),
        ({"coef": 0.0}, "config.kl.coef"),
    ],
)
def test_senseless_settings_are_one_clear_line(change, words):
    spec = {"kind": "adaptive", "coef": 0.1, "target": 6.0, "horizon": 100} | change
    with pytest.raises(UserError, match=words):
        kl.make_controller(spec)
