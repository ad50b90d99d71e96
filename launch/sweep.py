"""Runs a stage once for each entry of its config's `sweep`, one after the other.

    python launch/sweep.py gptlab.reward --config=configs/reward.py --workdir=runs/epochs \
        --config.inputs.init=runs/sft --config.inputs.comparisons=runs/rank \
        --config.inputs.vocabulary=runs/vocabulary

Everything after the program is its own command line. An entry runs in a directory below --workdir
that is named by its settings; the first one that fails ends the sweep. What is done is not run
again, so the same command goes on.
"""

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def commands(program: str, arguments: Sequence[str]) -> list[list[str]]:
    """One command line an entry; SystemExit names what is missing."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for flag in ("--config", "--workdir"):
        if flag not in given:
            sys.exit(f"sweep: {flag}=... is missing; write it with an equals sign")
    others = [argument for argument in arguments if not argument.startswith("--workdir=")]
    found = []
    for changes in entries(given["--config"].partition(":")[0]):
        settings = [f"{key}={value}" for key, value in changes.items()]
        found.append(
            [
                *(sys.executable, "-m", program),
                *others,
                *(f"--config.{setting}" for setting in settings),
                f"--workdir={given['--workdir']}/{','.join(settings)}",
            ]
        )
    return found


def entries(path: str) -> list[dict[str, Any]]:
    """The changes that a config file's `sweep` adds, in its order."""
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        sys.exit(f"sweep: there is no config file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        sys.exit(f"sweep: {path} has no sweep(add)")
    found: list[dict[str, Any]] = []
    module.sweep(lambda **changes: found.append(changes))
    return found


def main() -> None:
    """Runs all entries; the exit code is that of the first that fails, or 0."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("sweep: the first argument is a program, gptlab.reward say")
    for command in commands(sys.argv[1], sys.argv[2:]):
        print("sweep:", shlex.join(command), flush=True)
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    # Configs import each other by `configs.`, as programs that are started in the checkout can.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
