"""Running a Beam pipeline under a progress bar, so that it can be stopped between two blocks."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from ml_collections import ConfigDict

from gptlab.run import artifact, storage
from gptlab.run.errors import Interrupted, UserError
from gptlab.run.progress import Progress

TICKS, STOP = ".ticks", ".stop"  # in the workdir while workers run: work done, and a stop asked for


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a pipeline with a progress bar of its own; every `tick` is one `unit` done.

    `total` is a number of ticks, or a kind of tick: as many as there are of these when the phase
    begins. A phase ends when its total is reached or, if that is only a bound (`at_most`) or None,
    with a later phase's first tick.
    """

    desc: str
    unit: str
    tick: str  # one character
    total: int | str | None = None
    at_most: bool = False


def run(config: ConfigDict, build: Callable[[beam.Pipeline], None]) -> None:
    """Runs a pipeline on config.runner (config.beam of `prepare`) and waits for its end.

    Beam's own 'DirectRunner' tries a Go binary that it downloads first; its FnApiRunner is the
    part that works offline.
    """
    options = list(config.options)
    runner: Any = config.runner
    if runner == "DirectRunner":
        runner = FnApiRunner()
        mode = "multi_processing" if config.num_workers > 1 else "in_memory"
        options += [f"--direct_num_workers={config.num_workers}", f"--direct_running_mode={mode}"]
    # What a worker raises arrives here as well; Beam would log its traceback before that.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(options))
        build(pipeline)
        pipeline.run().wait_until_finish()
    except (RuntimeError, UserError) as error:
        # Beam adds the step's name to the message of a worker's exception.
        cause = _user_error(error)
        if cause is None:
            raise
        raise cause from error


def _user_error(error: BaseException | None) -> UserError | None:
    while error is not None:
        if isinstance(error, UserError):
            return error
        text = str(error)
        if "UserError: " in text:  # from another process only the text arrives
            return UserError(
                text.rsplit("UserError: ", 1)[1].split(" [while running")[0].split("\n")[0]
            )
        error = error.__cause__ or error.__context__
    return None


def tick(workdir: str, kind: str) -> None:
    """Notes a unit of work: one byte more in a file, which every process can append to."""
    directory = storage.local_directory(workdir, "prepare")
    if directory.is_dir():
        with open(directory / TICKS, "ab") as file:
            file.write(kind.encode())


def stopping(workdir: str) -> bool:
    """Whether the run was asked to stop. Workers look between blocks, and then do no more."""
    return (storage.local_directory(workdir, "prepare") / STOP).exists()


class watched:  # noqa: N801  (used as a function)
    """While a pipeline runs, shows the ticks of all workers and hands a requested stop on to them.

    Raises Interrupted if there was one: what the pipeline made is not all of it.
    """

    def __init__(self, opened: artifact.Run, desc: str, phases: Sequence[Phase]):
        self._opened, self._desc = opened, desc
        self._ticks, self._stop = (
            storage.local_directory(opened.workdir, "prepare") / name for name in (TICKS, STOP)
        )
        self._shown = Phases(opened.progress, phases)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._remove()
        self._thread.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        self._thread.join()
        self._shown.close()
        self._remove()
        if self._opened.stop_requested():
            raise Interrupted(f"stopped while {self._desc}, which will start anew") from None

    def _remove(self) -> None:
        for path in (self._ticks, self._stop):
            path.unlink(missing_ok=True)

    def _watch(self) -> None:
        seen = 0
        last = False
        while not last:
            last = self._done.wait(0.3)
            if self._opened.stop_requested() and not self._stop.exists():
                self._stop.touch()
            if self._ticks.exists():
                with open(self._ticks, "rb") as file:
                    file.seek(seen)
                    new = file.read()
                seen += len(new)
                self._shown.update(new.decode())


class Phases:
    """Shows one phase after the other, each with a bar that `progress` makes."""

    def __init__(self, progress: Callable[..., Progress], phases: Sequence[Phase]):
        self._progress, self._phases = progress, list(phases)
        self._counts: Counter[str] = Counter()
        self._at, self._bar = 0, self._open(0)

    def update(self, ticks: str) -> None:
        """Takes new ticks, in any order, and shows where they have led."""
        self._counts.update(ticks)
        self._show()
        while self._at + 1 < len(self._phases) and self._over():
            self._bar.close()
            self._at += 1
            self._bar = self._open(self._at)
            self._show()

    def close(self) -> None:
        self._bar.close()

    def _open(self, index: int) -> Progress:
        phase = self._phases[index]
        self._total = self._counts[phase.total] if isinstance(phase.total, str) else phase.total
        return self._progress(self._total, phase.desc, unit=phase.unit)

    def _show(self) -> None:
        now = self._counts[self._phases[self._at].tick]
        if now > self._bar.count:
            self._bar.update(now - self._bar.count)

    def _over(self) -> bool:
        if self._total is not None and self._bar.count >= self._total:
            return True
        later = any(self._counts[phase.tick] for phase in self._phases[self._at + 1 :])
        return later and (self._total is None or self._phases[self._at].at_most)
