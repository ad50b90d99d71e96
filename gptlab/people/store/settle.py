"""A task's state, as its answers say: open, to be reviewed, or done.

    withheld it shows the text of somebody who doesn't consent to training (any more)
    done     a reviewer has decided, or as many have judged as wanted, and they agree
    review   they order too many pairs differently, a flag is serious, or too many have skipped it
    open     otherwise, and a gold check always

States are computed anew whenever an answer comes or goes, so that none can be stale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from gptlab.people.store.consent import usable
from gptlab.people.store.database import Writer
from gptlab.people.store.judgements import Judgement, read_judgements
from gptlab.people.store.schema import campaigns, judgements, leases, people, tasks

SERIOUS = 2  # flags of this severity and above go to reviewers
DECIDING = ("decision", "drop")


def standing(until: int | None = None) -> sa.ColumnElement[bool]:
    """Of judgements: no newer one has superseded it (up to an audit row)."""
    newer = judgements.alias("newer")
    later = sa.select(newer.c.id).where(newer.c.supersedes == judgements.c.id)
    if until is None:
        return ~later.exists()
    return sa.and_(judgements.c.row <= until, ~later.where(newer.c.row <= until).exists())


_STANDING = sa.and_(judgements.c.task_id == sa.bindparam("key"), standing())
_UNUSABLE = sa.select(people.c.id).where(~usable("training"))
_SETTLED = (
    sa.select(tasks.c.state, tasks.c.gold, campaigns.c.overlap, campaigns.c.disagreement)
    .add_columns(campaigns.c.max_skips, tasks.c.person_id.in_(_UNUSABLE).label("withheld"))
    .join(campaigns, campaigns.c.id == tasks.c.campaign_id)
    .where(tasks.c.id == sa.bindparam("key"), tasks.c.state != "deleted")
)


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


def state_of(answers: Sequence[Judgement], overlap: int, threshold: float, max_skips: int) -> str:
    """A task's state by its standing judgements, and its campaign's settings."""
    kinds = [answer.kind for answer in answers]
    if any(kind in DECIDING for kind in kinds):
        return "done"
    if kinds.count("skip") >= max_skips:
        return "review"
    judged = [answer for answer in answers if answer.kind != "skip"]
    if len(judged) < overlap:
        return "open"
    if disagreement([a.ranks for a in judged if a.ranks is not None]) > threshold:
        return "review"
    serious = any(flag.severity >= SERIOUS for answer in judged for flag in answer.flags)
    return "review" if serious else "done"


def settle(writer: Writer, task_ids: Iterable[str]) -> None:
    """Writes the states of these tasks; deleted ones stay deleted.

    Who holds a task that is withheld loses it: its text is to be shown to nobody any more.
    """
    for task in task_ids:
        row = writer.execute(_SETTLED, {"key": task}).first()
        if row is None:
            continue
        if row.withheld:
            state = "withheld"
            held = sa.and_(leases.c.task_id == task, leases.c.state == "held")
            writer.execute(leases.update().where(held).values(state="released"))
        elif row.gold is not None:
            state = "open"
        else:
            answers = read_judgements(writer, _STANDING, {"key": task})
            state = state_of(answers, row.overlap, row.disagreement, row.max_skips)
        if state != row.state:
            writer.execute(tasks.update().where(tasks.c.id == task).values(state=state))


def settle_campaign(writer: Writer, campaign: str) -> None:
    """The same for all tasks of a campaign that have an answer, say after its settings changed."""
    answered = sa.select(judgements.c.task_id).where(judgements.c.campaign_id == campaign)
    settle(writer, writer.execute(answered.distinct()).scalars().all())


def occupied(now: float | sa.BindParameter[float]) -> sa.ScalarSelect[int]:
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
