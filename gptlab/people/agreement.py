"""How far people agree: pairs ordered alike, Krippendorff's alpha, position bias, with intervals.

A ranking is read as its pairs of replies: the first is preferred, the second is, or they tie.
Intervals are a bootstrap over *tasks*, as pairs of one task are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def preference_alpha(tasks: Sequence[Rankings], bootstrap: Bootstrap) -> Interval:
    """Alpha of pairwise preferences (first, tie, second), ordinal; a unit is a pair of replies."""
    sums = np.zeros((len(tasks), PREFERENCES, PREFERENCES))
    for row, rankings in enumerate(tasks):
        if len(rankings) > 1:
            orders = np.stack([_orders(ranks) for ranks in rankings.values()])  # [people, pairs]
            counts = np.stack([(orders == sign).sum(axis=0) for sign in (1, 0, -1)], axis=1)
            sums[row] = coincidences(counts).sum(axis=0)
    values = np.arange(PREFERENCES, dtype=np.float64)
    full = float(alpha_of(sums.sum(axis=0, keepdims=True), values, "ordinal")[0])
    if not np.isfinite(full):
        return NOTHING
    flat = bootstrap.weights(len(tasks)) @ sums.reshape(len(tasks), -1) * len(tasks)
    resampled = alpha_of(flat.reshape(-1, PREFERENCES, PREFERENCES), values, "ordinal")
    return bootstrap.interval(full, resampled[np.isfinite(resampled)])


def pair_agreement(
    tasks: Sequence[Rankings], bootstrap: Bootstrap, person: str | None = None
) -> tuple[Interval, int]:
    """Of the pairs that two people both order strictly, the share they order alike; and how many.

    `person`: only that one's pairs with the others.
    """
    sums = np.zeros((len(tasks), 2))
    for row, rankings in enumerate(tasks):
        known = [(who, _orders(ranks)) for who, ranks in rankings.items()]
        for i, (first, one) in enumerate(known):
            for second, two in known[:i]:
                if person is None or person in (first, second):
                    strict = (one != 0) & (two != 0)
                    sums[row] += ((one == two) & strict).sum(), strict.sum()
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
    for row, (ranks, order) in enumerate(shown):
        orders = _orders([ranks[number] for number in order])
        sums[row] = (orders > 0).sum(), (orders != 0).sum()
    interval = share(sums, bootstrap)
    moved = Interval(interval.mean - 0.5, interval.low - 0.5, interval.high - 0.5)
    return moved, int(sums[:, 1].sum())


def share(sums: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """sum of parts / sum of wholes over rows [U, 2], with its interval; NaN without a whole."""
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return NOTHING
    part, whole = (bootstrap.weights(len(sums)) @ sums).T
    return bootstrap.interval(float(sums[:, 0].sum() / sums[:, 1].sum()), part / whole)


def _orders(ranks: Sequence[int]) -> np.ndarray:
    """int [pairs]: 1 if the earlier reply of a pair is preferred, -1 if the later, 0 for a tie."""
    values = np.asarray(ranks)
    first, second = np.triu_indices(len(values), 1)
    return np.sign(values[second] - values[first])
