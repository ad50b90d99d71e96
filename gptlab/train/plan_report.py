"""What a plan says: a table for people, JSON for programs. Every time in it is an estimate."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from gptlab.run.errors import UserError
from gptlab.train import estimate
from gptlab.train.chips import GIB, Chip
from gptlab.train.compiled import Phase
from gptlab.train.estimate import Seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What compiling a config for a target has shown."""

    schema_version: int
    config: str
    target: str
    chips: int
    mesh: dict[str, int]  # axes larger than 1
    params: int  # of the model that is trained
    tokens: int  # token positions of a step
    limit_bytes: float  # of a chip's memory
    memory: dict[str, int]  # bytes a chip that the state takes, by kind
    phases: list[Phase]
    chip: Chip | None
    useful_flops: int | None  # of a step: causal attention, nothing twice
    libtpu: str | None
    commit: str | None

    @property
    def needed_bytes(self) -> int:
        """The most that one chip has to hold at once."""
        return max(phase.needed_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase compiles and leaves room for what stays beside it."""
        compiles = not any(phase.exhausted for phase in self.phases)
        return compiles and self.needed_bytes <= self.limit_bytes

    @property
    def seconds(self) -> Seconds | None:
        """Of a step; None where the device's speed is unknown or a phase did not compile."""
        total = Seconds(0.0, 0.0, 0.0)
        for phase in self.phases:
            if phase.seconds is None:
                return None
            for _ in range(phase.calls):
                total += phase.seconds
        return total


def limit_bytes(chip: Chip | None, devices: int) -> float:
    """What one chip, or one of so many virtual devices of this machine, can hold."""
    if chip is not None:
        return chip.hbm_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices


def to_json(plan: Plan) -> str:
    """The plan with what follows from it, for programs to read."""
    seconds = plan.seconds
    derived = {
        "fits": plan.fits,
        "needed_bytes": plan.needed_bytes,
        "seconds": dataclasses.asdict(seconds) if seconds else None,
    }
    return json.dumps({**dataclasses.asdict(plan), "derived": derived}, indent=1) + "\n"


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote."""
    held = json.loads(text)
    del held["derived"]
    held["chip"] = Chip(**held["chip"]) if held["chip"] else None
    held["phases"] = [
        Phase(**{**phase, "seconds": Seconds(**phase["seconds"]) if phase["seconds"] else None})
        for phase in held["phases"]
    ]
    return Plan(**held)


def describe(plan: Plan) -> str:
    """The plan as lines of text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    lines = [
        f"{plan.config} on {plan.target}: {plan.chips} chips, {mesh}; {plan.params / 1e9:.3g}B "
        f"parameters, {plan.tokens:,} tokens a step",
        f"libtpu {plan.libtpu}, commit {plan.commit}; nothing was run: all of this is estimated",
        "",
        _verdict(plan),
        "",
        "memory a chip, GiB",
    ]
    lines += [f"  {kind:26}{size / GIB:9.2f}" for kind, size in plan.memory.items()]
    for phase in plan.phases:
        lines.append(
            f"  peak of {phase.name:18}{phase.needed_bytes / GIB:9.2f}  = arguments "
            f"{phase.argument_bytes / GIB:.2f} + activations and other temporaries "
            f"{(phase.peak_bytes - phase.argument_bytes) / GIB:.2f} + beside it "
            f"{phase.beside_bytes / GIB:.2f}"
        )
    lines += ["", *_work(plan), "", *_time(plan)]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    worst = max(plan.phases, key=lambda phase: phase.needed_bytes)
    failed = [phase for phase in plan.phases if phase.exhausted]
    spare = (plan.limit_bytes - plan.needed_bytes) / GIB
    amounts = f"{plan.needed_bytes / GIB:.2f} of {plan.limit_bytes / GIB:.2f} GiB a chip"
    if plan.fits:
        return f"FITS: {amounts} at the peak, in {worst.name!r}; {spare:.2f} GiB to spare"
    reason = "; ".join(f"{phase.name!r}: {phase.exhausted}" for phase in failed)
    return f"DOES NOT FIT: {amounts}, {-spare:.2f} GiB too much ({reason or repr(worst.name)})"


def _work(plan: Plan) -> list[str]:
    lines = [
        "a step            calls   TFLOPs (all chips)   counted   FLOPs a byte   "
        "sent by a chip, MiB"
    ]
    for phase in plan.phases:
        if phase.exhausted:
            lines.append(f"  {phase.name:16}{phase.calls:5}   not compiled")
            continue
        sent = ", ".join(f"{kind} {n / 2**20:,.1f}" for kind, n in phase.sent_bytes.items())
        same = "equal" if phase.as_counted else "DIFFERENT"
        lines.append(
            f"  {phase.name:16}{phase.calls:5}   {phase.flops / 1e12:18,.3f}   {same:>7}   "
            f"{phase.intensity:12.0f}   {sent or 'nothing'}"
        )
        if same != "equal":
            lines.append(
                f"    the program multiplies {phase.flops / phase.counted_flops:.3f} times what "
                "was counted: work is repeated on several chips, or the count is wrong"
            )
        if phase.repeated_flops:
            lines.append(
                f"    {phase.repeated_flops / 1e12:,.3f} TFLOPs of these are products that the "
                "compiler computes again rather than keep their results; they were not counted"
            )
        if phase.kernel_flops:
            lines.append(
                f"    kernels multiply {phase.kernel_flops / 1e12:,.3f} TFLOPs beside these: "
                "counted from the architecture, since nothing can be seen inside of them"
            )
    return lines


def _time(plan: Plan) -> list[str]:
    seconds = plan.seconds
    if seconds is None or plan.chip is None:
        return ["no estimate of the time: it is made for TPUs, and of programs that compile"]
    rates = [plan.tokens / s / plan.chips for s in (seconds.mixed, seconds.floor)]
    lines = [
        f"a step takes {seconds.floor:.3g} s (floor) to {seconds.mixed:.3g} s (mixed); "
        f"{rates[0]:,.0f} to {rates[1]:,.0f} tokens/s a chip",
        "assumed: "
        + estimate.ASSUMPTIONS.format(
            product=plan.chip.product_share, kernel=plan.chip.kernel_share
        ),
    ]
    if len(plan.phases) > 1:
        lines.insert(1, "of it: " + ", ".join(_share(phase) for phase in plan.phases))
        lines.append("assumed: every reply is as long as it may be")
    if any(kind.endswith("scoring only") for kind in plan.memory):
        lines.append(
            "assumed: bringing frozen models, the critic and its optimizer from the host's memory "
            "and back takes no time"
        )
    if plan.useful_flops is not None:
        mfu = [
            plan.useful_flops / s / plan.chips / plan.chip.flops
            for s in (seconds.mixed, seconds.floor)
        ]
        lines.append(
            f"that would be an MFU of {mfu[0]:.1%} to {mfu[1]:.1%}, attention counted as causal "
            "(half of its square), nothing counted twice: a compiler's estimate, not a measurement"
        )
    share = seconds.communication / seconds.mixed
    if share > estimate.COMMUNICATION_SHARE:
        lines.append(
            f"WARNING: sending takes {seconds.communication:.3g} s by itself, {share:.0%} of a "
            "step: it may not hide behind the rest; use fewer ways of sharding or larger batches"
        )
    return lines


def _share(phase: Phase) -> str:
    assert phase.seconds is not None  # `Plan.seconds` has seen to it
    return (
        f"{phase.name} {phase.calls * phase.seconds.floor:.3g} to "
        f"{phase.calls * phase.seconds.mixed:.3g} s"
    )


def knob_table(plan: Plan, turned: Mapping[str, Plan | UserError]) -> str:
    """What turning each knob saves, most first."""
    lines = ["", "what would help, compiled too"]

    def saved(other: Plan | UserError) -> float:
        return plan.needed_bytes - other.needed_bytes if isinstance(other, Plan) else -1e30

    for name, other in sorted(turned.items(), key=lambda item: -saved(item[1])):
        if isinstance(other, Plan):
            verdict = "fits" if other.fits else "does not fit"
            lines.append(
                f"  {name}: {other.needed_bytes / GIB:.2f} GiB, saves {saved(other) / GIB:.2f} "
                f"GiB; {verdict}"
            )
        else:
            lines.append(f"  {name}: not possible ({other})")
    return "\n".join(lines)


def search_line(name: str, plan: Plan | UserError) -> str:
    """One mesh and batch size."""
    if not isinstance(plan, Plan):
        return f"{name:44} not possible: {plan}"
    need = f"{plan.needed_bytes / GIB:8.2f} of {plan.limit_bytes / GIB:.2f} GiB"
    seconds = plan.seconds
    if not plan.fits:
        return f"{name:44}{need}  does not fit"
    if seconds is None:
        return f"{name:44}{need}  fits"
    rates = [plan.tokens / s / plan.chips for s in (seconds.mixed, seconds.floor)]
    sending = seconds.communication / seconds.mixed
    return (
        f"{name:44}{need}  {seconds.floor:.3g} to {seconds.mixed:.3g} s, {rates[0]:,.0f} to "
        f"{rates[1]:,.0f} tokens/s a chip, sending {sending:.0%} of it"
    )


def search_table(found: Mapping[str, Plan | UserError]) -> str:
    """All that were tried: the fastest that fit first, by the mixed estimate."""

    def rank(item: tuple[str, Any]) -> tuple[int, float]:
        plan = item[1]
        if not isinstance(plan, Plan):
            return 2, 0.0
        if not plan.fits or plan.seconds is None:
            return 1, plan.needed_bytes
        return 0, plan.seconds.mixed / plan.tokens

    lines = [search_line(name, plan) for name, plan in sorted(found.items(), key=rank)]
    return "\n".join(["mesh and batch size, the fastest by the mixed estimate first", *lines])
