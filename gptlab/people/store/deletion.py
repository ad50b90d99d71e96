"""Deletion, and which exports hold whose data.

Deleting a person removes their conversations with all messages, their feedback, judgements, flags,
consents, sessions, keys and invitations, and the content of tasks that show their text, with what
others judged of those. What stays is a row in `people` without a name, and in the audit what was
done when, by ids: no content. Tasks they judged are open again for others. Artifacts exported
earlier are files outside of the store; the store knows which ones contain the person's data and
lists them, so that they can be made again and the old ones removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database


@dataclasses.dataclass(frozen=True)
class Export:
    """An artifact made from the store: its identity, where it was written, and what went in."""

    id: str
    identity: str
    workdir: str
    until: int  # the audit row up to which content went in
    created_at: float
    rows: int  # of those asked for: all, or one person's


class Exports:
    """See the head of this file."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def register(
        self, identity: str, workdir: str, until: int, rows: Iterable[tuple[str, str, str]]
    ) -> Export:
        """Notes an export and its rows: (table, id, person). Once for each identity and workdir."""
        raise NotImplementedError

    def all(self) -> list[Export]:
        """All exports, newest first."""
        raise NotImplementedError

    def containing(self, person: str) -> list[Export]:
        """The exports that contain something of a person, also after their deletion."""
        raise NotImplementedError

    def delete_person(self, person: str, actor: str) -> list[Export]:
        """Deletes (see above); an admin may delete anybody, a person themselves.

        Returns:
          The exports made earlier that contain some of it.
        """
        raise NotImplementedError
