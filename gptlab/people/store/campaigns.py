"""Campaigns and their tasks.

A ranking campaign asks people to rank the candidate replies of each task; a demonstration campaign
to write both sides of a conversation. Tasks are queued from candidate sets (`gptlab.collect`), from
a reply picked out of somebody's chat with alternatives to it, from prompts, or from topics.
Queueing the same thing again does nothing. A task's place in the queue is a hash of the campaign's
seed and what it was made of: random, and the same however it was queued.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.data.records import Candidate, CandidateSet, Prompt
from gptlab.people.store.audit import Audit
from gptlab.people.store.consent import usable
from gptlab.people.store.conversations import path_to
from gptlab.people.store.database import Database, Reader, new_id, storable
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.people.store.person import require
from gptlab.people.store.provenance import GOLD, origins
from gptlab.people.store.removal import EMPTY
from gptlab.people.store.schema import (
    campaigns,
    conversations,
    messages,
    people,
    tasks,
    to_json,
)
from gptlab.people.store.settle import settle_campaign
from gptlab.people.store.tasks import (
    Task,
    dense_ranks,
    payload,
    place,
    rankable,
    task_of,
)

KINDS = ("ranking", "demonstration")
STATES = ("open", "paused", "closed")
_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # all that str.strip() takes off
_KEY: sa.BindParameter[str] = sa.bindparam("key")
_CAMPAIGN = sa.select(campaigns).where(sa.or_(campaigns.c.id == _KEY, campaigns.c.name == _KEY))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a campaign is run.

    Attributes:
      instructions: Markdown, shown to labellers.
      overlap: how many people judge each task.
      lease_seconds: how long one may take; then the task may go to somebody else.
      gold_rate: share of leases that are gold checks, while there are any left for the person.
      disagreement: a task goes to reviewers if its labellers order more than this share of the
        pairs differently (0 to 1; 1: never). Flags of severity 2 and more go there always.
      max_skips: a task that so many people skip goes to reviewers.
      seed: of the order of tasks and candidates, and of where gold checks come.
    """

    instructions: str = ""
    overlap: int = 1
    lease_seconds: float = 900.0
    gold_rate: float = 0.0
    disagreement: float = 0.5
    max_skips: int = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Campaign:
    id: str
    name: str
    kind: str
    state: str
    settings: Settings
    created_at: float


@dataclasses.dataclass(frozen=True)
class Picked:
    """A model's reply out of a chat, to which alternatives are to be sampled."""

    message: str
    prompt: Prompt
    reply: Candidate
    model: str


class Campaigns:
    """See the head of this file. What changes something takes an admin, or 'system', as `actor`."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def create(self, name: str, kind: str, settings: Settings, actor: str) -> Campaign:
        """A new, open campaign. Raises Invalid: a taken name, or settings that make no sense."""
        name = " ".join(storable(name, 200, "a campaign's name").split())
        if not name or kind not in KINDS:
            raise Invalid(f"a campaign has a name, and is one of {', '.join(KINDS)}")
        _check(settings)
        made = Campaign(new_id(), name, kind, "open", settings, self._database.clock())
        with self._database.write() as writer:
            require(writer, actor, "admin")
            if writer.execute(sa.select(campaigns.c.id).where(campaigns.c.name == name)).scalar():
                raise Invalid(f"there is a campaign {name!r} already")
            values = dataclasses.asdict(made)
            writer.execute(campaigns.insert().values(**(values.pop("settings") | values)))
            self._audit.append(
                writer, actor, "campaign.add", f"campaigns:{made.id}", _described(settings)
            )
        return made

    def configure(self, campaign: str, settings: Settings, actor: str) -> Campaign:
        """Changes the settings; the audit keeps the old ones."""
        _check(settings)
        with self._database.write() as writer:
            require(writer, actor, "admin")
            found = find_campaign(writer, campaign)
            update = campaigns.update().where(campaigns.c.id == found.id)
            writer.execute(update.values(**dataclasses.asdict(settings)))
            settle_campaign(writer, found.id)
            detail = {"from": _described(found.settings), "to": _described(settings)}
            where = f"campaigns:{found.id}"
            self._audit.append(writer, actor, "campaign.configure", where, detail, content=True)
            return dataclasses.replace(found, settings=settings)

    def set_state(self, campaign: str, state: str, actor: str) -> Campaign:
        """No task is given out while a campaign is paused or closed."""
        if state not in STATES:
            raise Invalid(f"a campaign is {', '.join(STATES)}")
        with self._database.write() as writer:
            require(writer, actor, "admin")
            found = find_campaign(writer, campaign)
            update = campaigns.update().where(campaigns.c.id == found.id)
            writer.execute(update.values(state=state))
            where, detail = f"campaigns:{found.id}", {"from": found.state, "to": state}
            self._audit.append(writer, actor, "campaign.state", where, detail)
            return dataclasses.replace(found, state=state)

    def get(self, campaign: str) -> Campaign:
        """By its id or its name. Raises NotFound."""
        with self._database.read() as reader:
            return find_campaign(reader, campaign)

    def all(self, state: str | None = None) -> list[Campaign]:
        """All campaigns, or those of a state, newest first."""
        query = sa.select(campaigns).order_by(campaigns.c.created_at.desc(), campaigns.c.id)
        if state is not None:
            query = query.where(campaigns.c.state == state)
        with self._database.read() as reader:
            return [campaign_of(row) for row in reader.execute(query)]

    def queue(
        self, campaign: str, sets: Iterable[CandidateSet], actor: str, split: str = ""
    ) -> int:
        """Queues candidate sets to be ranked; returns how many were new.

        One that was made of a chat deleted since is only noted, as deleted.
        """
        rows = ({"source": item.id, "payload": payload(item)} for item in rankable(sets))
        return self._queue(campaign, "ranking", rows, actor, split=split)

    def queue_gold(
        self, campaign: str, item: CandidateSet, ranks: Sequence[int], actor: str
    ) -> int:
        """Queues a gold check, whose right ranks are known; returns 1 if it was new, else 0."""
        gold = dense_ranks(ranks, len(item.candidates))
        if len(set(gold)) < 2:
            raise Invalid("a gold check needs one reply that is better than another")
        rows = (
            {"source": f"{GOLD}{item.id}", "payload": payload(item), "gold": to_json(gold)}
            for item in rankable([item])
        )
        return self._queue(campaign, "ranking", rows, actor)

    def queue_prompts(
        self, campaign: str, prompts: Iterable[Prompt], actor: str, split: str = ""
    ) -> int:
        """Queues beginnings of conversations for a demonstration campaign; returns the new ones."""
        rows = ({"source": prompt.id, "payload": payload(prompt)} for prompt in prompts)
        return self._queue(campaign, "demonstration", rows, actor, split=split)

    def queue_topics(self, campaign: str, topics: Iterable[str], actor: str) -> int:
        """Queues what conversations shall be about: trainers write them from the first turn on."""
        rows = (
            {
                "source": f"topic:{hashlib.sha256(topic.encode()).hexdigest()[:24]}",
                "payload": to_json({"topic": storable(topic, 10_000, "a topic")}),
            }
            for topic in topics
        )
        return self._queue(campaign, "demonstration", rows, actor)

    def pick(self, campaign: str, count: int, seed: int) -> list[Picked]:
        """Replies drawn at random from chats whose owners consent to training.

        Those that the campaign already has are left out, as are refusals and blank replies. Sample
        alternatives, then `queue_picked`.
        """
        with self._database.read() as reader:
            found = find_campaign(reader, campaign)
            here = tasks.alias("here")
            queued = sa.select(here.c.id).where(
                here.c.campaign_id == found.id, here.c.message_id == messages.c.id
            )
            willing = sa.select(people.c.id).where(usable("training"))
            query = (
                sa.select(messages.c.id)
                .join(conversations, conversations.c.id == messages.c.conversation_id)
                .where(messages.c.role == "assistant", messages.c.policy.is_not(None))
                .where(messages.c.refusal.is_(None), ~queued.exists())
                .where(sa.func.trim(messages.c.content, _SPACE) != "")
                .where(conversations.c.person_id.in_(willing))
                .order_by(messages.c.row)
            )
            ids = list(reader.execute(query).scalars())
            chosen = random.Random(seed).sample(ids, min(count, len(ids)))
            return [_picked(reader, message) for message in chosen]

    def queue_picked(
        self, campaign: str, picked: Picked, alternatives: Sequence[Candidate], actor: str
    ) -> int:
        """Queues a picked reply with alternatives to it; returns 1 if it was new, else 0."""
        item = CandidateSet(
            f"message:{picked.message}", picked.prompt, (picked.reply, *alternatives)
        )
        rows = ({"source": item.id, "payload": payload(item)} for item in rankable([item]))
        return self._queue(campaign, "ranking", rows, actor, message=picked.message)

    def tasks(
        self, campaign: str, state: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Task]:
        """Tasks in the order in which they are given out."""
        with self._database.read() as reader:
            found = find_campaign(reader, campaign)
            query = sa.select(tasks).where(tasks.c.campaign_id == found.id)
            if state is not None:
                query = query.where(tasks.c.state == state)
            query = query.order_by(tasks.c.place, tasks.c.id).offset(offset).limit(limit)
            return [task_of(row) for row in reader.execute(query)]

    def states(self, campaign: str) -> dict[str, tuple[str, str]]:
        """What each task was made of (a candidate set's id, say) -> the task's id and state."""
        with self._database.read() as reader:
            found = find_campaign(reader, campaign)
            query = sa.select(tasks.c.source, tasks.c.id, tasks.c.state)
            rows = reader.execute(query.where(tasks.c.campaign_id == found.id))
            return {row.source: (row.id, row.state) for row in rows}

    def _queue(
        self, campaign: str, kind: str, rows: Iterable[dict[str, Any]], actor: str,
        split: str = "", message: str | None = None,
    ) -> int:  # fmt: skip
        with self._database.write() as writer:
            require(writer, actor, "admin")
            found = find_campaign(writer, campaign)
            if found.kind != kind:
                raise Invalid(f"{found.name!r} is a campaign of {found.kind}s, not of {kind}s")
            if message is not None:
                _check_there(writer, message)
            query = sa.select(tasks.c.source).where(tasks.c.campaign_id == found.id)
            known = set(writer.execute(query).scalars())
            by_source = {own["source"]: own for own in rows}
            new = [own for source, own in by_source.items() if source not in known]
            if not new:
                return 0
            where, detail = f"campaigns:{found.id}", {"tasks": len(new), "split": split}
            row = self._audit.append(writer, actor, "task.queue", where, detail, content=True)
            shared = {
                "campaign_id": found.id, "split": split, "gold": None, "message_id": message,
                "row": row, "created_at": self._database.clock(),
            }  # fmt: skip
            known_origins = origins(writer, [own["source"] for own in new], message)
            for own in new:
                origin = known_origins[own["source"]]
                own |= {"id": new_id(), "place": place(found.settings.seed, own["source"])}
                own |= {"person_id": origin.person, "state": origin.state}
                if origin.state == "deleted":
                    own |= EMPTY
            writer.execute(tasks.insert(), [shared | own for own in new])
        return len(new)


def find_campaign(reader: Reader, campaign: str) -> Campaign:
    """By its id or its name. Raises NotFound."""
    row = reader.execute(_CAMPAIGN, {"key": campaign}).first()
    if row is None:
        raise NotFound(f"there is no campaign {campaign!r}")
    return campaign_of(row)


def _check(settings: Settings) -> None:
    storable(settings.instructions, 100_000, "the instructions")
    rules = (
        ("overlap", 1 <= settings.overlap <= 100, "1 to 100"),
        ("lease_seconds", 1 <= settings.lease_seconds <= 7 * 86400, "1 to 604800"),
        ("gold_rate", 0 <= settings.gold_rate <= 0.9, "0 to 0.9"),
        ("disagreement", 0 <= settings.disagreement <= 1, "0 to 1"),
        ("max_skips", 1 <= settings.max_skips <= 1000, "1 to 1000"),
        ("seed", 0 <= settings.seed < 2**31, "0 to 2147483647"),
    )
    for name, right, allowed in rules:
        value = getattr(settings, name)
        if not right or not math.isfinite(value):
            raise Invalid(f"{name} is {allowed}, not {value}")


def _described(settings: Settings) -> dict[str, Any]:
    """Settings for the audit, the instructions by their hash."""
    values = dataclasses.asdict(settings)
    text = values.pop("instructions")
    return values | {"instructions_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _check_there(reader: Reader, message: str) -> None:
    if reader.execute(sa.select(messages.c.id).where(messages.c.id == message)).scalar() is None:
        raise NotFound("there is no such message")


def _picked(reader: Reader, message: str) -> Picked:
    *before, reply = path_to(reader, message)
    prompt = Prompt(
        prompt_id(reply.conversation, before[-1].row), tuple(m.record() for m in before), "chat"
    )
    candidate = Candidate(reply.id, reply.content, reply.policy or "human", reply.finished)
    return Picked(reply.id, prompt, candidate, reply.model or "")


def prompt_id(conversation: str, row: int) -> str:
    """The id of the prompt that ends with the turn of an audit row.

    '<conversation>:<number>', as prompts out of conversations have it everywhere. Turns of two
    branches have different rows.
    """
    return f"{conversation}:{row}"


def campaign_of(row: Any) -> Campaign:
    """A row of the table."""
    settings = Settings(
        row.instructions, row.overlap, row.lease_seconds, row.gold_rate, row.disagreement,
        row.max_skips, row.seed,
    )  # fmt: skip
    return Campaign(row.id, row.name, row.kind, row.state, settings, row.created_at)
