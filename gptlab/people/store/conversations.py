"""Conversations, as trees of messages.

Editing a message or asking for another reply adds a message with the same parent; nothing is
overwritten. A conversation as a model sees it is a path from the root to one message. Every method
takes the person whose conversation it must be, and raises NotFound otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from gptlab.data import records
from gptlab.people.store import removal
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database, Reader, Writer, new_id, storable
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.people.store.person import find_person
from gptlab.people.store.schema import conversations, messages, to_json

MAX_CHARACTERS = 200_000  # of a message, and of its context
MAX_TITLE = 200


@dataclasses.dataclass(frozen=True)
class Conversation:
    id: str
    person: str
    title: str
    created_at: float
    changed_at: float


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a tree.

    `policy` is the identity of the artifact that wrote it, None if the person did; `improves` the
    reply that this one is a person's better version of; `refusal` why moderation refused; `row` the
    audit's row, which counts up.
    """

    id: str
    conversation: str
    parent: str | None
    role: str
    content: str
    context: str | None
    model: str | None
    policy: str | None
    finished: bool
    refusal: str | None
    settings: Mapping[str, Any]
    improves: str | None
    created_at: float
    row: int = 0

    def record(self) -> records.Message:
        """The message as models and data sets see it."""
        return records.Message(self.role, self.content, self.context)


class Conversations:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def create(self, person: str, title: str = "", system: str = "") -> Conversation:
        """A new conversation; a system prompt, if given, becomes its first message."""
        now = self._database.clock()
        made = Conversation(new_id(), person, _title(title), now, now)
        with self._database.write() as writer:
            find_person(writer, person)  # a request may come later than a deletion
            row = self._audit.append(writer, person, "conversation.add", f"conversations:{made.id}")
            writer.execute(
                conversations.insert().values(
                    id=made.id, person_id=person, title=made.title, created_at=now, changed_at=now
                )
            )
            if system:
                message = _new(made.id, None, "system", system, None, now)
                _insert(writer, message, row)
        return made

    def of(self, person: str, limit: int = 100, before: float | None = None) -> list[Conversation]:
        """A person's conversations, the one changed last first; `before`: changed before that."""
        query = sa.select(conversations).where(conversations.c.person_id == person)
        if before is not None:
            query = query.where(conversations.c.changed_at < before)
        query = query.order_by(conversations.c.changed_at.desc(), conversations.c.id).limit(limit)
        with self._database.read() as reader:
            return [_conversation(row) for row in reader.execute(query)]

    def get(self, person: str, conversation: str) -> Conversation:
        """One conversation."""
        with self._database.read() as reader:
            return _owned(reader, person, conversation)

    def rename(self, person: str, conversation: str, title: str) -> Conversation:
        """Gives it another title."""
        title = _title(title)
        with self._database.write() as writer:
            found = _owned(writer, person, conversation)
            update = conversations.update().where(conversations.c.id == conversation)
            writer.execute(update.values(title=title))
            where = f"conversations:{conversation}"
            self._audit.append(writer, person, "conversation.rename", where)
        return dataclasses.replace(found, title=title)

    def delete(self, person: str, conversation: str) -> None:
        """Removes it, its messages, feedback on them and tasks made of them: see deletion.py."""
        with self._database.write() as writer:
            _owned(writer, person, conversation)
            removal.remove_conversations(writer, conversations.c.id == conversation)
            where = f"conversations:{conversation}"
            self._audit.append(writer, person, "conversation.delete", where, content=True)
        self._database.forget()

    def messages(self, person: str, conversation: str) -> list[Message]:
        """The whole tree, parents before their children, siblings oldest first."""
        # A child is written after its parent, in a later change.
        query = sa.select(messages).where(messages.c.conversation_id == conversation)
        with self._database.read() as reader:
            _owned(reader, person, conversation)
            return [message_of(row) for row in reader.execute(query.order_by(messages.c.row))]

    def path(self, person: str, message: str) -> list[Message]:
        """From the root to this message."""
        with self._database.read() as reader:
            owned_message(reader, person, message)
            return path_to(reader, message)

    def say(
        self,
        person: str,
        conversation: str,
        parent: str | None,
        content: str,
        context: str | None = None,
    ) -> Message:
        """The person's turn after `parent` (None: the first one). To edit one, give its parent."""
        now = self._database.clock()
        message = _new(conversation, parent, "user", content, context or None, now)
        if not content.strip():
            raise Invalid("a message can't be empty")
        with self._database.write() as writer:
            _owned(writer, person, conversation)
            if parent is None:
                roots = sa.select(messages.c.id).where(
                    messages.c.conversation_id == conversation, messages.c.role == "system"
                )
                message = dataclasses.replace(message, parent=writer.execute(roots).scalar())
            else:
                before = owned_message(writer, person, parent)
                if before.conversation != conversation or before.role == "user":
                    raise Invalid("a person's turn follows a reply, in the same conversation")
            return _added(self._audit, writer, person, message)

    def reply(
        self,
        person: str,
        parent: str,
        content: str,
        model: str,
        policy: str,
        finished: bool,
        settings: Mapping[str, Any] | None = None,
        refusal: str | None = None,
    ) -> Message:
        """A model's turn after the person's turn `parent`; another one makes two siblings.

        Args:
          person: whose conversation it is.
          parent: the turn that is answered.
          content: the reply, as far as it came.
          model: the name it was asked by.
          policy: identity of the artifact that wrote it.
          finished: whether it ended by itself.
          settings: temperature, seed and so on.
          refusal: why moderation refused, where it did.
        """
        now = self._database.clock()
        with self._database.write() as writer:
            asked = owned_message(writer, person, parent)
            if asked.role != "user":
                raise Invalid("a reply follows a person's turn")
            message = dataclasses.replace(
                _new(asked.conversation, parent, "assistant", _text_only(content), None, now),
                model=model, policy=policy, finished=finished, refusal=refusal,
                settings=dict(settings or {}),
            )  # fmt: skip
            return _added(self._audit, writer, person, message)


def add_version(
    audit: Audit, writer: Writer, person: str, reply: Message, content: str, now: float
) -> Message:
    """A person's own version of a reply, as its sibling."""
    message = dataclasses.replace(
        _new(reply.conversation, reply.parent, "assistant", content, None, now),
        improves=reply.id,
    )
    return _added(audit, writer, person, message)


def owned_message(reader: Reader, person: str, message: str) -> Message:
    """A message of this person's. Raises NotFound."""
    query = (
        sa.select(messages)
        .join(conversations, conversations.c.id == messages.c.conversation_id)
        .where(messages.c.id == message, conversations.c.person_id == person)
    )
    row = reader.execute(query).first()
    if row is None:
        raise NotFound("there is no such message")
    return message_of(row)


def path_to(reader: Reader, message: str) -> list[Message]:
    """From the root to a message."""
    up = sa.select(messages).where(messages.c.id == message).cte("up", recursive=True)
    up = up.union_all(sa.select(messages).join(up, messages.c.id == up.c.parent_id))
    return [message_of(row) for row in reader.execute(sa.select(up).order_by(up.c.row))]


def _owned(reader: Reader, person: str, conversation: str) -> Conversation:
    query = sa.select(conversations).where(
        conversations.c.id == conversation, conversations.c.person_id == person
    )
    row = reader.execute(query).first()
    if row is None:
        raise NotFound("there is no such conversation")
    return _conversation(row)


def _new(
    conversation: str, parent: str | None, role: str, content: str, context: str | None, now: float
) -> Message:
    storable(content, MAX_CHARACTERS, "a message")
    if context is not None:
        storable(context, MAX_CHARACTERS, "the additional context")
    return Message(
        new_id(), conversation, parent, role, content, context, None, None, True, None, {}, None,
        now,
    )  # fmt: skip


def _text_only(content: str) -> str:
    """A model may say anything, NUL too, and its reply must be kept all the same."""
    encoded = content.replace("\0", "\ufffd").encode("utf-16", "surrogatepass")
    return encoded.decode("utf-16", "replace")[:MAX_CHARACTERS]


def _added(audit: Audit, writer: Writer, person: str, message: Message) -> Message:
    detail = {"conversation": message.conversation, "role": message.role, "policy": message.policy}
    where = f"messages:{message.id}"
    row = audit.append(writer, person, "message.add", where, detail, content=True)
    _insert(writer, message, row)
    changed = conversations.update().where(conversations.c.id == message.conversation)
    writer.execute(changed.values(changed_at=message.created_at))
    return dataclasses.replace(message, row=row)


def _insert(writer: Writer, message: Message, row: int) -> None:
    values = dataclasses.asdict(message)
    values["conversation_id"], values["parent_id"] = (
        values.pop("conversation"),
        values.pop("parent"),
    )
    values["settings"], values["row"] = to_json(values["settings"]), row
    writer.execute(messages.insert().values(**values))


def _title(title: str) -> str:
    return " ".join(storable(title, MAX_TITLE, "a title").split())


def _conversation(row: Any) -> Conversation:
    return Conversation(row.id, row.person_id, row.title, row.created_at, row.changed_at)


def message_of(row: Any) -> Message:
    """A row of the table."""
    return Message(
        row.id, row.conversation_id, row.parent_id, row.role, row.content, row.context, row.model,
        row.policy, row.finished, row.refusal, json.loads(row.settings), row.improves,
        row.created_at, row.row,
    )  # fmt: skip
