"""What a compiled program does, read from its optimised HLO: products, collectives, traffic.

XLA's own cost analysis counts the body of a loop once. Here every instruction is counted as often
as it runs: a loop's trips are read from what XLA knows of it, or from the bound, the start and the
step of its counter. A loop that may end early (decoding, when every reply has ended) counts as if
it never did.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing by themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier while conditional call iota".split()
)

_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in a memory other than HBM

    @property
    def bytes(self) -> int:
        """Its size, without padding."""
        number = re.search(r"\d+", self.dtype)
        bits = int(number.group()) if number else {"pred": 8}.get(self.dtype, 0)
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result, a tuple's in order
    operands: tuple[str, ...]
    attributes: str  # everything after the operands
    literal: str  # what stands between the parentheses
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations behind attributes like calls= or body=."""
        found: list[str] = []
        for key in keys:
            for match in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += [name.strip(" %{}") for name in match.group(1).split(",")]
        return [name for name in found if name]

    def dims(self, key: str) -> tuple[int, ...]:
        """An attribute like lhs_contracting_dims={0,2}."""
        match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(x) for x in match.group(1).split(",") if x) if match else ()


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction that takes time, and how often a call of the program runs it."""

    scope: str  # the computation that it stands in
    instruction: Instruction
    times: int
    flops: int  # of matrix products in one run; of a kernel, what it says of itself
    kernel: bool  # written by hand, of whose inside nothing can be seen
    bytes: int  # read from and written to HBM in one run
    cycles: int  # the compiler's estimate for one run; 0 where it gives none


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends in a call of the program."""

    kind: str
    bytes: int  # in one run, over a ring
    times: int
    group: int  # devices that take part together


class Program:
    """Optimised HLO of one device, `compiled.as_text()`."""

    def __init__(self, text: str):
        """Reads the text.

        Raises:
          ValueError: it is no HLO module.
        """
        self.computations, self._entry = _parse(text)
        if not self._entry:
            raise ValueError("the text holds no ENTRY computation")

    @functools.cached_property
    def ops(self) -> tuple[Op, ...]:
        """Everything that takes time, but for collectives."""
        return tuple(self._ops())

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of all matrix products of one device, kernels excepted: 2 a multiply-add."""
        return sum(op.flops * op.times for op in self.ops if not op.kernel)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Each collective once, however many fusions it is overlapped with."""
        found: dict[str, Collective] = {}
        for scope, instruction, times in self._walk(self._entry, 1):
            for owner, inner in self.inside(scope, instruction):
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.attributes)
                key = channel.group(1) if channel else inner.name
                new = self._collective(owner, inner, kind, times)
                if key not in found or new.bytes * times > found[key].bytes * found[key].times:
                    found[key] = new
        return tuple(found.values())

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that one device sends in a call, by kind of collective."""
        total: dict[str, int] = {}
        for collective in self.collectives:
            sent = collective.bytes * collective.times
            total[collective.kind] = total.get(collective.kind, 0) + sent
        return total

    def _walk(self, computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, runs) of what the entry runs, loops and calls entered."""
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                trips = times * self.trips(computation, instruction)
                for body in instruction.called("body"):
                    yield from self._walk(body, trips)
            elif instruction.opcode in ("call", "conditional"):
                for name in instruction.called(
                    "to_apply", "branch_computations", "true_computation", "false_computation"
                ):
                    yield from self._walk(name, times)
            yield computation, instruction, times

    def inside(self, scope: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The instruction and, of a fusion or an asynchronous call, everything within."""
        yield scope, instruction
        if instruction.opcode in ("fusion", "async-start", "custom-call"):
            for name in instruction.called("calls", "called_computations"):
                for inner in self.computations.get(name, {}).values():
                    yield from self.inside(name, inner)

    def _ops(self) -> Iterator[Op]:
        for scope, instruction, times in self._walk(self._entry, 1):
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith(("-done", "-update")):
                continue
            if opcode.removesuffix("-start") in COLLECTIVES:
                continue
            flops = sum(
                self.product_flops(owner, inner) for owner, inner in self.inside(scope, instruction)
            )
            cycles = re.search(r'"?estimated_cycles"?\s*:\s*"?(\d+)', instruction.attributes)
            kernel = opcode == "custom-call" and "tpu_custom_call" in instruction.attributes
            if kernel:
                told = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
                flops = int(told.group(1)) if told else 0
            yield Op(
                scope,
                instruction,
                times,
                flops,
                kernel,
                self._traffic(scope, instruction),
                int(cycles.group(1)) if cycles else 0,
            )

    def trips(self, scope: str, loop: Instruction) -> int:
        """How often a while loop's body runs at most.

        Raises:
          ValueError: its condition compares no counter with a constant.
        """
        known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
        if known:
            return int(known.group(1))
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        for owner, compare in self._all(condition):
            direction = re.search(r"direction=(LT|LE|GT|GE|NE)", compare.attributes)
            if compare.opcode != "compare" or direction is None:
                continue
            sides = [self._resolve(owner, name, condition) for name in compare.operands]
            numbers = [side for side in sides if isinstance(side, int)]
            counters = [side for side in sides if isinstance(side, str)]
            if len(numbers) != 1 or len(counters) != 1:
                continue
            index = int(counters[0])
            start, step = self._start(scope, loop, index), self._step(body, index)
            inclusive = direction.group(1) in ("LE", "GE")
            return max(0, -(-(numbers[0] + inclusive - start) // step))
        raise ValueError(f"the trips of loop {loop.name} can't be told from {condition}")

    def _all(self, computation: str) -> Iterator[tuple[str, Instruction]]:
        for instruction in self.computations[computation].values():
            yield from self.inside(computation, instruction)

    def _resolve(self, scope: str, name: str, within: str) -> int | str | None:
        """A constant's value, or the index (as text) of the loop's variable that `name` is.

        `within` is the condition or body; fusions inside it are entered from their parameters.
        """
        seen = self.computations[scope].get(name)
        if seen is None:
            return None
        if seen.opcode == "constant":
            return int(seen.literal) if re.fullmatch(r"-?\d+", seen.literal.strip()) else None
        if seen.opcode == "get-tuple-element":
            match = re.search(r"index=(\d+)", seen.attributes)
            return match.group(1) if match else None
        if seen.opcode in ("copy", "convert", "bitcast", "reshape"):
            return self._resolve(scope, seen.operands[0], within)
        if seen.opcode == "parameter" and scope != within:
            for owner, caller in self._all(within):
                if scope in caller.called("calls"):
                    return self._resolve(owner, caller.operands[int(seen.literal)], within)
        return None

    def _start(self, scope: str, loop: Instruction, index: int) -> int:
        """The counter's first value; 0 where it is computed."""
        packed = self.computations[scope].get(loop.operands[0])
        if packed is None or packed.opcode != "tuple":
            return 0
        value = self._resolve(scope, packed.operands[index], scope)
        return value if isinstance(value, int) else 0

    def _step(self, body: str, index: int) -> int:
        """What one trip adds to the counter, as the body's result says; 1 where it can't be seen.

        Loops over pieces of a product add to the counter for other ends too.
        """
        root = next(x for x in self.computations[body].values() if x.root)
        if root.opcode != "tuple":
            return 1
        return self._advance(body, root.operands[index], body, index) or 1

    def _advance(self, scope: str, name: str, body: str, index: int) -> int | None:
        """By how much `name` is ahead of the counter; None where that can't be seen."""
        if self._resolve(scope, name, body) == str(index):
            return 0
        seen = self.computations[scope].get(name)
        if seen is None:
            return None
        if seen.opcode in ("copy", "convert", "bitcast", "reshape"):
            return self._advance(scope, seen.operands[0], body, index)
        if seen.opcode == "fusion":
            (inside,) = seen.called("calls")
            root = next(x for x in self.computations[inside].values() if x.root)
            return self._advance(inside, root.name, body, index)
        if seen.opcode == "add":
            for one, other in (seen.operands, seen.operands[::-1]):
                behind = self._advance(scope, one, body, index)
                step = self._resolve(scope, other, body)
                if behind is not None and isinstance(step, int):
                    return behind + step
        return None

    def _arrays(self, scope: str, name: str) -> tuple[Array, ...]:
        instruction = self.computations[scope].get(name)
        return instruction.arrays if instruction is not None else ()

    def product_flops(self, scope: str, instruction: Instruction) -> int:
        """Of an instruction that is itself a product; 0 of others."""
        if instruction.opcode == "dot":
            lhs = self._arrays(scope, instruction.operands[0])[0]
            rhs = self._arrays(scope, instruction.operands[1])[0]
            depth = math.prod(lhs.shape[i] for i in instruction.dims("lhs_contracting_dims"))
            batch = math.prod(lhs.shape[i] for i in instruction.dims("lhs_batch_dims"))
            height = math.prod(lhs.shape) // (depth * batch)
            width = math.prod(rhs.shape) // (depth * batch)
            # With a vector (a head of one output) it is no product of matrices, and XLA may or may
            # not write it as one; nor are many of them (a query of each head) while decoding.
            if width == 1 or (height == 1 and batch > 1):
                return 0
            return 2 * batch * height * width * depth
        if instruction.opcode == "convolution":
            lhs, rhs = (self._arrays(scope, name)[0] for name in instruction.operands)
            return convolution_flops(instruction, lhs.shape, rhs.shape)
        return 0

    def _traffic(self, scope: str, instruction: Instruction) -> int:
        """Bytes of operands and results in HBM; of an operand that is only sliced, the slices."""
        body = None
        if instruction.opcode == "fusion":
            (name,) = instruction.called("calls")
            body = self.computations[name]
        total = sum(x.bytes for x in self._written(instruction, body) if not x.on_chip)
        for position, operand in enumerate(instruction.operands):
            arrays = self._arrays(scope, operand)
            if not arrays or all(x.on_chip for x in arrays):
                continue
            read = sum(x.bytes for x in arrays)
            if body is not None:
                read = min(read, self._sliced(body, position, read))
            elif instruction.opcode in ("dynamic-slice", "gather"):
                read = min(read, sum(x.bytes for x in instruction.arrays))
            elif instruction.opcode == "dynamic-update-slice" and position == 0:
                read = 0
            total += read
        return total

    def _sliced(self, body: Mapping[str, Instruction], position: int, whole: int) -> int:
        """Bytes that a fusion reads of its operand: less than all if it is only sliced or updated.

        Fusions within it may be what slices.
        """
        name = next(
            (
                x.name
                for x in body.values()
                if x.opcode == "parameter" and x.literal == str(position)
            ),
            None,
        )
        total = 0
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
                total += sum(x.bytes for x in user.arrays)
            elif user.opcode == "fusion":
                (inner,) = user.called("calls")
                total += sum(
                    self._sliced(self.computations[inner], at, whole)
                    for at, operand in enumerate(user.operands)
                    if operand == name
                )
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(total, whole)

    def _written(
        self, instruction: Instruction, body: Mapping[str, Instruction] | None
    ) -> tuple[Array, ...]:
        """What is written: of an update in place, the update."""
        update = instruction
        if body is not None:
            update = next(inner for inner in body.values() if inner.root)
        if update.opcode != "dynamic-update-slice":
            return instruction.arrays
        where = (
            body
            if body is not None
            else next(
                c for c in self.computations.values() if c.get(instruction.name) is instruction
            )
        )
        return where[update.operands[1]].arrays if update.operands[1] in where else ()

    def _collective(
        self, scope: str, instruction: Instruction, kind: str, times: int
    ) -> Collective:
        """Bytes sent by one device of a ring of n: (n - 1) / n of the whole, twice to reduce."""
        operands = [x for name in instruction.operands for x in self._arrays(scope, name)]
        whole = max(
            sum(x.bytes for x in operands),
            max((x.bytes for x in instruction.arrays), default=0)
            if instruction.opcode.endswith("-start")
            else sum(x.bytes for x in instruction.arrays),
        )
        group = _group_size(instruction.attributes)
        share = 1.0 if kind == "collective-permute" else (group - 1) / group
        if kind == "all-reduce":
            share *= 2
        return Collective(kind, round(whole * share), times, group)


def convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """2 a multiply-add of real inputs; those with padding and with holes of a dilation are none.

    TPUs write every product as a convolution, a batch of products as one over spatial dimensions
    of which only the diagonal is real.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels")
    left, right, out = labels.groups()
    result = instruction.arrays[0].shape
    spatial = sorted(c for c in left if c.isdigit())
    groups = [
        int(match.group(1)) if (match := re.search(rf"{k}=(\d+)", instruction.attributes)) else 1
        for k in ("feature_group_count", "batch_group_count")
    ]
    total = rhs[right.index("i")] * result[out.index("f")] * lhs[left.index("b")] // groups[1]
    window = _window(instruction.attributes, len(spatial))
    for axis, dim in enumerate(spatial):
        total *= _valid_positions(
            lhs[left.index(dim)], rhs[right.index(dim)], result[out.index(dim)], window[axis]
        )
    return 2 * total


def _window(attributes: str, count: int) -> list[dict[str, int]]:
    """Stride, low padding and dilations of each spatial dimension."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match.group(1).split()) if match else {}
    axes = []
    for i in range(count):
        part = lambda key, default, i=i: (  # noqa: E731
            fields[key].split("x")[i] if key in fields else default
        )
        axes.append(
            {
                "stride": int(part("stride", "1")),
                "low": int(part("pad", "0_0").split("_")[0]),
                "lhs_dilate": int(part("lhs_dilate", "1")),
                "rhs_dilate": int(part("rhs_dilate", "1")),
            }
        )
    return axes


def _valid_positions(size: int, kernel: int, result: int, window: Mapping[str, int]) -> int:
    """Pairs (output, kernel position) of one spatial dimension that meet a real input."""
    outputs = np.arange(result, dtype=np.int64)[:, None] * window["stride"] - window["low"]
    count = 0
    for start in range(0, kernel, 4096):  # in blocks: both may be long
        taps = np.arange(start, min(start + 4096, kernel), dtype=np.int64)[None]
        at = outputs + taps * window["rhs_dilate"]
        real = (at >= 0) & (at % window["lhs_dilate"] == 0) & (at // window["lhs_dilate"] < size)
        count += int(real.sum())
    return count


def _group_size(attributes: str) -> int:
    """Devices in one group of replica_groups={{0,1}}, =[2,4]<=[8] or =mesh['a'=2,'b'=4] {'b'}."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed and listed.group(1):
        return listed.group(1).count(",") + 1
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return pairs.group(1).count("{") if pairs else 1


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, pending = "", None, ""
    for line in [*text.splitlines(), "}"]:
        header = _COMPUTATION.match(line)
        starts = header or line.startswith("}") or _INSTRUCTION.match(line)
        if not starts:
            pending += " " + line if pending else ""  # metadata of a kernel may hold line breaks
            continue
        if pending and current is not None:
            instruction = _instruction(pending)
            current[instruction.name] = instruction
        pending = ""
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif not line.startswith("}"):
            pending = line
    return computations, entry


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None  # `_parse` has seen to it
    root, name, rest = match.groups()
    if rest.startswith("("):
        end = _closing(rest, 0)
        shape, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    else:
        shape, _, rest = rest.partition(" ")
    open_at = rest.index("(")
    close_at = _closing(rest, open_at)
    literal = rest[open_at + 1 : close_at]
    return Instruction(
        name=name,
        opcode=rest[:open_at].strip(),
        arrays=_shapes(shape),
        operands=_operands(literal),
        attributes=rest[close_at + 1 :],
        literal=literal,
        root=bool(root),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


def _operands(literal: str) -> tuple[str, ...]:
    if "%" in literal:
        return tuple(re.findall(r"%([\w.\-]+)", literal))
    return tuple(re.findall(r"([\w.\-]+)\s*(?:,|$)", re.sub(r"[\[{][^\]}]*[\]}]", "", literal)))


def _shapes(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(n) for n in dims.split(",") if n),
            bool(layout and re.search(r"S\([1-9]\d*\)", layout)),
        )
        for dtype, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", text))
    )
