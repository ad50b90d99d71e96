"""Notices that another of several processes is gone, says which one, and ends this one.

A collective waits for all processes, so those that are left would wait for ever, or fail with an
error that names nobody. Every process writes a beat into JAX's coordination service each second:
that it is there, and the phase of its run (run/goodput.py). A thread reads the beats of the others.
When one falls silent, or has ended with an error, the process prints a line and ends by itself:
with exit code 75 for a lost process, as the same command goes on from the newest checkpoint. Whom
it found stands in its last beat: one that wakes later, from a long stretch without Python's lock,
would only find that those who ended are gone.

The service is a part of process 0, and when that is lost JAX ends all others on the spot, before
Python could say anything. So each process has a *witness*, a child that is told the phase at every
beat, and speaks when its parent is gone without a word.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from gptlab.run.errors import EXIT_INTERRUPTED

BEAT_SECONDS = 1.0
# A process that computes without ever letting go of Python's lock is silent, too.
LOST_AFTER_SECONDS = float(os.environ.get("GPTLAB_LOST_AFTER_SECONDS", "30"))
# After a collective has failed here, so long a silence is enough.
_SUSPECT_AFTER_SECONDS = 5.0
# Who ended with an error was seen by all others after these; processes often fail all alike.
_GRACE_SECONDS = 6.0
_PREFIX = "gptlab/beats/"
# Keeps the last line from its parent and speaks at the end of file, unless that line is empty.
_WITNESS = """
import socket, sys
line = ""
for line in sys.stdin:
    pass
if line.strip():
    host, _, port = sys.argv[1].rpartition(":")
    why = "was killed"
    if sys.argv[2] != "0":
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            why = "stops: process 0 of " + sys.argv[3] + " (" + host + ") was lost"
    print(line.strip().replace("WHY", why), file=sys.stderr, flush=True)
"""


class Peers:
    """The beats of all processes of a program.

    `client` is the coordination service's (key_value_set, key_value_dir_get), `address` where that
    service is; `exit_process` and `clock` are for tests.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        stage: str,
        address: str,
        exit_process: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.phase: Callable[[], str] = lambda: "start"
        self._client, self._index, self._count, self._stage = client, index, count, stage
        self._exit_process, self._clock = exit_process, clock
        self._limit = LOST_AFTER_SECONDS
        # Each process reads the beats of all: the service answers as many requests as there are.
        self._interval = max(BEAT_SECONDS, min(count / 100, LOST_AFTER_SECONDS / 5))
        self._witness = subprocess.Popen(
            [sys.executable, "-SEc", _WITNESS, address, str(index), str(count)],
            stdin=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._beats = 0
        self._where = f"{socket.gethostname()}, process id {os.getpid()}"
        self._end: dict[str, Any] = {}
        self._verdict: dict[str, Any] = {}  # peer, what and code, once one of the others is found
        self._last: dict[int, dict[str, Any]] = {}  # the last beat of each other process
        self._since: dict[int, float] = {}  # when it came
        self._answered = clock()
        self._stopping = False  # one of the others is lost
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="gptlab peers")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def leave(self, code: int, line: str) -> None:
        """Tells the others how this process ends, so that none of them takes it for lost.

        After an error the process must end by `os._exit`, which this does: the ordinary end waits
        for the others, and they may be waiting in a collective for this one.
        """
        with self._lock:
            self._end = {"code": code, "line": line}
            failed = code not in (0, EXIT_INTERRUPTED)
            try:
                self._beat()
            except Exception as error:  # the service is gone, and with it whoever would read this
                self._say(_first_line(error))
            self._dismiss_witness()
        if failed:
            # With process 0 the service ends, and with that all others, whatever they are at.
            time.sleep(_GRACE_SECONDS if self._index == 0 else 2 * self._interval)
            self._exit(code)

    def blame(self) -> None:
        """Waits a moment for the process whose loss explains an error that is about to be raised.

        Does not return if there is one.
        """
        if self._limit != LOST_AFTER_SECONDS:
            return  # waited already
        self._limit = max(_SUSPECT_AFTER_SECONDS, 3 * self._interval)
        until = self._clock() + self._limit + 3 * self._interval
        while self._stopping or self._clock() < until:  # until the thread ends the process
            time.sleep(BEAT_SECONDS / 2)

    def look(self) -> None:
        """Beats, and ends the process if one of the others is lost."""
        with self._lock:
            if self._end:
                return
            try:
                self._beat()
                self._listen()
            except Exception:  # an RPC that fails; the service is a part of process 0
                if self._clock() - self._answered > self._limit:
                    self.lost(0)
                return
            for peer, beat in self._last.items():
                silent = self._answered - self._since[peer]
                code = beat["end"].get("code")
                if beat["verdict"]:
                    self._stop(**beat["verdict"])
                elif code is None and silent > self._limit:
                    self.lost(peer)
                elif code not in (None, 0, EXIT_INTERRUPTED) and silent > _GRACE_SECONDS / 2:
                    line = f"process {peer} of {self._count} ended: {beat['end']['line']}"
                    self._stop(peer, line, code)

    def lost(self, peer: int) -> None:
        """Says that a process is lost, and ends this one."""
        beat = self._last.get(peer)
        where = f" ({beat['where']})" if beat else ""
        phase = f" in phase '{beat['phase']}'" if beat else ""
        what = f"process {peer} of {self._count}{where} was lost{phase}"
        self._stop(peer, what, EXIT_INTERRUPTED)

    def _stop(self, peer: int, what: str, code: int) -> None:
        """Ends this process because of another's end, and tells those who have not seen it."""
        self._stopping = True
        self._verdict = {"peer": peer, "what": what, "code": code}
        if peer == self._index:
            what = (
                f"the others took process {peer} of {self._count} for lost, which was silent for "
                f"{LOST_AFTER_SECONDS:g} s"
            )
        if code == EXIT_INTERRUPTED:
            what += (
                f", process {self._index} stops in phase '{self.phase()}'; the same command goes "
                "on from the newest checkpoint"
            )
        self._say(what)
        with contextlib.suppress(Exception):
            self._beat()
        if self._index == 0:
            self._outlast(peer)
        self._exit(code)

    def _outlast(self, lost: int) -> None:
        """Keeps the service, and this beat, until the others have seen what process 0 has seen.

        Without the service JAX would end them before they could, and they would name process 0.
        """
        others = set(range(1, self._count)) - {lost}
        wait = max(_GRACE_SECONDS, 2 * self._interval, LOST_AFTER_SECONDS / 2)
        until = self._clock() + wait
        while others and self._clock() < until:
            with contextlib.suppress(Exception):
                self._beat()
                self._listen()
            others -= {peer for peer, beat in self._last.items() if beat["verdict"] or beat["end"]}
            time.sleep(BEAT_SECONDS / 2)

    def _listen(self) -> None:
        """Reads the beats of the others."""
        rows = self._client.key_value_dir_get(_PREFIX)
        self._answered = self._clock()
        for key, value in rows:
            peer, beat = int(key.rsplit("/", 1)[-1]), json.loads(value)
            if peer != self._index and beat != self._last.get(peer):
                self._last[peer], self._since[peer] = beat, self._answered

    def _run(self) -> None:
        while not self._end:
            self.look()
            time.sleep(self._interval)

    def _beat(self) -> None:
        self._beats += 1
        beat = {
            "beat": self._beats, "phase": self.phase(), "where": self._where, "end": self._end,
            "verdict": self._verdict,
        }  # fmt: skip
        self._client.key_value_set(
            f"{_PREFIX}{self._index}", json.dumps(beat), allow_overwrite=True
        )

        assert self._witness.stdin is not None
        with contextlib.suppress(OSError):  # it was killed: nothing depends on it
            self._witness.stdin.write(
                f"gptlab {self._stage}: process {self._index} of {self._count} ({self._where}) WHY "
                f"in phase '{beat['phase']}'; the same command goes on from the newest checkpoint\n"
            )
            self._witness.stdin.flush()

    def _dismiss_witness(self) -> None:
        assert self._witness.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._witness.stdin.write("\n")
            self._witness.stdin.close()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"gptlab {self._stage}: {line}", file=sys.stderr, flush=True)

    def _exit(self, code: int) -> NoReturn:
        self._dismiss_witness()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it has ended
                stream.flush()
        self._exit_process(code)
        raise SystemExit(code)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
