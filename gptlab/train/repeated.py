"""Products that a compiler computes more than once, rather than keep what they give.

XLA fuses a product into what reads it. Where two operations read it (attention's scores: their
largest, and the softmax), it may write the product into both: less traffic, more FLOPs.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from gptlab.train.hlo import Instruction, Program

# What two fusions' products have to share: computation, line, arrays of both sides, FLOPs.
Alike = tuple[str, str, frozenset[frozenset[str]], int]


def repeated_flops(program: Program) -> int:
    """FLOPs of products, of one device, that fusions repeat of one another.

    Such fusions stand in the same computation; their products come from the same line of the source
    program (`op_name`) and are made of the same arrays, whatever else the fusions read.
    """
    alike: dict[Alike, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for op in program.ops:
        for scope, fusion in program.inside(op.scope, op.instruction):
            for source, sides, flops in _products(program, scope, fusion):
                # It may be called from several places.
                alike[scope, source, sides, flops][fusion.name] += op.times
    return sum(
        flops * (sum(runs.values()) - max(runs.values())) for (*_, flops), runs in alike.items()
    )


def _products(
    program: Program, scope: str, fusion: Instruction
) -> list[tuple[str, frozenset[frozenset[str]], int]]:
    """(its line, the arrays that each side is made of, FLOPs) of each product in a fusion."""
    found = []
    for name in fusion.called("calls") if fusion.opcode == "fusion" else ():
        body = program.computations[name]
        for inner in body.values():
            flops = program.product_flops(name, inner)
            source = re.search(r'op_name="([^"]*)"', inner.attributes)
            if flops and source is not None:
                sides = (_parameters(body, operand) for operand in inner.operands[:2])
                arrays = (
                    frozenset(_origin(program, scope, fusion.operands[at]) for at in side)
                    for side in sides
                )
                found.append((source.group(1), frozenset(arrays), flops))
    return found


def _parameters(body: Mapping[str, Instruction], name: str) -> set[int]:
    """Numbers of the parameters that an instruction of a computation is made of."""
    seen, found, left = {name}, set(), [name]
    while left:
        instruction = body[left.pop()]
        if instruction.opcode == "parameter":
            found.add(int(instruction.literal))
        new = {operand for operand in instruction.operands if operand in body} - seen
        seen |= new
        left += new
    return found


def _origin(program: Program, scope: str, name: str) -> str:
    """The array that a copy, or another form of the same, was made of."""
    seen = program.computations[scope].get(name)
    if seen is None or seen.opcode not in ("copy", "bitcast", "reshape"):
        return name
    return _origin(program, scope, seen.operands[0])
