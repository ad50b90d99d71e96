"""The audit: who did what, when, on what, as a chain of hashes that is only ever added to.

A row's hash is over its own fields and the hash of the row before, so that a row that is changed,
removed or put in between shows (`verify`); to notice that the newest rows were cut off, or that the
whole chain was computed anew, keep `head` elsewhere (every export's manifest has it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from gptlab.people.store import schema
from gptlab.people.store.database import Database, Reader, Writer
from gptlab.people.store.schema import audit, to_json

SYSTEM = "system"
# What every change executes is made once: to put a statement together takes longer than to run it.
_HEAD = sa.select(schema.head.c.row, schema.head.c.hash)
_INSERT, _MOVE = audit.insert(), schema.head.update()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row. `object` is '<table>:<id>'."""

    row: int
    at: float
    actor: str
    action: str
    object: str
    detail: Mapping[str, Any]
    hash: str


@dataclasses.dataclass(frozen=True)
class Head:
    """The newest row of the audit: the state of the whole store."""

    row: int
    hash: str


class Audit:
    """See the head of this file."""

    def __init__(self, database: Database):
        self._database = database

    def entries(
        self,
        after: int = 0,
        limit: int = 100,
        actor: str | None = None,
        object: str | None = None,
    ) -> list[Entry]:
        """Rows in order, from the one after `after`; of one actor, or about one object."""
        query = sa.select(audit).where(audit.c.id > after).order_by(audit.c.id).limit(limit)
        if actor is not None:
            query = query.where(audit.c.actor == actor)
        if object is not None:
            query = query.where(audit.c.object == object)
        with self._database.read() as reader:
            return [
                Entry(r.id, r.at, r.actor, r.action, r.object, json.loads(r.detail), r.hash)
                for r in reader.execute(query)
            ]

    def head(self) -> Head:
        """The newest row."""
        with self._database.read() as reader:
            return _head(reader)

    def verify(self, known: Head | None = None) -> str | None:
        """What is wrong with the chain (which row, and what about it), or None.

        Args:
          known: a head kept elsewhere, which must be part of the chain.
        """
        with self._database.read() as reader:
            last = Head(0, _genesis(reader))
            seen = known is None or known == last
            query = sa.select(audit).order_by(audit.c.id).execution_options(yield_per=1000)
            for row in reader.execute(query):
                if row.id != last.row + 1:
                    return f"row {last.row + 1} of the audit is missing"
                fields = (row.id, row.at, row.actor, row.action, row.object, row.detail)
                if row.previous != last.hash or row.hash != _hash(last.hash, *fields, row.content):
                    return f"row {row.id} of the audit is not what was written"
                last = Head(row.id, row.hash)
                seen = seen or last == known
            if last != _head(reader):
                return f"the audit ends at row {last.row}, and its newest row was another"
            if not seen:
                assert known is not None
                return f"row {known.row} of the audit is not the one that was known"
        return None

    def append(
        self,
        writer: Writer,
        actor: str,
        action: str,
        object: str,
        detail: Mapping[str, Any] | None = None,
        content: bool = False,
    ) -> int:
        """Adds a row within a transaction and returns its number: for the store's own parts.

        `content`: whether what an export reads has changed.
        """
        before = _head(writer)
        previous = before.hash if before.row else _genesis(writer)
        row, at, text = before.row + 1, self._database.clock(), to_json(dict(detail or {}))
        digest = _hash(previous, row, at, actor, action, object, text, content)
        writer.execute(
            _INSERT,
            {
                "id": row, "at": at, "actor": actor, "action": action, "object": object,
                "detail": text, "content": content, "previous": previous, "hash": digest,
            },
        )  # fmt: skip
        writer.execute(_MOVE, {"row": row, "hash": digest})
        return row


def _head(reader: Reader) -> Head:
    row = reader.execute(_HEAD).one()
    return Head(row.row, row.hash) if row.row else Head(0, _genesis(reader))


def _genesis(reader: Reader) -> str:
    """What the first row follows: no two stores begin alike."""
    return hashlib.sha256(
        reader.execute(sa.select(schema.store.c.id)).scalar_one().encode()
    ).hexdigest()


def _hash(previous: str, *fields: object) -> str:
    return hashlib.sha256(to_json([previous, *fields]).encode()).hexdigest()
