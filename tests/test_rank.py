"""rank: candidate sets in, simulated comparisons out, split by split."""

import json
import os
import shutil
import signal

import pytest

from configs import rank as rank_config
from gptlab import rank
from gptlab.data import records
from gptlab.data.records import CandidateSet, Comparison
from gptlab.people import labellers
from gptlab.run import artifact
from gptlab.run.errors import Interrupted, UserError
from tests.fixtures import SPLITS, disk_full_after, read_records


@pytest.fixture
def config(tiny_candidates):
    config = rank_config.get_config()
    config.inputs.candidates = str(tiny_candidates)
    return config


def test_every_split_is_ranked_and_stays_a_split(config, tiny_candidates, tmp_path):
    rank.run(config, tmp_path / "run")
    for split, count in SPLITS.items():
        sets = read_records(tiny_candidates, "candidates", split, CandidateSet)
        comparisons = read_records(tmp_path / "run", "comparisons", split, Comparison)
        assert len(comparisons) == len(sets) == count
        by_prompt = {item.prompt.id: item for item in sets}
        for comparison in comparisons:
            assert comparison.prompt == by_prompt[comparison.prompt.id].prompt
            assert comparison.candidates == by_prompt[comparison.prompt.id].candidates
            assert comparison.simulated and comparison.scores is not None
            assert "vader" in comparison.labeller and "noise=0.25" in comparison.labeller
    manifest = artifact.read_manifest(tmp_path / "run")
    assert manifest["digest"] == records.digest(tmp_path / "run" / "records")
    assert (
        manifest["inputs"]["candidates"]["identity"]
        == (artifact.read_manifest(tiny_candidates)["identity"])
    )


def test_results_are_those_of_the_labels(config, tmp_path):
    rank.run(config, tmp_path / "run")
    results = artifact.read_manifest(tmp_path / "run")["results"]
    comparisons = read_records(tmp_path / "run", "comparisons", "train", Comparison)
    ceiling = labellers.ceiling([c.scores for c in comparisons], 0.25, 0.05)
    assert results["train/ceiling/accuracy"] == pytest.approx(ceiling.accuracy)
    assert results["train/agreement"] == pytest.approx(ceiling.agreement)
    assert results["train/sets"] == SPLITS["train"]
    assert results["train/pairs"] == 6 * SPLITS["train"]
    assert results["train/accuracy"] == pytest.approx(ceiling.accuracy, abs=0.05)
    assert results["train/mean_score"] < results["train/best_score"]
    ties = sum(
        comparison.ranks[i] == comparison.ranks[j]
        for comparison in comparisons
        for i in range(4)
        for j in range(i)
    )
    assert results["train/tie_rate"] == pytest.approx(ties / results["train/pairs"])


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(config, tmp_path):
    rank.run(config, tmp_path / "whole")
    with disk_full_after(1):
        with pytest.raises(UserError, match="^the disk is full while writing .*comparisons-"):
            rank.run(config, tmp_path / "run")
    rank.run(config, tmp_path / "run")
    digests = [artifact.read_manifest(tmp_path / name)["digest"] for name in ("run", "whole")]
    assert digests[0] == digests[1]


def test_samples_show_the_best_reply_first(config, tmp_path):
    rank.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 10
    for line in map(json.loads, lines):
        ranks = [entry["rank"] for entry in line["ranking"]]
        assert ranks == sorted(ranks) and len(ranks) == 4
        assert line["labeller"].startswith("simulated:")


def test_the_same_run_ranks_the_same_and_is_not_done_twice(config, tmp_path, capsys):
    rank.run(config, tmp_path / "one")
    rank.run(config, tmp_path / "two")
    one, two = (artifact.read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one["digest"] == two["digest"] and one["identity"] == two["identity"]
    capsys.readouterr()
    shutil.rmtree(tmp_path / "one" / "records")
    rank.run(config, tmp_path / "one")
    assert "is done" in capsys.readouterr().out
    assert not (tmp_path / "one" / "records").exists()
    config.seed = 1
    rank.run(config, tmp_path / "three")
    assert artifact.read_manifest(tmp_path / "three")["digest"] != one["digest"]


def test_a_killed_run_starts_anew(config, tmp_path, monkeypatch):
    """Killed before its records are written, it ends as an undisturbed run does."""
    with monkeypatch.context() as patch:
        patch.setattr(rank.records, "digest", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank.run(config, tmp_path / "killed")
    rank.run(config, tmp_path / "killed")
    rank.run(config, tmp_path / "whole")
    killed, whole = (artifact.read_manifest(tmp_path / name) for name in ("killed", "whole"))
    assert killed["digest"] == whole["digest"] and killed["results"] == whole["results"]
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("killed", "whole")]
    assert samples[0] == samples[1]


def test_sigterm_stops_between_chunks_which_change_nothing(config, tmp_path, monkeypatch):
    rank.run(config, tmp_path / "whole")
    monkeypatch.setattr(rank, "_CHUNK", 7)
    ranked = []
    compare = labellers.SimulatedLabeller.compare

    def compared(self, sets):
        ranked.append(len(sets))
        if len(ranked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compare(self, sets)

    with monkeypatch.context() as patch:
        patch.setattr(labellers.SimulatedLabeller, "compare", compared)
        with pytest.raises(Interrupted, match="stopped while ranking t.*, which will start anew"):
            rank.run(config, tmp_path / "stopped")
    assert ranked == [7, 7]
    manifest = artifact.read_manifest(tmp_path / "stopped", allow_unfinished=True)
    assert manifest["status"] == "interrupted"
    rank.run(config, tmp_path / "stopped")
    digests = [artifact.read_manifest(tmp_path / w)["digest"] for w in ("whole", "stopped")]
    assert digests[0] == digests[1]


def test_an_empty_split_is_named(config, tiny_candidates, tmp_path):
    broken = tmp_path / "candidates"
    shutil.copytree(tiny_candidates, broken)
    records.write_shards(broken / "records", "candidates", "test", [])
    config.inputs.candidates = str(broken)
    with pytest.raises(UserError, match="records candidates-test in .* are empty"):
        rank.run(config, tmp_path / "run")


def test_what_is_wrong_is_said_in_one_line(config, tiny_clean, tmp_path):
    config.backend = "people"
    with pytest.raises(UserError, match="config.backend='people'"):
        rank.run(config, tmp_path / "a")
    config.backend = "simulated"
    config.inputs.candidates = str(tiny_clean)
    with pytest.raises(UserError, match="no records candidates-"):
        rank.run(config, tmp_path / "b")
    config = rank_config.get_config()
    with pytest.raises(UserError, match="config.inputs.candidates is not set"):
        rank.run(config, tmp_path / "c")


@pytest.mark.parametrize("arg", [arg for arg in rank_config.ARGS if arg != "people"])
def test_every_argument_ranks(arg, tiny_candidates, tmp_path):
    config = rank_config.get_config(arg)
    config.inputs.candidates = str(tiny_candidates)
    rank.run(config, tmp_path / arg)
    assert artifact.read_manifest(tmp_path / arg)["status"] == "done"


def test_every_entry_of_the_sweep_applies():
    entries = []
    rank_config.sweep(lambda **overrides: entries.append(overrides))
    for overrides in entries:
        rank_config.get_config().update_from_flattened_dict(overrides)
    assert len(entries) == 6
