"""Deletion, and which exports hold whose data.

Deleting a person removes their conversations with all messages, their feedback, judgements, flags,
consents, sessions, keys and invitations, and the content of tasks that show their text, with what
others judged of those. What stays is a row in `people` without a name, and in the audit what was
done when, by ids: no content. What an admin wrote for a campaign stays with it as well: its
instructions, questions, topics and gold checks. Tasks they judged are open again for others.

Artifacts exported earlier are files outside of the store; the store knows which ones contain the
person's data and lists them, so that they can be made again and the old ones removed. What such an
artifact still holds is not taken in again (provenance.py). Somebody who withdraws their consent
stays in the store, and artifacts that hold their data are told apart in the same way.

SQLite's file holds nothing of it afterwards, not in its free pages either, nor does its log once
nobody reads an earlier state (Database.forget). PostgreSQL overwrites the space in its own time
(VACUUM), and its write-ahead log and everybody's backups keep what they have until they are
rotated: that is for the administrator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import SYSTEM, Audit
from gptlab.people.store.consent import SCOPES, usable
from gptlab.people.store.content import State, state_of_content
from gptlab.people.store.database import Database, Reader, new_id
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.people.store.person import check_not_last_admin, find_person, require
from gptlab.people.store.removal import remove, remove_answers, remove_conversations
from gptlab.people.store.schema import (
    api_keys,
    consents,
    conversations,
    export_rows,
    exports,
    feedback,
    invitations,
    judgements,
    leases,
    people,
    sessions,
)
from gptlab.people.store.settle import settle

# What was made again in the same second has other content.
_NEWEST_FIRST = (exports.c.created_at.desc(), exports.c.until.desc(), exports.c.id)


@dataclasses.dataclass(frozen=True)
class Export:
    """An artifact made from the store: its identity, where it was written, and what went in."""

    id: str
    identity: str
    workdir: str
    until: int  # the audit row up to which content went in
    consent: str  # the scope that people had to consent to
    created_at: float
    rows: int  # of those asked for: all, or one person's
    deleted: int  # of these rows, those of people who were deleted since
    withdrawn: int  # those of people who have withdrawn that consent since

    @property
    def stale(self) -> bool:
        """Whether it holds what would not be exported again."""
        return self.deleted + self.withdrawn > 0


class Exports:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def register(
        self,
        identity: str,
        workdir: str,
        state: State,
        rows: Iterable[tuple[str, str, str]],
        consent: str,
    ) -> Export:
        """Notes an export, before it is written.

        The same one again, with what it had and more, is a run that was stopped and goes on. With
        less it is another, made in the place of the first: what was there before stays noted, as
        something may have been made of it.

        Args:
          identity: the artifact's.
          workdir: where it is.
          state: the content that was read.
          rows: (table, id, person) of what goes in.
          consent: the scope that people had to consent to.

        Raises:
          Invalid: somebody was deleted or has withdrawn their consent since the content was read.
        """
        inside = set(rows)
        with self._database.write() as writer:
            if state_of_content(writer, state.until) != state:
                raise Invalid("the store has changed while it was read: export once more")
            same = sa.and_(exports.c.identity == identity, exports.c.workdir == workdir)
            newest = sa.select(exports.c.id).where(same).order_by(*_NEWEST_FIRST)
            known = writer.execute(newest).scalar()
            values = {"identity": identity, "workdir": workdir, "until": state.until}
            if known is None or not _rows(writer, known) <= inside:
                known, now = new_id(), self._database.clock()
                values |= {"id": known, "created_at": now, "consent": consent}
                writer.execute(exports.insert().values(**values))
            else:
                writer.execute(exports.update().where(exports.c.id == known).values(**values))
            new = sorted(inside - _rows(writer, known))
            if new:
                names = ("kind", "row_id", "person_id")
                writer.execute(
                    export_rows.insert(),
                    [{"export_id": known} | dict(zip(names, row, strict=True)) for row in new],
                )
            detail = {"identity": identity, "until": state.until, "rows": len(new)}
            self._audit.append(writer, SYSTEM, "export.add", f"exports:{known}", detail)
            return next(e for e in _exports(writer) if e.id == known)

    def all(self) -> list[Export]:
        """All exports, newest first."""
        with self._database.read() as reader:
            return _exports(reader)

    def containing(self, person: str) -> list[Export]:
        """The exports that contain something of a person, also after their deletion.

        Raises NotFound if there never was such a person.
        """
        with self._database.read() as reader:
            if reader.execute(sa.select(people.c.id).where(people.c.id == person)).first() is None:
                raise NotFound("there is no such person")
            return _exports(reader, person)

    def delete_person(self, person: str, actor: str) -> list[Export]:
        """Deletes (see above); an admin may delete anybody, a person themselves.

        Returns:
          The exports made earlier that contain some of it.
        """
        with self._database.write() as writer:
            require(writer, actor, "admin", own=person)
            if find_person(writer, person).role == "admin":
                check_not_last_admin(writer, person)
            judged = sa.select(judgements.c.task_id).where(judgements.c.person_id == person)
            touched = writer.execute(judged.distinct()).scalars().all()
            remove_answers(writer, judgements.c.person_id == person)
            writer.execute(leases.delete().where(leases.c.person_id == person))
            settle(writer, touched)
            remove(writer, feedback, feedback.c.person_id == person)
            # Tasks made of them go with them; those that an admin wrote are the campaign's.
            remove_conversations(writer, conversations.c.person_id == person)
            for table in (consents, sessions, api_keys, invitations):
                writer.execute(table.delete().where(table.c.person_id == person))
            gone = {"name": "", "deleted_at": self._database.clock()}
            writer.execute(people.update().where(people.c.id == person).values(**gone))
            where = f"people:{person}"
            self._audit.append(writer, actor, "person.delete", where, content=True)
            affected = _exports(writer, person)
        self._database.forget()
        return affected


def _rows(reader: Reader, export: str) -> set[tuple[str, str, str]]:
    query = sa.select(export_rows.c.kind, export_rows.c.row_id, export_rows.c.person_id)
    rows = reader.execute(query.where(export_rows.c.export_id == export))
    return {(row.kind, row.row_id, row.person_id) for row in rows}


def _exports(reader: Reader, person: str | None = None) -> list[Export]:
    """All exports, or those with something of a person, of which only that is counted."""
    query = sa.select(export_rows.c.export_id, export_rows.c.person_id, sa.func.count())
    query = query.group_by(export_rows.c.export_id, export_rows.c.person_id)
    if person is not None:
        query = query.where(export_rows.c.person_id == person)
    inside: dict[str, dict[str, int]] = {}  # export -> person -> rows
    for export, owner, count in reader.execute(query):
        inside.setdefault(export, {})[owner] = count
    gone = sa.select(people.c.id).where(people.c.deleted_at.is_not(None))
    deleted = set(reader.execute(gone).scalars())
    refused = {s: sa.select(people.c.id).where(~usable(s)) for s in SCOPES}
    withdrawn = {s: set(reader.execute(q).scalars()) - deleted for s, q in refused.items()}
    rows = reader.execute(sa.select(exports).order_by(*_NEWEST_FIRST))
    found = [_export(row, inside.get(row.id, {}), deleted, withdrawn[row.consent]) for row in rows]
    return [export for export in found if person is None or export.rows]


def _export(row: Any, inside: dict[str, int], deleted: set[str], withdrawn: set[str]) -> Export:
    def of(owners: set[str]) -> int:
        return sum(count for owner, count in inside.items() if owner in owners)

    return Export(
        row.id, row.identity, row.workdir, row.until, row.consent, row.created_at,
        sum(inside.values()), of(deleted), of(withdrawn),
    )  # fmt: skip
