"""A task's state, as its answers say: open, to be reviewed, or done.

    done     a reviewer has decided, or as many have judged as wanted, and they agree
    review   they order too many pairs differently, a flag is serious, or too many have skipped it
    open     otherwise

States are computed anew whenever an answer comes or goes, so that none can be stale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from gptlab.people.store.database import Reader, Writer
from gptlab.people.store.schema import campaigns, flags, judgements, leases, tasks

SERIOUS = 2  # flags of this severity and above go to reviewers
DECIDING = ("decision", "drop")


def standing() -> sa.ColumnElement[bool]:
    """Of judgements: no correction has superseded it."""
    newer = judgements.alias("newer")
    return ~sa.select(newer.c.id).where(newer.c.supersedes == judgements.c.id).exists()


def disagreement(rankings: Sequence[Sequence[int]]) -> float:
    """Share of (pair of people, pair of replies) that are ordered differently; NaN for one person.

    A tie against a preference counts half.
    """
    total = count = 0.0
    for i, first in enumerate(rankings):
        for second in rankings[:i]:
            for a in range(len(first)):
                for b in range(a):
                    one = (first[a] > first[b]) - (first[a] < first[b])
                    two = (second[a] > second[b]) - (second[a] < second[b])
                    total, count = total + abs(one - two) / 2, count + 1
    return total / count if count else math.nan


def settle(writer: Writer, task_ids: Iterable[str]) -> None:
    """Writes the states of these tasks. Gold checks stay open, deleted tasks deleted."""
    for task in task_ids:
        query = (
            sa.select(tasks.c.state, campaigns.c.overlap, campaigns.c.disagreement)
            .add_columns(campaigns.c.max_skips)
            .join(campaigns, campaigns.c.id == tasks.c.campaign_id)
            .where(tasks.c.id == task, tasks.c.gold.is_(None), tasks.c.state != "deleted")
        )
        row = writer.execute(query).first()
        if row is None:
            continue
        state = _state(writer, task, row.overlap, row.disagreement, row.max_skips)
        if state != row.state:
            writer.execute(tasks.update().where(tasks.c.id == task).values(state=state))


def settle_campaign(writer: Writer, campaign: str) -> None:
    """The same for all tasks of a campaign that have an answer, say after its settings changed."""
    answered = sa.select(judgements.c.task_id).where(judgements.c.campaign_id == campaign)
    settle(writer, writer.execute(answered.distinct()).scalars().all())


def _state(reader: Reader, task: str, overlap: int, threshold: float, max_skips: int) -> str:
    query = sa.select(judgements.c.id, judgements.c.kind, judgements.c.ranks).where(
        judgements.c.task_id == task, standing()
    )
    rows = reader.execute(query).all()
    kinds = [row.kind for row in rows]
    if any(kind in DECIDING for kind in kinds):
        return "done"
    if kinds.count("skip") >= max_skips:
        return "review"
    judged = [row for row in rows if row.kind != "skip"]
    if len(judged) < overlap:
        return "open"
    rankings = [json.loads(row.ranks) for row in judged if row.ranks is not None]
    if disagreement(rankings) > threshold:
        return "review"
    serious = sa.select(sa.func.max(flags.c.severity)).where(
        flags.c.judgement_id.in_([row.id for row in judged])
    )
    return "review" if (reader.execute(serious).scalar() or 0) >= SERIOUS else "done"


def occupied(now: float) -> sa.ScalarSelect[int]:
    """How many people hold a task (of the enclosing query) or have judged it."""
    return (
        sa.select(sa.func.count())
        .select_from(leases)
        .where(
            leases.c.task_id == tasks.c.id,
            sa.or_(
                leases.c.state == "judged",
                sa.and_(leases.c.state == "held", leases.c.expires_at > now),
            ),
        )
        .correlate(tasks)
        .scalar_subquery()
    )
