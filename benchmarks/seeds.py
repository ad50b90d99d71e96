"""Several runs of the rounds side by side: every figure, its spread over seeds, demands met.

    python -m benchmarks.seeds runs/quickstart runs/seed-1 runs/seed-2

Reads each workdir's report.json and prints one Markdown table. Intervals within a run are over
prompts (see the run's report); 'mean ± sd' is over the runs, with the n - 1 standard deviation.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.evals import preference, report
from gptlab.evals.preference import Interval

Key = tuple[str, str]


def main() -> None:
    """Prints the table of the workdirs that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", help="of gptlab.rounds")
    parser.add_argument("--all", action="store_true", help="also the figures without a demand")
    args = parser.parse_args()
    print(table([read(Path(workdir)) for workdir in args.workdirs], args.workdirs, args.all))


def read(workdir: Path) -> dict[Key, dict[str, Any]]:
    """The figures of a run's report.json by stage and name."""
    try:
        stages = json.loads((workdir / "report.json").read_text())["stages"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{workdir} has no readable report.json ({error}): is that run of rounds done?")
    figures = [preference.from_json(figure) for figure in stages]
    return {(figure["stage"], figure["name"]): figure for figure in figures}


def table(runs: Sequence[dict[Key, dict[str, Any]]], names: Sequence[str], everything: bool) -> str:
    """Markdown: a line for each figure of the first run, a column for each run."""
    rows = []
    for key, first in runs[0].items():
        if not (first["demand"] or everything):
            continue
        figures = [run.get(key) for run in runs]
        met = sum(bool(figure and figure["met"]) for figure in figures)
        rows.append(
            [
                *key,
                *(figure and figure["value"] for figure in figures),
                spread([_number(figure and figure["value"]) for figure in figures]),
                first["demand"],
                f"{met} of {len(runs)}" if first["demand"] else None,
            ]
        )
    return report.markdown_table(
        ["stage", "figure", *names, "mean ± sd of the runs", "asked", "met in"], rows
    )


def spread(values: Sequence[float | None]) -> str | None:
    """'mean ± sd', or None unless every run has the figure and there are at least two."""
    there = [value for value in values if value is not None]
    if len(there) < len(values) or len(there) < 2:
        return None
    return f"{report.show(statistics.mean(there))} ± {report.show(statistics.stdev(there))}"


def _number(value: Any) -> float | None:
    value = value.mean if isinstance(value, Interval) else value
    return None if value is None or isinstance(value, bool | str) else float(value)


if __name__ == "__main__":
    main()
