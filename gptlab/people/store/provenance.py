"""Whose text a task shows.

A reply picked out of a chat names its message. What was exported, and came back as a candidate set
of `gptlab.collect`, begins with its conversation's id: '<conversation>:<turn>:<artifact>', in a
gold check after 'gold:'. So a person's text can be found, withheld and removed also where it comes
back, and what was deleted stays out: an artifact that still holds it can't bring it in again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import sqlalchemy as sa

from gptlab.people.store.consent import usable
from gptlab.people.store.database import Reader, new_id
from gptlab.people.store.schema import audit, conversations, messages, people, tasks

GOLD = "gold:"
_ID_LENGTH = len(new_id())
_AT_ONCE = 500  # values in one query


@dataclasses.dataclass(frozen=True)
class Origin:
    """`person` is None for text that is nobody's. `state` is that of a new task of it."""

    person: str | None
    state: str  # 'open', 'withheld' or 'deleted'


def origins(reader: Reader, sources: Collection[str], message: str | None) -> dict[str, Origin]:
    """Of the sources of new tasks, all made of the reply `message` if that isn't None."""
    if message is None:
        keys = {source: _conversation(source) for source in sources}
    else:
        query = sa.select(messages.c.conversation_id).where(messages.c.id == message)
        keys = dict.fromkeys(sources, reader.execute(query).scalar_one())
    owners: dict[str, str] = {}
    for some in _chunks(set(keys.values())):
        query = sa.select(conversations.c.id, conversations.c.person_id)
        rows = reader.execute(query.where(conversations.c.id.in_(some)))
        owners |= {row.id: row.person_id for row in rows}
    deleted = _deleted(reader, set(keys.values()) - owners.keys())
    refused = sa.select(people.c.id).where(~usable("training"))
    unusable = set(reader.execute(refused).scalars()) if owners else set()
    return {source: _origin(key, owners, deleted, unusable) for source, key in keys.items()}


def tasks_of(reader: Reader, conversation_ids: Collection[str]) -> list[str]:
    """Ids of the tasks that show text of these conversations."""
    found = []
    for task in reader.execute(sa.select(tasks.c.id, tasks.c.source)):
        if _conversation(task.source) in conversation_ids:
            found.append(task.id)
    for some in _chunks(set(conversation_ids)):
        inside = sa.select(messages.c.id).where(messages.c.conversation_id.in_(some))
        picked = sa.select(tasks.c.id).where(tasks.c.message_id.in_(inside))
        found += reader.execute(picked).scalars().all()
    return found


def _origin(
    key: str, owners: dict[str, str], deleted: Collection[str], unusable: Collection[str]
) -> Origin:
    if key in deleted:
        return Origin(None, "deleted")
    person = owners.get(key)
    return Origin(person, "withheld" if person in unusable else "open")


def _conversation(source: str) -> str:
    """The id of the conversation that a source begins with, if it does."""
    return source.removeprefix(GOLD)[:_ID_LENGTH]


def _deleted(reader: Reader, keys: Collection[str]) -> set[str]:
    """Those that once were conversations, as the audit knows."""
    if not keys:
        return set()
    added = sa.select(audit.c.object).where(audit.c.action == "conversation.add")
    return {name.partition(":")[2] for name in reader.execute(added).scalars()} & set(keys)


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    ordered = sorted(values)
    for begin in range(0, len(ordered), _AT_ONCE):
        yield ordered[begin : begin + _AT_ONCE]
