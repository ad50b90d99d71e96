"""The suite's figures and gate, on systems whose figures are known."""

import dataclasses
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from gptlab.evals import suite
from gptlab.evals.preference import Bootstrap

BOOTSTRAP = Bootstrap(resamples=100, seed=0)
RULES = ConfigDict(
    {
        "min_win_rate_low": 0.5,
        "min_gold_difference": 0.1,
        "max_most_common_share": 0.05,
        "min_distinct_2_ratio": 0.5,
    }
)
HELD_OUT = {"loss": 2.0, "bits_per_byte": 1.5}


def system(gold=0.0, num=40, seed=0, **fields):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 200, size=(num, 12)).tolist()
    values = {
        "tokens": tokens,
        "texts": [f"reply {i}" for i in range(num)],
        "finished": np.ones(num, bool),
        "lengths": np.full(num, 11),
        "log_ratio": np.full(num, 0.5),
        "reward": np.full(num, 1.0),
        "reward_shuffled": np.full(num, 0.25),
        "judge": np.zeros(num),
        "base_nats": np.full(num, 22.0),
        "base_tokens": np.full(num, 11.0),
        "gold": np.full(num, gold),
        "reviews": None,
    }
    return suite.Replies(**(values | fields))


def figures_of(**systems):
    held_out = {name: HELD_OUT for name in [*systems, "base"]}
    return suite.summarise(systems, held_out, BOOTSTRAP)


def test_figures_by_hand():
    figures = figures_of(policy=system(gold=0.4), baseline=system())
    policy, over = figures["policy"], figures["over_baseline"]
    assert figures["num_prompts"] == 40
    assert policy["gold"].mean == pytest.approx(0.4)
    assert policy["kl"].mean == pytest.approx(0.5)
    assert policy["shuffled_drop"].mean == pytest.approx(0.75)
    assert policy["base_perplexity"] == pytest.approx(math.exp(2.0))
    assert policy["most_common_share"] == 1 / 40
    assert policy["end_rate"] == 1.0
    assert over["gold_difference"].mean == pytest.approx(0.4)
    assert over["win_rate"].mean == 1.0
    assert over["win_rate_reward_model"].mean == pytest.approx(0.5)
    assert "review_classifier" not in policy and "win_rate_review_classifier" not in over
    assert "over_previous" not in figures


def test_reviews_and_previous_add_their_figures():
    one, zero = np.ones(40), np.zeros(40)
    figures = figures_of(
        policy=system(gold=0.4, reviews=one, log_ratio=np.full(40, 2.0)),
        previous=system(gold=0.3, reviews=zero, log_ratio=np.full(40, 1.0)),
        baseline=system(reviews=zero),
    )
    assert figures["over_baseline"]["win_rate_review_classifier"].mean == 1.0
    assert figures["over_previous"]["gold_difference"].mean == pytest.approx(0.1)
    # At the previous policy's KL, half of the gain of 0.4 is left: 0.2 - 0.3.
    matched = figures["over_previous"]["gold_difference_kl_matched"]
    assert matched.mean == pytest.approx(-0.1)


def test_base_perplexity_is_over_all_tokens_and_not_a_mean_of_ratios():
    nats, counts = np.array([10.0, 0.0]), np.array([5.0, 0.0])  # an empty reply counts for nothing
    replies = system(num=2, base_nats=nats, base_tokens=counts)
    figures = suite.describe(replies, 10, BOOTSTRAP)
    assert figures["base_perplexity"] == pytest.approx(math.exp(2.0))


def test_gate_passes_a_better_policy_and_names_what_a_worse_one_breaks():
    baseline = system()
    assert suite.gate(figures_of(policy=system(gold=0.4), baseline=baseline), RULES) == []
    collapsed = system(gold=-0.1, texts=["great"] * 40, tokens=[[7, 7, 7, 7]] * 40)
    failures = suite.gate(figures_of(policy=collapsed, baseline=baseline), RULES)
    assert len(failures) == 4
    assert any("win rate" in line and "0.000" in line for line in failures)
    assert any("most common reply is 1.000, must be <= 0.05" in line for line in failures)


def test_gate_refuses_what_is_not_a_number():
    figures = figures_of(policy=system(gold=0.4, tokens=[[]] * 40), baseline=system())
    assert math.isnan(figures["policy"]["distinct_2"])
    assert ["distinct-2" in line for line in suite.gate(figures, RULES)] == [True]


def test_tables_hold_every_interval():
    systems = {"policy": system(gold=0.4), "previous": system(), "baseline": system()}
    figures = figures_of(**systems)
    tables = suite.tables(figures)
    header, rows = tables["Systems"]
    assert header == ["", "SFT", "previous", "policy"]
    labels = {row[0] for row in rows} | {row[0] for row in tables["Policy against"][1]}
    known = {k for name in ("policy", "over_baseline", "over_previous") for k in figures[name]}
    hidden = {"most_common_reply", "pretraining_bits_per_byte"}
    assert labels == {suite.LABELS[key] for key in known - hidden}


def test_flatten_names_every_number():
    flat = dict(suite.flatten({"a": {"b": 1, "text": "x"}, "c": 2.5}, "eval"))
    assert flat == {"eval/a/b": 1.0, "eval/c": 2.5}


def test_every_field_of_replies_has_a_row_per_prompt():
    replies = system(num=7)
    for field in dataclasses.fields(replies):
        value = getattr(replies, field.name)
        assert value is None or len(value) == 7
