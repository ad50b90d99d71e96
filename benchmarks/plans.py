"""The README's table of plans: every TPU config that is shipped, on the topology it names.

    python -m benchmarks.plans --workdir=runs/plans [--only=llama3] [--table]

Each is compiled by `python -m gptlab.plan` in a process of its own, unless `--workdir` has its plan
already; `--table` compiles nothing. The table is of what is there: rows that were not planned yet
say so; where planning failed, the exit code is 1. Needs libtpu; a row takes 1 to 20 minutes on two
cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from gptlab.plan import hardware
from gptlab.train import plan_report
from gptlab.train.chips import GIB
from gptlab.train.plan_report import Plan

LLAMA = ("8b", "70b", "8b_lora", "70b_lora")
CONFIGS = (
    *(f"pretrain.py:{arg}" for arg in ("gpt2_124m", "gpt2_1.5b", "init")),
    *(
        f"{stage}_instructgpt.py:{size}"
        for stage in ("pretrain", "sft", "reward", "ppo")
        for size in ("1.3b", "6.7b")
    ),
    *(f"{stage}_llama3.py:{arg}" for stage in ("sft", "reward", "ppo") for arg in LLAMA),
)


def newest(workdir: Path) -> dict[str, Plan]:
    """The last plan in `workdir` of each shipped config, as it is and for what it names."""
    found: dict[str, Plan] = {}
    shipped = {f"configs/{name}" for name in CONFIGS}
    for path in sorted(workdir.glob("*.json"), key=lambda path: path.stat().st_mtime):
        plan = plan_report.from_json(path.read_text())
        if plan.config in shipped and plan.target == hardware(plan.config)["topology"]:
            found[plan.config] = plan
    return found


def row(name: str, plan: Plan | None) -> str:
    """A line of the table."""
    if plan is None:
        return f"| `{name}` | | | not planned yet | | | | |"
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    need = f"{plan.needed_bytes / GIB:.1f} of {plan.limit_bytes / GIB:.1f}"
    worst = max(plan.phases, key=lambda phase: phase.needed_bytes)
    if len(plan.phases) > 1:
        need += f" ({worst.name})"
    flops = sum(phase.calls * phase.flops for phase in plan.phases) / 1e15
    rounded = f"{float(f'{flops:.3g}'):,g}"
    again = sum(phase.calls * phase.repeated_flops for phase in plan.phases) / 1e15
    equal = all(phase.as_counted for phase in plan.phases)
    seconds, time, rate = plan.seconds, "", ""
    if seconds is not None:
        time = f"{seconds.floor:.3g} to {seconds.mixed:.3g}"
        rates = [plan.tokens / s / plan.chips for s in (seconds.mixed, seconds.floor)]
        rate = f"{rates[0]:,.0f} to {rates[1]:,.0f}"
    fits = need if plan.fits else f"**does not fit**: {need}"
    counted = f", {again / flops:.1%} of them twice" if again else ""
    counted += "" if equal else ", not as counted"
    commit = (plan.commit or "")[:7]
    return (
        f"| `{name}` | {plan.target} | {mesh} | {fits} | {rounded}{counted} | {time} | {rate} | "
        f"{commit} |"
    )


def table(workdir: Path) -> str:
    """All shipped configs, as Markdown."""
    plans = newest(workdir)
    lines = [
        "| config | topology | mesh | peak a chip, GiB | PFLOPs a step | s a step, estimated | "
        "tokens/s a chip, estimated | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(name, plans.get(f"configs/{name}")) for name in CONFIGS]
    versions = sorted({str(plan.libtpu) for plan in plans.values()})
    return "\n".join([*lines, "", f"libtpu {', '.join(versions)}"])


def main() -> None:
    """Plans what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--only", default="", help="configs whose name contains this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    failed = []
    for name in () if args.table else (name for name in CONFIGS if args.only in name):
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "gptlab.plan", f"--config=configs/{name}", "--noknobs"]
        command.append(f"--workdir={args.workdir}")
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            failed.append(name)
    print(table(args.workdir))
    if failed:
        sys.exit(f"not planned, as said above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
