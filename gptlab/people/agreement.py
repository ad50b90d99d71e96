"""How far people agree: pairs ordered alike, Krippendorff's alpha, position bias, with intervals.

A ranking is read as its pairs of replies: the first is preferred, the second is, or they tie.
Intervals are a bootstrap over *tasks*, as pairs of one task are not independent of each other. All
of it is over arrays: a server computes it beside other requests, and numpy lets those go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from gptlab.evals.preference import Bootstrap, Interval

METRICS = ("nominal", "ordinal", "interval")
PREFERENCES = 3  # the first is preferred, tie, the second is
NOTHING = Interval(float("nan"), float("nan"), float("nan"))

Rankings = Mapping[str, Sequence[int]]  # of one task: who -> ranks, in the candidates' own order


def krippendorff_alpha(units: Iterable[Sequence[float]], metric: str) -> float:
    """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives.

        alpha = 1 - D_o / D_e,   D_o = sum_ck o_ck d2_ck,   D_e = 1/(n-1) sum_ck n_c n_k d2_ck

    o_ck counts pairs of values within a unit, each unit's m_u values as m_u pairs (weight
    1/(m_u - 1)); n_c are its row sums, n their sum. d2_ck is 1 for c != k ('nominal'), (c - k)^2
    ('interval'), or (sum_{g=c..k} n_g - (n_c + n_k)/2)^2 ('ordinal'). Units with one value don't
    count. (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.)

    Args:
      units: what each unit was given, by however many observers; missing values left out.
      metric: one of METRICS.

    Returns:
      NaN if no unit has two values, or if all values are one and the same.
    """
    listed = [list(unit) for unit in units]
    values = sorted({value for unit in listed for value in unit})
    index = {value: i for i, value in enumerate(values)}
    counts = np.zeros((len(listed), len(values)))
    for row, unit in enumerate(listed):
        for value in unit:
            counts[row, index[value]] += 1
    pairs = coincidences(counts).sum(axis=0, keepdims=True)
    return float(alpha_of(pairs, np.asarray(values, np.float64), metric)[0])


def coincidences(counts: np.ndarray) -> np.ndarray:
    """float64 [U, C, C]: pairs of values within each unit, each pair with weight 1/(m_u - 1).

    Args:
      counts: [U, C], how often each unit was given each value.
    """
    counts = np.asarray(counts, np.float64)
    own = counts[:, :, None] * np.eye(counts.shape[1])
    pairs = counts[:, :, None] * counts[:, None, :] - own  # a value is no pair with itself
    others = counts.sum(axis=1)[:, None, None] - 1
    return np.where(others > 0, pairs / np.maximum(others, 1), 0.0)


def alpha_of(pairs: np.ndarray, values: np.ndarray, metric: str) -> np.ndarray:
    """Alpha [R] of coincidence matrices [R, C, C] over these values [C], in ascending order."""
    totals = pairs.sum(axis=2)  # [R, C]
    if metric == "nominal":
        squared = np.broadcast_to(1.0 - np.eye(len(values)), pairs.shape)
    elif metric == "interval":
        squared = np.broadcast_to((values[:, None] - values[None, :]) ** 2, pairs.shape)
    elif metric == "ordinal":
        middle = np.cumsum(totals, axis=1) - totals / 2  # between c and k lie their middles
        squared = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        raise ValueError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    count = totals.sum(axis=1)
    observed = (pairs * squared).sum(axis=(1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * squared).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (count - 1) * observed / expected, np.nan)


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What people prefer in pairs of replies. A unit is a pair of one task, E how many were given.

    Attributes:
      people: who ranked.
      tasks: how many there are.
      task: int [U], of each unit.
      counts: float64 [U, 3], how many prefer the first reply, tie, prefer the second.
      unit, person, side: int [E], of each preference: its unit, who gave it (as an index into
        `people`), and which of the three.
    """

    people: tuple[str, ...]
    tasks: int
    task: np.ndarray
    counts: np.ndarray
    unit: np.ndarray
    person: np.ndarray
    side: np.ndarray

    @staticmethod
    def of(tasks: Sequence[Rankings]) -> Preferences:
        """Those of these tasks' rankings."""
        given = [(i, who, ranks) for i, own in enumerate(tasks) for who, ranks in own.items()]
        people = {who: i for i, who in enumerate(dict.fromkeys(who for _, who, _ in given))}
        units: list[np.ndarray] = [np.empty(0, np.int64)]
        found: list[np.ndarray] = [np.empty((3, 0), np.int64)]  # unit, person, side
        for rows, ranks in _by_length([ranks for *_, ranks in given]):
            orders = _orders(ranks)  # [n, pairs]
            pairs, before = orders.shape[1], sum(map(len, units))
            own, index = np.unique([given[row][0] for row in rows], return_inverse=True)
            unit = before + index[:, None] * pairs + np.arange(pairs)
            person = np.array([people[given[row][1]] for row in rows])[:, None]
            entries = (unit, np.broadcast_to(person, unit.shape), 1 - orders)
            found.append(np.stack([entry.ravel() for entry in entries]))
            units.append(np.repeat(own, pairs))
        unit, person, side = np.concatenate(found, axis=1)
        task = np.concatenate(units)
        counts = np.bincount(unit * PREFERENCES + side, minlength=len(task) * PREFERENCES)
        counts = counts.reshape(-1, PREFERENCES).astype(np.float64)
        return Preferences(tuple(people), len(tasks), task, counts, unit, person, side)

    def of_tasks(self, values: np.ndarray) -> np.ndarray:
        """Figures of units [U, F], summed within each task: [tasks, F]."""
        sums = np.zeros((self.tasks, values.shape[1]))
        np.add.at(sums, self.task, values)
        return sums


def preference_alpha(given: Preferences, bootstrap: Bootstrap) -> Interval:
    """Alpha of pairwise preferences (first, tie, second), ordinal; a unit is a pair of replies."""
    sums = given.of_tasks(coincidences(given.counts).reshape(-1, PREFERENCES**2))
    values = np.arange(PREFERENCES, dtype=np.float64)

    def alphas(flat: np.ndarray) -> np.ndarray:
        return alpha_of(flat.reshape(-1, PREFERENCES, PREFERENCES), values, "ordinal")

    full = float(alphas(sums.sum(axis=0))[0])
    if not np.isfinite(full):
        return NOTHING
    resampled = alphas(bootstrap.sums(sums))
    return bootstrap.interval(full, resampled[np.isfinite(resampled)])


def pair_agreement(
    given: Preferences, bootstrap: Bootstrap, person: str | None = None
) -> tuple[Interval, int]:
    """Of the pairs that two people both order strictly, the share they order alike; and how many.

    `person`: only that one's pairs with the others.
    """
    if person is None:
        first, _, second = given.counts.T
        alike, both = _pairs_of(first) + _pairs_of(second), _pairs_of(first + second)
        sums = given.of_tasks(np.stack([alike, both], axis=1))
    else:
        number = given.people.index(person) if person in given.people else -1
        own = (given.person == number) & (given.side != 1)
        unit = given.unit[own]
        strict = given.counts[unit]
        same = strict[np.arange(len(unit)), given.side[own]] - 1
        others = strict[:, 0] + strict[:, 2] - 1
        sums = np.zeros((given.tasks, 2))
        np.add.at(sums, given.task[unit], np.stack([same, others], axis=1))
    return share(sums, bootstrap), int(sums[:, 1].sum())


def position_bias(
    shown: Sequence[tuple[Sequence[int], Sequence[int]]], bootstrap: Bootstrap
) -> tuple[Interval, int]:
    """How often the reply that stood first of a pair was preferred, minus 1/2; and of how many.

    Args:
      shown: of each judgement, its ranks in the candidates' own order, and the order shown
        (shown[i] is the candidate in place i). Ties don't count. Each judgement is resampled as
        one.
      bootstrap: how the interval is made.
    """
    sums = np.zeros((len(shown), 2))
    for rows, ranks in _by_length([ranks for ranks, _ in shown]):
        places = np.array([shown[row][1] for row in rows])
        orders = _orders(np.take_along_axis(ranks, places, axis=1))
        sums[rows] = np.stack([(orders > 0).sum(axis=1), (orders != 0).sum(axis=1)], axis=1)
    interval = share(sums, bootstrap)
    moved = Interval(interval.mean - 0.5, interval.low - 0.5, interval.high - 0.5)
    return moved, int(sums[:, 1].sum())


def tie_rate(rankings: Sequence[Sequence[int]]) -> float:
    """Of all pairs of replies, the share that is tied; NaN without any."""
    ties = pairs = 0
    for _, ranks in _by_length(rankings):
        orders = _orders(ranks)
        ties, pairs = ties + int((orders == 0).sum()), pairs + orders.size
    return ties / pairs if pairs else float("nan")


def share(sums: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """sum of parts / sum of wholes over rows [U, 2], with its interval; NaN without a whole."""
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return NOTHING
    part, whole = bootstrap.sums(sums).T
    return bootstrap.interval(float(sums[:, 0].sum() / sums[:, 1].sum()), part / whole)


def _by_length(rankings: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rankings of as many replies as arrays [n, K], with their places in the sequence [n]."""
    lengths = np.array([len(ranks) for ranks in rankings], np.int64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        yield rows, np.array([rankings[row] for row in rows.tolist()])


def _orders(ranks: np.ndarray) -> np.ndarray:
    """int [n, pairs] of ranks [n, K]: 1 where the earlier reply wins, -1 the later, 0 a tie."""
    first, second = np.triu_indices(ranks.shape[1], 1)
    return np.sign(ranks[:, second] - ranks[:, first])


def _pairs_of(counts: np.ndarray) -> np.ndarray:
    """How many pairs can be made of so many people."""
    return counts * (counts - 1) / 2
