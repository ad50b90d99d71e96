"""Rounds whose stages take no time: they keep to the artifact protocol and make up their figures.

`python -m tests.rounds_driver WORKDIR DOCUMENTS SECONDS [MOMENT]` runs them in a process of its
own, each stage taking SECONDS, so that a test can kill it. With a MOMENT, prepare is a process of
its own as ever, and takes a minute: 'starting', when it can't hear of a stop yet, or 'working' in
its workdir.
"""

import json
import os
import sys
import time
from pathlib import Path

from gptlab import rounds
from gptlab.evals import suite
from gptlab.run import artifact, files, program
from gptlab.run.errors import EXIT_INTERRUPTED, Interrupted

SETS = ("conversations-train", "prompts-train", "prompts-test", "comparisons-train")
CALLS = "calls.txt"  # one line for each stage that did any work, in WORKDIR
UNDER_WAY = "under_way.txt"  # process and workdir of the stage that is, in WORKDIR
_MINUTE = 60.0


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
            say_under_way(root, workdir)
            end = time.monotonic() + seconds
            while not own.stop_requested() and time.monotonic() < end:
                time.sleep(0.02)
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


def say_under_way(root, workdir):
    files.atomic_write(Path(root) / UNDER_WAY, f"{os.getpid()} {workdir}")


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


def run_rounds(workdir, documents, seconds, moment=None):
    """The rounds; with a moment, prepare in a process of its own, which is to be met then."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    run_subprocess = rounds.run_subprocess
    install(workdir, float(seconds))
    if moment is not None:
        rounds.run_subprocess = run_subprocess
        driver = ["python", "-m", "tests.rounds_driver", moment, workdir]
        rounds.command_line = lambda step, path: [*driver, str(path), str(step.workdir)]
    rounds.run(tiny_config(documents), workdir)
    print(json.dumps({"done": True}))


def run_prepare(moment, root, config_file, workdir):
    """What the rounds started."""
    if moment == "starting":
        say_under_way(root, workdir)
        time.sleep(_MINUTE)
    stage("prepare", root, _MINUTE)(program.load_config(config_file), workdir)


if __name__ == "__main__":
    try:
        (run_prepare if sys.argv[1] in ("starting", "working") else run_rounds)(*sys.argv[1:])
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
