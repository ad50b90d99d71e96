"""What an export reads: the store's content up to a row of the audit, in one snapshot.

Later messages, feedback and judgements don't count, nor does what they supersede come back wrongly:
a correction made later leaves the earlier answer standing. Deletions, consent, roles and decisions
about campaigns count as they are *now*, whatever `until` says: who withdraws or is deleted is in no
export from then on. `State` names both parts, so equal states mean equal content.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import sqlalchemy as sa

from gptlab.people.store.campaigns import Campaign, campaign_of
from gptlab.people.store.consent import SCOPES, consenting
from gptlab.people.store.conversations import Message, message_of
from gptlab.people.store.database import Database, Reader
from gptlab.people.store.feedback import Given, counting, given
from gptlab.people.store.judgements import Judgement, read_judgements
from gptlab.people.store.person import Person, person_of
from gptlab.people.store.schema import (
    audit,
    campaigns,
    conversations,
    feedback,
    messages,
    people,
    store,
    tasks,
)
from gptlab.people.store.settle import standing
from gptlab.people.store.tasks import Task, task_of

# Content that is only added to, so that `until` can leave it out. Any other change counts at once.
_ADDING = ("message.add", "feedback.add", "judgement.add", "task.queue")


@dataclasses.dataclass(frozen=True)
class State:
    """`until`: the audit row up to which content counts. `digest`: a hash of what that content is.

    `store` tells one store from another.
    """

    store: str
    until: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that could be exported, before any filter."""

    state: State
    people: Mapping[str, Person]  # simulated ones too; nobody who was deleted
    consenting: Mapping[str, frozenset[str]]  # scope -> people
    owners: Mapping[str, str]  # conversation -> person
    messages: Mapping[str, Message]
    feedback: tuple[Given, ...]
    campaigns: Mapping[str, Campaign]
    tasks: Mapping[str, Task]
    judgements: tuple[Judgement, ...]

    def path(self, message: str | None) -> list[Message]:
        """From the root to a message; nothing for None."""
        found: list[Message] = []
        while message is not None:
            found.append(self.messages[message])
            message = found[-1].parent
        return found[::-1]


def read_state(database: Database, until: int | None = None) -> State:
    """The state up to an audit row; None: the newest content."""
    with database.read() as reader:
        return state_of_content(reader, until)


def read(database: Database, until: int | None = None) -> Content:
    """All content up to an audit row; None: the newest."""
    with database.read() as reader:
        state = state_of_content(reader, until)
        alive = reader.execute(sa.select(people).where(people.c.deleted_at.is_(None)))
        row = sa.select(messages).where(messages.c.row <= state.until).order_by(messages.c.row)
        own = sa.select(tasks).where(tasks.c.row <= state.until, tasks.c.state != "deleted")
        return Content(
            state,
            {r.id: person_of(r) for r in alive},
            {s: frozenset(reader.execute(consenting(s)).scalars()) for s in SCOPES},
            {r.id: r.person_id for r in reader.execute(sa.select(conversations))},
            {r.id: message_of(r) for r in reader.execute(row)},
            tuple(
                given(r)
                for r in reader.execute(
                    counting(sa.select(feedback), state.until).order_by(feedback.c.row)
                )
            ),
            {r.id: campaign_of(r) for r in reader.execute(sa.select(campaigns))},
            {r.id: task_of(r) for r in reader.execute(own.order_by(tasks.c.source))},
            tuple(read_judgements(reader, standing(state.until))),
        )


def state_of_content(reader: Reader, until: int | None) -> State:
    """`read_state` within a transaction."""
    changed = sa.select(audit.c.id, audit.c.hash).where(audit.c.content)
    newest = changed.order_by(audit.c.id.desc()).limit(1)
    name = reader.execute(sa.select(store.c.id)).scalar_one()
    last = newest if until is None else newest.where(audit.c.id <= until)
    added = reader.execute(last).first()
    other = reader.execute(newest.where(audit.c.action.not_in(_ADDING))).first()
    parts = [name, *("" if row is None else row.hash for row in (added, other))]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return State(name, 0 if added is None else added.id, digest)
