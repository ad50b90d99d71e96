"""Leases as rows: who holds which task, for how long, and in what order its replies are shown."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import sqlalchemy as sa

from gptlab.data.records import Message
from gptlab.people.store.campaigns import Campaign, find_campaign
from gptlab.people.store.database import Reader, Writer
from gptlab.people.store.errors import LeaseLost, NotFound
from gptlab.people.store.schema import leases, tasks, to_json
from gptlab.people.store.settle import occupied
from gptlab.people.store.tasks import Task, find_task, task_of

ANSWERED = ("judged", "skipped")  # states of leases
_LEASE = sa.select(leases).where(
    leases.c.id == sa.bindparam("key"), leases.c.person_id == sa.bindparam("person")
)
# Open tasks that a person hasn't answered, in their order; those that have room; gold checks.
_ANSWER = sa.select(leases.c.id).where(
    leases.c.task_id == tasks.c.id,
    leases.c.person_id == sa.bindparam("person"),
    leases.c.state.in_(ANSWERED),
)
_OPEN = (
    sa.select(tasks)
    .where(tasks.c.campaign_id == sa.bindparam("campaign"), tasks.c.state == "open")
    .where(~_ANSWER.exists())
    .order_by(tasks.c.place, tasks.c.id)
    .limit(1)
)
_TAKEN = occupied(sa.bindparam("now", type_=sa.Double))
_FREE = _OPEN.where(tasks.c.gold.is_(None), _TAKEN < sa.bindparam("overlap"))
_GOLD = _OPEN.where(tasks.c.gold.is_not(None))
_CLOSE = leases.update().where(leases.c.id == sa.bindparam("key")).values(state=sa.bindparam("to"))


@dataclasses.dataclass(frozen=True)
class Lease:
    """A task as a labeller sees it: which model wrote what, and which is a check, is not told.

    `replies` are in the order to be shown; ranks, ratings and flags follow that order. A
    demonstration has none; without a prompt, its conversation is to be about `topic`.
    """

    token: str
    campaign: str
    kind: str
    prompt: tuple[Message, ...]
    topic: str
    replies: tuple[str, ...]
    granted_at: float
    expires_at: float


def next_task(writer: Writer, campaign: Campaign, person: str, now: float) -> Task | None:
    """The first task that has room, which the person hasn't answered; now and then a gold check."""
    mine = {"campaign": campaign.id, "person": person}
    row = writer.execute(
        _FREE, {**mine, "now": now, "overlap": campaign.settings.overlap}
    ).first()  # fmt: skip
    if row is not None and _gold_is_due(writer, campaign, person):
        row = writer.execute(_GOLD, mine).first() or row
    return None if row is None else task_of(row)


def _gold_is_due(writer: Writer, campaign: Campaign, person: str) -> bool:
    """Drawn for each lease anew, from the seed, the person and how many they had."""
    if not campaign.settings.gold_rate:
        return False
    mine = sa.select(sa.func.count()).where(
        leases.c.campaign_id == campaign.id, leases.c.person_id == person
    )
    number = writer.execute(mine).scalar_one()
    return _draw(campaign.settings.seed, "gold", person, number) < campaign.settings.gold_rate


def order_shown(campaign: Campaign, task: Task, person: str) -> list[int]:
    """shown[i]: the number of the candidate in place i; drawn for each task and person."""
    key = (campaign.settings.seed, "order", task.id, person)
    return sorted(range(len(task.candidates)), key=lambda number: _draw(*key, number))


def _draw(*key: object) -> float:
    """A hash of the key as a number in [0, 1)."""
    digest = hashlib.sha256(to_json(key).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def own_lease(reader: Reader, token: str, person: str) -> Any:
    """The row of a person's lease. Raises NotFound."""
    row = reader.execute(_LEASE, {"key": token, "person": person}).first()
    if row is None:
        raise NotFound("there is no such task of yours")
    return row


def check_held(reader: Reader, lease: Any, now: float) -> Campaign:
    """The campaign of a lease that can be answered. Raises LeaseLost.

    It runs, or has run out and nobody else needs its place.
    """
    campaign = find_campaign(reader, lease.campaign_id)
    if lease.state != "held" or (
        lease.expires_at <= now and not has_room(reader, campaign, lease, now)
    ):
        raise LeaseLost("this task was given back, or has gone to somebody else")
    return campaign


def has_room(reader: Reader, campaign: Campaign, lease: Any, now: float) -> bool:
    """Whether a lease that has run out can go on."""
    query = sa.select(tasks.c.state, tasks.c.gold, occupied(now).label("occupied"))
    task = reader.execute(query.where(tasks.c.id == lease.task_id)).one()
    if task.state != "open":
        return False
    return task.gold is not None or task.occupied < campaign.settings.overlap


def close_lease(writer: Writer, lease: str, state: str) -> None:
    """Ends a lease: 'judged', 'skipped' or 'released'."""
    writer.execute(_CLOSE, {"key": lease, "to": state})


def show(reader: Reader, campaign: Campaign, row: Any) -> Lease:
    """A row of the table as its labeller sees it."""
    task = find_task(reader, row.task_id)
    return lease_of(campaign, task, row.id, row.created_at, row.expires_at, row.shown)


def lease_of(
    campaign: Campaign, task: Task, token: str, granted: float, expires: float, shown: str
) -> Lease:
    """The same of its parts; `shown` is the row's JSON."""
    replies = tuple(task.candidates[number].content for number in json.loads(shown))
    prompt = () if task.prompt is None else task.prompt.messages
    return Lease(token, campaign.id, campaign.kind, prompt, task.topic, replies, granted, expires)
