"""A progress bar with the time left; a plain line every half minute when nobody watches."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

_LINE_SECONDS = 30.0


class Progress:
    """Shows `total` units of work going by. A context manager, so that the bar is always closed.

    On a terminal this is a tqdm bar. In a log file, a bar would be thousands of lines, so there is
    one line every 30 seconds and one at the end.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        initial: int = 0,
        unit: str = "step",
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._desc, self._total, self._unit, self._clock = desc, total, unit, clock
        self._initial = self.count = initial
        self._enabled = enabled
        self._start = self._printed = clock()
        self._figures: dict[str, float] = {}
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, desc=desc, initial=initial, unit=unit, file=self._stream,
                dynamic_ncols=True, mininterval=0.5, smoothing=0.1,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1, **figures: float) -> None:
        """Notes `n` more units done; `figures` (say loss=2.3) are shown beside the bar."""
        self.count += n
        self._figures.update(figures)
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
            self._bar.update(n)
        elif self._enabled and self._clock() - self._printed >= _LINE_SECONDS:
            self._line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self.count > self._initial:
            self._line()
        self._enabled, self._bar = False, None

    def _line(self) -> None:
        self._printed = self._clock()
        elapsed = max(self._printed - self._start, 1e-9)
        rate = (self.count - self._initial) / elapsed
        parts = [f"{self._desc}: {self.count}"]
        if self._total:
            parts[0] += f"/{self._total} {self._unit}s ({self.count / self._total:.0%})"
        else:
            parts[0] += f" {self._unit}s"
        parts.append(f"{rate:.3g} {self._unit}s/s" if rate >= 1 else f"{elapsed:.0f} s")
        if self._total and rate > 0 and self.count < self._total:
            parts.append(f"{_duration((self._total - self.count) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        print(", ".join(parts), file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
