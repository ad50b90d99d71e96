"""The database behind the store: connections, transactions, migrations.

Reading is a snapshot. Writers come one at a time: SQLite by BEGIN IMMEDIATE, PostgreSQL by a lock
on the one row of `head`, which every write needs for the audit anyway. So what a writer has read
stays true until it commits, and the same code is right on both. Those of one process queue for
SQLite, which itself lets writers try again after a sleep, and some of them for seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event

from gptlab.people.store import schema
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.run.errors import UserError

Reader = sa.Connection
Writer = sa.Connection
_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 30.0
_WRITES = "gptlab_writes"
_URL_VARIABLE = "GPTLAB_STORE"
# What libpq takes from a URL's query: what is secret of it, and what names a place.
_SECRET = frozenset({"password", "sslpassword", "oauth_client_secret"})
_PLACE = ("host", "port")
# hide_parameters: what people write is not told by an error, which a server may log.
_ENGINE: Mapping[str, Any] = {"pool_size": 10, "max_overflow": 30, "hide_parameters": True}
# secure_delete: what is deleted is overwritten.
_PRAGMAS = ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "secure_delete=ON")


class Database:
    """An engine with the store's transactions; made by `open`."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float]):
        self._engine = engine
        self._writers = engine.execution_options(**{_WRITES: True})
        sqlite = engine.dialect.name == "sqlite"
        self._turn = threading.Lock() if sqlite else contextlib.nullcontext()
        self._remembers = False  # whether SQLite's log may hold what was deleted
        self.clock = clock

    @staticmethod
    def open(url: str, clock: Callable[[], float], create: bool) -> Database:
        """See Store.open."""
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            _check_file(parsed, create)
        engine = _engine(parsed)
        database = Database(engine, clock)
        try:
            with _explained(parsed):
                _migrate(engine, clock())
        except BaseException:
            engine.dispose()
            raise
        return database

    @property
    def where(self) -> str:
        """The URL without a password, for messages."""
        return _shown(self._engine.url)

    @contextlib.contextmanager
    def read(self) -> Iterator[Reader]:
        """A transaction that only reads, of one snapshot."""
        with _explained(self._engine.url), self._engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Writer]:
        """A transaction that writes, alone. It is committed at the end, or rolled back."""
        with self._turn, _explained(self._engine.url), self._writers.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(schema.head.c.row).with_for_update())
            yield connection
        if self._remembers:
            self._remembers = not self._truncate_log(0)

    def forget(self) -> None:
        """Has SQLite's write-ahead log forget what was deleted.

        While somebody reads an earlier state for longer than _BUSY_SECONDS, the log stays: a
        warning says so, and every later write tries again, as does closing the store.
        """
        if self._engine.dialect.name == "sqlite":
            self._remembers = not self._truncate_log(_BUSY_SECONDS)
            if self._remembers:
                _LOG.warning(
                    "%s: something was deleted, but the log beside it (-wal) still holds the text, "
                    "as somebody has been reading for long; it goes with a later change, or when "
                    "all programs that use the store have ended",
                    self.where,
                )

    def _truncate_log(self, wait_seconds: float) -> bool:
        """Whether all of the log has gone into the file, and nothing is left of it."""
        with _explained(self._engine.url), self._engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            try:
                raw.execute(f"PRAGMA busy_timeout={round(1000 * wait_seconds)}").close()
                ((busy, _, _),) = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                raw.execute(f"PRAGMA busy_timeout={round(1000 * _BUSY_SECONDS)}").close()
        return not busy

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


def new_id() -> str:
    """A random id: 96 bits, 16 characters that are safe in a URL."""
    return secrets.token_urlsafe(12)


def resolve_url(url: str | None) -> str:
    """The URL that a config names, or else $GPTLAB_STORE, which may have a password.

    Raises UserError without either, and for a password in a config, as that is kept on disk.
    """
    if url is None:
        if not (url := os.environ.get(_URL_VARIABLE)):
            raise UserError(
                f"config.store.url is not set: give sqlite:///PATH or postgresql+psycopg://"
                f"HOST/NAME, or set ${_URL_VARIABLE}"
            )
    elif (parsed := _parse(url)).password is not None or not _SECRET.isdisjoint(parsed.query):
        raise UserError(
            f"config.store.url has a password, which would be kept in config.json: put the URL "
            f"into ${_URL_VARIABLE} instead, or the password into $PGPASSWORD"
        )
    return url


def storable(text: str, limit: int, what: str) -> str:
    """The text, if both databases can keep it. Raises Invalid."""
    if not isinstance(text, str):
        raise Invalid(f"{what} must be text")
    if len(text) > limit:
        raise Invalid(f"{what} has {len(text):,} characters, {limit:,} are allowed")
    # PostgreSQL keeps no NUL, and lone surrogates are no Unicode text.
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise Invalid(f"{what} has characters that are no text")
    return text


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # ValueError: of a port
        parsed = None
    drivers = ("sqlite", "postgresql+psycopg")
    if parsed is None or parsed.drivername not in drivers or not parsed.database:
        shown = repr(url if parsed is None else _shown(parsed))
        if parsed is None and ("@" in url or "?" in url):  # there may be a password in it
            shown = "what was given"
        raise UserError(
            f"the store's URL is sqlite:///PATH or postgresql+psycopg://HOST/NAME, not {shown}"
        )
    if parsed.database == ":memory:":
        raise UserError("a store in memory would be lost: give sqlite:///PATH")
    return parsed


def _shown(url: sa.URL) -> str:
    """The URL without a password; its query may hold one, too, so of that only the place."""
    place = {key: value for key, value in url.query.items() if key in _PLACE}
    return url.set(query=place).render_as_string(hide_password=True)


def _check_file(url: sa.URL, create: bool) -> None:
    """UserError for a SQLite file that can't be used, in better words than SQLite's."""
    path = Path(str(url.database))
    if path.is_dir():
        raise UserError(f"the store {path} is a directory; give sqlite:///PATH of a file")
    if not path.exists():
        if not create:
            raise UserError(f"there is no store {path}: was it made by gptlab.serve?")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What people say is nobody else's business on this machine. (A log beside it follows.)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise UserError(f"cannot make the store {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the store {path} can't be written: check its permissions")


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        try:
            engine = sa.create_engine(url, pool_pre_ping=True, **_ENGINE)
        except ModuleNotFoundError as error:
            raise UserError(
                "PostgreSQL needs the package psycopg: pip install 'gptlab[postgres]'"
            ) from error

        @event.listens_for(engine, "handle_error")
        def failed(context: sa.engine.ExceptionContext) -> None:
            # PostgreSQL's details hold the values of the row that it refuses.
            diagnosis = getattr(context.original_exception, "diag", None)
            if diagnosis is not None and diagnosis.message_primary is not None:
                for error in (context.original_exception, context.sqlalchemy_exception):
                    if error is not None:
                        error.args = (diagnosis.message_primary,)

        return engine
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, **_ENGINE)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # Python's sqlite3 must not begin by itself
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def migrations() -> Config:
    """Alembic's configuration: the revisions are part of the package."""
    config = Config()
    config.set_main_option("script_location", "gptlab.people.store:migrations")
    config.set_main_option("file_template", "v%%(rev)s_%%(slug)s")
    return config


def _migrate(engine: sa.Engine, now: float) -> None:
    """Brings the tables up to date, and refuses those of a newer gptlab."""
    config = migrations()
    script = ScriptDirectory.from_config(config)
    with engine.execution_options(**{_WRITES: True}).begin() as connection:
        if connection.dialect.name == "postgresql":  # several programs may begin at once
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x677074)))
        current = MigrationContext.configure(connection).get_current_revision()
        if current == script.get_current_head():
            return
        known = {revision.revision for revision in script.walk_revisions()}
        where = _shown(engine.url)
        if current is not None and current not in known:
            raise UserError(
                f"the store {where} has schema {current}, this gptlab knows up to "
                f"{script.get_current_head()}: it was written by a newer gptlab; update this one"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        if current is None:
            connection.execute(schema.store.insert().values(id=new_id(), created_at=now))
            connection.execute(schema.head.insert().values(id=1, row=0, hash="0" * 64))


@contextlib.contextmanager
def _explained(url: sa.URL) -> Iterator[None]:
    """Turns what a database says into one line; what is wrong with our own SQL stays a defect."""
    where = _shown(url)
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
        reason = " ".join(str(error.orig).split()) or type(error.orig).__name__
        raise UserError(f"the store {where}: {reason}") from error
    except (sa.exc.DataError, UnicodeEncodeError) as error:
        # An id of a request: whatever is kept was looked at by `storable` before.
        raise NotFound("there is nothing whose id has characters that are no text") from error
    except sa.exc.DatabaseError as error:
        if "not a database" not in str(error.orig):
            raise
        raise UserError(f"the store {where} is no SQLite database") from error
