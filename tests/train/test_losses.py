"""Every loss against slow NumPy written from the equation, in value and in gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.model import vocabulary
from gptlab.train import losses
from tests.signatures import checked

RNG = np.random.default_rng(0)


def numeric_grad(fn, x, eps=1e-5):
    """Central differences of a float64 NumPy function."""
    x = np.asarray(x, np.float64)
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        grad[index] = (fn(up) - fn(down)) / (2 * eps)
    return grad


def slow_cross_entropy(logits, targets, mask, z_loss):
    total = 0.0
    for b, t in np.ndindex(*targets.shape):
        log_z = np.log(np.sum(np.exp(logits[b, t])))
        total += mask[b, t] * (log_z - logits[b, t, targets[b, t]] + z_loss * log_z**2)
    return total


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy(z_loss):
    logits = RNG.normal(size=(2, 3, 5)) * 3
    targets = RNG.integers(0, 5, (2, 3))
    mask = np.array([[1, 1, 0], [0, 1, 1]], np.float64)
    args = jnp.array(targets), jnp.array(mask, jnp.float32), z_loss

    def loss(x):
        return checked(losses.cross_entropy_sums)(vocabulary.of_logits(x, args[0]), *args[1:])[0]

    x = jnp.array(logits, jnp.float32)
    total, weight, sums = losses.cross_entropy_sums(vocabulary.of_logits(x, args[0]), *args[1:])
    want = slow_cross_entropy(logits, targets, mask, z_loss)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert weight == 4
    plain = slow_cross_entropy(logits, targets, mask, 0.0)
    np.testing.assert_allclose(sums["nll"], plain, rtol=1e-5)
    assert sums["accuracy"] == np.sum(mask * (logits.argmax(-1) == targets))
    grad = numeric_grad(lambda y: slow_cross_entropy(y, targets, mask, z_loss), logits)
    np.testing.assert_allclose(jax.grad(loss)(x), grad, atol=1e-5)


def test_cross_entropy_of_large_logits_is_finite():
    logits = jnp.full((1, 1, 4), 1e4, jnp.float32).at[0, 0, 1].set(2e4)
    stats = vocabulary.of_logits(logits, jnp.array([[1]]))
    loss, _, _ = losses.cross_entropy_sums(stats, jnp.ones((1, 1)), 0.0)
    assert loss == 0


def slow_ranking(rewards, ranks, weight):
    """(loss sum, weight sum) with loops over prompts and pairs."""
    total = total_weight = 0.0
    for r, k, w in zip(rewards, ranks, weight, strict=True):
        present = [i for i in range(len(k)) if k[i] > 0]
        pairs = [(i, j) for i, j in itertools.permutations(present, 2) if k[i] < k[j]]
        if pairs:
            total += w * np.mean([np.log1p(np.exp(-(r[i] - r[j]))) for i, j in pairs])
            total_weight += w
    return total, total_weight


# Four candidates; two with an absent one; a tie; nothing but ties; one candidate; a padding row.
RANKS = np.array(
    [[2, 1, 4, 3], [1, 0, 2, 0], [1, 1, 3, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 2, 3, 4]]
)
WEIGHT = np.array([0.25, 1.0, 1.0, 1.0, 1.0, 0.0])


def test_ranking_loss_on_a_ragged_batch():
    rewards = RNG.normal(size=RANKS.shape)
    args = jnp.array(RANKS), jnp.array(WEIGHT, jnp.float32)

    def loss(x):
        return checked(losses.ranking_loss_sums)(x, *args)[0]

    x = jnp.array(rewards, jnp.float32)
    total, weight, _ = losses.ranking_loss_sums(x, *args)
    want, want_weight = slow_ranking(rewards, RANKS, WEIGHT)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert weight == want_weight == 2.25
    grad = numeric_grad(lambda y: slow_ranking(y, RANKS, WEIGHT)[0], rewards)
    np.testing.assert_allclose(jax.grad(loss)(x), grad, atol=1e-5)
    assert (np.abs(grad[[0, 1, 2]]).sum(-1) > 0).all()


def test_ranking_loss_is_a_mean_within_each_prompt_not_over_all_pairs():
    rewards = jnp.array(RNG.normal(size=RANKS.shape), jnp.float32)
    total, weight, sums = losses.ranking_loss_sums(rewards, RANKS, jnp.array(WEIGHT, jnp.float32))
    flat = []
    for r, k in zip(np.asarray(rewards)[:3], RANKS[:3], strict=True):
        flat += [
            np.log1p(np.exp(-(r[i] - r[j])))
            for i, j in itertools.permutations(range(4), 2)
            if 0 < k[i] < k[j]
        ]
    assert sums["pairs"] == len(flat) == 6 + 1 + 2
    assert abs(total / weight - np.mean(flat)) > 1e-3


def test_absent_candidates_and_ties_cannot_change_loss_or_gradient():
    rewards = jnp.array(RNG.normal(size=RANKS.shape), jnp.float32)
    wild = jnp.where(jnp.array(RANKS) == 0, jnp.inf, rewards)
    args = jnp.array(RANKS), jnp.array(WEIGHT, jnp.float32)

    def loss(x):
        return losses.ranking_loss_sums(x, *args)[0]

    assert loss(wild) == loss(rewards)
    grad = jax.grad(loss)(wild)
    np.testing.assert_array_equal(grad, jax.grad(loss)(rewards))
    assert (grad[3:] == 0).all(), "only ties, one candidate, a padding row"


def test_ranking_accuracy_counts_equal_rewards_as_half():
    ranks = jnp.array([[1, 2, 3]])
    _, _, sums = losses.ranking_loss_sums(jnp.array([[1.0, 1.0, 0.0]]), ranks, jnp.ones((1,)))
    np.testing.assert_allclose(sums["accuracy"], (0.5 + 1 + 1) / 3, rtol=1e-6)
    np.testing.assert_allclose(sums["margin"], (0 + 1 + 1) / 3, rtol=1e-6)


def slow_policy(logprobs, old, advantages, mask, clip):
    terms = []
    for index in np.ndindex(*mask.shape):
        if mask[index]:
            ratio = np.exp(logprobs[index] - old[index])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            terms.append(-min(advantages[index] * ratio, advantages[index] * clipped))
    return np.mean(terms)


def test_policy_loss():
    shape, clip = (3, 4), 0.2
    logprobs, old = RNG.normal(size=shape) * 0.4, RNG.normal(size=shape) * 0.4
    advantages = RNG.normal(size=shape)
    mask = (RNG.random(shape) < 0.7).astype(np.float64)
    rest = [jnp.array(x, jnp.float32) for x in (old, advantages, mask)]

    def loss(x):
        return checked(losses.ppo_policy_loss)(x, *rest, clip)[0]

    x = jnp.array(logprobs, jnp.float32)
    value, metrics = losses.ppo_policy_loss(x, *rest, clip)
    slow = slow_policy(logprobs, old, advantages, mask, clip)
    np.testing.assert_allclose(value, slow, rtol=1e-5)
    grad = numeric_grad(lambda y: slow_policy(y, old, advantages, mask, clip), logprobs)
    np.testing.assert_allclose(jax.grad(loss)(x), grad, atol=1e-4)
    # By hand: A > 0 is clipped above 1.2, A < 0 below 0.8.
    ratio = np.exp(logprobs - old)
    cut = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    np.testing.assert_allclose(metrics["clip_frac"], cut[mask > 0].mean(), rtol=1e-5)
    assert 0 < cut[mask > 0].mean() < 1
    k3 = (ratio - 1 - np.log(ratio))[mask > 0].mean()
    np.testing.assert_allclose(metrics["approx_kl"], k3, rtol=1e-4)


def slow_value(values, old, returns, mask, clip):
    terms = []
    for index in np.ndindex(*mask.shape):
        if mask[index]:
            near = min(max(values[index], old[index] - clip), old[index] + clip)
            terms.append(max((values[index] - returns[index]) ** 2, (near - returns[index]) ** 2))
    return 0.5 * np.mean(terms)


def test_value_loss():
    shape, clip = (3, 4), 0.2
    values, old, returns = (RNG.normal(size=shape) for _ in range(3))
    mask = (RNG.random(shape) < 0.7).astype(np.float64)
    rest = [jnp.array(x, jnp.float32) for x in (old, returns, mask)]

    def loss(x):
        return checked(losses.ppo_value_loss)(x, *rest, clip)[0]

    x = jnp.array(values, jnp.float32)
    slow = slow_value(values, old, returns, mask, clip)
    np.testing.assert_allclose(loss(x), slow, rtol=1e-5)
    grad = numeric_grad(lambda y: slow_value(y, old, returns, mask, clip), values)
    np.testing.assert_allclose(jax.grad(loss)(x), grad, atol=1e-4)


@pytest.mark.parametrize("fn", [losses.ppo_policy_loss, losses.ppo_value_loss])
def test_padding_cannot_change_ppo_losses_or_their_gradients(fn):
    shape = (2, 3)
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    x, a, b = (jnp.array(RNG.normal(size=shape), jnp.float32) for _ in range(3))
    for wild in (1e4, jnp.inf):
        dirty = [jnp.where(mask > 0, y, wild) for y in (x, a, b)]
        clean = [jnp.where(mask > 0, y, 0.0) for y in (x, a, b)]
        grad = jax.grad(lambda y, o, g: fn(y, o, g, mask, 0.2)[0])
        assert fn(*dirty, mask, 0.2)[0] == fn(*clean, mask, 0.2)[0]
        np.testing.assert_array_equal(grad(*dirty), grad(*clean))


def test_low_precision_and_wrong_ranks_are_refused():
    with pytest.raises(TypeError, match="float32"):
        stats = vocabulary.of_logits(jnp.zeros((1, 2, 3), jnp.bfloat16), jnp.zeros((1, 2), int))
        losses.cross_entropy_sums(stats, jnp.ones((1, 2)), 0.0)
    with pytest.raises(TypeError, match="rank 2"):
        losses.ranking_loss_sums(jnp.zeros((3,)), jnp.zeros((3,), jnp.int32), jnp.ones((1,)))
