"""Rounds whose stages take no time: they keep to the artifact protocol and make up their figures.

`python -m tests.rounds_driver WORKDIR DOCUMENTS SECONDS` runs them in a process of its own, each
stage taking SECONDS, so that a test can kill it.
"""

import json
import sys
import time
from pathlib import Path

from gptlab import rounds
from gptlab.evals import suite
from gptlab.run import artifact, files
from gptlab.run.errors import EXIT_INTERRUPTED, Interrupted

SETS = ("conversations-train", "prompts-train", "prompts-test", "comparisons-train")
CALLS = "calls.txt"  # one line for each stage that did any work, in WORKDIR


def _made(directory):
    directory.mkdir(exist_ok=True)
    return directory


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def evaluation(config):
    """Figures that say a policy is the better the lower its seed is."""
    alone = {key: interval(0.3) for key in suite.LABELS}
    paired = {key: interval(0.6) for key in suite.LABELS if "win" in key or "gold_d" in key}
    figures = {"policy": alone, "baseline": alone, "over_baseline": paired, "num_prompts": 10}
    if config.inputs.previous is not None:
        figures["over_previous"] = paired
    passed = config.gate.min_gold_difference <= 0
    return {**figures, "passed": passed, "failures": [] if passed else ["no gain"]}


def stage(program, root, seconds=0.0):
    """A program's run function that does nothing for some seconds."""

    def run(config, workdir):
        raw = rounds.raw_files(config) if config.get("mode") == "clean" else {}
        with artifact.open_run(config, workdir, program, files=raw) as own:
            if own.finished:
                return
            for _ in range(10):
                time.sleep(seconds / 10)
                if own.stop_requested():
                    raise Interrupted("stopped")
            if config.get("mode") == "clean":
                for name in config.module.split(","):  # stands for what is in the documents
                    shard = f"{name}-00000-of-00001.array_record"
                    files.atomic_write(_made(own.workdir / "records") / shard, "")
            own.metrics.write(1, {"train/loss": 2.0, "ppo/kl": 0.1, "ppo/score": 0.2})
            if program == "evaluate":
                own.results(**evaluation(config))
            if program == "reward":
                own.results(reliability=[])
            with open(Path(root) / CALLS, "a") as calls:
                calls.write(f"{program} {Path(workdir).name}\n")
            own.complete(digest="0")

    return run


def install(root, seconds=0.0):
    """Puts the stages in the place of the programs; returns what undoes it."""
    before = dict(rounds.IN_PROCESS), rounds.run_subprocess
    rounds.IN_PROCESS.update({name: stage(name, root, seconds) for name in rounds.IN_PROCESS})

    def run_here(step, config_file, stop_requested):
        stage(step.program, root, seconds)(step.config, str(step.workdir))

    rounds.run_subprocess = run_here

    def undo():
        rounds.IN_PROCESS.update(before[0])
        rounds.run_subprocess = before[1]

    return undo


def tiny_config(documents, **changes):
    """The smoke config on a directory of documents."""
    from configs import quickstart

    config = quickstart.get_config("smoke")
    config.data.documents = str(documents)
    config.stages.clean.data.beside = ()
    config.stages.clean.module = ",".join(SETS)
    config.update_from_flattened_dict(changes)
    return config.lock()


if __name__ == "__main__":
    workdir, documents, seconds = sys.argv[1:]
    Path(workdir).mkdir(parents=True, exist_ok=True)
    install(workdir, float(seconds))
    try:
        rounds.run(tiny_config(documents), workdir)
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    print(json.dumps({"done": True}))
