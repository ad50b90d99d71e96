"""Krippendorff's alpha, published and by its definition; agreement and position bias."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab.evals.preference import Bootstrap
from gptlab.people import agreement
from gptlab.people.agreement import Preferences

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, example C: four observers, twelve
# units, missing values; a dot is missing.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
PUBLISHED = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}
UNITS = [[int(o[i]) for o in OBSERVERS if o[i] != "."] for i in range(12)]


def slow_alpha(units, metric):
    """From the definition, pair by pair."""
    kept = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in kept for value in unit]

    def squared(c, k):
        if metric == "nominal":
            return float(c != k)
        if metric == "interval":
            return float(c - k) ** 2
        low, high = min(c, k), max(c, k)
        between = sum(low <= value <= high for value in everything)
        return (between - (everything.count(c) + everything.count(k)) / 2) ** 2 if c != k else 0.0

    observed = sum(
        squared(c, k) / (len(unit) - 1)
        for unit in kept
        for (i, c), (j, k) in itertools.product(enumerate(unit), repeat=2)
        if i != j
    )
    n = len(everything)
    expected = sum(
        squared(c, k)
        for (i, c), (j, k) in itertools.product(enumerate(everything), repeat=2)
        if i != j
    )
    return 1 - (n - 1) * observed / expected if expected else math.nan


@pytest.mark.parametrize("metric", agreement.METRICS)
def test_alpha_is_the_published_one(metric):
    assert agreement.krippendorff_alpha(UNITS, metric) == pytest.approx(
        PUBLISHED[metric], abs=0.0005
    )


@given(
    st.lists(st.lists(st.integers(-2, 3), max_size=4), max_size=7),
    st.sampled_from(agreement.METRICS),
)
def test_alpha_is_that_of_the_definition(units, metric):
    alpha, slow = agreement.krippendorff_alpha(units, metric), slow_alpha(units, metric)
    assert alpha == pytest.approx(slow, nan_ok=True)


def test_alpha_of_perfect_and_of_no_agreement():
    assert agreement.krippendorff_alpha([[1, 1], [2, 2], [3, 3]], "ordinal") == 1.0
    rng = np.random.default_rng(0)
    units = rng.integers(0, 3, (4000, 2)).tolist()
    assert abs(agreement.krippendorff_alpha(units, "nominal")) < 0.05
    assert math.isnan(agreement.krippendorff_alpha([[1, 1], [1, 1]], "nominal"))
    assert math.isnan(agreement.krippendorff_alpha([[1], []], "interval"))
    with pytest.raises(ValueError, match="none of nominal"):
        agreement.krippendorff_alpha(UNITS, "ratio")


def test_alpha_of_preferences_is_alpha_of_their_pairs():
    rng = np.random.default_rng(1)
    tasks = [{who: rng.integers(1, 4, 3).tolist() for who in "abc"[: 1 + i % 3]} for i in range(30)]
    units = [
        [np.sign(ranks[j] - ranks[i]) for ranks in task.values()]
        for task in tasks
        for i, j in itertools.combinations(range(3), 2)
    ]
    interval = agreement.preference_alpha(Preferences.of(tasks), Bootstrap(200))
    assert interval.mean == pytest.approx(slow_alpha(units, "ordinal"))
    assert interval.low < interval.mean < interval.high


def test_agreement_counts_pairs_that_both_order():
    tasks = [
        {"ann": (1, 2, 3), "bo": (1, 3, 2)},  # alike 2, differently 1
        {"ann": (1, 1, 2), "bo": (2, 1, 3)},  # alike 2; a tie doesn't count
        {"ann": (1, 2, 3), "cy": (3, 2, 1)},  # differently 3
        {"cy": (1, 2, 3)},
    ]
    given = Preferences.of(tasks)
    interval, pairs = agreement.pair_agreement(given, Bootstrap(100))
    assert pairs == 8 and interval.mean == pytest.approx(4 / 8)
    assert agreement.pair_agreement(given, Bootstrap(100), "bo")[1] == 5
    for nothing in (Preferences.of(tasks[3:]), Preferences.of([])):
        interval, pairs = agreement.pair_agreement(nothing, Bootstrap(100))
        assert pairs == 0 and math.isnan(interval.mean)
        assert math.isnan(agreement.preference_alpha(nothing, Bootstrap(100)).mean)
    assert agreement.pair_agreement(given, Bootstrap(100), "di")[1] == 0


def slow_agreement(tasks, person=None):
    """(pairs ordered alike, pairs that both order), pair by pair of people and of replies."""
    alike = both = 0
    for task in tasks:
        for one, two in itertools.combinations(task, 2):
            if person is None or person in (one, two):
                for i, j in itertools.combinations(range(len(task[one])), 2):
                    first, second = (np.sign(task[who][j] - task[who][i]) for who in (one, two))
                    alike, both = alike + (first == second != 0), both + (first * second != 0)
    return alike, both


@given(
    st.lists(
        st.integers(2, 4).flatmap(
            lambda replies: st.dictionaries(
                st.sampled_from("abcd"), st.tuples(*[st.integers(1, 3)] * replies), max_size=4
            )
        ),
        max_size=6,
    )
)
def test_agreement_of_rankings_of_any_length_is_that_of_the_definition(tasks):
    preferences = Preferences.of(tasks)
    for person in (None, "a", "d"):
        interval, pairs = agreement.pair_agreement(preferences, Bootstrap(10), person)
        alike, both = slow_agreement(tasks, person)
        assert pairs == both
        assert interval.mean == pytest.approx(alike / both if both else math.nan, nan_ok=True)
    rankings = [ranks for task in tasks for ranks in task.values()]
    pairs = [pair for ranks in rankings for pair in itertools.combinations(ranks, 2)]
    ties = sum(one == two for one, two in pairs)
    assert agreement.tie_rate(rankings) == pytest.approx(
        ties / len(pairs) if pairs else math.nan, nan_ok=True
    )


def test_who_always_takes_the_first_has_a_bias():
    rng = np.random.default_rng(2)
    first, fair = [], []
    for _ in range(200):
        order = rng.permutation(3).tolist()
        first.append(([order.index(i) + 1 for i in range(3)], order))
        fair.append(((1, 2, 3), order))
    interval, pairs = agreement.position_bias(first, Bootstrap(100))
    assert pairs == 600 and (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)
    interval, _ = agreement.position_bias(fair, Bootstrap(1000))
    assert interval.low < 0 < interval.high and abs(interval.mean) < 0.1


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Agreement of 70%: a 95% interval holds it in most of 60 draws."""
    rng, inside = np.random.default_rng(3), 0
    for seed in range(60):
        alike = rng.random(80) < 0.7
        tasks = [{"a": (1, 2), "b": (1, 2) if same else (2, 1)} for same in alike]
        interval, _ = agreement.pair_agreement(Preferences.of(tasks), Bootstrap(300, seed))
        inside += interval.low <= 0.7 <= interval.high
    assert inside >= 51
