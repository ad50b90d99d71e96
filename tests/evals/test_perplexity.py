"""Perplexity against sums written out slowly."""

import math

import jax
import numpy as np
import pytest

from gptlab.evals import perplexity
from gptlab.model import vocabulary
from gptlab.train import mesh as mesh_lib

VOCAB = 7


class FixedModel:
    """A model whose next-token logits depend on the current token only: rows of a table."""

    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)

    def apply(
        self, variables, tokens, targets, positions, segment_ids, deterministic, rngs, method
    ):
        assert deterministic and not rngs, "an evaluation has no dropout"
        return method(variables["params"]["table"][tokens], targets)

    def score(self, logits, targets):
        return vocabulary.of_logits(logits, targets)

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


@pytest.fixture
def mesh():
    sizes = {"replica": 1, "data": 1, "fsdp": -1, "context": 1, "tensor": 1}
    return mesh_lib.make_mesh(sizes)


def test_surprise_equals_the_slow_sum_whatever_the_batching(model, params, mesh):
    lines = [[3, 4, 5, 6, 1], [3, 6, 1], [3, 2]]
    nll = perplexity.make_nll(model, mesh)
    for batch_size in (8, 16):
        nats, counts = perplexity.continuation_nll(
            nll, params, [line[:1] for line in lines], [line[1:] for line in lines],
            batch_size, 5, mesh,
        )  # fmt: skip
        np.testing.assert_array_equal(counts, [4, 2, 1])
        np.testing.assert_allclose(
            nats, [-model.log_probability(line, 1) for line in lines], rtol=1e-5
        )


def test_only_the_continuation_counts(model, params, mesh):
    contexts, replies = [[3, 4], [5], [5]], [[1, 2, 6], [1], []]
    nats, counts = perplexity.continuation_nll(
        perplexity.make_nll(model, mesh), params, contexts, replies, 8, 8, mesh
    )
    np.testing.assert_array_equal(counts, [3, 1, 0])
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
