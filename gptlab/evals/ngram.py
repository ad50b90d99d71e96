"""N-gram baselines for pretraining: what a language model must beat to have learnt anything.

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1998, TR-10-98, section 2.7) over
token ids, orders 1 to 3, with one discount for each order. A model of order n uses raw counts at
order n and continuation counts (in how many different left contexts a sequence occurs) below:

    P(w | h) = max(c(h w) - D, 0) / c(h .) + D N(h .) / c(h .) P(w | h')

where N(h .) is the number of different words seen after h, and h' is h without its first word.
Under the unigram lies the uniform distribution over the vocabulary, so every token has probability.
D = n1 / (n1 + 2 n2), n1 and n2 being how many sequences occur once and twice.

Everything is sorting: an n-gram is one int64 key, a table is a sorted array of keys with counts, a
lookup is a binary search. Fitting all three orders to 4M tokens takes 1.5 s and 0.2 GB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from gptlab.data.records import TokenExample
from gptlab.run.errors import UserError

MAX_ORDER = 3
# Used where too few sequences occur once or twice to estimate a discount.
_DEFAULT_DISCOUNT = 0.75


@dataclasses.dataclass(frozen=True)
class _Level:
    """Counts of one order. Keys are sequences of words as numbers of base V + 1, sorted."""

    keys: np.ndarray  # int64 [G], sequences of `order` words
    counts: np.ndarray  # int64 [G]
    contexts: np.ndarray  # int64 [C], sequences of order - 1 words
    totals: np.ndarray  # int64 [C], sum of the counts after each context
    types: np.ndarray  # int64 [C], different words after each context
    discount: float


class NgramModel:
    """A fitted model; `fit` makes one."""

    def __init__(self, levels: list[_Level], vocab_size: int):
        """Takes the levels from the unigram up."""
        self._levels = levels
        self._vocab_size = vocab_size

    def logprobs(self, grams: np.ndarray) -> np.ndarray:
        """Log-probability (nats) of the last word of each gram given the words before it.

        Args:
          grams: int64 [n, MAX_ORDER], of which a model of a lower order reads the last columns.

        Returns:
          float64 [n].
        """
        base = self._vocab_size + 1
        probability = np.full(len(grams), 1 / self._vocab_size)
        for order, level in enumerate(self._levels, 1):
            keys = _keys(grams, order, self._vocab_size)
            at, known = _find(level.contexts, keys // base)
            where, seen = _find(level.keys, keys)
            count = np.where(seen, level.counts[where], 0)
            own = np.maximum(count - level.discount, 0)
            below = level.discount * level.types[at] * probability
            probability = np.where(known, (own + below) / level.totals[at], probability)
        return np.log(probability)


def grams_of(examples: Iterable[TokenExample], vocab_size: int) -> np.ndarray:
    """Every token with loss and the words before it: int64 [n, MAX_ORDER].

    Before an example begins there is a word of its own, vocab_size, which is never predicted.

    Raises:
      UserError: a token id is not in the vocabulary.
    """
    start = np.full(MAX_ORDER - 1, vocab_size, np.int32)
    tokens, masks = [start], [np.zeros(MAX_ORDER - 1, np.uint8)]
    for example in examples:
        tokens += [example.tokens, start]
        masks += [example.loss_mask, masks[0]]
    flat = np.concatenate(tokens)
    at = np.flatnonzero(np.concatenate(masks))
    if flat.max() > vocab_size or (len(at) and flat[at].max() >= vocab_size):
        raise UserError(
            f"token id {flat.max()} in a vocabulary of {vocab_size}: were the examples made with "
            "another vocabulary?"
        )
    return np.stack([flat[at - back] for back in range(MAX_ORDER - 1, -1, -1)], 1).astype(np.int64)


def fit(grams: np.ndarray, vocab_size: int, order: int) -> NgramModel:
    """Fits a model.

    Args:
      grams: of the training text, from `grams_of`.
      vocab_size: V, at most 2^20.
      order: 1 (unigram) to MAX_ORDER.

    Raises:
      UserError: no gram at all, or the vocabulary is too large.
    """
    if not len(grams) or vocab_size > 2**20:
        raise UserError(f"can't fit an n-gram model to {len(grams)} tokens of {vocab_size} kinds")
    levels: list[_Level] = []
    keys, counts = np.unique(_keys(grams, order, vocab_size), return_counts=True)
    for k in range(order, 0, -1):
        levels.insert(0, _level(keys, counts, vocab_size))
        # Below, a sequence counts once for every different word before it.
        keys, counts = np.unique(keys % (vocab_size + 1) ** (k - 1), return_counts=True)
    return NgramModel(levels, vocab_size)


def baselines(
    train: Iterable[TokenExample], held_out: Iterable[TokenExample], token_bytes: np.ndarray
) -> dict[str, float]:
    """Held-out bits per byte of the models of every order.

    Counts like train.held_out: the bits of all tokens with loss, control tokens included, over
    the bytes of the text.

    Args:
      train: what the language model is trained on, all of it.
      held_out: what it is evaluated on.
      token_bytes: int [V], UTF-8 bytes of each token.

    Returns:
      {'unigram', 'bigram', 'trigram': bits per byte}.
    """
    vocab_size = len(token_bytes)
    fitted, measured = grams_of(train, vocab_size), grams_of(held_out, vocab_size)
    num_bytes = int(token_bytes[measured[:, -1]].sum())
    if not num_bytes:
        raise UserError("no text to predict in the held-out examples")
    return {
        name: float(-fit(fitted, vocab_size, order).logprobs(measured).sum())
        / math.log(2)
        / num_bytes
        for order, name in enumerate(("unigram", "bigram", "trigram"), 1)
    }


def _level(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Level:
    # Keys are sorted, so those of one context are neighbours.
    contexts, first = np.unique(keys // (vocab_size + 1), return_index=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return _Level(
        keys=keys,
        counts=counts,
        contexts=contexts,
        totals=np.add.reduceat(counts, first),
        types=np.diff(first, append=len(keys)),
        discount=once / (once + 2 * twice) if once and twice else _DEFAULT_DISCOUNT,
    )


def _keys(grams: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """The last `order` words of each gram as one number, the oldest word first."""
    keys = np.zeros(len(grams), np.int64)
    for column in range(grams.shape[1] - order, grams.shape[1]):
        keys = keys * (vocab_size + 1) + grams[:, column]
    return keys


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each key in a sorted table (meaningless if absent), and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
