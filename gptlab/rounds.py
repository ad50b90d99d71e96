"""The whole loop: documents become a chat model, and rounds of feedback make it a better one.

    python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart

Prepares, pretrains and fine-tunes once; then, for each round, collects replies from the current
policy, ranks them, trains a reward model on the rankings of *all* rounds from its SFT start, runs
PPO, evaluates, and promotes the new policy if it passes the evaluation's gate.

What people said in the chat meanwhile (an artifact of `gptlab.export`) comes in at a round:

    python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart \
        --config.num_rounds=3 --config.inputs.feedback_3=runs/export

From that round on their demonstrations continue fine-tuning, and their comparisons join the
rankings. Rounds before it stay as they are.

Every stage is an artifact at WORKDIR/artifacts/<program>-<identity>, where the identity follows
from its config and its inputs, so a change runs only what depends on it, and running the same
command again does nothing twice. WORKDIR/rounds/<r>.json lists what each round was made of,
WORKDIR/configs holds the exact config of each stage, and WORKDIR/report.md sums it all up.
"""

import dataclasses
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from gptlab import collect, evaluate, ppo, pretrain, rank, reward, sft, train_tokenizer
from gptlab.data import raw as raw_inputs
from gptlab.data import readers, records
from gptlab.evals import rounds_report
from gptlab.run import artifact, files, program, signals, storage
from gptlab.run.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, UserError

# Stages by their name in config.stages: the program that runs them. Two may share a program.
PROGRAMS = {
    "clean": "prepare",
    "vocabulary": "train_tokenizer",
    "tokenize": "prepare",
    "pretrain": "pretrain",
    "sft": "sft",
    "reviews": "reward",
    "feedback_tokens": "prepare",
    "demonstrations": "sft",
    "collect": "collect",
    "rank": "rank",
    "reward": "reward",
    "judge": "reward",
    "ppo": "ppo",
    "evaluate": "evaluate",
}
ONCE = ("clean", "vocabulary", "tokenize", "pretrain", "sft", "reviews")
OF_DEMONSTRATIONS = ("feedback_tokens", "demonstrations")  # of a round that has some, and first
EACH_ROUND = ("collect", "rank", "reward", "judge", "ppo", "evaluate")
# prepare is not among them: it needs TensorFlow, so it always runs in a process of its own.
IN_PROCESS: Mapping[str, Callable[[ConfigDict, str], object]] = {
    "train_tokenizer": train_tokenizer.run,
    "pretrain": pretrain.run,
    "sft": sft.run,
    "collect": collect.run,
    "rank": rank.run,
    "reward": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
}
# The inputs of `reward` that the rankings of rounds 1, 2, ... go into: it pools them.
LABEL_INPUTS = ("comparisons", "comparisons_2", "comparisons_3", "comparisons_4")
# The one for what people said in the chat.
FEEDBACK_INPUT = "comparisons_feedback"
# Stages that draw the same in all rounds: the same prompts and SFT replies to compare policies on;
# and the same feedback gives the same model.
_SAME_DRAWS = (*OF_DEMONSTRATIONS, "evaluate")
# Seeds of the rounds are this far apart, so that no round's draws are another experiment's.
_SEEDS_APART = 1000


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage, ready to run: `config` has its inputs filled in."""

    name: str
    round: int  # 0 for what is done once
    config: ConfigDict
    inputs: Mapping[str, str]  # input's name -> its identity
    identity: str
    workdir: epath.Path

    @property
    def program(self) -> str:
        """The module in gptlab/ that runs it."""
        return PROGRAMS[self.name]

    @property
    def title(self) -> str:
        """What progress lines call it."""
        return f"round {self.round}: {self.name}" if self.round else self.name

    def manifest(self) -> dict[str, Any] | None:
        """Its manifest if it has finished, else None."""
        if not (self.workdir / artifact.MANIFEST_FILE).exists():
            return None
        manifest = artifact.read_manifest(self.workdir, allow_unfinished=True)
        return manifest if manifest["status"] == "done" else None


@dataclasses.dataclass(frozen=True)
class Feedback:
    """An artifact of gptlab.export, as an input of steps."""

    identity: str
    workdir: epath.Path
    has_demonstrations: bool
    has_comparisons: bool


class Planner:
    """Turns stages of the config into steps, whose identities are known before anything runs."""

    def __init__(self, config: ConfigDict, root: epath.Path):
        self._config = config
        self._root = storage.resolve(root)

    def step(self, name: str, round_number: int, **inputs: Step | Feedback | None) -> Step:
        """The step of a stage whose inputs are other steps; one that is None stays empty."""
        stage = self._config.stages[name]
        optional = {k: t for k, t in program.may_be_empty(stage).items() if t in (int, float, str)}
        # Its own: what stages share by reference would change in all of them.
        config = program.with_placeholders(stage.to_dict(), optional)
        if round_number and name not in _SAME_DRAWS:
            config.seed = config.seed + _SEEDS_APART * round_number
        for key, value in inputs.items():
            if key not in config.inputs:
                raise UserError(f"config.stages.{name}.inputs has no {key}")
            config.inputs[key] = None if value is None else str(value.workdir)
        identities = {key: value.identity for key, value in inputs.items() if value is not None}
        raw = raw_files(config) if PROGRAMS[name] == "prepare" else {}
        digests = {f"files:{key}": files.digest_files(paths) for key, paths in raw.items()}
        identity = artifact.identity(PROGRAMS[name], config, {**identities, **digests})
        workdir = self._root / "artifacts" / f"{PROGRAMS[name]}-{identity}"
        return Step(name, round_number, config.lock(), identities, identity, workdir)


def raw_files(config: ConfigDict) -> raw_inputs.Files:
    """The raw files that `prepare` will read for this config, as it names them to its own run."""
    if config.mode == "tokenize":
        return raw_inputs.of_tasks(config)
    sources = readers.plan(config.data.sources, config.data.documents, config.data.beside)
    return raw_inputs.of_sources(sources, config.data.tfds_dir, config.module)


class Runner:
    """Runs steps, each at most once, and says where the whole stands."""

    def __init__(
        self, config: ConfigDict, root: epath.Path, stages: list[str], stop: Callable[[], bool]
    ):
        self._config = config
        self._root = root
        self._stop_requested = stop
        self._left = list(stages)
        self._total = len(self._left)
        self._start = time.monotonic()
        self._spent = {"expected": 0.0, "measured": 0.0}

    def run(self, step: Step) -> dict[str, Any]:
        """Makes sure that a step is done and returns its manifest.

        Raises:
          Interrupted: a stop was requested; what the stage had is saved.
          UserError: the stage refused its input, or a subprocess failed.
        """
        if self._stop_requested():
            raise Interrupted
        number = self._total - len(self._left) + 1
        self._left.remove(step.name)
        label = f"[{number:2}/{self._total}] {step.title:18}"
        manifest = step.manifest()
        if manifest is not None:
            if step.program == "rank" and step.config.backend == "store":
                rank.run(step.config, str(step.workdir))  # refuses what may not be used now
            print(f"{label} is done: artifacts/{step.workdir.name}", flush=True)
            return manifest
        print(f"{label} {self._outlook(step)}", flush=True)
        path = write_config(step, self._root / "configs")
        start = time.monotonic()
        if self._config.backend == "in_process" and step.program in IN_PROCESS:
            IN_PROCESS[step.program](step.config, str(step.workdir))
            jax.clear_caches()  # no stage uses another's programs; on disk they stay cached
            gc.collect()
        else:
            run_subprocess(step, path, self._stop_requested)
        seconds = time.monotonic() - start
        self._spent["measured"] += seconds
        self._spent["expected"] += self._config.expected_seconds[step.name]
        print(f"{label} took {clock(seconds)}", flush=True)
        manifest = artifact.read_manifest(step.workdir)
        if manifest["identity"] != step.identity:
            raise RuntimeError(
                f"{step.workdir} became {manifest['identity']}: not what was planned"
            )
        return manifest

    def leave_out(self, name: str) -> None:
        """Counts a stage as not needed."""
        self._left.remove(name)
        self._total -= 1

    def _outlook(self, step: Step) -> str:
        """Elapsed time, and what is left at the pace seen so far."""
        expected = self._config.expected_seconds
        pace = 1.0
        if self._spent["expected"]:
            pace = self._spent["measured"] / self._spent["expected"]
        left = pace * (expected[step.name] + sum(expected[name] for name in self._left))
        return f"starts; {clock(time.monotonic() - self._start)} so far, about {clock(left)} left"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def write_config(step: Step, directory: epath.Path) -> epath.Path:
    """Writes a step's exact config as a file that its program takes; returns the path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{step.workdir.name}.py"
    command = command_line(step, path)
    kinds = program.may_be_empty(step.config)
    optional = ", ".join(f"{json.dumps(key)}: {kind.__name__}" for key, kind in kinds.items())
    files.atomic_write(
        path,
        f'"""{step.title}, exactly as gptlab.rounds runs it.\n\n{shlex.join(command)}\n"""\n\n'
        "import json\n\nfrom gptlab.run import program\n\n"
        f"CONFIG = {json.dumps(step.config.to_json(indent=1))}\n"
        f"MAY_BE_EMPTY = {{{optional}}}\n\n\n"
        "def get_config(arg=None):\n"
        "    return program.with_placeholders(json.loads(CONFIG), MAY_BE_EMPTY)\n",
    )
    return epath.Path(storage.local_copy(path))  # a config is read from a disk


def command_line(step: Step, config_file: epath.Path) -> list[str]:
    """The command that runs a step on its own."""
    module = f"gptlab.{step.program}"
    return ["python", "-m", module, f"--config={config_file}", f"--workdir={step.workdir}"]


def run_subprocess(step: Step, config_file: epath.Path, stop_requested: Callable[[], bool]) -> None:
    """Runs a step in a process of its own, and hands a requested stop on to it.

    Raises as the step itself would: Interrupted for exit code 75, UserError for 2 (its own line is
    on the terminal already), and UserError that names the exit code for anything else. A process
    that a requested stop met while it still started has no exit code of its own: Interrupted.
    """
    command = [sys.executable, *command_line(step, config_file)[1:]]
    with subprocess.Popen(signals.ending_with_this_process(command)) as process:
        told = False
        while process.poll() is None:
            if stop_requested() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.1)
    # Not only if it was told: Ctrl-C reaches both at once, and may be quicker than the loop.
    stopped = process.returncode != 0 and stop_requested()
    if stopped or process.returncode == EXIT_INTERRUPTED:
        raise Interrupted
    if process.returncode == EXIT_USER_ERROR:
        raise UserError(f"{step.title} stopped at the mistake named in the line above")
    if process.returncode:
        raise UserError(
            f"{step.title} ended with exit code {process.returncode}; what it said is above, and "
            f"this runs it alone: {shlex.join(command)}"
        )


@dataclasses.dataclass
class State:
    """Where the rounds have led so far."""

    once: dict[str, Step]
    feedback: Mapping[int, Feedback]  # by the round at which it comes in
    policy: Step  # the newest promoted policy; the SFT model before there is one
    latest: Step | None = None  # the newest policy, promoted or not
    labels: list[Step] = dataclasses.field(default_factory=list)  # the rankings of all rounds
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def prepare_once(planner: Planner, runner: Runner) -> dict[str, Step]:
    """Documents to the SFT model; and a reward model of human comparisons, if there are some."""
    once: dict[str, Step] = {}

    def do(name: str, **inputs: Step) -> None:
        once[name] = planner.step(name, 0, **inputs)
        runner.run(once[name])

    do("clean")
    has_reviews = check_corpus(once["clean"])
    do("vocabulary", corpus=once["clean"])
    do("tokenize", corpus=once["clean"], vocabulary=once["vocabulary"])
    do("pretrain", tokens=once["tokenize"], vocabulary=once["vocabulary"])
    do("sft", init=once["pretrain"], tokens=once["tokenize"], vocabulary=once["vocabulary"])
    if has_reviews:  # No chat: the pretrained model has read reviews later than the SFT model.
        base = once["pretrain"]
        do("reviews", init=base, comparisons=once["clean"], vocabulary=once["vocabulary"])
    else:
        runner.leave_out("reviews")
    return once


def check_corpus(clean: Step) -> bool:
    """Whether the corpus has human comparisons; UserError if it has no dialogues to learn from."""
    there = records.record_sets(clean.workdir / "records")
    for name in ("conversations-train", "prompts-train", "prompts-test"):
        if name not in there:
            raise UserError(
                f"{clean.workdir} has no {name}: fine-tuning needs dialogues. Add .jsonl files of "
                '{"messages": [...]} lines to config.data.documents, or leave out that setting'
            )
    return "comparisons-train" in there


def run_round(number: int, state: State, planner: Planner, runner: Runner, start: str) -> None:
    """One round: `state` gets its labels, its policy and its record.

    Args:
      number: from 1.
      state: what the rounds before have led to.
      planner: of the steps.
      runner: of the steps.
      start: 'sft' or 'previous', what PPO starts from.
    """
    once = state.once
    shared = {"vocabulary": once["vocabulary"]}
    steps: dict[str, Step] = {}
    manifests: dict[str, dict[str, Any]] = {}

    def do(name: str, **inputs: Step | Feedback | None) -> None:
        steps[name] = planner.step(name, number, **inputs)
        manifests[name] = runner.run(steps[name])

    feedback = newest(state.feedback, number)
    start_model = once["sft"]  # of the reward models and PPO
    if feedback is not None and feedback.has_demonstrations:
        do("feedback_tokens", corpus=feedback, **shared)
        do("demonstrations", init=once["sft"], tokens=steps["feedback_tokens"], **shared)
        start_model = steps["demonstrations"]
    do("collect", policy=state.policy, prompts=once["clean"], **shared)
    do("rank", candidates=steps["collect"])
    state.labels.append(steps["rank"])
    pooled: dict[str, Step | Feedback] = dict(zip(LABEL_INPUTS, state.labels, strict=False))
    if feedback is not None and feedback.has_comparisons:
        pooled[FEEDBACK_INPUT] = feedback
    do("reward", init=start_model, **pooled, **shared)
    do("judge", init=start_model, **pooled, **shared)
    do(
        "ppo",
        init=state.policy if start == "previous" else start_model,
        reference=start_model,
        reward=steps["reward"],
        prompts=once["clean"],
        tokens=once["tokenize"],
        **shared,
    )
    do(
        "evaluate",
        policy=steps["ppo"],
        baseline=once["sft"],
        base=once["pretrain"],
        previous=state.latest,
        reward=steps["reward"],
        judge=steps["judge"],
        prompts=once["clean"],
        reviews=once["clean"] if "reviews" in once else None,
        tokens=once["tokenize"],
        **shared,
    )
    figures = manifests["evaluate"]["results"]
    before = state.policy
    state.latest = steps["ppo"]
    if figures["passed"]:
        state.policy = steps["ppo"]
    state.rounds.append(
        {
            "round": number,
            "policy_before": before.identity,
            "policy": steps["ppo"].identity,
            "promoted": figures["passed"],
            "failures": figures["failures"],
            "policy_after": state.policy.identity,
            "labels": [step.identity for step in state.labels],
            "feedback": None if feedback is None else feedback.identity,
            "steps": {name: entry(step, manifests[name]) for name, step in steps.items()},
            "figures": figures,
        }
    )


def entry(step: Step, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a round's record says of a step."""
    return {
        "program": step.program,
        "identity": step.identity,
        "inputs": dict(step.inputs),
        "digest": manifest["digest"],
        "artifact": f"artifacts/{step.workdir.name}",
        "seconds": seconds_of(manifest),
    }


def seconds_of(manifest: Mapping[str, Any]) -> float:
    """Wall time of all starts of a run together."""
    starts = [start.get("goodput", {}) for start in manifest["starts"]]
    return float(sum(goodput.get("goodput/total_s", 0.0) for goodput in starts))


def run(config: ConfigDict, workdir: str) -> None:
    """Runs everything that is not done yet. Errors and interruption are those of the stages."""
    check(config)
    root = storage.resolve(workdir)
    feedback = find_feedback(config)
    raw = raw_files(config.stages.clean) | raw_files(config.stages.tokenize)
    supersede(config, root, raw, feedback)
    with artifact.open_run(config, workdir, "rounds", files=raw) as own:
        forget_rounds(root, config.num_rounds)
        planner = Planner(config, root)
        runner = Runner(config, root, stages_of(config, feedback), own.stop_requested)
        once = prepare_once(planner, runner)
        state = State(once, feedback, policy=once["sft"])
        for number in range(1, config.num_rounds + 1):
            run_round(number, state, planner, runner, config.ppo_init)
            record = state.rounds[-1]
            files.atomic_write(_made(root / "rounds") / f"{number}.json", _json(record))
            said = (
                "promoted"
                if record["promoted"]
                else "not promoted: " + "; ".join(record["failures"])
            )
            print(f"round {number}: {said}", flush=True)
        preparation = {
            "steps": {
                name: entry(step, artifact.read_manifest(step.workdir))
                for name, step in once.items()
            }
        }
        files.atomic_write(_made(root / "rounds") / "0.json", _json(preparation))
        table, plots = rounds_report.write(root, preparation, state.rounds)
        if not own.finished:
            own.results(
                policy=str(state.policy.workdir),
                promoted=[record["promoted"] for record in state.rounds],
                artifacts={step.name: str(step.workdir) for step in once.values()},
            )
            own.complete()
    shown = display(root)
    print(f"\n{table}\n")
    print(f"Report  {shown}/report.md")
    print(f"Plots   {', '.join(f'{shown}/{plot.name}' for plot in plots)}")
    # By this interpreter: a fresh machine has no `python` outside the environment.
    print(f"Chat    {display(epath.Path(sys.executable))} -m gptlab.chat --workdir={shown}")


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    if config.backend not in ("in_process", "subprocess"):
        raise UserError(f"config.backend={config.backend!r} is unknown: in_process or subprocess")
    if config.ppo_init not in ("sft", "previous"):
        raise UserError(f"config.ppo_init={config.ppo_init!r} is unknown: sft or previous")
    if not 1 <= config.num_rounds <= len(LABEL_INPUTS):
        raise UserError(f"config.num_rounds={config.num_rounds}: 1 to {len(LABEL_INPUTS)}")
    for group in ("stages", "expected_seconds"):
        missing = [name for name in PROGRAMS if name not in config[group]]
        if missing:
            raise UserError(f"config.{group} lacks {', '.join(missing)}")
    try:
        rank.check(config.stages.rank)  # it comes after hours of training
    except UserError as error:
        raise UserError(f"config.stages.rank: {error}") from error


def find_feedback(config: ConfigDict) -> dict[int, Feedback]:
    """The exports that config.inputs names, by the round at which they come in.

    Raises:
      UserError: one is no export, holds nothing to learn from, or belongs to no round.
    """
    found = {}
    for name, path in config.inputs.items():
        if path is None:
            continue
        key, number = f"config.inputs.{name}", int(name.removeprefix("feedback_"))
        if number > config.num_rounds:
            raise UserError(
                f"{key} is for round {number}, but config.num_rounds={config.num_rounds}: raise it "
                "to that, or give the export to an earlier round"
            )
        try:
            manifest = artifact.read_manifest(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        if manifest["stage"] != "export":
            raise UserError(f"{key}: {path} was made by {manifest['stage']}, not by gptlab.export")
        kinds = [manifest["results"].get(f"{k}-train") for k in ("conversations", "comparisons")]
        if not any(kinds):
            raise UserError(f"{key}: {path} has no conversations and no comparisons to learn from")
        demonstrations, comparisons = map(bool, kinds)
        workdir = storage.resolve(path)
        found[number] = Feedback(manifest["identity"], workdir, demonstrations, comparisons)
    return found


def newest(feedback: Mapping[int, Feedback], number: int) -> Feedback | None:
    """What a round learns from: the last export until then, as it holds what its store held."""
    return feedback.get(max((r for r in feedback if r <= number), default=0))


def stages_of(config: ConfigDict, feedback: Mapping[int, Feedback]) -> list[str]:
    """The stages of the whole run, in order."""
    names = list(ONCE)
    for number in range(1, config.num_rounds + 1):
        export = newest(feedback, number)
        names += OF_DEMONSTRATIONS if export is not None and export.has_demonstrations else ()
        names += EACH_ROUND
    return names


def supersede(
    config: ConfigDict, root: epath.Path, raw: raw_inputs.Files, feedback: Mapping[int, Feedback]
) -> None:
    """Makes room for a changed config: artifacts are kept by identity, so nothing is lost.

    An ordinary run refuses a workdir of another config, as that would mix two runs. Here every
    stage has a directory of its own, and only the summary belongs to the whole.
    """
    if not (root / artifact.MANIFEST_FILE).exists():
        return
    inputs = {f"files:{key}": files.digest_files(paths) for key, paths in raw.items()}
    inputs |= {f"feedback_{number}": export.identity for number, export in feedback.items()}
    own = artifact.identity("rounds", config, inputs)
    with artifact.locked(root):  # nothing is taken from a run that is under way
        manifest = artifact.read_manifest(root, allow_unfinished=True)
        if manifest["stage"] == "rounds" and manifest["identity"] != own:
            kept = _made(root / "rounds") / f"manifest-{manifest['identity']}.json"
            files.atomic_write(kept, (root / artifact.MANIFEST_FILE).read_bytes())
            (root / artifact.MANIFEST_FILE).unlink()


def forget_rounds(root: epath.Path, after: int) -> None:
    """Deletes the records of rounds that the config no longer has; their artifacts stay."""
    for path in (root / "rounds").glob("*.json"):
        if path.stem.isdigit() and int(path.stem) > after:
            path.unlink()


def display(path: epath.Path) -> str:
    """A path as one would type it here: relative, unless it is elsewhere."""
    if storage.in_bucket(path):
        return str(path)
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _made(directory: epath.Path) -> epath.Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _json(content: Mapping[str, Any]) -> str:
    return files.to_json(content, indent=1) + "\n"


if __name__ == "__main__":
    program.main(run, "rounds")
