"""Which of two systems is preferred, how surely, and how well a reward model predicts preferences.

Everything is numpy over per-prompt figures, and every interval is a bootstrap over *prompts*:
replies to one prompt are not independent of each other, prompts are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval. All three are in the unit of the values."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three figures by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, figures: Mapping[str, float | str]) -> "Interval":
        """From the three figures; one that is not finite may come as a string."""
        return cls(**{name: float(value) for name, value in figures.items()})


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: the number of resamples, the seed and the coverage."""

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def weights(self, num_prompts: int) -> np.ndarray:
        """How often every resample holds every prompt, divided by the number of prompts.

        Returns:
          float64 [R, P]; each row sums to 1.
        """
        if num_prompts < 1:
            raise ValueError("a bootstrap over prompts needs at least one prompt")
        rng = np.random.default_rng(self.seed)
        uniform = np.full(num_prompts, 1.0 / num_prompts)
        return rng.multinomial(num_prompts, uniform, size=self.resamples) / num_prompts

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Sums over the rows [P, F] of every resample: float64 [R, F].

        Rows that are alike are drawn together, which changes nothing in how the sums are
        distributed: counts of a few kinds are cheap, however many prompts there are.
        """
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        rng = np.random.default_rng(self.seed)
        return rng.multinomial(len(rows), counts / len(rows), size=self.resamples) @ kinds

    def interval(self, mean: float, resampled: np.ndarray) -> Interval:
        """The percentile interval of resampled statistics [R] beside the full sample's."""
        tail = 50.0 * (1.0 - self.level)
        low, high = np.percentile(resampled, [tail, 100.0 - tail])
        return Interval(float(mean), float(low), float(high))


def mean_interval(values: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """Mean of per-prompt values [P] with its interval."""
    values = np.asarray(values, np.float64)
    return bootstrap.interval(values.mean(), bootstrap.weights(len(values)) @ values)


def wins(scores: np.ndarray, others: np.ndarray, tie_margin: float = 0.0) -> np.ndarray:
    """Per-prompt outcomes: 1 where `scores` is higher, 0 where lower, 1/2 for a tie.

    Args:
      scores: [P], the judge's score of the first system's reply.
      others: [P], of the second system's reply to the same prompt.
      tie_margin: differences up to this many units of score are ties.

    Returns:
      float64 [P].
    """
    difference = np.asarray(scores, np.float64) - np.asarray(others, np.float64)
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0).astype(np.float64))


def win_rate(
    scores: np.ndarray, others: np.ndarray, bootstrap: Bootstrap, tie_margin: float = 0.0
) -> Interval:
    """Share of prompts that the first system wins, ties counting one half."""
    return mean_interval(wins(scores, others, tie_margin), bootstrap)


def paired_difference(scores: np.ndarray, others: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """Mean of `scores - others` [P]: prompts are resampled once for both systems."""
    return mean_interval(np.asarray(scores, np.float64) - np.asarray(others, np.float64), bootstrap)


def length_controlled_win_rate(
    outcomes: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray, bootstrap: Bootstrap
) -> Interval:
    """The win rate that would be seen if both systems wrote replies of equal length.

    The logistic regression of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475,
    equation 1) without its per-instruction term, which needs many systems to be fitted:
    P(win) = sigmoid(theta + phi tanh((length - other) / std)). The figure is sigmoid(theta), the
    model's prediction at no difference. A weak ridge keeps theta finite for a system that wins
    everything.

    Args:
      outcomes: [P] from `wins` (ties 1/2).
      lengths: [P], of the first system's replies, in tokens.
      other_lengths: [P], of the second system's.
      bootstrap: how the interval is made.
    """
    outcomes = np.asarray(outcomes, np.float64)
    difference = np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64)
    spread = difference.std()
    feature = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    uniform = np.full((1, len(outcomes)), 1.0 / len(outcomes))
    theta = _fit_logistic(feature, outcomes, uniform)[:, 0]
    resampled = _fit_logistic(feature, outcomes, bootstrap.weights(len(outcomes)))[:, 0]
    return bootstrap.interval(special.expit(theta[0]), special.expit(resampled))


def _fit_logistic(
    feature: np.ndarray, outcomes: np.ndarray, weights: np.ndarray, steps: int = 30
) -> np.ndarray:
    """Newton's method for all R weighted two-parameter regressions at once.

    Returns:
      float64 [R, 2], theta and phi of each row of `weights` [R, P].
    """
    design = np.stack([np.ones_like(feature), feature], axis=1)  # [P, 2]
    products = (design[:, :, None] * design[:, None, :]).reshape(-1, 4)
    ridge = 0.5 / len(feature)  # half a pseudo-observation in all, whatever the prompts' number
    solution = np.zeros((len(weights), 2))
    for _ in range(steps):
        predicted = special.expit(solution @ design.T)  # [R, P]
        gradient = (weights * (outcomes - predicted)) @ design - ridge * solution
        curvature = weights * predicted * (1.0 - predicted)
        hessian = (curvature @ products).reshape(-1, 2, 2) + ridge * np.eye(2)
        change = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A Newton step may overshoot where the curve is flat: a bounded step still converges.
        solution += np.clip(change, -2.0, 2.0)
    return solution


def kl_matched_difference(
    gains: np.ndarray,
    log_ratios: np.ndarray,
    other_gains: np.ndarray,
    other_log_ratios: np.ndarray,
    bootstrap: Bootstrap,
) -> Interval:
    """First system's gain minus the second's, both brought to the smaller of the two KLs.

    A policy that has moved further from the reference has bought its gain at a higher price. The
    mixture that answers with it with probability p, and with the reference otherwise, has gain
    p times as large and, KL being convex, at most p times the KL. So p = (smaller KL) / (larger
    KL) is a policy that exists at the smaller KL; it is a lower bound of what the further one
    could do there, which makes the comparison conservative against the one with the larger KL.

    Args:
      gains: [P], gold score of the first system minus the reference's on the same prompt.
      log_ratios: [P], sequence log-ratio of the first system's sample to the reference.
      other_gains, other_log_ratios: [P], the same for the second system.
      bootstrap: how the interval is made; KLs are resampled together with the gains.
    """

    def difference(weights: np.ndarray) -> np.ndarray:
        gain, other_gain = weights @ np.asarray(gains), weights @ np.asarray(other_gains)
        # A Monte Carlo estimate of a KL near zero may be negative; the KL itself is not.
        kl = np.maximum(weights @ np.asarray(log_ratios), 1e-6)
        other_kl = np.maximum(weights @ np.asarray(other_log_ratios), 1e-6)
        matched = np.minimum(kl, other_kl)
        return gain * matched / kl - other_gain * matched / other_kl

    num_prompts = len(gains)
    full = difference(np.full((1, num_prompts), 1.0 / num_prompts))[0]
    return bootstrap.interval(full, difference(bootstrap.weights(num_prompts)))


# Reward models against rankings.


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs of candidates that a labeller told apart, better candidate first.

    `row` is the comparison, `better` and `worse` are the candidates' columns: int64 [M].
    """

    row: np.ndarray
    better: np.ndarray
    worse: np.ndarray

    def margins(self, rewards: np.ndarray) -> np.ndarray:
        """Reward of the better minus reward of the worse candidate: [M] from rewards [B, N]."""
        return rewards[self.row, self.better] - rewards[self.row, self.worse]


def ranked_pairs(ranks: np.ndarray) -> Pairs:
    """The pairs of a batch of rankings [B, N] (1 = best, equal = tie, 0 = absent); ties dropped."""
    ranks = np.asarray(ranks)
    first, second = ranks[:, :, None], ranks[:, None, :]
    row, better, worse = np.nonzero((first > 0) & (second > 0) & (first < second))
    return Pairs(row, better, worse)


def strict_accuracy(margins: np.ndarray) -> float:
    """Share of pairs [M] with a margin above zero: an equal reward is a mistake, not half of one.

    Not a number when there is no pair.
    """
    margins = np.asarray(margins)
    return float((margins > 0).mean()) if margins.size else float("nan")


def accuracy_interval(margins: np.ndarray, prompts: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """`strict_accuracy` with its interval over prompts, whose pairs are resampled together.

    Args:
      margins: [M], reward of the better minus the worse candidate.
      prompts: [M], which prompt each pair answers: ids of any kind.
      bootstrap: how the interval is made.
    """
    if not np.size(margins):
        return Interval(*[float("nan")] * 3)
    _, of = np.unique(prompts, return_inverse=True)
    weights = bootstrap.weights(of.max() + 1)
    right = np.bincount(of, weights=np.asarray(margins) > 0)
    resampled = (weights @ right) / (weights @ np.bincount(of))  # every prompt has a pair
    return bootstrap.interval(strict_accuracy(margins), resampled)


def reliability(margins: np.ndarray, num_bins: int = 10) -> list[dict[str, float]]:
    """Calibration of sigmoid(margin): predicted confidence against observed frequency.

    A pair has no natural order, so the prediction is the confidence sigmoid(|margin|) in [1/2, 1]
    that the candidate with the higher reward is the better one. Equal rewards (confidence exactly
    1/2) say nothing about which, and count as right half of the time.

    Args:
      margins: [M], reward of the better minus the worse candidate.
      num_bins: equal-width bins of [1/2, 1]; empty ones are left out.

    Returns:
      One row a bin: `low`, `high`, `count`, `confidence` (mean prediction), `accuracy` (observed).
    """
    margins = np.asarray(margins, np.float64)
    confidence = special.expit(np.abs(margins))
    right = np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    index = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
    rows = []
    for i in range(num_bins):
        inside = index == i
        if inside.any():
            rows.append({
                'low': float(edges[i]), 'high': float(edges[i + 1]),
                'count': int(inside.sum()),
                'confidence': float(confidence[inside].mean()),
                'accuracy': float(right[inside].mean()),
            })  # fmt: skip
    return rows


def expected_calibration_error(rows: list[dict[str, float]]) -> float:
    """Mean |confidence - accuracy| over the pairs of a reliability table (Naeini et al. 2015)."""
    total = sum(row["count"] for row in rows)
    gap = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return gap / total if total else float("nan")


# Best of n.


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound log n - (n - 1) / n of KL(best of n || policy), in nats.

    Exact for continuous scores only: Stiennon et al. 2020 quote it as the KL; for discrete outputs
    Beirami et al. 2024 (arXiv 2401.01879) show it to be a bound.
    """
    return float(np.log(n) - (n - 1) / n)


def best_of_n(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """Unbiased expected gold score of the candidate with the best proxy among n.

    Averages over all C(N, n) subsets of the N samples a prompt: the i-th lowest proxy (from 1) is
    the best of C(i - 1, n - 1) of them (Nakano et al. 2021, arXiv 2112.09332, appendix I).
    Candidates of equal proxy share their gold, as if the tie were broken at random.

    Args:
      proxy: [P, N], what selects.
      gold: [P, N], what is reported.
      n: 1 to N.

    Returns:
      float64 [P].
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    num_samples = proxy.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"best of {n} needs between 1 and {num_samples} samples a prompt")
    order = np.argsort(proxy, axis=1)
    proxy, gold = np.take_along_axis(proxy, order, 1), np.take_along_axis(gold, order, 1)
    position = np.arange(1, num_samples + 1)
    weight = special.comb(position - 1, n - 1) / special.comb(num_samples, n)
    # Equal proxies are neighbours now: group them by a running number over the whole array.
    starts = np.diff(proxy, axis=1, prepend=-np.inf) > 0
    group = (np.cumsum(starts, axis=1) + np.arange(len(proxy))[:, None] * (num_samples + 1)).ravel()
    shared = np.bincount(group, gold.ravel()) / np.maximum(np.bincount(group), 1)
    return shared[group].reshape(gold.shape) @ weight


def to_json(figures: Mapping[str, object]) -> dict[str, object]:
    """Figures with every Interval replaced by its three numbers, recursively."""
    plain: dict[str, object] = {}
    for name, value in figures.items():
        if isinstance(value, Interval):
            plain[name] = value.to_json()
        elif isinstance(value, Mapping):
            plain[name] = to_json(value)
        else:
            plain[name] = value
    return plain


def from_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Back from to_json: what has the three numbers of an Interval becomes one, recursively."""

    def back(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return Interval.from_json(value) if "low" in value else from_json(value)

    return {name: back(value) for name, value in figures.items()}
