"""Keeps a second run out of a workdir.

On a disk the system's lock does it, which a kill drops. A bucket has none: there the lock is a
*lease*, an object that its owner renews. A run that finds a lease watches it: one that is renewed
is in use, one that is not is taken over, so that a killed run resumes after LEASE_SECONDS at most.
Two runs that take over in the same second both read the lease again before they go on, and the one
whose token is not in it gives up. An owner that was cut off from the bucket and finds another's
token when it is back stops without writing anything more.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from gptlab.run import files, storage
from gptlab.run.errors import UserError

LOCK_FILE = ".lock"
LEASE_SECONDS = 20.0
_RENEW_SECONDS = LEASE_SECONDS / 4
_SETTLE_SECONDS = 2.0  # longer than a write takes


def take(directory: epath.Path) -> "FileLock | Lease":
    """Locks a directory that exists. Raises UserError if a run is in it."""
    return Lease(directory) if storage.in_bucket(directory) else FileLock(Path(directory))


def _in_use(directory: os.PathLike[str], owner: str) -> UserError:
    return UserError(
        f"{os.fspath(directory)} is in use by another run ({owner}); "
        "wait for it, stop it, or choose another --workdir"
    )


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class FileLock:
    """The system's lock on a file in the directory; the system drops it at a kill."""

    lost_to: str | None = None

    def __init__(self, directory: Path):
        path = directory / LOCK_FILE
        with files.disk_errors(path):
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 100, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise _in_use(directory, owner) from error
        except OSError:
            return  # some network file systems have no locks
        with files.disk_errors(path):
            os.truncate(self._file, 0)
            os.pwrite(self._file, f"{_owner()}\n".encode(), 0)

    def close(self) -> None:
        """Gives the directory free."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Lease:
    """A lease on a directory in a bucket, renewed by a thread until it is closed."""

    def __init__(self, directory: epath.Path):
        self._path = directory / LOCK_FILE
        self._token = uuid.uuid4().hex
        self.lost_to: str | None = None  # the owner that has taken it over
        self._closed = threading.Event()
        self._wait_for_owner(directory)
        self._write()
        time.sleep(_SETTLE_SECONDS)
        self._check()
        if self.lost_to is not None:
            raise _in_use(directory, self.lost_to)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="gptlab lease")
        self._thread.start()

    def close(self) -> None:
        """Gives the directory free."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it runs out by itself
            self._check()
            if self.lost_to is None:
                self._path.unlink(missing_ok=True)

    def _wait_for_owner(self, directory: epath.Path) -> None:
        """Returns when there is no lease, or one that has run out; UserError if it is renewed."""
        first = self._read()
        if not first:
            return
        # Clocks of hosts may differ: this only shortens the wait, what decides is a renewal.
        age = min(max(time.time() - float(first["renewed"]), 0.0), LEASE_SECONDS)
        deadline = time.monotonic() + LEASE_SECONDS - age
        while time.monotonic() < deadline:
            time.sleep(1.0)
            now = self._read()
            if not now:
                return
            if now != first:
                raise _in_use(directory, str(now["owner"]))

    def _renew(self) -> None:
        while not self._closed.wait(_RENEW_SECONDS):
            with contextlib.suppress(Exception):  # a network that is away for a while
                self._check()
                if self.lost_to is not None:
                    return
                self._write()

    def _check(self) -> None:
        found = self._read()
        if found and found["token"] != self._token:
            self.lost_to = str(found["owner"])

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}

    def _write(self) -> None:
        lease = {"owner": _owner(), "token": self._token, "renewed": time.time()}
        storage.write(self._path, json.dumps(lease).encode())
