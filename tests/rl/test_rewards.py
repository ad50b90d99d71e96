"""Per-token rewards, every array written out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.rl import rewards
from tests.signatures import checked

MASK = jnp.asarray([[1.0, 1, 0, 0], [1, 1, 1, 1]])
LOGP = jnp.asarray([[-1.0, -2.0, -9.0, -9.0], [-1.0, -1.0, -1.0, -3.0]])
REF = jnp.asarray([[-1.5, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
FINISHED = jnp.asarray([True, True])
SCORES = jnp.asarray([0.73, -0.25])


def assemble(**changes):
    options = {"no_eos_score": -1.0, "position": "last", "whiten": False} | changes
    finished = options.pop("finished", FINISHED)
    logp = options.pop("logprobs", LOGP)
    return checked(rewards.assemble)(SCORES, logp, REF, MASK, finished, jnp.float32(0.1), **options)


def test_untouched_policy_pays_exactly_nothing():
    """Policy = reference makes the non-score reward exactly 0."""
    got = assemble(logprobs=REF)
    np.testing.assert_array_equal(got.non_score, np.zeros((2, 4)))
    np.testing.assert_array_equal(got.total, [[0, np.float32(0.73), 0, 0], [0, 0, 0, -0.25]])


def test_score_at_the_last_token_by_hand():
    """d = [[.5, -1], [0, 0, 0, -2]], beta 0.1."""
    got = assemble(position="last")
    np.testing.assert_allclose(
        got.total, [[-0.05, 0.1 + 0.73, 0, 0], [0, 0, 0, 0.2 - 0.25]], atol=1e-6
    )
    np.testing.assert_array_equal(got.value_mask, MASK)


def test_score_one_after_the_last_token_by_hand():
    """A value mask one slot longer; a full response has no such slot."""
    got = assemble(position="after_last")
    np.testing.assert_allclose(got.total, [[-0.05, 0.1, 0.73, 0], [0, 0, 0, 0.2 - 0.25]], atol=1e-6)
    np.testing.assert_array_equal(got.value_mask, [[1, 1, 1, 0], [1, 1, 1, 1]])


def test_unfinished_reply_has_its_score_replaced_not_shifted():
    got = assemble(finished=jnp.asarray([True, False]))
    np.testing.assert_array_equal(got.scores, np.asarray([0.73, -1.0], np.float32))
    replaced = checked(rewards.replace_unfinished)(SCORES, jnp.asarray([True, False]), -1.0)
    np.testing.assert_array_equal(replaced, got.scores)
    np.testing.assert_allclose(got.total[1], [0, 0, 0, 0.2 - 1.0], atol=1e-6)
    kept = assemble(finished=jnp.asarray([True, False]), no_eos_score=None)
    np.testing.assert_array_equal(kept.scores, SCORES)


@pytest.mark.parametrize("position, index", [("last", [1, 3]), ("after_last", [2, 3])])
def test_the_slot_that_is_paid_is_the_last_one_with_a_value(position, index):
    np.testing.assert_array_equal(checked(rewards.score_index)(MASK, position), index)
    exists = checked(rewards.value_mask)(MASK, position)
    np.testing.assert_array_equal(exists.sum(axis=1), np.asarray(index) + 1)


def test_rewards_are_float32_whatever_the_scores():
    """A score of 0.73 survives even if every other array were integer-like."""
    assert assemble().total.dtype == jnp.float32 and assemble().total[0, 1] > 0.7


def test_whitening_keeps_the_mean_over_the_value_mask():
    plain, white = assemble(position="after_last"), assemble(position="after_last", whiten=True)
    real = np.asarray(plain.value_mask) > 0
    before, after = np.asarray(plain.total)[real], np.asarray(white.total)[real]
    assert abs(before.mean() - after.mean()) < 1e-6 and abs(after.std() - 1) < 1e-4
    assert np.all(np.asarray(white.total)[~real] == 0)
    np.testing.assert_array_equal(plain.non_score, white.non_score)


def test_unknown_position_is_refused():
    with pytest.raises(ValueError, match="after_last"):
        assemble(position="end")
