"""Metrics and samples of a run: JSON lines for notebooks and tests, TensorBoard beside them."""

import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

# TensorBoard imports TensorFlow (10 s) wherever that is installed, unless there is a module of this
# name; it then writes files by itself.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))

from etils import epath  # noqa: E402
from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: E402
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: E402

from gptlab.run import files, storage  # noqa: E402
from gptlab.run.errors import UserError  # noqa: E402

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
UPLOAD_SECONDS = 30.0
# What files.to_json writes for floats that JSON has no word for.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Appends to WORKDIR/metrics.jsonl, WORKDIR/samples.jsonl and TensorBoard event files.

    A line is in the operating system's hands when `write` returns, so SIGKILL loses nothing that
    was written; at worst it leaves a half-written last line, which the next writer cuts off.

    Nothing can be appended to in a bucket: the files are written on this machine, and copied there
    each UPLOAD_SECONDS and at `flush`, which must come before a checkpoint is saved. What a kill
    loses then is of steps that are run again.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, enabled: bool = True):
        self._target = os.fspath(workdir)
        self._copied: dict[Path, int] = {}  # size when it was copied into the bucket
        self._copy_time = time.monotonic()
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        if enabled and storage.in_bucket(workdir):
            self._spool = tempfile.TemporaryDirectory(prefix="gptlab-metrics-")
            self._workdir = Path(self._spool.name)
            for name in (METRICS_FILE, SAMPLES_FILE):
                path = storage.resolve(workdir) / name
                if path.exists():
                    (self._workdir / name).write_bytes(path.read_bytes())
        else:
            self._workdir = Path(workdir)
        self._enabled = enabled
        self._open: dict[str, BinaryIO] = {}
        self._events: EventFileWriter | None = None
        if enabled:
            for name in (METRICS_FILE, SAMPLES_FILE):
                _cut_half_line(self._workdir / name)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes scalars (Python, NumPy or JAX) measured after `step` steps."""
        if not self._enabled:
            return
        values = {name: _scalar(name, value) for name, value in figures.items()}
        now = time.time()
        self._append(METRICS_FILE, {"step": int(step), "time": round(now, 3), **values})
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
            ]
        )
        self._add_event(event_pb2.Event(wall_time=now, step=int(step), summary=summary))

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Writes one JSON object: a generated reply, say, with its prompt and step."""
        if self._enabled:
            self._append(SAMPLES_FILE, dict(sample))

    def rewind(self, step: int) -> None:
        """Forgets what was written for later steps; they are about to be run again.

        To be called after restoring a checkpoint of `step` (-1 when starting anew).
        """
        if not self._enabled:
            return
        self._close_files()
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self._workdir / name
            if not path.exists():
                continue
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                files.atomic_write(path, b"".join(kept))
                self._copied.pop(path, None)
        # TensorBoard drops the later points of earlier event files when it reads this.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def flush(self) -> None:
        """Copies what was written into the workdir, if that is in a bucket."""
        if self._spool is None:
            return
        if self._events is not None:
            self._events.flush()
        for path in self._workdir.iterdir():
            size = path.stat().st_size
            if self._copied.get(path) != size and not path.name.endswith(".tmp"):
                storage.upload(path, f"{self._target}/{path.name}")
                self._copied[path] = size
        self._copy_time = time.monotonic()

    def close(self) -> None:
        self._close_files()
        if self._events is not None:
            with files.disk_errors(self._workdir):
                self._events.close()
            self._events = None
        self.flush()

    def _close_files(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        line = files.to_json(entry)
        path = self._workdir / name
        with files.disk_errors(path):
            if name not in self._open:
                self._open[name] = open(path, "ab", buffering=0)
            self._open[name].write(line.encode() + b"\n")
        if time.monotonic() - self._copy_time > UPLOAD_SECONDS:
            self.flush()

    def _add_event(self, event: event_pb2.Event) -> None:
        with files.disk_errors(self._workdir):
            if self._events is None:
                self._events = EventFileWriter(str(self._workdir), flush_secs=30)
            self._events.add_event(event)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; a half-written last line is left out.

    Raises UserError if there is no such file, or a line other than the last is damaged.
    """
    path = epath.Path(workdir) / METRICS_FILE
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"no metrics at {path} ({error.strerror}); has the run started?") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is damaged ({error}); remove that line") from error
        entries.append({name: _NON_FINITE.get(v, v) for name, v in entry.items()})
    return entries


def _scalar(name: str, value: Any) -> float:
    if getattr(value, "shape", ()) != ():
        raise ValueError(f"metric {name} has shape {value.shape}; only scalars can be written")
    return float(value)


def _step_of(line: bytes) -> int:
    """The step of a line; a line without one (or a damaged one) belongs to no step: kept."""
    try:
        return int(json.loads(line).get("step", -1))
    except ValueError:
        return -1


def _cut_half_line(path: Path) -> None:
    """Cuts off a last line without its newline, as a kill in the middle of a write leaves it."""
    if not path.exists():
        return
    with files.disk_errors(path), open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
