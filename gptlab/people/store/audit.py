"""The audit: who did what, when, on what, as a chain of hashes that is only ever added to.

A row's hash is over its own fields and the hash of the row before, so that a row that is changed,
removed or put in between shows (`verify`); to notice that the newest rows were cut off, or that the
whole chain was computed anew, keep `head` elsewhere (every export's manifest has it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptlab.people.store.database import Database, Writer

SYSTEM = "system"


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
        raise NotImplementedError

    def head(self) -> Head:
        """The newest row."""
        raise NotImplementedError

    def verify(self, known: Head | None = None) -> str | None:
        """What is wrong with the chain (which row, and what about it), or None.

        Args:
          known: a head kept elsewhere, which must be part of the chain.
        """
        raise NotImplementedError

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
        raise NotImplementedError
