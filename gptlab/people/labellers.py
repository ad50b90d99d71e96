"""Simulated labellers: a scorer's judgement plus noise of a known level.

A labeller's utility of reply i is u_i = s_i + noise * G_i, where s_i is the scorer's clean score
and G_i independent standard Gumbel noise. Then P(i is ranked above j) = sigmoid((s_i - s_j) /
noise), the Bradley-Terry model, and whole rankings follow Plackett-Luce (Luce 1959, Plackett 1975;
that Gumbel noise and no other does this: Yellott 1977). Noise per reply keeps rankings transitive,
which independent flips of pairs would not, and the best accuracy that anything can reach on such
labels is known in closed form (`ceiling`).

Two replies can be tied. In order of utility, replies within `tie_margin` of the best one of their
group share its rank; the first that is further away begins the next group. (Chaining neighbours
instead would tie replies that are far apart.) With tie_margin 0 only equal utilities tie, that is
replies of equal score under noise 0.

A *clean tie* is a pair whose scores are equal (two replies without a rated word, both VADER 0.0):
no order of it is right, so it counts in no strict accuracy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special

from gptlab.data.records import CandidateSet, Comparison, Prompt
from gptlab.run.errors import UserError
from gptlab.scorers.registry import Scorer

_NAME = re.compile(r"simulated:.*,noise=(?P<noise>[^,]+),tie_margin=(?P<tie_margin>[^,]+),seed=.*")


class SimulatedLabeller:
    """Ranks candidate sets; its comparisons are marked simulated and carry the clean scores."""

    def __init__(self, scorer: Scorer, noise: float, tie_margin: float, seed: int):
        """Makes a labeller.

        Args:
          scorer: its clean judgement.
          noise: scale of the Gumbel noise in units of the score; 0 is a perfect labeller.
          tie_margin: see the module's text; in units of the score.
          seed: two labellers of different seeds make independent mistakes.
        """
        if noise < 0 or tie_margin < 0:
            raise UserError(
                f"labeller: noise={noise} and tie_margin={tie_margin} can't be negative"
            )
        self.scorer, self.noise, self.tie_margin, self.seed = scorer, noise, tie_margin, seed
        self.name = f"simulated:{scorer.name},noise={noise:g},tie_margin={tie_margin:g},seed={seed}"

    def compare(self, candidate_sets: Iterable[CandidateSet]) -> list[Comparison]:
        """Ranks every set. A ranking depends on its set and the seed alone, not on the others.

        Raises:
          UserError: a set has fewer than two candidates, or a score is not finite.
        """
        sets = list(candidate_sets)
        prompts: list[Prompt] = []
        replies: list[str] = []
        for item in sets:
            if len(item.candidates) < 2:
                raise UserError(f"candidate set {item.id} has fewer than two candidates to rank")
            prompts += [item.prompt] * len(item.candidates)
            replies += [candidate.content for candidate in item.candidates]
        scores = np.asarray(self.scorer(prompts, replies), np.float64)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise UserError(
                f"scorer {self.scorer.name} gave {scores[bad[0]]} for {replies[bad[0]][:80]!r}"
            )
        rankings, begin = [], 0
        for item in sets:
            end = begin + len(item.candidates)
            rankings.append(self._compare_one(item, scores[begin:end]))
            begin = end
        return rankings

    def _compare_one(self, item: CandidateSet, scores: np.ndarray) -> Comparison:
        digest = hashlib.blake2b(item.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest, "big")])
        utilities = scores + self.noise * rng.gumbel(size=len(scores))
        return Comparison(
            id=f"{item.id}:{self.name}",
            prompt=item.prompt,
            candidates=item.candidates,
            ranks=ranks_of(utilities, self.tie_margin),
            labeller=self.name,
            simulated=True,
            scores=tuple(float(score) for score in scores),
        )


def ranks_of(utilities: np.ndarray, tie_margin: float) -> tuple[int, ...]:
    """Ranks from 1 (best) without gaps; replies within tie_margin of their group's best one tie."""
    ranks = np.zeros(len(utilities), np.int64)
    rank, leader = 0, np.inf
    for i in np.argsort(-utilities, kind="stable"):
        if leader - utilities[i] > tie_margin:
            rank, leader = rank + 1, utilities[i]
        ranks[i] = rank
    return tuple(int(rank) for rank in ranks)


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What a labeller's noise allows, expected over its noise and pooled over all pairs.

    accuracy: of the pairs it ranks strictly, clean ties left out, the share it ranks as the clean
      scores do. No predictor does better on its labels than the clean order.
    agreement: of the pairs that two such labellers both rank strictly, the share they rank alike.
    tie_rate: share of pairs it ties.
    clean_tie_rate: share of pairs with equal clean scores.
    """

    accuracy: float
    agreement: float
    tie_rate: float
    clean_tie_rate: float


def ceiling(scores: Iterable[Sequence[float]], noise: float, tie_margin: float) -> Ceiling:
    """The ceiling of a labeller on candidate sets with these clean scores, in closed form.

    For a pair with d = s_i - s_j the difference of utilities is d plus logistic noise, hence

        P(i above j) = sigmoid((d - tie_margin) / noise) =: p
        P(j above i) = sigmoid((-d - tie_margin) / noise) =: q
        accuracy  = sum max(p, q) / sum (p + q)      over pairs with d != 0
        agreement = sum (p^2 + q^2) / sum (p + q)^2  over all pairs

    Exact for two candidates or tie_margin 0. With more candidates the boundary of a group can part
    two replies that are within tie_margin of each other, so tie_rate is an upper bound then.

    Args:
      scores: clean scores of each candidate set.
      noise: the labeller's.
      tie_margin: the labeller's.

    Returns:
      Figures in [0, 1]; NaN where no pair counts.
    """
    differences = _pair_differences(scores)
    if noise > 0:
        above = special.expit((differences - tie_margin) / noise)
        below = special.expit((-differences - tie_margin) / noise)
    else:
        above = (differences > tie_margin).astype(np.float64)
        below = (-differences > tie_margin).astype(np.float64)
    strict = above + below
    clean = differences != 0
    return Ceiling(
        accuracy=_ratio(np.maximum(above, below)[clean].sum(), strict[clean].sum()),
        agreement=_ratio((above**2 + below**2).sum(), (strict**2).sum()),
        tie_rate=_ratio((1 - strict).sum(), len(strict)),
        clean_tie_rate=_ratio((~clean).sum(), len(clean)),
    )


@dataclasses.dataclass(frozen=True)
class Observed:
    """The same figures as `Ceiling`, counted on labels that were given."""

    pairs: int
    accuracy: float
    tie_rate: float


def observe(comparisons: Iterable[Comparison]) -> Observed:
    """Counts how often simulated labels follow their clean scores. Fields as in `Ceiling`."""
    pairs = ties = strict = right = 0
    for comparison in comparisons:
        if comparison.scores is None:
            raise ValueError(f"comparison {comparison.id} has no clean scores")
        upper = np.triu_indices(len(comparison.ranks), 1)
        ranks, scores = np.array(comparison.ranks), np.array(comparison.scores)
        order = (ranks[upper[1]] - ranks[upper[0]]).astype(np.int64)  # > 0: the first is preferred
        difference = scores[upper[0]] - scores[upper[1]]
        counted = (order != 0) & (difference != 0)
        pairs, ties = pairs + len(order), ties + int((order == 0).sum())
        strict += int(counted.sum())
        right += int((np.sign(order) == np.sign(difference))[counted].sum())
    return Observed(pairs, _ratio(right, strict), _ratio(ties, pairs))


def expected_agreement(comparisons: Iterable[Comparison]) -> float:
    """`Ceiling.agreement` of the simulated ones among these comparisons, pooled over labellers.

    NaN if there is none: nobody knows how noisy people are.
    """
    scores: dict[tuple[float, float], list[tuple[float, ...]]] = {}
    for comparison in comparisons:
        if comparison.scores is not None:
            scores.setdefault(level(comparison.labeller), []).append(comparison.scores)
    parts = [(ceiling(own, *known).agreement, len(own)) for known, own in scores.items()]
    return _ratio(sum(agreement * n for agreement, n in parts), sum(n for _, n in parts))


def level(labeller: str) -> tuple[float, float]:
    """(noise, tie_margin) of a simulated labeller, from the name that its comparisons carry."""
    match = _NAME.fullmatch(labeller)
    if match is None:
        raise UserError(f"{labeller!r} is not the name of a simulated labeller")
    return float(match["noise"]), float(match["tie_margin"])


def _pair_differences(scores: Iterable[Sequence[float]]) -> np.ndarray:
    """s_i - s_j of every pair i < j within every set, float64 [pairs]."""
    parts = [np.zeros(0)]
    for own in scores:
        values = np.asarray(own, np.float64)
        first, second = np.triu_indices(len(values), 1)
        parts.append(values[first] - values[second])
    return np.concatenate(parts)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
