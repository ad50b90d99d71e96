"""What people say about a model's replies: thumbs, choices between two, better versions.

Feedback is never changed. A second thumb or choice of the same person on the same message
supersedes the first, and only the newest counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import Audit
from gptlab.people.store.conversations import MAX_CHARACTERS, Message, add_version, owned_message
from gptlab.people.store.database import Database, Reader, Writer, new_id, storable
from gptlab.people.store.errors import Invalid
from gptlab.people.store.schema import feedback, messages, to_json

REASONS = ("harmful", "untrue", "biased", "unhelpful", "other")
# These are flags: they become safety prompts and rejected comparisons.
FLAGGING = ("harmful", "untrue", "biased")
MAX_NOTE = 10_000  # characters
_SEVERITY = 2  # of a flag whose person didn't say


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
        chosen = tuple(reason for reason in REASONS if reason in reasons)
        if len(chosen) != len(reasons):
            raise Invalid(f"the reasons are some of {', '.join(REASONS)}, each once")
        if up and chosen:
            raise Invalid("a thumb up has no reasons")
        flagged = any(reason in FLAGGING for reason in chosen)
        if severity is not None and not (flagged and severity in (1, 2, 3)):
            raise Invalid("a severity is 1 to 3, and belongs to a reply that is flagged")
        weight = severity or (_SEVERITY if flagged else 0)
        with self._database.write() as writer:
            _reply(writer, person, message)
            return self._add(
                writer, person, message, "thumb", 1 if up else -1, None, chosen, weight, note
            )

    def choose(self, person: str, message: str, other: str, value: int, note: str = "") -> Given:
        """Of two replies to the same turn, which is better: 1 `message`, -1 `other`, 0 neither."""
        if value not in (-1, 0, 1):
            raise Invalid("a choice is 1, 0 or -1")
        with self._database.write() as writer:
            first, second = _reply(writer, person, message), _reply(writer, person, other)
            if first.parent != second.parent or first.id == second.id:
                raise Invalid("a choice is between two replies to the same turn")
            return self._add(writer, person, message, "choice", value, other, (), 0, note)

    def improve(self, person: str, message: str, content: str) -> tuple[Given, Message]:
        """The person's own version of a reply: a message too, from which the chat can go on."""
        storable(content, MAX_CHARACTERS, "a reply")
        if not content.strip():
            raise Invalid("a reply can't be empty")
        with self._database.write() as writer:
            reply = _reply(writer, person, message)
            now = self._database.clock()
            better = add_version(self._audit, writer, person, reply, content, now)
            given = self._add(writer, person, message, "better", 1, better.id, (), 0, "")
            return given, better

    def of(self, person: str, conversation: str) -> list[Given]:
        """What counts of a person's feedback in a conversation, oldest first."""
        query = (
            counting(sa.select(feedback))
            .join(messages, messages.c.id == feedback.c.message_id)
            .where(feedback.c.person_id == person, messages.c.conversation_id == conversation)
            .order_by(feedback.c.row)
        )
        with self._database.read() as reader:
            return [given(row) for row in reader.execute(query)]

    def _add(
        self, writer: Writer, person: str, message: str, kind: str, value: int, other: str | None,
        reasons: tuple[str, ...], severity: int, note: str,
    ) -> Given:  # fmt: skip
        note, now = storable(note, MAX_NOTE, "a note"), self._database.clock()
        made = Given(new_id(), person, message, kind, value, other, reasons, severity, note, now)
        earlier = _earlier(writer, made)
        detail = {"message": message, "kind": kind, "value": value, "severity": severity}
        where = f"feedback:{made.id}"
        row = self._audit.append(writer, person, "feedback.add", where, detail, content=True)
        writer.execute(
            feedback.insert().values(
                id=made.id, person_id=person, message_id=message, kind=kind, value=value,
                other_id=other, reasons=to_json(list(reasons)), severity=severity, note=note,
                supersedes=earlier, created_at=now, row=row,
            )
        )  # fmt: skip
        return made


def counting(query: sa.Select[Any], until: int | None = None) -> sa.Select[Any]:
    """Only feedback that no newer one supersedes; `until`: as of that audit row."""
    newer = feedback.alias("newer")
    later = sa.select(newer.c.id).where(newer.c.supersedes == feedback.c.id)
    if until is not None:
        later = later.where(newer.c.row <= until)
        query = query.where(feedback.c.row <= until)
    return query.where(~later.exists())


def given(row: Any) -> Given:
    """A row of the table."""
    return Given(
        row.id, row.person_id, row.message_id, row.kind, row.value, row.other_id,
        tuple(json.loads(row.reasons)), row.severity, row.note, row.created_at,
    )  # fmt: skip


def _reply(reader: Reader, person: str, message: str) -> Message:
    found = owned_message(reader, person, message)
    if found.role != "assistant":
        raise Invalid("feedback is about a reply")
    return found


def _earlier(reader: Reader, made: Given) -> str | None:
    """The feedback that this one takes the place of: of the same person, on the same replies."""
    query = counting(sa.select(feedback.c.id)).where(
        feedback.c.person_id == made.person, feedback.c.kind == made.kind
    )
    about = (feedback.c.message_id, feedback.c.other_id)
    if made.kind == "choice":  # whichever of the two was shown first
        pair = (made.message, made.other)
        query = query.where(about[0].in_(pair), about[1].in_(pair))
    else:
        query = query.where(about[0] == made.message)
    return reader.execute(query).scalar()
