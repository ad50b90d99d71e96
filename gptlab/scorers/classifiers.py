"""Linear models over TF-IDF features: a judge, and the baseline of every reward model.

They are fitted on comparisons, as Bradley-Terry models whose strengths are linear in the features:
P(i beats j) = sigmoid(w . (x_i - x_j)).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from gptlab.data import records
from gptlab.data.records import Comparison, Prompt
from gptlab.run.errors import UserError

# Apostrophes stay inside words, and ! and ? are features of their own.
_TOKEN = r"(?u)\w+(?:['\u2019]\w+)*|[!?]"


class Tfidf:
    """A fitted linear scorer of replies; make one by `fit_comparisons`."""

    def __init__(self, vectorizer, weights: np.ndarray, name: str):
        """Takes a fitted TfidfVectorizer of F features and weights float64 [F]."""
        self._vectorizer = vectorizer
        self._weights = weights
        self.name = name

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Strengths, float32 [n]."""
        del prompts
        if not len(replies):
            return np.zeros(0, np.float32)
        return (self._vectorizer.transform(replies) @ self._weights).astype(np.float32)


def fit_comparisons(
    comparisons: Iterable[Comparison], *, min_count: int = 2, inverse_penalty: float = 1.0
) -> Tfidf:
    """Fits a Bradley-Terry model on rankings.

    Tied pairs are left out; the pairs of one comparison weigh 1 together, as in a reward model's
    loss.

    Raises:
      UserError: no pair is ranked strictly, or no feature occurs min_count times.
    """
    from sklearn.linear_model import LogisticRegression

    replies: list[str] = []
    better, worse, weight = [], [], []
    for comparison in comparisons:
        base = len(replies)
        replies += [candidate.content for candidate in comparison.candidates]
        pairs = list(_strict_pairs(comparison.ranks))
        better += [base + i for i, _ in pairs]
        worse += [base + j for _, j in pairs]
        weight += [1 / max(len(pairs), 1)] * len(pairs)
    if not better:
        raise UserError("no comparison ranks one reply above another: nothing to fit")
    vectorizer = _fit_vectorizer(replies, min_count)
    features = vectorizer.transform(replies)
    difference = features[better] - features[worse]
    # The loss of (x, 1) is that of (-x, 0): turning every other pair round changes nothing but
    # gives the solver the two classes it asks for.
    sign = np.where(np.arange(len(better)) % 2, -1.0, 1.0)
    difference = difference.multiply(sign[:, None]).tocsr()
    if len(better) == 1:
        difference, sign, weight = _with_mirror_image(difference, sign, weight)
    model = LogisticRegression(
        C=inverse_penalty, fit_intercept=False, solver="liblinear", random_state=0
    )
    model.fit(difference, sign > 0, sample_weight=np.array(weight))
    return Tfidf(vectorizer, model.coef_[0], "tfidf_comparisons")


def fit_comparison_records(
    workdir: str | os.PathLike,
    records_name: str,
    split: str,
    min_count: int,
    inverse_penalty: float,
) -> Tfidf:
    """`fit_comparisons` on the records of an artifact."""
    directory = epath.Path(workdir) / "records"
    reader = records.RecordReader(directory, records_name, split, Comparison)
    return fit_comparisons(reader, min_count=min_count, inverse_penalty=inverse_penalty)


def _strict_pairs(ranks: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(i, j) where i is ranked above j."""
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            yield i, j


def _with_mirror_image(difference, sign: np.ndarray, weight: list[float]):
    from scipy import sparse

    return sparse.vstack([difference, -difference]), np.array([sign[0], -sign[0]]), weight * 2


def _fit_vectorizer(texts: Sequence[str], min_count: int):
    """Words and pairs of neighbouring words, with sublinear term frequencies."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=min_count, sublinear_tf=True, token_pattern=_TOKEN
    )
    try:
        return vectorizer.fit(texts)
    except ValueError as error:
        raise UserError(
            f"no word occurs in {min_count} of {len(texts)} texts: lower min_count or add texts"
        ) from error
