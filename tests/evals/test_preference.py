"""Preference statistics against brute force, closed forms and simulated coverage."""

import itertools
import json
import math

import numpy as np
import pytest

from gptlab.evals import preference
from gptlab.run import files

BOOTSTRAP = preference.Bootstrap(resamples=200, seed=0)


def test_wins_counts_ties_as_half():
    outcome = preference.wins([1.0, 0.0, 0.5, 0.50], [0.0, 1.0, 0.5, 0.45], tie_margin=0.1)
    np.testing.assert_array_equal(outcome, [1.0, 0.0, 0.5, 0.5])
    np.testing.assert_array_equal(preference.wins([0.5], [0.45]), [1.0])


def test_win_rate_of_a_system_against_itself_is_half():
    scores = np.random.default_rng(0).normal(size=50)
    interval = preference.win_rate(scores, scores, BOOTSTRAP)
    assert list(interval.to_json().values()) == pytest.approx([0.5, 0.5, 0.5], abs=1e-12)


def test_interval_agrees_with_a_slow_bootstrap():
    values = np.random.default_rng(1).exponential(size=60)
    rng = np.random.default_rng(2)
    slow = [np.mean(rng.choice(values, size=60)) for _ in range(4000)]
    interval = preference.mean_interval(values, preference.Bootstrap(4000, 0, 0.9))
    assert interval.mean == pytest.approx(values.mean())
    np.testing.assert_allclose(
        [interval.low, interval.high], np.percentile(slow, [5, 95]), atol=0.02
    )


def test_sums_of_few_kinds_are_distributed_as_those_of_single_rows():
    rows = np.array([[1.0, 0.0]] * 30 + [[0.0, 2.0]] * 10)
    bootstrap = preference.Bootstrap(20_000, 3)
    sums, slow = bootstrap.sums(rows), bootstrap.weights(len(rows)) @ rows * len(rows)
    assert sums.shape == (20_000, 2)
    np.testing.assert_array_equal(sums[:, 0] + sums[:, 1] / 2, 40)
    np.testing.assert_allclose(sums.mean(axis=0), rows.sum(axis=0), rtol=0.01)
    np.testing.assert_allclose(np.cov(sums.T), np.cov(slow.T), rtol=0.05)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        values = (rng.random(80) < 0.6).astype(float)
        interval = preference.mean_interval(values, preference.Bootstrap(200, seed, 0.9))
        covered += interval.low <= 0.6 <= interval.high
    assert 0.83 <= covered / 200 <= 0.96


def test_same_seed_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).normal(size=40)
    first = preference.mean_interval(values, preference.Bootstrap(100, 5))
    assert first == preference.mean_interval(values, preference.Bootstrap(100, 5))
    assert first != preference.mean_interval(values, preference.Bootstrap(100, 6))


def test_paired_difference_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=200) * 10
    first, second = prompt + 0.5 + rng.normal(size=200) * 0.1, prompt
    paired = preference.paired_difference(first, second, BOOTSTRAP)
    assert paired.low > 0.4 and paired.high < 0.6
    alone = preference.mean_interval(first, BOOTSTRAP)
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


def test_length_control_removes_a_preference_for_length():
    rng = np.random.default_rng(0)
    difference = rng.normal(5.0, 5.0, size=2000)
    # The judge looks only at length; the first system is merely longer.
    outcomes = rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))
    raw = preference.mean_interval(outcomes, BOOTSTRAP)
    controlled = preference.length_controlled_win_rate(
        outcomes, 20 + difference, np.full(2000, 20), BOOTSTRAP
    )
    assert raw.mean > 0.65
    assert controlled.low < 0.5 < controlled.high
    assert controlled.high - controlled.low < 0.16


def test_length_control_keeps_what_is_not_length():
    rng = np.random.default_rng(0)
    outcomes = (rng.random(2000) < 0.7).astype(float)
    lengths = rng.integers(5, 50, size=(2, 2000))
    controlled = preference.length_controlled_win_rate(outcomes, *lengths, BOOTSTRAP)
    assert controlled.mean == pytest.approx(outcomes.mean(), abs=0.01)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_length_control_is_finite_for_a_clean_sweep_and_equal_lengths(outcome):
    controlled = preference.length_controlled_win_rate(
        np.full(30, outcome), np.full(30, 9), np.full(30, 9), BOOTSTRAP
    )
    assert abs(controlled.mean - outcome) < 0.1
    assert np.isfinite([controlled.low, controlled.high]).all()


def test_kl_matched_difference_by_hand():
    # Twice the gain at four times the KL: matched, the first is worth half of the second.
    gains, other = np.full(20, 2.0), np.full(20, 1.0)
    interval = preference.kl_matched_difference(
        gains, np.full(20, 8.0), other, np.full(20, 2.0), BOOTSTRAP
    )
    assert interval.mean == pytest.approx(2.0 / 4 - 1.0)
    swapped = preference.kl_matched_difference(
        other, np.full(20, 2.0), gains, np.full(20, 8.0), BOOTSTRAP
    )
    assert swapped.mean == pytest.approx(-interval.mean)
    equal = preference.kl_matched_difference(
        gains, np.full(20, 2.0), other, np.full(20, 2.0), BOOTSTRAP
    )
    assert equal.mean == pytest.approx(1.0)


def test_ranked_pairs_drop_ties_and_absent_candidates():
    ranks = np.array([[1, 2, 2, 0], [3, 1, 0, 2]])
    rewards = np.array([[5.0, 1.0, 7.0, 99.0], [0.0, 1.0, 99.0, 1.0]])
    pairs = preference.ranked_pairs(ranks)
    found = {
        (row, better, worse)
        for row, better, worse in zip(pairs.row, pairs.better, pairs.worse, strict=True)
    }
    assert found == {(0, 0, 1), (0, 0, 2), (1, 1, 3), (1, 1, 0), (1, 3, 0)}
    margins = pairs.margins(rewards)
    assert sorted(margins) == [-2.0, 0.0, 1.0, 1.0, 4.0]
    assert preference.strict_accuracy(margins) == 3 / 5  # the equal pair is a mistake
    assert math.isnan(preference.strict_accuracy(np.zeros(0)))


def test_reliability_of_a_calibrated_and_an_overconfident_model():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20_000) * 1.5
    won = rng.random(20_000) < 1 / (1 + np.exp(-truth))
    margins = np.where(won, truth, -truth)
    calibrated = preference.reliability(margins)
    assert preference.expected_calibration_error(calibrated) < 0.015
    assert sum(row["count"] for row in calibrated) == 20_000
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in calibrated)
    overconfident = preference.expected_calibration_error(preference.reliability(margins * 4))
    assert overconfident > 0.1


def test_reliability_of_equal_rewards_is_half():
    assert preference.reliability(np.zeros(7)) == [
        {"low": 0.5, "high": 0.55, "count": 7, "confidence": 0.5, "accuracy": 0.5}
    ]


def test_best_of_n_equals_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        slow = [
            np.mean(
                [
                    gold[row, max(subset, key=lambda i, row=row: proxy[row, i])]
                    for subset in itertools.combinations(range(6), n)
                ]
            )
            for row in range(3)
        ]
        np.testing.assert_allclose(preference.best_of_n(proxy, gold, n), slow)


def test_best_of_n_breaks_ties_at_random():
    gold = np.array([[1.0, 0.0, 5.0, 3.0]])
    np.testing.assert_allclose(preference.best_of_n(np.zeros((1, 4)), gold, 4), [9 / 4])


def test_best_of_n_kl_bound():
    assert preference.best_of_n_kl_bound(1) == 0.0
    assert preference.best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    # Simulated for a continuous score, where the bound is the KL: E log(n u^(n-1)).
    u = np.random.default_rng(0).random((200_000, 4)).max(axis=1)
    assert np.mean(np.log(4 * u**3)) == pytest.approx(preference.best_of_n_kl_bound(4), abs=0.01)


def test_best_of_n_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="between 1 and 4"):
        preference.best_of_n(np.zeros((1, 4)), np.zeros((1, 4)), 5)


def test_to_json_unpacks_intervals():
    figures = {"a": preference.Interval(1.0, 0.5, 1.5), "b": {"c": preference.Interval(0, 0, 0)}}
    assert preference.to_json(figures) == {
        "a": {"mean": 1.0, "low": 0.5, "high": 1.5},
        "b": {"c": {"mean": 0, "low": 0, "high": 0}},
    }


def test_an_interval_comes_back_from_strict_json():
    interval = preference.Interval(math.nan, -math.inf, 0.5)
    back = preference.Interval.from_json(json.loads(files.to_json(interval.to_json())))
    assert math.isnan(back.mean) and (back.low, back.high) == (-math.inf, 0.5)


def test_accuracy_is_resampled_by_prompt():
    """Pairs of one prompt stand or fall together: a hundred copies of it say no more than one."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.3, 1.0, 200)
    each = np.arange(200)
    bootstrap = preference.Bootstrap(resamples=4000)
    alone = preference.accuracy_interval(margins, each, bootstrap)
    assert alone.mean == preference.strict_accuracy(margins)
    normal = 1.96 * np.sqrt(alone.mean * (1 - alone.mean) / 200)
    assert alone.high - alone.mean == pytest.approx(normal, rel=0.1)
    copies = preference.accuracy_interval(np.repeat(margins, 100), np.repeat(each, 100), bootstrap)
    assert (copies.mean, copies.low, copies.high) == pytest.approx(
        (alone.mean, alone.low, alone.high)
    )
    assert np.isnan(preference.accuracy_interval(np.zeros(0), np.zeros(0), bootstrap).mean)
