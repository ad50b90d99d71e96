"""Adjudication: what labellers don't agree on, flag or skip goes to reviewers.

A reviewer's decision is a judgement that stands in the labellers' place in every export; theirs
stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gptlab.people.store.audit import Audit
from gptlab.people.store.campaigns import Task
from gptlab.people.store.database import Database
from gptlab.people.store.work import Flag, Judgement


@dataclasses.dataclass(frozen=True)
class Case:
    """A task to be decided.

    `disagreement`: share of pairs ordered differently, NaN with one judgement.
    """

    task: Task
    judgements: tuple[Judgement, ...]
    disagreement: float
    severity: int  # of the worst flag; 0: none
    skips: int


class Review:
    """See the head of this file. Raises Forbidden for a person who is no reviewer."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def queue(self, campaign: str, reviewer: str, limit: int = 50) -> list[Case]:
        """Tasks to be decided, the worst flags first. A reviewer isn't shown what they judged."""
        raise NotImplementedError

    def decide(
        self,
        task: str,
        reviewer: str,
        ranks: Sequence[int],
        flags: Sequence[Flag] = (),
        note: str = "",
    ) -> Judgement:
        """The ranking that counts, in the task's own order, and the flags that are right."""
        raise NotImplementedError

    def drop(self, task: str, reviewer: str, note: str) -> Judgement:
        """Leaves a task out of every export."""
        raise NotImplementedError
