"""Scores that a few lines compute exactly: canaries for the loops, and controls for length."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from gptlab.data.records import Prompt
from gptlab.run.errors import UserError

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, with inner apostrophes ("don't" is one word)."""
    return _WORD.findall(text.lower())


class WordFraction:
    """Share of the reply's words that are in a set, 0 to 1; 0 for a reply without words."""

    def __init__(self, words: Sequence[str]):
        """Takes the set of words, compared in lower case."""
        self._words = {word.lower() for word in words}
        if not self._words:
            raise UserError("scorer 'word_fraction': `words` is empty")
        self.name = f"word_fraction({','.join(sorted(self._words)[:3])}...{len(self._words)})"

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Shares float32 [n]; the prompts do not count."""
        del prompts
        shares = []
        for reply in replies:
            words = words_of(reply)
            shares.append(sum(word in self._words for word in words) / max(len(words), 1))
        return np.array(shares, np.float32)


class Length:
    """Length of the reply in words: the 'longer wins' baseline."""

    name = "length"

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Numbers of words float32 [n]; the prompts do not count."""
        del prompts
        return np.array([len(words_of(reply)) for reply in replies], np.float32)


class Repetition:
    """Minus the share of word n-grams that the reply had before: 0 is best, -1 worst."""

    def __init__(self, ngram: int):
        """Takes the number of words in an n-gram."""
        if ngram < 1:
            raise UserError(f"scorer 'repetition': ngram={ngram}; it must be at least 1")
        self._ngram = ngram
        self.name = f"repetition({ngram})"

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Scores float32 [n]; a reply of fewer words than an n-gram has no repetition."""
        del prompts
        scores = []
        for reply in replies:
            words = words_of(reply)
            grams = [tuple(words[i : i + self._ngram]) for i in range(len(words) - self._ngram + 1)]
            scores.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
        return np.array(scores, np.float32)
