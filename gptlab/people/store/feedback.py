"""What people say about a model's replies: thumbs, choices between two, better versions.

Feedback is never changed. A second thumb or choice of the same person on the same message
supersedes the first, and only the newest counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gptlab.people.store.audit import Audit
from gptlab.people.store.conversations import Message
from gptlab.people.store.database import Database

REASONS = ("harmful", "untrue", "biased", "unhelpful", "other")
# These are flags: they become safety prompts and rejected comparisons.
FLAGGING = ("harmful", "untrue", "biased")
MAX_NOTE = 10_000  # characters


@dataclasses.dataclass(frozen=True)
class Given:
    """One piece of feedback.

    `kind` is 'thumb' (value 1 or -1), 'choice' (1: `message` was preferred, -1: `other`, 0:
    neither) or 'better' (`other` is the person's version of `message`). `severity` is 0 where
    nothing was flagged, else 1 (low) to 3 (high).
    """

    id: str
    person: str
    message: str
    kind: str
    value: int
    other: str | None
    reasons: tuple[str, ...]
    severity: int
    note: str
    created_at: float


class Feedback:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def thumb(
        self,
        person: str,
        message: str,
        up: bool,
        reasons: Sequence[str] = (),
        note: str = "",
        severity: int | None = None,
    ) -> Given:
        """A thumb on a model's reply; giving reasons later is a second thumb.

        Args:
          person: who gives it, in their own conversation.
          message: the reply.
          up: or down.
          reasons: some of REASONS; a thumb up has none.
          note: in the person's words.
          severity: 1 to 3, of a flag; None: 2 if a reason is in FLAGGING.
        """
        raise NotImplementedError

    def choose(self, person: str, message: str, other: str, value: int, note: str = "") -> Given:
        """Of two replies to the same turn, which is better: 1 `message`, -1 `other`, 0 neither."""
        raise NotImplementedError

    def improve(self, person: str, message: str, content: str) -> tuple[Given, Message]:
        """The person's own version of a reply: a message too, from which the chat can go on."""
        raise NotImplementedError

    def of(self, person: str, conversation: str) -> list[Given]:
        """What counts of a person's feedback in a conversation, oldest first."""
        raise NotImplementedError
