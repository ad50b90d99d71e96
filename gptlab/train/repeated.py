"""Products that a compiler computes more than once, rather than keep what they give.

XLA fuses a product into what reads it. Where two operations read it (attention's scores: their
largest, and the softmax), it may write the product into both: less traffic, more FLOPs.
"""

import re
from collections import defaultdict

from gptlab.train.hlo import Instruction, Program


def repeated_flops(program: Program) -> int:
    """FLOPs of products, of one device, whose fusion repeats another's product.

    Such a fusion stands in the same computation, its product comes from the same line of the source
    program (`op_name`), and it reads all that the other reads, whatever else it may read.
    """
    alike: dict[tuple[str, str, int], dict[str, tuple[frozenset[str], int]]] = defaultdict(dict)
    for op in program.ops:
        for scope, fusion in program.inside(op.scope, op.instruction):
            for source, flops in _products(program, fusion):
                group = alike[scope, source, flops]
                _, before = group.get(fusion.name, (None, 0))  # it may be called from other places
                group[fusion.name] = _reads(program, scope, fusion), before + op.times
    total = 0
    for (_, _, flops), group in alike.items():
        kept: list[frozenset[str]] = []
        for reads, times in sorted(group.values(), key=lambda entry: len(entry[0])):
            if any(first <= reads for first in kept):
                total += flops * times
            else:
                kept.append(reads)
    return total


def _products(program: Program, fusion: Instruction) -> list[tuple[str, int]]:
    """(where it comes from, FLOPs) of each product that stands in a fusion, not deeper."""
    found = []
    for name in fusion.called("calls") if fusion.opcode == "fusion" else ():
        for inner in program.computations[name].values():
            flops = program.product_flops(name, inner)
            source = re.search(r'op_name="([^"]*)"', inner.attributes)
            if flops and source is not None:
                found.append((source.group(1), flops))
    return found


def _reads(program: Program, scope: str, fusion: Instruction) -> frozenset[str]:
    """Names of what a fusion reads, seen through copies and other forms of the same."""

    def origin(name: str) -> str:
        seen = program.computations[scope].get(name)
        if seen is None or seen.opcode not in ("copy", "bitcast", "reshape"):
            return name
        return origin(seen.operands[0])

    return frozenset(map(origin, fusion.operands))
