"""Databases for the store's tests: SQLite, and a PostgreSQL that a session starts for itself.

A test that takes `store_url` (or `store`) runs once on each. PostgreSQL is found in PATH or where
Debian puts it; it refuses to run as root, so root has it run by the user postgres.
"""

from __future__ import annotations

import glob
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BACKENDS = ("sqlite", "postgresql")
_USER = "postgres"


class Clock:
    """Seconds since 1970, as a test wants them."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The directory of a running server's socket; skips where PostgreSQL isn't installed."""
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg: the extra 'postgres'")
    initdb = _program("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: no initdb in PATH or /usr/lib/postgresql")
    as_user: list[str] = []
    directory = Path(tempfile.mkdtemp(prefix="gptlab-pg-"))
    if os.getuid() == 0:
        user = pwd.getpwnam(_USER)
        os.chown(directory, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    data = directory / "data"
    subprocess.run(
        [*as_user, initdb, "-D", data, "-U", _USER, "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True, capture_output=True, cwd=directory,
    )  # fmt: skip
    settings = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=200")
    options = [part for setting in settings for part in ("-c", setting)]
    server = subprocess.Popen(
        [*as_user, Path(initdb).with_name("postgres"), "-D", data, "-k", directory]
        + ["-c", "listen_addresses=", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory,
    )  # fmt: skip
    try:
        _wait_for(server, str(directory))
        yield str(directory)
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: there is nothing to keep
        server.wait(60)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgresql_store(postgresql: str) -> str:
    """The URL of a database that tests empty before they use it: making one takes longer."""
    from gptlab.people.store import Store

    url = new_database(postgresql)
    Store.open(url).close()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory, no_fsync: None) -> Path:
    """A file that holds an empty store."""
    from gptlab.people.store import Store

    path = tmp_path_factory.mktemp("store") / "store.sqlite"
    Store.open(f"sqlite:///{path}").close()
    return path


def new_database(directory: str) -> str:
    """The URL of a new, empty database of the server."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(host=directory, user=_USER, dbname="postgres", autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://{_USER}@/{name}?host={directory}"


@pytest.fixture(params=BACKENDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, of each backend in turn."""
    return make_store_url(request, request.param, tmp_path)


def make_store_url(request: pytest.FixtureRequest, backend: str, directory: Path) -> str:
    """The URL of an empty store; a test has one of each backend, and all have the same id."""
    if backend == "sqlite":
        path = directory / f"{secrets.token_hex(6)}.sqlite"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    import sqlalchemy as sa

    from gptlab.people.store import schema

    url = request.getfixturevalue("postgresql_store")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        name = connection.execute(sa.select(schema.store.c.id)).scalar_one()
        tables = ", ".join(f'"{table.name}"' for table in schema.metadata.sorted_tables)
        connection.execute(sa.text(f"TRUNCATE {tables}"))
        connection.execute(schema.store.insert().values(id=name, created_at=0.0))
        connection.execute(schema.head.insert().values(id=1, row=0, hash="0" * 64))
    engine.dispose()
    return url


@pytest.fixture(scope="session")
def no_fsync() -> Iterator[None]:
    """A test's SQLite needs no disk that survives a power cut."""
    from gptlab.people.store import database

    with pytest.MonkeyPatch.context() as patch:
        fast = tuple(p.replace("synchronous=FULL", "synchronous=OFF") for p in database._PRAGMAS)
        patch.setattr(database, "_PRAGMAS", fast)
        yield


@pytest.fixture
def clock() -> Clock:
    """The time in `store`."""
    return Clock()


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[object]:
    """An empty store of each backend in turn, in the time of `clock`."""
    from gptlab.people.store import Store

    opened = Store.open(store_url, clock)
    yield opened
    opened.close()


def _program(name: str) -> str | None:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return shutil.which(name) or (found[-1] if found else None)


def _wait_for(server: subprocess.Popen, directory: str) -> None:
    import psycopg

    for _ in range(600):
        assert server.poll() is None, "PostgreSQL has ended"
        try:
            psycopg.connect(host=directory, user=_USER, dbname="postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start")
