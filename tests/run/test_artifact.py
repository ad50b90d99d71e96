import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from gptlab.run import artifact
from gptlab.run.errors import Interrupted, UserError
from gptlab.run.metrics import read_metrics

GOLDEN = Path(__file__).parent / "golden" / "run_schema_1"


def config(**changes):
    made = ConfigDict(
        {
            "seed": 0,
            "inputs": {"corpus": config_dict.placeholder(str)},
            "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)},
            "total_steps": 10,
            "total_tokens": config_dict.placeholder(int),
            "log_every_steps": 5,
            "eval_every_steps": 5,
            "eval_batches": 2,
            "checkpoint": {
                "every_steps": 5,
                "keep": 2,
                "best_metric": "eval/validation/loss",
                "best_mode": "min",
            },
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
    made.update_from_flattened_dict(changes)
    return made


def finished(workdir, stage="stage", files=None, **changes):
    """An artifact made from `changes`; its identity."""
    with artifact.open_run(config(**changes), workdir, stage, files=files) as run:
        if not run.finished:
            run.complete(digest="of " + stage)
    return run.identity


def status(workdir):
    return artifact.read_manifest(workdir, allow_unfinished=True)["status"]


# Identity


def test_identity_is_the_same_on_every_machine_and_day():
    # If this fails, every existing artifact would be made anew: is that what the change means?
    own = artifact.identity("pretrain", config(), {"corpus": "0123456789ab"})
    assert own == "c96bb82c7d4b"


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every_steps": 1},
        {"checkpoint.keep": 7},
        {"inputs.corpus": "/elsewhere"},
    ],
)
def test_paths_and_cadence_do_not_count(changes):
    assert artifact.identity("s", config(**changes), {}) == artifact.identity("s", config(), {})


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"optimizer.lr": 2e-3},
        {"total_steps": 11},
        {"mesh.fsdp": 2},
        {"eval_every_steps": 1},
        {"eval_batches": 1},
        {"checkpoint.every_steps": 1},
        {"checkpoint.best_metric": "eval/validation/accuracy"},  # another checkpoint is the best:
        {"checkpoint.best_mode": "max"},  # later stages start from other parameters
    ],
)
def test_everything_else_counts(changes):
    assert artifact.identity("s", config(**changes), {}) != artifact.identity("s", config(), {})


@pytest.mark.parametrize(
    ("key", "counts"),
    [("sample", False), ("beam", False), ("sampling", True)],  # of replies shown; of those used
)
def test_how_samples_are_shown_or_workers_shared_does_not_count(key, counts):
    few, many = (artifact.identity("s", {key: {"number": n}}, {}) for n in (1, 2))
    assert (few != many) == counts


def test_a_section_that_pretraining_got_later_counts_only_where_it_is_in_use(tmp_path):
    def with_lora(**lora):
        return ConfigDict({**config().to_dict(), "lora": lora})

    before = finished(tmp_path, "pretrain")  # by an earlier gptlab
    with artifact.open_run(with_lora(rank=0, alpha=16.0), tmp_path, "pretrain") as run:
        assert run.finished and run.identity == before
    assert artifact.identity("pretrain", with_lora(rank=0), {}) == before
    assert artifact.identity("pretrain", with_lora(rank=4), {}) != before
    with pytest.raises(UserError, match=r"config.lora.rank: \(absent\) -> 4"):
        artifact.open_run(with_lora(rank=4), tmp_path, "pretrain")
    # Of a stage whose identities had it from the beginning, it always counts.
    assert artifact.identity("sft", with_lora(rank=0), {}) != artifact.identity("sft", config(), {})


def test_stage_inputs_and_history_count():
    own = artifact.identity("s", config(), {"a": "1"})
    others = [
        artifact.identity("t", config(), {"a": "1"}),
        artifact.identity("s", config(), {"a": "2"}),
        artifact.identity("s", config(), {"b": "1"}),
        artifact.identity("s", config(), {"a": "1"}, [{"total_steps": 5}]),
    ]
    assert len({own, *others}) == 5


def test_identity_of_the_written_config_is_that_of_the_run(tmp_path):
    own = finished(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert artifact.identity("stage", written, {}) == own


def test_a_config_value_that_json_does_not_know_is_named(tmp_path):
    bad = ConfigDict({"optimizer": {"schedule": len}})
    with pytest.raises(UserError, match=r"config.optimizer.schedule: builtin"):
        artifact.open_run(bad, tmp_path, "stage")


# The life of a run


def test_a_new_run_is_running_then_done(tmp_path):
    with artifact.open_run(config(), tmp_path / "a" / "b", "stage") as run:
        assert not run.finished
        assert status(run.workdir) == "running"
        run.metrics.write(1, {"train/loss": 2.0})
        run.results(loss=np.float32(0.5), curve=[1, 2])
        run.results(**{"eval/bits": 1.5, "loss": 0.25})
        assert status(run.workdir) == "running"
        run.complete(digest="abc")
    manifest = artifact.read_manifest(run.workdir)
    assert manifest["status"] == "done"
    assert manifest["digest"] == "abc"
    assert manifest["results"] == {"loss": 0.25, "curve": [1, 2], "eval/bits": 1.5}
    start = manifest["starts"][0]
    assert start["versions"]["jax"] and start["command"] and start["goodput"]["goodput/total_s"] > 0
    assert not list(Path(run.workdir).glob("*.tmp"))


def test_manifest_and_config_are_strict_json_whatever_is_in_them(tmp_path):
    """And the same run is recognised: what is compared is what was written."""
    infinite = config(**{"optimizer.lr": float("inf")})
    figures = {"mean": float("nan"), "low": np.float32("-inf")}
    with artifact.open_run(infinite, tmp_path / "run", "stage") as run:
        run.results(gold=figures, rows=[{"accuracy": float("nan")}])
        run.metrics.write_sample({"step": 0, "scores": [float("nan")]})
    for name in ("manifest.json", "config.json", "samples.jsonl"):
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
    results = artifact.read_manifest(tmp_path / "run", allow_unfinished=True)["results"]
    assert results == {"gold": {"mean": "nan", "low": "-inf"}, "rows": [{"accuracy": "nan"}]}
    with artifact.open_run(infinite, tmp_path / "run", "stage") as run:
        run.complete("d")
    with artifact.open_run(infinite, tmp_path / "run", "stage") as run:
        assert run.finished


def test_leaving_without_complete_is_not_done(tmp_path):
    with artifact.open_run(config(), tmp_path, "stage"):
        pass
    assert status(tmp_path) == "running"
    with pytest.raises(UserError, match=r"not finished \(stage is running\)"):
        artifact.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Interrupted("step 3"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("loss is nan\nat step 7"), "failed"),
    ],
)
def test_how_a_run_ended_is_written_down(tmp_path, error, expected):
    with pytest.raises(type(error)):
        with artifact.open_run(config(), tmp_path, "stage"):
            raise error
    manifest = artifact.read_manifest(tmp_path, allow_unfinished=True)
    assert manifest["status"] == expected
    assert manifest["error"] == (
        "ValueError: loss is nan at step 7" if expected == "failed" else None
    )


def test_a_run_that_failed_can_be_started_again_and_forgets_the_error(tmp_path):
    with pytest.raises(ValueError):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            run.results(kept=1)
            raise ValueError("no")
    with artifact.open_run(config(), tmp_path, "stage") as run:
        assert not run.finished
        run.complete()
    manifest = artifact.read_manifest(tmp_path)
    assert (manifest["error"], manifest["results"]) == (None, {"kept": 1})
    assert len(manifest["starts"]) == 2


def test_a_finished_run_is_left_as_it_is(tmp_path):
    finished(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with artifact.open_run(config(log_every_steps=1), tmp_path, "stage") as run:
        assert run.finished
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_after_complete_does_not_undo_it(tmp_path):
    with pytest.raises(ValueError):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            run.complete()
            raise ValueError("while printing the summary")
    assert status(tmp_path) == "done"


def test_the_first_error_is_the_one_reported_when_the_disk_is_full(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        with artifact.open_run(config(), tmp_path, "stage"):

            def full(path, data):
                raise UserError("the disk is full")

            monkeypatch.setattr(artifact.files, "atomic_write", full)
            raise ZeroDivisionError


def test_two_runs_can_not_share_a_workdir(tmp_path):
    with artifact.open_run(config(), tmp_path, "stage"):
        with pytest.raises(UserError, match=r"in use by another run \(process \d+ on "):
            artifact.open_run(config(), tmp_path, "stage")
    with artifact.open_run(config(), tmp_path, "stage"):
        pass  # free again


def test_a_refused_run_gives_the_workdir_free(tmp_path):
    finished(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="holds another run"):
            artifact.open_run(config(seed=1), tmp_path, "stage")


def test_workdirs_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        artifact.open_run(config(), tmp_path / "file", "stage")
    with pytest.raises(UserError, match="given as gs://BUCKET/DIRECTORY"):
        artifact.open_run(config(), "s3://bucket/run", "stage")


# The same workdir, another config


def test_another_run_in_the_workdir_is_refused_with_the_difference(tmp_path):
    finished(tmp_path)
    with pytest.raises(UserError) as error:
        artifact.open_run(config(**{"seed": 1, "optimizer.lr": 0.5}), tmp_path, "stage")
    assert "config.optimizer.lr: 0.001 -> 0.5; config.seed: 0 -> 1. Choose" in str(error.value)
    with pytest.raises(UserError, match="holds a run of stage, not of other"):
        artifact.open_run(config(), tmp_path, "other")
    assert status(tmp_path) == "done"
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_a_run_that_made_nothing_gives_way_to_a_corrected_one(tmp_path):
    with pytest.raises(UserError):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            (run.workdir / "checkpoints").mkdir()
            raise UserError("the batch doesn't fit the mesh")
    finished(tmp_path, seed=1)
    manifest = artifact.read_manifest(tmp_path)
    assert (manifest["error"], len(manifest["starts"])) == (None, 1)


@pytest.mark.parametrize("made", ["metrics", "results", "file"])
def test_a_run_that_made_something_does_not_give_way(tmp_path, made):
    with pytest.raises(ValueError):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            if made == "metrics":
                run.metrics.write(1, {"a": 0.0})
            elif made == "results":
                run.results(a=1)
            else:
                (run.workdir / "records").mkdir()
                (run.workdir / "records" / "a").touch()
            raise ValueError
    with pytest.raises(UserError, match="holds another run"):
        artifact.open_run(config(seed=1), tmp_path, "stage")


def test_many_differences_are_counted(tmp_path):
    finished(tmp_path)
    other = config()
    with other.unlocked():
        other.more = {f"key{i}": i for i in range(8)}
    with pytest.raises(UserError, match=r"config.more.key0: \(absent\) -> 0; .*; and 3 more"):
        artifact.open_run(other, tmp_path, "stage")


def test_going_on_for_longer_is_a_different_artifact_and_says_so(tmp_path):
    short = finished(tmp_path / "a", total_steps=10)
    long = finished(tmp_path / "a", total_steps=20)
    straight = finished(tmp_path / "b", total_steps=20)
    # Its first ten steps followed another schedule, so it is not the straight run.
    assert len({short, long, straight}) == 3
    manifest = artifact.read_manifest(tmp_path / "a")
    assert [entry["total_steps"] for entry in manifest["continued"]] == [10]
    with artifact.open_run(config(total_steps=20), tmp_path / "a", "stage") as run:
        assert run.finished
        assert run.identity == long


def test_another_mesh_may_go_on_with_a_run(tmp_path):
    with pytest.raises(Interrupted):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            run.metrics.write(1, {"train/loss": 2.0})
            raise Interrupted
    finished(tmp_path, **{"mesh.fsdp": 2})
    assert artifact.read_manifest(tmp_path)["continued"][0]["mesh"] == {"data": -1, "fsdp": 1}


@pytest.mark.parametrize("key", ["eval_every_steps", "eval_batches", "checkpoint.every_steps"])
def test_how_often_a_run_is_evaluated_and_saved_may_change_and_is_recorded(key, tmp_path):
    first = finished(tmp_path)
    second = finished(tmp_path, **{key: 1})
    (before,) = artifact.read_manifest(tmp_path)["continued"]
    assert before[key] == 2 + 3 * (key != "eval_batches") and first != second


@pytest.mark.parametrize("change", [("best_metric", "eval/x"), ("best_mode", "max")])
def test_what_is_best_may_not_change_in_the_same_workdir(change, tmp_path):
    finished(tmp_path)
    with pytest.raises(UserError, match=f'config.checkpoint.{change[0]}: .* -> "{change[1]}"'):
        finished(tmp_path, **{f"checkpoint.{change[0]}": change[1]})
    finished(tmp_path, **{"checkpoint.keep": 9})


def test_metrics_of_an_interrupted_run_are_kept(tmp_path):
    for step in (1, 2):
        with artifact.open_run(config(), tmp_path, "stage") as run:
            run.metrics.write(step, {"a": 0.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


# Inputs


def test_an_input_must_be_a_finished_artifact(tmp_path):
    with pytest.raises(UserError, match=r"config.inputs.corpus: .*missing has no manifest.json"):
        finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "missing")})
    with artifact.open_run(config(), tmp_path / "a", "prepare"):
        pass
    with pytest.raises(UserError, match="config.inputs.corpus: .* is not finished"):
        finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "a")})
    assert not (tmp_path / "b").exists()


def test_an_input_that_changed_is_a_difference(tmp_path):
    finished(tmp_path / "a", "prepare")
    finished(tmp_path / "a2", "prepare", seed=1)
    finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "a")})
    with pytest.raises(UserError, match='inputs.corpus: "[0-9a-f]{12}" -> "[0-9a-f]{12}"'):
        finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "a2")})


def test_the_same_input_elsewhere_is_no_difference(tmp_path):
    finished(tmp_path / "a", "prepare")
    finished(tmp_path / "a2", "prepare")
    own = finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "a")})
    assert finished(tmp_path / "b", **{"inputs.corpus": str(tmp_path / "a2")}) == own


def test_raw_files_count_by_content(tmp_path):
    raw = tmp_path / "doc.txt"
    raw.write_text("one")
    finished(tmp_path / "a", files={"documents": [raw]})
    entry = artifact.read_manifest(tmp_path / "a")["files"]["documents"]
    assert entry["paths"] == [str(raw)] and entry["count"] == 1
    raw.write_text("two")
    with pytest.raises(UserError, match="inputs.files:documents"):
        finished(tmp_path / "a", files={"documents": [raw]})


# Lineage


def chain(tmp_path):
    raw = tmp_path / "doc.txt"
    raw.write_text("one")
    finished(tmp_path / "t" / "corpus", "prepare", files={"documents": [raw]})
    finished(tmp_path / "t" / "base", "pretrain", **{"inputs.corpus": f"{tmp_path}/t/corpus"})
    finished(tmp_path / "t" / "sft", "sft", **{"inputs.corpus": f"{tmp_path}/t/base"})


def stages(tree):
    return [tree["manifest"]["stage"], *(s for t in tree["inputs"].values() for s in stages(t))]


def test_lineage_walks_back_to_the_documents(tmp_path):
    chain(tmp_path)
    tree = artifact.lineage(tmp_path / "t" / "sft")
    assert stages(tree) == ["sft", "pretrain", "prepare"]
    corpus = tree["inputs"]["corpus"]["inputs"]["corpus"]
    assert corpus["manifest"]["files"]["documents"]["digest"]
    assert corpus["path"] == str(tmp_path / "t" / "corpus")


def test_lineage_survives_moving_the_whole_tree(tmp_path):
    chain(tmp_path)
    (tmp_path / "t").rename(tmp_path / "moved")
    assert stages(artifact.lineage(tmp_path / "moved" / "sft")) == ["sft", "pretrain", "prepare"]


def test_lineage_notices_an_input_that_is_another_one_now(tmp_path):
    chain(tmp_path)
    shutil.rmtree(tmp_path / "t" / "corpus")
    with pytest.raises(UserError, match="t/base was made from .* as its input corpus, .* is gone"):
        artifact.lineage(tmp_path / "t" / "sft")
    finished(tmp_path / "t" / "corpus", "prepare", seed=5)
    with pytest.raises(UserError, match="now holds"):
        artifact.lineage(tmp_path / "t" / "sft")


# Schema


def test_a_run_written_with_schema_1_is_read_and_recognised(tmp_path):
    """The golden directory was written by gptlab 0.1.0. Never regenerate it: add a second one."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    manifest = artifact.read_manifest(tmp_path / "run")
    assert manifest["schema"] == 1
    assert manifest["results"] == {"eval/bits_per_byte": 1.75}
    assert [entry["train/loss"] for entry in read_metrics(tmp_path / "run")] == [2.5, 1.5]
    same = ConfigDict(json.loads((GOLDEN / "config.json").read_text()))
    with artifact.open_run(same, tmp_path / "run", "pretrain") as run:
        assert run.finished
        assert run.identity == manifest["identity"]


def test_a_newer_schema_is_refused(tmp_path):
    finished(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match="has schema 99, this gptlab reads up to 1; .* update"):
        artifact.read_manifest(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema":')
    with pytest.raises(UserError, match="cannot read .*manifest.json"):
        artifact.read_manifest(tmp_path)


def test_every_manifest_field_is_in_the_golden_one(tmp_path):
    """A new field needs a new schema version, or readers of old runs would stumble over it."""
    finished(tmp_path)
    now = artifact.read_manifest(tmp_path)
    golden = artifact.read_manifest(GOLDEN)
    assert now.keys() == golden.keys()
    assert now["starts"][0].keys() == golden["starts"][0].keys()
