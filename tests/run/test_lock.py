"""Locks of workdirs: the system's on a disk, a lease in a bucket (here: a dictionary)."""

import json
import time

import pytest

from gptlab.run import lock
from gptlab.run.errors import UserError


class Object:
    """An object of a bucket as Lease uses it, in a directory that has only this one."""

    def __init__(self):
        self.content = None

    def __truediv__(self, name):
        return self

    def __fspath__(self):
        return "gs://bucket/run"

    def read_text(self):
        if self.content is None:
            raise FileNotFoundError
        return self.content

    def unlink(self, missing_ok):
        self.content = None


@pytest.fixture
def place(monkeypatch):
    for name, seconds in (("LEASE", 0.6), ("_RENEW", 0.1), ("_SETTLE", 0.15)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))

    def write(path, data):
        path.content = data.decode()

    monkeypatch.setattr(lock.storage, "write", write)
    return Object()


def test_a_lease_that_is_renewed_keeps_others_out_and_ends_with_its_run(place):
    held = lock.Lease(place)
    with pytest.raises(UserError, match="gs://bucket/run is in use by another run .process"):
        lock.Lease(place)
    assert held.lost_to is None
    held.close()
    assert place.content is None
    lock.Lease(place).close()


def test_what_a_killed_run_left_is_taken_over_when_it_has_run_out(place):
    place.content = json.dumps({"owner": "gone", "token": "x", "renewed": time.time()})
    began = time.monotonic()
    held = lock.Lease(place)
    assert time.monotonic() - began >= lock.LEASE_SECONDS
    held.close()
    # An old one at once, whatever the clock of the host that wrote it.
    place.content = json.dumps({"owner": "gone", "token": "x", "renewed": time.time() - 1000})
    began = time.monotonic()
    lock.Lease(place).close()
    assert time.monotonic() - began < lock.LEASE_SECONDS


def test_who_was_cut_off_finds_out_and_leaves_the_lease_to_its_new_owner(place):
    held = lock.Lease(place)
    place.content = json.dumps({"owner": "another", "token": "y", "renewed": time.time()})
    deadline = time.monotonic() + 30
    while held.lost_to is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held.lost_to == "another"
    held.close()
    assert json.loads(place.content)["token"] == "y"


def test_of_two_that_take_over_at_once_one_gives_up(place, monkeypatch):
    def write(path, data):  # the other one's write comes last
        path.content = json.dumps({"owner": "another", "token": "y", "renewed": time.time()})

    monkeypatch.setattr(lock.storage, "write", write)
    with pytest.raises(UserError, match="in use by another run .another."):
        lock.Lease(place)
