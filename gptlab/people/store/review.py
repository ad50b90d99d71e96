"""Adjudication: what labellers don't agree on, flag or skip goes to reviewers.

A reviewer's decision is a judgement that stands in the labellers' place in every export; theirs
stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import Audit
from gptlab.people.store.campaigns import find_campaign
from gptlab.people.store.database import Database, Reader, Writer, new_id, storable
from gptlab.people.store.errors import Forbidden, Invalid, NotFound
from gptlab.people.store.judgements import (
    MAX_NOTE,
    Flag,
    Judgement,
    check_flags,
    insert_judgement,
    read_judgements,
)
from gptlab.people.store.person import require
from gptlab.people.store.schema import flags as flag_rows
from gptlab.people.store.schema import judgements, tasks
from gptlab.people.store.settle import DECIDING, disagreement, settle, standing
from gptlab.people.store.tasks import Task, dense_ranks, find_task, task_of


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


# Of the worst flag in a task's answers; 0: none.
_SEVERITY = (
    sa.select(sa.func.coalesce(sa.func.max(flag_rows.c.severity), 0))
    .join(judgements, judgements.c.id == flag_rows.c.judgement_id)
    .where(judgements.c.task_id == tasks.c.id, standing())
    .correlate(tasks)
    .scalar_subquery()
)


class Review:
    """See the head of this file. Raises Forbidden for a person who is no reviewer."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def queue(self, campaign: str, reviewer: str, limit: int = 50) -> list[Case]:
        """Tasks to be decided, the worst flags first.

        A reviewer isn't shown what they judged themselves, and can't decide it; an admin can.
        """
        with self._database.read() as reader:
            query = _waiting(reader, campaign, reviewer)
            worst = _SEVERITY.desc()
            return _cases(reader, query.order_by(worst, tasks.c.place, tasks.c.id).limit(limit))

    def case(self, campaign: str, task: str, reviewer: str) -> Case:
        """One of them. Raises NotFound for a task that isn't to be decided by this reviewer."""
        with self._database.read() as reader:
            query = _waiting(reader, campaign, reviewer).where(tasks.c.id == task)
            found = _cases(reader, query)
        if not found:
            raise NotFound("this case is not in the queue (any more)")
        return found[0]

    def decide(
        self,
        task: str,
        reviewer: str,
        ranks: Sequence[int],
        flags: Sequence[Flag] = (),
        note: str = "",
    ) -> Judgement:
        """The ranking that counts, in the task's own order, and the flags that are right."""
        with self._database.write() as writer:
            require(writer, reviewer, "reviewer")
            found = find_task(writer, task)
            if not found.candidates or found.gold is not None:
                raise Invalid("only rankings are decided, and no gold check")
            dense = tuple(dense_ranks(ranks, len(found.candidates)))
            check_flags(flags, len(dense))
            return self._add(writer, found, reviewer, "decision", dense, tuple(flags), note)

    def drop(self, task: str, reviewer: str, note: str) -> Judgement:
        """Leaves a task out of every export."""
        with self._database.write() as writer:
            require(writer, reviewer, "reviewer")
            found = find_task(writer, task)
            return self._add(writer, found, reviewer, "drop", None, (), note)

    def _add(
        self, writer: Writer, task: Task, reviewer: str, kind: str, ranks: tuple[int, ...] | None,
        flags: tuple[Flag, ...], note: str,
    ) -> Judgement:  # fmt: skip
        """Writes a decision; the same one again is the one before, sent twice."""
        if task.state == "open":
            raise Invalid("labellers are still at this task: it is not to be decided yet")
        if not _is_admin(writer, reviewer) and _has_judged(writer, reviewer, task.id):
            raise Forbidden("you have judged this task yourself: another reviewer decides")
        where = sa.and_(
            judgements.c.task_id == task.id, judgements.c.kind.in_(DECIDING), standing()
        )
        before = next(iter(read_judgements(writer, where)), None)
        made = Judgement(
            new_id(), task.id, task.campaign, reviewer, kind, ranks, None, flags, (),
            storable(note, MAX_NOTE, "a note"), 0.0, None,
            None if before is None else before.id,
            self._database.clock(),
        )  # fmt: skip
        if before is not None and _same(before, made):
            return before
        insert_judgement(writer, self._audit, made, None)
        settle(writer, [task.id])
        return made


def _waiting(reader: Reader, campaign: str, reviewer: str) -> sa.Select[Any]:
    """The tasks of a campaign that this reviewer may decide now."""
    require(reader, reviewer, "reviewer")
    found = find_campaign(reader, campaign)
    query = sa.select(tasks).where(tasks.c.campaign_id == found.id, tasks.c.state == "review")
    if not _is_admin(reader, reviewer):
        query = query.where(tasks.c.id.not_in(_own(reviewer)))
    return query


def _cases(reader: Reader, query: sa.Select[Any]) -> list[Case]:
    """Tasks with their answers, in the query's order."""
    rows = reader.execute(query).all()
    answers: dict[str, list[Judgement]] = {row.id: [] for row in rows}
    where = sa.and_(judgements.c.task_id.in_(list(answers)), standing())
    for judgement in read_judgements(reader, where):
        answers[judgement.task].append(judgement)
    return [_case(task_of(row), answers[row.id]) for row in rows]


def _is_admin(reader: Reader, person: str) -> bool:
    try:
        require(reader, person, "admin")
    except Forbidden:
        return False
    return True


def _own(person: str) -> sa.Select[Any]:
    """Ids of the tasks that a person has judged as a labeller."""
    query = sa.select(judgements.c.task_id).where(judgements.c.person_id == person)
    return query.where(judgements.c.kind.not_in(DECIDING))


def _has_judged(reader: Reader, person: str, task: str) -> bool:
    return reader.execute(_own(person).where(judgements.c.task_id == task)).first() is not None


def _same(one: Judgement, other: Judgement) -> bool:
    fields = ("person", "kind", "ranks", "note")
    same = all(getattr(one, name) == getattr(other, name) for name in fields)
    return same and set(one.flags) == set(other.flags)


def _case(task: Task, answers: Sequence[Judgement]) -> Case:
    rankings = [a.ranks for a in answers if a.kind == "ranking" and a.ranks is not None]
    return Case(
        task,
        tuple(answers),
        disagreement(rankings),
        max((flag.severity for answer in answers for flag in answer.flags), default=0),
        sum(answer.kind == "skip" for answer in answers),
    )
