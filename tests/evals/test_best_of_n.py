"""PPO beside best of n: on made-up replies whose figures are known."""

import numpy as np
import pytest

from gptlab.evals import best_of_n, preference
from gptlab.evals.best_of_n import Draws
from gptlab.evals.preference import Interval

BOOTSTRAP = preference.Bootstrap(resamples=100, seed=0)
PROMPTS, SAMPLES = 400, 8


def draws(noise=0.0):
    """Uniform gold scores, and a reward model that errs by `noise`."""
    rng = np.random.default_rng(0)
    gold = rng.uniform(size=(PROMPTS, SAMPLES))
    return Draws(reward=gold + noise * rng.normal(size=gold.shape), gold=gold)


def figures_of(policy_gold=0.7, kl=0.5, sizes=(2, 4), many=None):
    many = many or draws()
    rng = np.random.default_rng(1)
    rows = PROMPTS + 50  # the policy answers more prompts than best of n does
    gold = np.full(rows, policy_gold)
    gold[PROMPTS:] = 99.0
    baseline, log_ratio = rng.uniform(size=rows), np.full(rows, kl)
    return best_of_n.summarise(many, sizes, gold, baseline, log_ratio, BOOTSTRAP)


def test_best_of_n_of_uniform_scores_is_n_over_n_plus_one():
    figures = figures_of()
    assert figures["sft_gold"].mean == pytest.approx(0.5, abs=0.02)
    for n in (2, 4):
        best = figures[str(n)]
        assert best["gold"].mean == pytest.approx(n / (n + 1), abs=0.02)
        assert best["win_rate"].mean == pytest.approx(n / (n + 1), abs=0.02)  # its upper bound
        assert best["gold_difference"].mean == pytest.approx(n / (n + 1) - 0.5, abs=0.02)
        assert best["kl"] == preference.best_of_n_kl_bound(n)
    assert figures["policy"]["gold"].mean == pytest.approx(0.7)  # of the same prompts only


def test_a_worse_reward_model_chooses_worse():
    exact, rough = (figures_of(many=draws(noise))["4"] for noise in (0.0, 1.0))
    assert 0.5 < rough["gold"].mean < exact["gold"].mean - 0.1
    assert rough["reward_model"].mean > exact["reward_model"].mean  # and thinks it did better


def test_equal_kl_brings_the_further_one_down():
    bound = preference.best_of_n_kl_bound(4)
    best_gain = figures_of()["4"]["gold_difference"].mean
    for kl in (0.25 * bound, bound, 4 * bound):
        figures = figures_of(policy_gold=0.7, kl=kl)
        gain = figures["policy"]["gold_difference"].mean
        expected = gain * min(1, bound / kl) - best_gain * min(1, kl / bound)
        assert figures["4"]["policy_difference_kl_matched"].mean == pytest.approx(expected)
        assert figures["4"]["policy_difference"].mean == pytest.approx(gain - best_gain)


def test_the_table_says_who_is_ahead_where():
    header, rows = best_of_n.table(figures_of(policy_gold=0.75, kl=0.4))
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == ["SFT", "best of 2", "best of 4", "policy"]
    # Of best of 2, 0.75 at a KL of 0.4 is no proof: mixed down to its 0.19, about 0.62 is left.
    assert [row[-1] for row in rows] == [None, "open", "open", None]


@pytest.mark.parametrize(
    ("policy_kl", "plain", "matched", "expected"),
    [
        (2.0, 0.3, 0.1, "policy"),  # further away, and ahead even when mixed down
        (2.0, 0.3, -0.1, "open"),  # a lower bound says nothing
        (2.0, -0.1, -0.3, "best of n"),  # more for less
        (0.5, 0.1, 0.3, "policy"),
        (0.5, -0.3, 0.1, "open"),
        (0.5, -0.3, -0.1, "best of n"),
    ],
)
def test_which_is_surely_ahead(policy_kl, plain, matched, expected):
    def around(mean):
        return Interval(mean, mean - 0.05, mean + 0.05)

    best = {
        "kl": 1.0,
        "policy_difference": around(plain),
        "policy_difference_kl_matched": around(matched),
    }
    assert best_of_n.ahead(policy_kl, best) == expected
    unsure = {"kl": 1.0, **dict.fromkeys(list(best)[1:], Interval(0.1, -0.1, 0.3))}
    assert best_of_n.ahead(policy_kl, unsure) == "open"


def test_the_curve_starts_at_the_sft_model():
    figures = figures_of(sizes=(2, 8, 4))
    kl, gold = best_of_n.curve(figures)
    assert kl == [0.0, *(preference.best_of_n_kl_bound(n) for n in (2, 4, 8))]
    assert gold[0] == figures["sft_gold"]
    assert [g.mean for g in gold] == sorted(g.mean for g in gold)
    assert best_of_n.nearest(figures, kl=0.7) == 4 and best_of_n.nearest(figures, kl=99.0) == 8
