"""Perplexity against sums written out slowly."""

import math

import jax
import numpy as np
import pytest

from gptlab.data.batches import TokenBatch
from gptlab.evals import perplexity

VOCAB = 7


class FixedModel:
    """A model whose next-token logits depend on the current token only: rows of a table."""

    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)

    def apply(self, variables, tokens, positions, segment_ids):
        return variables["params"]["table"][tokens]

    def log_probability(self, line, start):
        """Sum of log p(line[i] | line[i-1]) for i >= start, in plain Python."""
        total = 0.0
        for i in range(start, len(line)):
            logits = [float(x) for x in self.table[line[i - 1]]]
            total += logits[line[i]] - math.log(sum(math.exp(x) for x in logits))
        return total


@pytest.fixture
def model():
    return FixedModel()


@pytest.fixture
def params(model):
    return {"table": jax.numpy.asarray(model.table)}


def test_held_out_equals_the_slow_sum_whatever_the_batching(model, params):
    lines = [[3, 4, 5, 6, 1], [3, 6, 1], [3, 2]]
    token_bytes = np.array([0, 0, 1, 0, 2, 3, 1])
    nats = -sum(model.log_probability(line, 1) for line in lines)
    num_bytes = 2 + 3 + 1 + 0 + 1 + 0 + 1
    nll = perplexity.make_nll(model)
    for batch_size in (1, 2, 3):
        batches = perplexity.continuation_batches(
            [line[:1] for line in lines], [line[1:] for line in lines], batch_size, 5
        )
        figures = perplexity.held_out(nll, params, batches, token_bytes)
        assert figures["num_tokens"] == 7
        assert figures["num_bytes"] == num_bytes
        assert figures["loss"] == pytest.approx(nats / 7, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_only_the_continuation_counts(model, params):
    contexts, replies = [[3, 4], [5]], [[1, 2, 6], [1]]
    nats, counts = perplexity.continuation_nll(
        perplexity.make_nll(model), params, contexts, replies, batch_size=2, seq_len=8
    )
    np.testing.assert_array_equal(counts, [3, 1])
    slow = [-model.log_probability(c + r, len(c)) for c, r in zip(contexts, replies, strict=True)]
    np.testing.assert_allclose(nats, slow, rtol=1e-5)


def test_a_long_context_loses_its_oldest_tokens():
    (batch,) = perplexity.continuation_batches([[1, 2, 3, 4]], [[5, 6]], 1, 3)
    np.testing.assert_array_equal(batch.tokens, [[3, 4, 5]])
    np.testing.assert_array_equal(batch.targets, [[4, 5, 6]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1]])


def test_padding_rows_and_slots_are_masked():
    batches = list(perplexity.continuation_batches([[1], [1], [1]], [[2], [2, 3], [4]], 2, 4))
    assert [batch.tokens.shape for batch in batches] == [(2, 4), (2, 4)]
    np.testing.assert_array_equal(batches[1].loss_mask, [[1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batches[1].segment_ids, [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_nothing_to_predict_is_an_error(model, params):
    empty = TokenBatch(
        tokens=np.zeros((1, 2), np.int32), targets=np.zeros((1, 2), np.int32),
        loss_mask=np.zeros((1, 2), np.float32), segment_ids=np.zeros((1, 2), np.int32),
        positions=np.zeros((1, 2), np.int32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no token"):
        perplexity.held_out(perplexity.make_nll(model), params, [empty], np.ones(VOCAB, int))
