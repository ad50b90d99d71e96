"""How long a compiled program takes on a chip that isn't here: an estimate, as a range.

Every instruction is charged the time of what it is bound by, one after the other:

  floor: products as fast as the compiler rates a large plain one on this chip (train/chips.py), or
    as HBM gives them what they multiply, where that takes longer (while decoding it does), or with
    the compiler's cycles where these are fewer; everything else at 85% of HBM bandwidth;
  mixed: products with the cycles that the compiler estimates, everything else at 85% of HBM.

Kernels are assumed to reach half of the peak (35% on v6e) with the FLOPs that they tell or, since
splash attention tells none, that are counted from the architecture; communication to be hidden
behind the rest; how long it would take alone is told beside it. The compiler's cycles of anything
but products are far too many against HBM bandwidth, and its own total counts a loop's body once:
neither is used.
"""

import dataclasses

from gptlab.train.chips import Chip
from gptlab.train.hlo import Program

HBM_SHARE = 0.85  # of the bandwidth that streaming operations reach
COMMUNICATION_SHARE = 0.25  # of a step, above which hiding it is in doubt
ASSUMPTIONS = (
    "products at {product:.0%} of peak or as HBM feeds them (floor), or with the compiler's cycles "
    "(mixed), the rest at 85% of HBM bandwidth, kernels at {kernel:.0%} of peak, communication "
    "hidden; sent over both directions of one ring of links if it is not"
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one call of a program on one chip."""

    floor: float
    mixed: float
    communication: float  # if nothing were hidden, in rings over one axis of the interconnect

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.floor + other.floor,
            self.mixed + other.mixed,
            self.communication + other.communication,
        )


def seconds(program: Program, chip: Chip, kernel_flops: int) -> Seconds:
    """The estimate for one call; `kernel_flops` of one chip, where kernels tell less themselves."""
    floor = mixed = kernel_stream = 0.0
    told = 0
    for op in program.ops:
        stream = op.bytes / (HBM_SHARE * chip.hbm_bandwidth)
        if op.kernel:
            told += op.times * op.flops
            kernel_stream += op.times * stream
            continue
        if op.flops:
            bound = max(op.flops / (chip.product_share * chip.flops), stream)
            rated = max(op.cycles / chip.clock or bound, op.flops / chip.flops)
            best = min(bound, rated)
        else:
            best = rated = stream
        floor += op.times * best
        mixed += op.times * rated
    inside = max(told, kernel_flops) / (chip.kernel_share * chip.flops)
    floor, mixed = (x + max(inside, kernel_stream) for x in (floor, mixed))
    sent = sum(program.bytes_sent().values())
    return Seconds(floor, mixed, sent / (2 * chip.link_bandwidth))


def hbm_bytes(program: Program) -> int:
    """Bytes that one chip reads from and writes to HBM in one call."""
    return sum(op.bytes * op.times for op in program.ops)
