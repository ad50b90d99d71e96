"""Rounds: each stage once, only what a change concerns again, on after any stop, all on record."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gptlab import rounds
from gptlab.evals import rounds_report
from gptlab.run import artifact
from gptlab.run.errors import UserError
from tests import fixtures, rounds_driver

PATIENCE = 240  # seconds that a process may take to start on a busy machine
TOTAL = len(rounds.ONCE) + 2 * len(rounds.EACH_ROUND)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documents")
    (directory / "a.txt").write_text("a document of one's own\n")
    return directory


@pytest.fixture
def root(tmp_path, monkeypatch):
    # Half of the time of such a run would go into plots; those of `finished` are looked at.
    monkeypatch.setattr(rounds_report, "write_plots", lambda *_: [])
    root = tmp_path / "run"
    root.mkdir()
    undo = rounds_driver.install(root)
    yield root
    undo()


@pytest.fixture(scope="module")
def finished(documents, tmp_path_factory):
    """Two finished rounds, to be copied; and the stages that ran, in order."""
    root = tmp_path_factory.mktemp("rounds")
    undo = rounds_driver.install(root)
    calls = run(root, documents)
    undo()
    return root, calls


@pytest.fixture
def done(finished, root):
    """A copy of the finished rounds in `root`; the stages that had run."""
    shutil.copytree(finished[0], root, dirs_exist_ok=True)
    return finished[1]


def run(root, documents, **changes):
    """Runs the rounds; returns the (program, artifact) of each stage that did any work."""
    calls = root / rounds_driver.CALLS
    calls.write_text("")
    rounds.run(rounds_driver.tiny_config(documents, **changes), str(root))
    return [tuple(line.split()) for line in calls.read_text().splitlines()]


def programs(calls):
    return [program for program, _ in calls]


def manifest_times(root):
    return {p.parent.name: p.stat().st_mtime_ns for p in root.glob("artifacts/*/manifest.json")}


def record(root, number):
    return json.loads((root / "rounds" / f"{number}.json").read_text())


def test_two_rounds_in_order(root, documents, finished, capsys):
    calls = run(root, documents)
    assert programs(calls) == [
        "prepare", "train_tokenizer", "prepare", "pretrain", "sft", "reward",
        *["collect", "rank", "reward", "reward", "ppo", "evaluate"] * 2,
    ]  # fmt: skip
    assert len({name for _, name in calls}) == TOTAL  # nothing is shared by mistake
    printed = capsys.readouterr().out
    assert f"[ 1/{TOTAL}] clean" in printed and f"[{TOTAL}/{TOTAL}] round 2: evaluate" in printed
    assert "about" in printed and "left" in printed
    assert "report.md" in printed
    chat = next(line for line in printed.splitlines() if line.startswith("Chat "))
    python, *arguments = chat.removeprefix("Chat").split()
    assert os.path.samefile(python, sys.executable)  # it can be pasted without an activated venv
    assert arguments == ["-m", "gptlab.chat", f"--workdir={rounds.display(root)}"]
    results = artifact.read_manifest(root)["results"]
    assert results["promoted"] == [True, True]
    assert results["policy"].endswith(f"ppo-{record(root, 2)['policy']}")
    assert (root / "report.md").stat().st_size > 0
    for name in ("losses.png", "reward_kl.png", "gold_kl.png", "calibration.png"):
        assert (finished[0] / name).stat().st_size > 0


def test_a_second_run_does_nothing_twice(root, documents, done):
    before = manifest_times(root)
    assert run(root, documents) == []
    assert manifest_times(root) == before


def test_identities_are_known_before_anything_runs(root, done):
    for program, name in done:
        manifest = artifact.read_manifest(root / "artifacts" / name)
        assert name == f"{program}-{manifest['identity']}"


@pytest.mark.parametrize(
    "change, rerun",
    [
        ({"stages.ppo.kl.coef": 0.5}, {"collect", "rank", "reward", "ppo", "evaluate"}),
        ({"stages.ppo.kl.coef": 0.5, "num_rounds": 1}, {"ppo", "evaluate"}),
        ({"stages.evaluate.data.num_prompts": 16}, {"evaluate"}),
        ({"stages.evaluate.report_samples": 5, "stages.pretrain.log_every_steps": 1}, {"evaluate"}),
        ({"stages.sft.optimizer.lr": 0.5}, {"sft", "collect", "rank", "reward", "ppo", "evaluate"}),
        ({"ppo_init": "previous"}, {"ppo", "evaluate"}),  # of round 2
        ({"stages.pretrain.checkpoint.keep": 1, "stages.ppo.sample_every_steps": 2}, set()),
    ],
)
def test_a_change_runs_only_what_depends_on_it(root, documents, done, change, rerun):
    after = run(root, documents, **change)
    assert set(programs(after)) == rerun
    assert not set(after) & set(done)
    assert run(root, documents) == []  # the first experiment is still there, whole


def test_a_run_under_way_is_not_superseded(root, documents, done):
    before = (root / "manifest.json").read_bytes()
    with artifact.locked(root):
        with pytest.raises(UserError, match="is in use by another run"):
            run(root, documents, num_rounds=1)
    assert (root / "manifest.json").read_bytes() == before


def test_fewer_rounds_leave_no_record_of_the_others(root, documents, done):
    run(root, documents, num_rounds=1)
    assert sorted(path.stem for path in (root / "rounds").glob("[0-9].json")) == ["0", "1"]
    assert run(root, documents) == []
    assert record(root, 2)["policy"]


def test_changed_documents_run_everything_again(root, documents, done):
    (documents / "b.txt").write_text("another one\n")
    try:
        assert len(run(root, documents)) == TOTAL
    finally:
        (documents / "b.txt").unlink()


def test_a_new_seed_reaches_every_stage_that_has_one(root, documents, done):
    again = run(root, documents, seed=1)
    assert programs(again)[0] == "train_tokenizer"  # preparing has no seed of the experiment's
    assert len(again) == TOTAL - 1


def test_rounds_pool_labels_and_differ_in_their_draws(root, done):
    first, second = record(root, 1), record(root, 2)
    for name in rounds.EACH_ROUND:
        assert first["steps"][name]["identity"] != second["steps"][name]["identity"]
    labels = [r["steps"]["rank"]["identity"] for r in (first, second)]
    for name in ("reward", "judge"):
        inputs = second["steps"][name]["inputs"]
        assert [inputs["comparisons"], inputs["comparisons_2"]] == labels
        assert inputs["init"] == record(root, 0)["steps"]["sft"]["identity"]
        assert "comparisons_2" not in first["steps"][name]["inputs"]
    assert second["steps"]["collect"]["inputs"]["policy"] == first["policy"]
    assert second["steps"]["evaluate"]["inputs"]["previous"] == first["policy"]
    config = json.loads((root / second["steps"]["reward"]["artifact"] / "config.json").read_text())
    judge = json.loads((root / second["steps"]["judge"]["artifact"] / "config.json").read_text())
    assert not set(config["data"]["folds"]) & set(judge["data"]["folds"])
    assert config["seed"] != judge["seed"]
    seeds = {
        json.loads((root / r["steps"]["evaluate"]["artifact"] / "config.json").read_text())["seed"]
        for r in (first, second)
    }
    assert seeds == {0}  # the same prompts and draws, so that rounds can be compared


@pytest.mark.parametrize("start", ["sft", "previous"])
def test_ppo_starts_where_it_was_told_to(root, documents, done, start):
    run(root, documents, ppo_init=start)
    sft = record(root, 0)["steps"]["sft"]["identity"]
    inputs = record(root, 2)["steps"]["ppo"]["inputs"]
    assert inputs["init"] == (sft if start == "sft" else record(root, 1)["policy"])
    assert inputs["reference"] == sft


def exported(directory, **figures):
    """What gptlab.export leaves behind, for rounds that only pretend to learn from it."""
    config = ConfigDict({"seed": 0, "figures": figures})
    with artifact.open_run(config, directory, "export") as own:
        own.results(**figures)
        own.complete("0")
    return str(directory)


BOTH = {"conversations-train": 30, "comparisons-train": 50}


def test_feedback_comes_in_at_its_round_and_stays(root, documents, done, tmp_path, capsys):
    export = exported(tmp_path / "export", **BOTH)
    before = [record(root, number) for number in (1, 2)]
    calls = run(root, documents, num_rounds=4, **{"inputs.feedback_3": export})
    each = ["collect", "rank", "reward", "reward", "ppo", "evaluate"]
    assert programs(calls) == ["prepare", "sft", *each, *each]
    assert f"[{TOTAL + 16}/{TOTAL + 16}] round 4: evaluate" in capsys.readouterr().out
    assert [record(root, number) for number in (1, 2)] == before
    identity = artifact.read_manifest(export)["identity"]
    third, fourth = (record(root, number)["steps"] for number in (3, 4))
    assert record(root, 2)["feedback"] is None and record(root, 3)["feedback"] == identity
    assert third["feedback_tokens"]["inputs"]["corpus"] == identity
    assert third["demonstrations"] == fourth["demonstrations"]  # the same feedback, learnt once
    sft, learnt = record(root, 0)["steps"]["sft"]["identity"], third["demonstrations"]["identity"]
    assert third["demonstrations"]["inputs"]["init"] == sft
    for steps in (third, fourth):
        for name in ("reward", "judge", "ppo"):
            assert steps[name]["inputs"]["init"] == learnt
        assert steps["ppo"]["inputs"]["reference"] == learnt
        assert steps["reward"]["inputs"]["comparisons_feedback"] == identity
        assert steps["evaluate"]["inputs"]["baseline"] == sft  # all rounds beside the same replies
    assert "comparisons_feedback" not in before[1]["steps"]["reward"]["inputs"]
    assert run(root, documents, num_rounds=4, **{"inputs.feedback_3": export}) == []
    assert artifact.read_manifest(root)["inputs"]["feedback_3"]["identity"] == identity


@pytest.mark.parametrize(
    "figures, stages",
    [
        ({"comparisons-train": 50}, {"reward", "ppo", "evaluate"}),
        ({"conversations-train": 30}, {"prepare", "sft", "reward", "ppo", "evaluate"}),
    ],
)
def test_feedback_of_one_kind(root, documents, done, tmp_path, figures, stages):
    export = exported(tmp_path / "export", **figures)
    assert set(programs(run(root, documents, **{"inputs.feedback_2": export}))) == stages
    inputs = record(root, 2)["steps"]["reward"]["inputs"]
    assert ("comparisons_feedback" in inputs) == ("comparisons-train" in figures)


def test_newer_feedback_takes_the_place_of_older(root, documents, done, tmp_path):
    one = exported(tmp_path / "one", **BOTH)
    two = exported(tmp_path / "two", **{**BOTH, "comparisons-train": 60})
    run(root, documents, **{"inputs.feedback_1": one, "inputs.feedback_2": two})
    found = [record(root, number)["feedback"] for number in (1, 2)]
    assert found == [artifact.read_manifest(path)["identity"] for path in (one, two)]


def test_feedback_that_teaches_nothing_is_refused(root, documents, done, tmp_path):
    with pytest.raises(UserError, match="feedback_3 is for round 3, but config.num_rounds"):
        run(root, documents, **{"inputs.feedback_3": exported(tmp_path / "late", **BOTH)})
    with pytest.raises(UserError, match="feedback_2: .*has no conversations and no comparisons"):
        empty = exported(tmp_path / "empty", **{"prompts-test": 4, "comparisons-train": 0})
        run(root, documents, **{"inputs.feedback_2": empty})
    with pytest.raises(UserError, match="feedback_2: .* was made by rounds, not by gptlab.export"):
        run(root, documents, **{"inputs.feedback_2": str(root)})
    with pytest.raises(UserError, match="feedback_2: .*manifest.json, so it is no artifact"):
        run(root, documents, **{"inputs.feedback_2": str(tmp_path / "nowhere")})


def test_a_policy_that_fails_the_gate_is_not_promoted(root, documents, done, capsys):
    run(root, documents, **{"stages.evaluate.gate.min_gold_difference": 0.5})
    sft = record(root, 0)["steps"]["sft"]["identity"]
    for number in (1, 2):
        assert record(root, number)["failures"] == ["no gain"]
        assert record(root, number)["policy_after"] == sft
    assert record(root, 2)["steps"]["collect"]["inputs"]["policy"] == sft
    # Compared with the round before all the same.
    assert record(root, 2)["steps"]["evaluate"]["inputs"]["previous"] == record(root, 1)["policy"]
    assert "not promoted: no gain" in capsys.readouterr().out
    assert artifact.read_manifest(root)["results"]["policy"].endswith(f"sft-{sft}")


def test_without_human_comparisons_there_is_no_judge_of_reviews(root, documents):
    sets = ",".join(rounds_driver.SETS[:-1])
    assert len(run(root, documents, **{"stages.clean.module": sets})) == TOTAL - 1
    assert "reviews" not in record(root, 1)["steps"]["evaluate"]["inputs"]


def test_documents_without_dialogues_are_refused_with_advice(root, documents):
    with pytest.raises(UserError, match="no conversations-train.*needs dialogues"):
        run(root, documents, **{"stages.clean.module": "documents-train"})


def test_lineage_goes_back_to_the_documents(root, documents, done):
    tree = artifact.lineage(root / record(root, 2)["steps"]["ppo"]["artifact"])
    while tree["inputs"]:
        tree = (
            tree["inputs"].get("init") or tree["inputs"].get("tokens") or tree["inputs"]["corpus"]
        )
    (path,) = tree["manifest"]["files"]["sources"]["paths"]
    assert path == str(documents / "a.txt")


def test_written_configs_are_the_exact_ones(root, done):
    for path in (root / "configs").glob("*.py"):
        spec = importlib.util.spec_from_file_location("written", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        manifest = artifact.read_manifest(root / "artifacts" / path.stem)
        identities = {name: entry["identity"] for name, entry in manifest["inputs"].items()}
        raw = {f"files:{name}": entry["digest"] for name, entry in manifest["files"].items()}
        config = module.get_config()
        found = artifact.identity(manifest["stage"], config, {**identities, **raw})
        assert path.stem == f"{manifest['stage']}-{found}"


def test_a_written_configs_empty_keys_may_be_filled_and_others_emptied(tmp_path, documents):
    planner = rounds.Planner(rounds_driver.tiny_config(documents), tmp_path)
    path = rounds.write_config(planner.step("sft", 0), tmp_path / "configs")
    code = (
        "import sys\nfrom gptlab.run import program\n"
        "program.main(lambda config, workdir: print(config.to_json()), 'sft')\n"
    )
    given = ("--config.total_steps", "None", "--config.total_epochs=1.5", "--workdir=unused")
    done = subprocess.run(
        [sys.executable, "-c", code, f"--config={path}", *given],
        text=True, capture_output=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert (read["total_steps"], read["total_epochs"]) == (None, 1.5)


@pytest.fixture
def driver(documents):
    """Starts rounds in a process of their own: (root, SECONDS, perhaps MOMENT) -> Popen."""
    started = []

    def start(root, *arguments, **options):
        command = [sys.executable, "-m", "tests.rounds_driver", str(root), str(documents)]
        options["stderr"] = subprocess.DEVNULL
        started.append(subprocess.Popen([*command, *arguments], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(happened, process):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_goes_on_after_a_stop(tmp_path, driver, number):
    root = tmp_path / "run"
    process = driver(root, "0.5")
    calls = root / rounds_driver.CALLS

    def the_fifth_is_under_way():  # so the fourth is done, and not only said to be
        done = calls.read_text() if calls.exists() else ""
        now = (root / rounds_driver.UNDER_WAY).read_text() if done.count("\n") >= 4 else ""
        return now and Path(now.split()[1]).name not in done

    wait_until(the_fifth_is_under_way, process)
    os.kill(process.pid, number)
    assert process.wait(timeout=PATIENCE) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    done = manifest_times(root)
    finished = calls.read_text().splitlines()
    assert 4 <= len(finished) < TOTAL
    assert driver(root, "0").wait(timeout=PATIENCE) == 0
    again = calls.read_text().splitlines()
    assert again[: len(finished)] == finished and len(again) == len(set(again)) == TOTAL
    after = manifest_times(root)
    for line in finished:
        assert after[line.split()[1]] == done[line.split()[1]]
    assert artifact.read_manifest(root)["status"] == "done"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stop_that_meets_a_subprocess_before_it_can_hear_is_no_failure(tmp_path, driver, number):
    root = tmp_path / "run"
    process = driver(root, "0", "starting", start_new_session=True)
    wait_until((root / rounds_driver.UNDER_WAY).exists, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    assert process.wait(timeout=PATIENCE) == 75
    manifest = artifact.read_manifest(root, allow_unfinished=True)
    assert (manifest["status"], manifest["error"]) == ("interrupted", None)


def test_a_killed_run_takes_its_subprocess_along(tmp_path, driver):
    root = tmp_path / "run"
    process = driver(root, "0", "working")
    wait_until((root / rounds_driver.UNDER_WAY).exists, process)
    process.kill()
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    pid, workdir = (root / rounds_driver.UNDER_WAY).read_text().split()
    try:
        deadline = time.monotonic() + 30  # a minute it would go on
        while in_use(workdir):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    manifest = artifact.read_manifest(workdir, allow_unfinished=True)
    assert manifest["status"] == "interrupted"
    assert driver(root, "0").wait(timeout=PATIENCE) == 0


def in_use(directory):
    try:
        with artifact.locked(directory):
            return False
    except UserError:
        return True


def test_a_subprocess_speaks_for_itself(tmp_path, documents, capfd):
    config = rounds_driver.tiny_config(documents)
    planner = rounds.Planner(config, tmp_path)
    step = planner.step("rank", 1)  # without its candidates
    path = rounds.write_config(step, tmp_path / "configs")
    with pytest.raises(UserError, match="round 1: rank stopped at the mistake"):
        rounds.run_subprocess(step, path, lambda: False)
    assert "config.inputs.candidates is not set" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_rounds": 0}, "num_rounds=0"),
        ({"num_rounds": 9}, "num_rounds=9"),
        ({"backend": "cloud"}, "config.backend='cloud'"),
        ({"ppo_init": "base"}, "config.ppo_init='base'"),
    ],
)
def test_mistakes_are_named(root, documents, change, message):
    with pytest.raises(UserError, match=message):
        run(root, documents, **change)


def test_missing_documents_are_named_before_anything_runs(root, tmp_path):
    with pytest.raises(UserError, match="config.data.documents"):
        run(root, tmp_path / "nowhere")
    assert not (root / "artifacts").exists()


@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_smoke_goes_all_the_way_and_does_nothing_twice(smoke_run):
    assert artifact.read_manifest(smoke_run)["results"]["promoted"] == [True, True]
    before = manifest_times(smoke_run)
    assert len(before) == TOTAL
    printed = fixtures.run_smoke(smoke_run)
    assert printed.count("is done") == TOTAL
    assert manifest_times(smoke_run) == before
    tree = artifact.lineage(smoke_run / record(smoke_run, 2)["steps"]["evaluate"]["artifact"])
    assert tree["inputs"]["policy"]["manifest"]["stage"] == "ppo"
