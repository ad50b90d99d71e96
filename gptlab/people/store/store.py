"""The store as a whole; what its parts are is in the package's docstring."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from gptlab.people.store import content
from gptlab.people.store.accounts import Accounts
from gptlab.people.store.audit import Audit
from gptlab.people.store.campaigns import Campaigns
from gptlab.people.store.content import Content, State
from gptlab.people.store.conversations import Conversations
from gptlab.people.store.database import Database
from gptlab.people.store.deletion import Export, Exports
from gptlab.people.store.feedback import Feedback
from gptlab.people.store.figures import Figures
from gptlab.people.store.review import Review
from gptlab.people.store.work import Work


@dataclasses.dataclass(frozen=True)
class Store:
    """One database, and its parts by topic. Make one with `open`, once in a process."""

    database: Database
    accounts: Accounts
    conversations: Conversations
    feedback: Feedback
    campaigns: Campaigns
    work: Work
    review: Review
    figures: Figures
    exports: Exports
    audit: Audit

    @staticmethod
    def open(url: str, clock: Callable[[], float] = time.time, create: bool = True) -> Store:
        """Opens the database of a URL and brings its tables up to date.

        Args:
          url: sqlite:///PATH (kept in WAL mode), or postgresql+psycopg://HOST/NAME. A password
            comes from the environment (PGPASSWORD, PGPASSFILE), and is refused in the URL where
            that would be written to a config.json.
          clock: seconds since 1970; tests bring their own.
          create: whether a SQLite file is made if there is none.

        Raises:
          UserError: the database can't be reached, opened or written, or is of a newer gptlab.
        """
        database = Database.open(url, clock, create)
        audit = Audit(database)
        return Store(
            database=database,
            accounts=Accounts(database, audit),
            conversations=Conversations(database, audit),
            feedback=Feedback(database, audit),
            campaigns=Campaigns(database, audit),
            work=Work(database, audit),
            review=Review(database, audit),
            figures=Figures(database),
            exports=Exports(database, audit),
            audit=audit,
        )

    def delete_person(self, person: str, actor: str) -> list[Export]:
        """Removes what is stored of a person; returns the exports that contain some of it.

        See deletion.py for what is removed and what stays.
        """
        return self.exports.delete_person(person, actor)

    def content(self, until: int | None = None) -> Content:
        """What an export reads, up to an audit row; None: the newest. See content.py."""
        return content.read(self.database, until)

    def state(self, until: int | None = None) -> State:
        """Which content that is, without reading it."""
        return content.read_state(self.database, until)

    def close(self) -> None:
        """Closes all connections."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
