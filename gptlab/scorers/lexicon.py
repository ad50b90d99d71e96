"""Scores from word lists that people rated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptlab.data.records import Prompt


class Vader:
    """Sentiment of the reply by VADER's rules and lexicon, -1 (negative) to 1 (positive).

    The compound score of Hutto and Gilbert 2014, "VADER: A parsimonious rule-based model for
    sentiment analysis of social media text". Replies without a rated word score exactly 0. It is
    easily gamed ('great great great' scores 0.97): judge what it trains by other means as well.
    """

    name = "vader"

    def __init__(self) -> None:
        """Loads the lexicon."""
        from vaderSentiment import vaderSentiment

        self._analyzer = vaderSentiment.SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Compound scores float32 [n]; the prompts do not count."""
        del prompts
        scores = [self._analyzer.polarity_scores(reply)["compound"] for reply in replies]
        return np.array(scores, np.float32)
