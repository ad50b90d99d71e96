"""GAE against a slow loop and by hand; whitening against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.rl import advantages
from tests.signatures import checked

gae, whiten = checked(advantages.gae), checked(advantages.whiten)
explained_variance = checked(advantages.explained_variance)


def slow_gae(rewards, values, lengths, gamma, lam):
    """The sum of the definition: A_t = sum_k (gamma lam)^k delta_{t+k}, per row, in float64."""
    out = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        for t in range(length):
            for k in range(length - t):
                s = t + k
                following = values[row, s + 1] if s + 1 < length else 0.0
                delta = rewards[row, s] + gamma * following - values[row, s]
                out[row, t] += (gamma * lam) ** k * delta
    return out


def ragged(seed, rows=5, width=7):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    mask = (np.arange(width)[None] < lengths[:, None]).astype(np.float32)
    rewards = rng.normal(size=(rows, width)).astype(np.float32)
    values = rng.normal(size=(rows, width)).astype(np.float32)
    return rewards, values, mask, lengths


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
def test_gae_equals_the_slow_sum(gamma, lam):
    rewards, values, mask, lengths = ragged(0)
    got, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, lam=lam)
    want = slow_gae(rewards.astype(np.float64), values.astype(np.float64), lengths, gamma, lam)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(returns, want + values * mask, atol=1e-5)


def test_zero_bootstrap_gives_reward_to_go_minus_value():
    rewards, values, mask, lengths = ragged(1)
    got, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=1.0, lam=1.0)
    for row, length in enumerate(lengths):
        to_go = np.cumsum(rewards[row, :length][::-1])[::-1]
        np.testing.assert_allclose(got[row, :length], to_go - values[row, :length], atol=1e-5)
        np.testing.assert_allclose(returns[row, :length], to_go, atol=1e-5)


def test_returns_come_from_unwhitened_advantages_by_hand():
    """Two tokens, gamma 1, lambda 0.5."""
    rewards = jnp.asarray([[0.0, 1.0]])
    values = jnp.asarray([[0.5, 0.25]])
    got, returns = gae(rewards, values, jnp.ones((1, 2)), gamma=1.0, lam=0.5)
    # delta = [0 + 0.25 - 0.5, 1 - 0.25] = [-0.25, 0.75]; A = [-0.25 + 0.5 * 0.75, 0.75]
    np.testing.assert_allclose(got, [[0.125, 0.75]], atol=1e-7)
    np.testing.assert_allclose(returns, [[0.625, 1.0]], atol=1e-7)


def test_padding_changes_nothing():
    """What stands in the padding cannot reach an advantage or its gradient."""
    rewards, values, mask = map(jnp.asarray, ragged(2)[:3])

    def total(values):
        got, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
        return jnp.sum(got * 1.7 + returns * 0.3)

    dirty = values + 100.0 * (1.0 - mask)
    clean_out = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    dirty_out = gae(rewards + 50 * (1 - mask), dirty, mask, gamma=1.0, lam=0.95)
    for a, b in zip(clean_out, dirty_out, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.asarray(a)[np.asarray(mask) == 0], 0)
    gradient = np.asarray(jax.grad(total)(jnp.asarray(values)))
    assert np.all(gradient[np.asarray(mask) == 0] == 0) and np.any(gradient != 0)


def test_whitening_has_biased_variance():
    """As numpy with ddof=0, over real tokens only."""
    x, _, mask, _ = ragged(3)
    got = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask), keep_mean=False))
    real = x[mask > 0]
    want = (x - real.mean()) / np.sqrt(real.var(ddof=0) + 1e-8) * mask
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert abs(got[mask > 0].std(ddof=0) - 1) < 1e-4
    assert abs(got[mask > 0].std(ddof=1) - 1) > 1e-2  # the two conventions differ on this batch


def test_whitening_by_minibatch_and_by_rollout_differ():
    """The scope is a choice that matters."""
    x, _, mask, _ = ragged(4, rows=4)
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    rollout = whiten(x, mask, keep_mean=False)
    halves = [whiten(x[i : i + 2], mask[i : i + 2], keep_mean=False) for i in (0, 2)]
    assert np.abs(rollout - jnp.concatenate(halves)).max() > 1e-2


def test_reward_whitening_keeps_the_mean():
    """By hand: [1, 3] -> mean 2, std 1, so nothing moves; [0, 4] -> [1, 3]."""
    got = whiten(jnp.asarray([[1.0, 3.0]]), jnp.ones((1, 2)), keep_mean=True)
    np.testing.assert_allclose(got, [[1.0, 3.0]], atol=1e-5)
    got = whiten(jnp.asarray([[0.0, 4.0, 9.0]]), jnp.asarray([[1.0, 1, 0]]), keep_mean=True)
    np.testing.assert_allclose(got, [[1.0, 3.0, 0.0]], atol=1e-5)


def test_constant_input_whitens_to_zero_not_nan():
    got = whiten(jnp.full((2, 2), 3.0), jnp.ones((2, 2)), keep_mean=False)
    np.testing.assert_array_equal(got, np.zeros((2, 2)))


def test_explained_variance_of_perfect_and_constant_critics():
    returns, _, mask, _ = ragged(5)
    returns, mask = jnp.asarray(returns), jnp.asarray(mask)
    assert abs(float(explained_variance(returns + 3.0, returns, mask)) - 1) < 1e-5
    constant = jnp.full(returns.shape, 0.7)
    assert abs(float(explained_variance(constant, returns, mask))) < 1e-5


def test_integer_rewards_are_refused():
    """A reward array that took its dtype from token ids turns 0.73 into 0."""
    ones = jnp.ones((1, 2))
    with pytest.raises(TypeError, match="rewards"):
        advantages.gae(jnp.ones((1, 2), jnp.int32), ones, ones, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="shape"):
        advantages.gae(jnp.ones((1, 3)), ones, ones, gamma=1.0, lam=1.0)
