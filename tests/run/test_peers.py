"""Who is lost, in which phase, and how the others end: with a stand-in for JAX's service."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from gptlab.run import peers


class Service:
    """The key-value part of JAX's coordination client."""

    def __init__(self):
        self.values = {}
        self.broken = False

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.key_value_dir_get("")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        if self.broken:
            raise RuntimeError("UNAVAILABLE: Socket closed")
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


class Exited(BaseException):
    pass


@pytest.fixture
def several(monkeypatch):
    """Makes processes' Peers on one service and clock; they raise Exited where they would end.

    What is in `meanwhile` is called at every moment in which one of them sleeps.
    """
    made, now, meanwhile = [], SimpleNamespace(time=100.0), []

    def exited(code):
        raise Exited(code)

    def slept(seconds):
        now.time += seconds
        for call in meanwhile:
            call()

    def make(count):
        service = Service()
        made.extend(
            peers.Peers(service, i, count, "sft", "127.0.0.1:1", exited, lambda: now.time)
            for i in range(count)
        )
        return SimpleNamespace(service=service, now=now, all=made, meanwhile=meanwhile)

    monkeypatch.setattr(time, "sleep", slept)
    yield make
    for each in made:
        each._dismiss_witness()
        each._witness.wait()


@pytest.fixture
def two(several):
    both = several(2)
    both.first, both.second = both.all
    return both


def test_while_all_beat_nothing_happens(two, capfd):
    for _ in range(100):
        two.first.look()
        two.second.look()
        two.now.time += 1
    assert capfd.readouterr().err == ""


def test_a_silent_process_is_named_with_its_phase(two, capfd):
    two.second.phase = lambda: "save"
    two.second.look()
    two.first.phase = lambda: "step"
    two.first.look()
    two.now.time += peers.LOST_AFTER_SECONDS
    two.first.look()
    two.now.time += 1
    with pytest.raises(Exited, match="75"):
        two.first.look()
    err = capfd.readouterr().err
    assert err.startswith("gptlab sft: process 1 of 2 (")
    assert "was lost in phase 'save', process 0 stops in phase 'step'; the same command goes" in err
    assert len(err.splitlines()) == 1


def lose_the_last_of_three(three):
    """Process 2 is silent, process 1 is in a long stretch; returns when process 0 has ended."""
    for each in three.all:
        each.look()
    three.all[2].look()  # heard by process 0, not by process 1
    three.all[0].look()
    three.now.time += peers.LOST_AFTER_SECONDS
    three.all[1].look()
    three.all[0].look()
    three.now.time += 1
    with pytest.raises(Exited, match="75"):
        three.all[0].look()


def test_one_that_wakes_late_names_whom_process_0_has_found(several, capfd):
    """It has itself heard of process 2 a moment ago. Process 0 waits for it: it is the service."""
    three, began, woken = several(3), [], []

    def wake():
        began.append(three.now.time)
        if three.now.time - began[0] > 8 and not woken:
            woken.append(three.now.time)
            with pytest.raises(Exited, match="75"):
                three.all[1].look()

    three.meanwhile.append(wake)
    lose_the_last_of_three(three)
    assert woken and three.now.time - woken[0] <= 1
    lines = capfd.readouterr().err.splitlines()
    for line, index in zip(lines, (0, 1), strict=True):
        assert "process 2 of 3 (" in line and "was lost" in line
        assert f"process {index} stops in phase 'start'" in line


def test_one_that_was_taken_for_lost_says_so(several, capfd):
    three = several(3)
    lose_the_last_of_three(three)
    capfd.readouterr()
    with pytest.raises(Exited, match="75"):
        three.all[2].look()
    assert "the others took process 2 of 3 for lost" in capfd.readouterr().err


def test_after_a_failed_collective_a_short_silence_is_enough(two):
    two.second.look()
    two.first.look()
    two.first._limit = peers._SUSPECT_AFTER_SECONDS
    two.now.time += peers._SUSPECT_AFTER_SECONDS + 1
    with pytest.raises(Exited, match="75"):
        two.first.look()


def test_one_that_has_not_begun_is_waited_for(two):
    two.now.time += 1000
    two.first.look()


@pytest.mark.parametrize("code", [0, 75])
def test_one_that_ended_well_is_not_lost(two, code):
    two.second.leave(code, "")
    two.first.look()
    two.now.time += 1000
    two.first.look()


def test_an_error_of_one_ends_the_others_with_its_code(two, capfd):
    with pytest.raises(Exited, match="2"):
        two.second.leave(2, "config.x is wrong")
    two.first.look()  # it may be about to say the same
    two.now.time += peers._GRACE_SECONDS
    with pytest.raises(Exited, match="2"):
        two.first.look()
    assert capfd.readouterr().err == "gptlab sft: process 1 of 2 ended: config.x is wrong\n"


def test_without_its_service_process_0_is_lost(two, capfd):
    two.first.look()
    two.second.look()
    two.service.broken = True
    two.second.look()
    two.now.time += peers.LOST_AFTER_SECONDS + 1
    with pytest.raises(Exited, match="75"):
        two.second.look()
    assert "process 0 of 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    "index, last, said",
    [
        (
            "1",
            "gptlab sft: process 1 of 2 WHY in phase 'step'",
            "stops: process 0 of 2 (127.0.0.1)",
        ),
        ("0", "gptlab sft: process 0 of 2 WHY in phase 'step'", "was killed in phase 'step'"),
        ("1", "", None),
    ],
)
def test_the_witness_speaks_for_a_process_that_is_gone(index, last, said):
    done = subprocess.run(
        [sys.executable, "-SEc", peers._WITNESS, "127.0.0.1:1", index, "2"],
        input=f"an earlier line\n{last}\n", text=True, capture_output=True, timeout=250,
    )  # fmt: skip
    assert (said is None and done.stderr == "") or said in done.stderr
    assert len(done.stderr.splitlines()) == (said is not None)
