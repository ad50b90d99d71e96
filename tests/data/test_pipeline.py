"""Progress of a pipeline's phases, from ticks that come in any order."""

import io

import pytest

from gptlab.data import pipeline
from gptlab.run.progress import Progress

PHASES = [
    pipeline.Phase("reading", "source", "r", 2),
    pipeline.Phase("cleaning", "block", "c", "m"),
    pipeline.Phase("resolving", "part", "u", 32, at_most=True),
    pipeline.Phase("prompts", "part", "p", 32, at_most=True),
    pipeline.Phase("writing", "shard", "w"),
]


def shown(*ticks):
    """The last line of each bar, after these ticks came."""
    out = io.StringIO()

    def progress(total, desc, unit):
        return Progress(total, desc, unit=unit, stream=out, clock=lambda: 0.0)

    phases = pipeline.Phases(progress, PHASES)
    for some in ticks:
        phases.update(some)
    phases.close()
    return [line.split(",")[0] for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("ticks", "lines"),
    [
        ([""], []),
        (["mm", "r"], ["reading: 1/2 sources (50%)"]),
        (["mmr", "mmr"], ["reading: 2/2 sources (100%)"]),
        # A block that is cleaned while others are still read: how many there will be is not known.
        (["mr", "c", "mmrc"], ["reading: 2/2 sources (100%)", "cleaning: 2/3 blocks (67%)"]),
        (["mrr", "c", "uu"], ["reading: 2/2 sources (100%)", "cleaning: 1/1 blocks (100%)",
                              "resolving: 2/32 parts (6%)"]),
        # No prompts: the writing follows at once.
        (["mrrcuuw", "ww"], ["reading: 2/2 sources (100%)", "cleaning: 1/1 blocks (100%)",
                             "resolving: 2/32 parts (6%)", "writing: 3 shards"]),
        (["mrrc" + 32 * "u" + "p", "pw"],
         ["reading: 2/2 sources (100%)", "cleaning: 1/1 blocks (100%)",
          "resolving: 32/32 parts (100%)", "prompts: 2/32 parts (6%)", "writing: 1 shards"]),
    ],
)  # fmt: skip
def test_each_phase_has_a_bar_with_its_total(ticks, lines):
    assert shown(*ticks) == lines
