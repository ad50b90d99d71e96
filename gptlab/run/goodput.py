"""Where a run's time goes: compiling, waiting for data, stepping, saving, evaluating."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Goodput:
    """Adds up wall time by phase. Not for use from several threads.

    Phases may nest; a second counts for the innermost one only, so the phases and 'other' (time
    in none of them) add up to the total.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = self._mark = clock()
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._failed: str | None = None  # the phase that an error came out of

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the time inside the with block for `phase`."""
        self._settle()
        self._open.append(phase)
        self._failed = None
        try:
            yield
        except BaseException:
            self._failed = self._failed or phase
            raise
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now = self._clock()
        phase = self._open[-1] if self._open else "other"
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def phase(self) -> str:
        """The phase now, or the one that an error has just ended. Any thread may ask."""
        phases = self._open[-1:]
        return phases[0] if phases else self._failed or "other"

    def summary(self) -> dict[str, float]:
        """Seconds by phase, 'goodput/<phase>_s' and 'goodput/total_s', and the share of steps."""
        self._settle()
        total = self._mark - self._start
        figures = {f"goodput/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        figures["goodput/total_s"] = total
        if "step" in self._seconds and total > 0:
            figures["goodput/step_fraction"] = self._seconds["step"] / total
        return figures
