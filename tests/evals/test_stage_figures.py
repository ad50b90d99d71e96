"""What each stage shows: figures from manifests, and demands that are met by figures alone."""

import json

import pytest

from gptlab.evals import rounds_report, stage_figures
from gptlab.run import artifact, files
from tests import rounds_driver

PRETRAIN = {
    "validation/bits_per_byte": 1.85,
    "ngram/unigram": 2.8,
    "ngram/bigram": 1.92,
    "ngram/trigram": 1.68,
}
REWARD = {
    "accuracy": 0.7, "clean_accuracy": 0.75, "unequal_accuracy": 0.72, "ceiling_accuracy": 0.8,
    "on_policy_clean_accuracy": 0.74, "on_policy_clean_pairs": 150,
    "longer_wins_accuracy": 0.5, "linear_accuracy": 0.6, "clean_linear_accuracy": 0.65,
    "labellers_agreement": 0.7, "tie_rate": 0.1, "identical_share": 0.02, "pairs": 400,
    "clean_longer_wins_accuracy": 0.55, "clean_pairs": 300, "calibration_error": 0.03,
    "reported_on": "test",
}  # fmt: skip


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def evaluation(gold=0.3, low=0.55, common=0.02, distinct=0.4):
    return {
        "policy": {"most_common_share": common, "distinct_2": distinct, "kl": interval(3, 2, 4)},
        "baseline": {"most_common_share": 0.01, "distinct_2": 0.5, "end_rate": 0.97},
        "over_baseline": {
            "gold_difference": interval(gold, gold - 0.1, gold + 0.1),
            "win_rate": interval(0.6, low, 0.65),
            "tie_rate": interval(0.3, 0.2, 0.4),
        },
    }


def met(figures):
    """{name: met} of those with a demand."""
    return {figure.name: figure.met for figure in figures if figure.demand}


def test_pretraining_is_asked_to_beat_the_bigram():
    (figure,) = stage_figures.of_pretrain(PRETRAIN)
    assert figure.met is True and figure.beside == {"unigram": 2.8, "bigram": 1.92, "trigram": 1.68}
    for bits in (1.92, 2.5, "nan", None):  # a demand is met by a figure, or not at all
        (figure,) = stage_figures.of_pretrain({**PRETRAIN, "validation/bits_per_byte": bits})
        assert figure.met is False
    assert stage_figures.of_pretrain({})[0].met is False


def test_fine_tuning_is_asked_for_a_fall_of_perplexity_and_for_ends():
    results = {"sft/reply_perplexity": 20.0, "pretrained/reply_perplexity": 60.0}
    figures = stage_figures.of_sft(results, {"end_rate": 0.97}, 40)
    assert [f.met for f in figures] == [True, True] and "within 40 tokens" in figures[1].name
    results["sft/reply_perplexity"] = 61.0
    assert [f.met for f in stage_figures.of_sft(results, {"end_rate": 0.94}, 40)] == [False] * 2


@pytest.mark.parametrize("key, limit", [("on_policy_clean_accuracy", 0.70), ("accuracy", 0.65)])
def test_a_reward_model_is_asked_for_accuracy_of_the_right_kind(key, limit):
    cases = (limit, True), (limit - 0.01, False), (None, False)
    intervals = (interval(limit, 0.1, 0.9), True), (interval(limit - 0.01, 0.1, 0.9), False)
    for value, expected in (*cases, *intervals):
        figures = stage_figures.of_reward("reward", {**REWARD, key: value}, key, limit)
        assert [f.met for f in figures if f.demand] == [expected]
    figures = stage_figures.of_reward("judge", REWARD, key, None)
    assert not any(f.demand for f in figures)


def test_each_accuracy_stands_beside_its_own_ceiling():
    figures = {
        f.name: f
        for f in stage_figures.of_reward("reward", REWARD, "on_policy_clean_accuracy", 0.7)
    }  # fmt: skip
    newest = figures["accuracy on the newest policy's pairs"]
    assert newest.value == 0.74 and newest.beside == {"pairs": 150, "ceiling": 1.0}
    assert figures["accuracy against clean scores, all rounds"].beside == {
        "pairs": 300, "ceiling": 1.0, "longer wins": 0.55, "linear TF-IDF": 0.65,
    }  # fmt: skip
    unequal = figures["accuracy on labels, clean scores unequal"]
    assert (unequal.value, unequal.beside["ceiling"]) == (0.72, 0.8)
    assert "ceiling" not in figures["accuracy on labels"].beside
    assert figures["pairs"].beside == {"of": "test", "ties": 0.1, "identical texts": 0.02}


@pytest.mark.parametrize(
    "change, broken",
    [
        ({}, None),
        ({"gold": 0.24}, "gold score over SFT"),
        ({"low": 0.5}, "win rate over SFT"),
        ({"common": 0.06}, "share of the most common reply"),
        ({"distinct": 0.24}, "distinct-2 as a share of SFT's"),
    ],
)
def test_a_policy_is_asked_for_a_gain_at_a_price(change, broken):
    answers = met(stage_figures.of_policy("ppo", evaluation(**change)))
    assert len(answers) == 4
    assert [name for name, value in answers.items() if not value] == ([broken] if broken else [])


def test_the_round_before_is_shown_and_asks_for_nothing():
    figures = evaluation()
    figures["over_previous"] = {"gold_difference": interval(0.1, 0.0, 0.2)}
    lines = stage_figures.of_policy("ppo", figures)[4:]
    assert len(lines) == 3 and not any(line.demand for line in lines)
    assert lines[0].value.mean == 0.1 and lines[1].value is None


def test_best_of_n_is_shown_at_the_nearest_kl():
    best = {
        "gold_difference": interval(0.2, 0.1, 0.3),
        "policy_difference": interval(-0.1, "-inf", 0.1),
        "kl": 1.2,
    }
    figures = evaluation()
    figures["best_of_n"] = {
        "policy": {"kl": interval(1.1, 1.0, 1.2), "gold_difference": interval(0.3, 0.2, 0.4)},
        "4": {**best, "policy_difference_kl_matched": interval(-1.0, -2.0, 0.0)},
        "8": {**best, "policy_difference_kl_matched": interval(0.1, 0.0, 0.2)},
    }
    line = stage_figures.of_policy("ppo", figures)[-1]
    assert line.name == "gold score minus best of 8's, mixed down to equal KL" and line.main
    assert line.beside["surely ahead"] == "open"
    assert line.value.mean == 0.1 and line.met is None


def test_clean_and_vocabulary():
    clean = {
        "records": {"documents-train": 5},
        "dropped": {"documents: short": 2},
        "quarantined": 1,
    }
    assert [f.value for f in stage_figures.of_clean(clean)] == [5, 2, 1]
    assert [f.value for f in stage_figures.of_clean({})] == [None, None, None]
    results = {"train/round_tripped_texts": 7, "validation/round_tripped_texts": 3}
    assert met(stage_figures.of_vocabulary(results)) == {"texts that round-trip": True}
    more = stage_figures.of_vocabulary({**results, "test/round_tripped_texts": 2})
    assert [f.value for f in more if "round-trip" in f.name] == [12]
    assert met(stage_figures.of_vocabulary({})) == {"texts that round-trip": False}


def test_a_whole_run_is_reported_for_people_and_for_programs(tmp_path, capsys, monkeypatch):
    """Stages that measured nothing: dashes, no demand met, and strict JSON all the same."""
    monkeypatch.setattr(
        rounds_report, "write_plots", lambda *_: []
    )  # tests/test_rounds.py has some
    root, documents = tmp_path / "run", tmp_path / "documents"
    root.mkdir()
    documents.mkdir()
    (documents / "a.txt").write_text("a document of one's own\n")
    undo = rounds_driver.install(root)
    try:
        rounds_driver.rounds.run(rounds_driver.tiny_config(documents), str(root))
    finally:
        undo()
    content = json.loads((root / "report.json").read_text(), parse_constant=pytest.fail)
    by_name = {(f["stage"], f["name"]): f for f in content["stages"]}
    assert by_name["pretrain", "held-out bits a byte"]["met"] is False
    assert by_name["round 2: ppo", "gold score over SFT"]["value"]["mean"] == 0.6
    assert "pretrain: held-out bits a byte" in content["unmet"]
    assert len(content["rounds"]) == 2 and "sft" in content["preparation"]["steps"]
    reward = artifact.read_manifest(root / content["rounds"][0]["steps"]["reward"]["artifact"])
    assert "clean_accuracy" not in reward["results"]
    text = (root / "report.md").read_text()
    demands = text[text.index("## Demands") : text.index("## What")]
    assert "**not met**" in demands and demands.count("\n- **") == len(content["unmet"])
    assert "- **pretrain: held-out bits a byte** is -; asked: below the bigram's -" in demands
    assert "## What each stage shows" in text and text.index("## What") < text.index("## Rounds")
    assert "| pretrain | held-out bits a byte | - | unigram -, bigram -, trigram - |" in text
    printed = capsys.readouterr().out
    lines = printed[printed.rindex("demand  met") :].splitlines()
    assert f"Unmet demands: {len(content['unmet'])}" in lines
    table = lines[2 : lines.index("")]
    assert 10 <= len(table) <= 16 and any("pretrain: held-out" in line for line in table)


def test_figures_are_json_with_their_intervals():
    line = stage_figures.of_policy("ppo", evaluation())[0]
    assert json.loads(files.to_json(line.to_json()))["value"] == pytest.approx(
        interval(0.3, 0.2, 0.4)
    )
