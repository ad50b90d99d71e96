"""A campaign in figures: how far it is, and how far its labels can be trusted."""

from __future__ import annotations

import dataclasses

from gptlab.people.store.database import Database


@dataclasses.dataclass(frozen=True)
class Progress:
    """Gold checks don't count. `wanted` judgements are tasks x overlap; `judged` never exceeds it.

    A decision of a reviewer, or a dropped task, counts as all that its task wanted.
    """

    tasks: int
    done: int
    review: int
    wanted: int
    judged: int
    skipped: int
    held: int  # leases that run


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its 95% confidence interval; NaN where there is nothing to count."""

    value: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Labeller:
    """One labeller's figures. `gold`: share of gold checks whose strict pairs were all right."""

    person: str
    name: str
    simulated: bool
    judged: int
    skipped: int
    median_seconds: float
    gold: Interval
    agreement: Interval  # with the others, pairs that both order strictly


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Agreement is over pairs of replies that two labellers both order strictly.

    `alpha`: Krippendorff's, of pairwise preferences (first, tie, second), ordinal.
    `position_bias`: how often the reply shown first of a strict pair was preferred, minus 1/2.
    `flags`: how many of each kind; `ratings`: how many of each Likert value.
    """

    median_seconds: float
    mean_seconds: float
    agreement: Interval
    alpha: Interval
    position_bias: Interval
    tie_rate: float
    flags: dict[str, int]
    skips: dict[str, int]
    ratings: dict[int, int]
    labellers: tuple[Labeller, ...]


class Figures:
    """See the head of this file."""

    def __init__(self, database: Database):
        self._database = database

    def progress(self, campaign: str) -> Progress:
        """How far a campaign is; cheap enough to ask every second."""
        raise NotImplementedError

    def statistics(self, campaign: str, seed: int = 0) -> Statistics:
        """All figures; seconds for 10,000 tasks. `seed` is the bootstrap's."""
        raise NotImplementedError
