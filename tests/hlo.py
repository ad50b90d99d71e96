"""What a compiled program does, read from its HLO text: arrays that exist, collectives."""

from __future__ import annotations

import collections
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collective_counts(text: str) -> dict[str, int]:
    """How many of each kind stand in the program, the body of a loop once."""
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return dict(sorted(collections.Counter(found).items()))


def sizes(text: str, dtype: str = "f32") -> set[int]:
    """Elements of every array of a dtype that the program mentions, on one device."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]*)\]", text)
    return {math.prod(int(n) for n in shape.split(",") if n) for shape in shapes}


def results(text: str, kind: str) -> list[int]:
    """Elements of what each collective of a kind gives."""
    lines = re.findall(rf"= (.*) {kind}(?:-start)?\(", text)
    return [max(sizes(line, r"\w+")) for line in lines]
