"""Conversations, as trees of messages.

Editing a message or asking for another reply adds a message with the same parent; nothing is
overwritten. A conversation as a model sees it is a path from the root to one message. Every method
takes the person whose conversation it must be, and raises NotFound otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptlab.data import records
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database

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
    reply that this one is a person's better version of; `refusal` why moderation refused.
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

    def record(self) -> records.Message:
        """The message as models and data sets see it."""
        return records.Message(self.role, self.content, self.context)


class Conversations:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def create(self, person: str, title: str = "", system: str = "") -> Conversation:
        """A new conversation; a system prompt, if given, becomes its first message."""
        raise NotImplementedError

    def of(self, person: str, limit: int = 100, before: float | None = None) -> list[Conversation]:
        """A person's conversations, the one changed last first; `before`: changed before that."""
        raise NotImplementedError

    def get(self, person: str, conversation: str) -> Conversation:
        """One conversation."""
        raise NotImplementedError

    def rename(self, person: str, conversation: str, title: str) -> Conversation:
        """Gives it another title."""
        raise NotImplementedError

    def delete(self, person: str, conversation: str) -> None:
        """Removes it, its messages, feedback on them and tasks made of them: see deletion.py."""
        raise NotImplementedError

    def messages(self, person: str, conversation: str) -> list[Message]:
        """The whole tree, parents before their children, siblings oldest first."""
        raise NotImplementedError

    def path(self, person: str, message: str) -> list[Message]:
        """From the root to this message."""
        raise NotImplementedError

    def say(
        self,
        person: str,
        conversation: str,
        parent: str | None,
        content: str,
        context: str | None = None,
    ) -> Message:
        """The person's turn after `parent` (None: the first one). To edit one, give its parent."""
        raise NotImplementedError

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
        raise NotImplementedError
