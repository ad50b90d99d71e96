"""Stopping on request: SIGTERM (a scheduler preempts us) and SIGINT (Ctrl-C).

The first signal asks; the loop sees it at its next step, saves and raises `Interrupted`. Another
signal insists: the process dies at once, and the next start resumes from the newest checkpoint.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from gptlab.run import processes

# `timeout`, process groups and job launchers deliver one request twice within milliseconds.
_SAME_REQUEST_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A program that has the system send it SIGTERM when its parent, process argv[1], dies (prctl's
# PR_SET_PDEATHSIG, 1), and becomes argv[2:]: the request outlives an exec. Should the parent have
# died before, nobody will send it.
_LAUNCH = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit()\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class StopRequest:
    """While installed, notes SIGTERM and SIGINT instead of dying from them."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Takes over both signals; outside the main thread Python allows no handlers, so not.

        Of several processes, all must stop at the same step. JAX's coordination service arranges
        that (`processes.stop_reached`); it has its own handler of SIGTERM, which must stay.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if processes.count() > 1:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, _as_sigterm)
            return
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
            outer = self._outer(number)
            if outer is not None and outer.signal is not None:
                self.signal, self._time = outer.signal, outer._time

    def uninstall(self) -> None:
        """Puts back whatever handled the signals before."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._time > _SAME_REQUEST_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.note(signal.Signals(number), now)
        # os.write, as print is not safe if the signal arrived inside another print.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"\n{signal.Signals(number).name}: saving and stopping after this step; "
            "send it again to stop at once\n".encode(),
        )

    def note(self, number: signal.Signals, now: float) -> None:
        """Remembers the request, also in the enclosing run: `rounds` has a run around a stage's."""
        self.signal, self._time = number, now
        outer = self._outer(number)
        if outer is not None:
            outer.note(number, now)

    def _outer(self, number: signal.Signals) -> "StopRequest | None":
        owner = getattr(self._previous.get(number), "__self__", None)
        return owner if isinstance(owner, StopRequest) else None


def ending_with_this_process(command: list[str]) -> list[str]:
    """A command line that does the same, and gets SIGTERM when this process dies, even by SIGKILL.

    Else the child would work on unseen and hold its workdir against whoever starts again. Elsewhere
    than on Linux it is the command as given. To be started by the main thread: the system means a
    thread by a parent.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
