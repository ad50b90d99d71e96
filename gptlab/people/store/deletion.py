"""Deletion, and which exports hold whose data.

Deleting a person removes their conversations with all messages, their feedback, judgements, flags,
consents, sessions, keys and invitations, and the content of tasks that show their text, with what
others judged of those. What stays is a row in `people` without a name, and in the audit what was
done when, by ids: no content. What an admin wrote for a campaign stays with it as well: its
instructions, questions, topics and gold checks. Tasks they judged are open again for others.

Artifacts exported earlier are files outside of the store; the store knows which ones contain the
person's data and lists them, so that they can be made again and the old ones removed. What such an
artifact still holds is not taken in again (provenance.py).

SQLite's file holds nothing of it afterwards, not in its free pages either, nor does its log once
nobody reads an earlier state (Database.forget). PostgreSQL overwrites the space in its own time
(VACUUM), and its write-ahead log and everybody's backups keep what they have until they are
rotated: that is for the administrator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import sqlalchemy as sa

from gptlab.people.store.accounts import check_not_last_admin, find_person, require
from gptlab.people.store.audit import SYSTEM, Audit
from gptlab.people.store.content import State, state_of_content
from gptlab.people.store.database import Database, Reader, Writer, new_id
from gptlab.people.store.errors import Invalid
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


@dataclasses.dataclass(frozen=True)
class Export:
    """An artifact made from the store: its identity, where it was written, and what went in."""

    id: str
    identity: str
    workdir: str
    until: int  # the audit row up to which content went in
    created_at: float
    rows: int  # of those asked for: all, or one person's
    deleted: int  # of these rows, those of people who were deleted since


class Exports:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def register(
        self, identity: str, workdir: str, state: State, rows: Iterable[tuple[str, str, str]]
    ) -> Export:
        """Notes an export, before it is written; one that is noted already gets further rows.

        It loses those of people who were deleted since: it is written anew, without them.

        Args:
          identity: the artifact's.
          workdir: where it is.
          state: the content that was read.
          rows: (table, id, person) of what goes in.

        Raises:
          Invalid: somebody was deleted or has withdrawn their consent since the content was read.
        """
        with self._database.write() as writer:
            if state_of_content(writer, state.until) != state:
                raise Invalid("the store has changed while it was read: export once more")
            same = sa.and_(exports.c.identity == identity, exports.c.workdir == workdir)
            known = writer.execute(sa.select(exports.c.id).where(same)).scalar()
            values = {"identity": identity, "workdir": workdir, "until": state.until}
            if known is None:
                known, now = new_id(), self._database.clock()
                writer.execute(exports.insert().values(id=known, created_at=now, **values))
            else:  # a run that was stopped, and has more to write now
                writer.execute(exports.update().where(exports.c.id == known).values(**values))
                gone = sa.select(people.c.id).where(people.c.deleted_at.is_not(None))
                old = sa.and_(export_rows.c.export_id == known, export_rows.c.person_id.in_(gone))
                writer.execute(export_rows.delete().where(old))
            new = sorted(set(rows) - _rows(writer, known))
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
        """The exports that contain something of a person, also after their deletion."""
        with self._database.read() as reader:
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


def _exports(reader: Reader | Writer, person: str | None = None) -> list[Export]:
    rows = export_rows.c.export_id == exports.c.id
    if person is not None:
        rows = sa.and_(rows, export_rows.c.person_id == person)
    count = sa.func.count(export_rows.c.row_id).label("inside")
    deleted = sa.func.count(people.c.deleted_at).label("deleted")
    query = (
        sa.select(exports, count, deleted)
        .join(export_rows, rows, isouter=person is None)
        .join(people, people.c.id == export_rows.c.person_id, isouter=True)
        .group_by(*exports.c)
        .order_by(exports.c.created_at.desc(), exports.c.id)
    )
    return [
        Export(r.id, r.identity, r.workdir, r.until, r.created_at, r.inside, r.deleted)
        for r in reader.execute(query)
    ]
