"""A run is an artifact: a directory that knows what it is, what it was made from, and by what.

WORKDIR holds config.json, manifest.json, metrics.jsonl, TensorBoard events, samples.jsonl and what
the stage adds (checkpoints/, records/, report.md). Its identity is a hash of the config (without
paths and without keys that can't change the outcome) and of its inputs' identities, so equal
identities mean the same experiment, and one can walk from any artifact back to the documents.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import gptlab
from gptlab.run import files, lock, processes, signals, storage
from gptlab.run.errors import Interrupted, UserError
from gptlab.run.goodput import Goodput
from gptlab.run.metrics import MetricWriter
from gptlab.run.progress import Progress

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
LOCK_FILE = lock.LOCK_FILE

# Keys ('a.b' is b within a) of how a run shows itself, and on how many workers it is made: none of
# it changes the outcome, so it is no part of a run's identity and free to change at any time.
CADENCE = (
    "log_every_steps",
    "sample_every_steps",
    "sample",  # what loops write to samples.jsonl; `sampling`, of replies that are used, counts
    "beam",
    "checkpoint.keep",  # the best one is kept whatever it says
    "profile",
    "store.url",  # the store itself counts, wherever it is
    "store.poll_seconds",
)
# Part of the identity, yet a run may go on under another value; the manifest then says so. What is
# evaluated and saved, and when, is among them: later stages load the best of it.
RESUMABLE = (
    "total_steps",
    "total_tokens",
    "total_epochs",
    "mesh",
    "eval_every_steps",
    "eval_batches",
    "checkpoint.every_steps",
)
# Sections that the configs of a stage got later, each with its key that is 0 where all is as it was
# before. Then the section doesn't count: runs from before keep their identity and go on.
SWITCHED_OFF = {"pretrain": {"lora": "rank"}}
_ABSENT = object()

_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain array_record numpy sentencepiece seqio "
    "tensorflow apache-beam tokenizers"
).split()
_SHOWN_DIFFERENCES = 5


@dataclasses.dataclass(frozen=True)
class Known:
    """A raw input that is no file, a database say: where it is, and a digest of its content."""

    where: str
    digest: str


RawFiles = Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] | Known


class Run:
    """One run of one stage in one workdir; a context manager made by `open_run`.

    Leaving the with block by `Interrupted` marks the manifest 'interrupted', by another exception
    'failed' with its message; only `complete` marks it 'done'. A killed run stays 'running'.
    """

    def __init__(
        self, config: ConfigDict, workdir: epath.Path, stage: str, manifest: dict[str, Any],
        finished: bool, held: lock.FileLock | lock.Lease | None,
    ):  # fmt: skip
        self.config = config
        self.workdir = workdir
        self.stage = stage
        self.identity: str = manifest["identity"]
        self.finished = finished
        self.goodput = Goodput()
        self._manifest = manifest
        self._lock = held
        self._stop = signals.StopRequest()
        self._writes = processes.is_first()
        self.metrics = MetricWriter(workdir, enabled=self._writes and not finished)

    def __enter__(self) -> "Run":
        self._stop.install()
        processes.show_phase(self.goodput.phase)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Interrupted | UserError):
            processes.blame()  # a collective that fails is another process's end
        try:
            if not self.finished and self._lost_to() is None:
                self._record_end(error)
        finally:
            self._stop.uninstall()
            if self._lock is not None:
                self._lock.close()

    def _record_end(self, error: BaseException | None) -> None:
        # The first failure is the one to report: a full disk makes these writes fail as well.
        with contextlib.suppress(UserError) if error is not None else contextlib.nullcontext():
            self.metrics.close()
            if self._manifest["status"] == "done":
                pass  # what failed after `complete` doesn't undo it
            elif isinstance(error, Interrupted | KeyboardInterrupt):
                self._manifest["status"] = "interrupted"
            elif error is not None:
                self._manifest["status"] = "failed"
                self._manifest["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._manifest["starts"][-1]["goodput"] = {
                name: round(value, 3) for name, value in self.goodput.summary().items()
            }
            self._write_manifest()

    def progress(
        self, total: int | None, desc: str, initial: int = 0, unit: str = "step"
    ) -> Progress:
        """A progress bar on process 0; silent on the others. Use it in a with statement."""
        return Progress(total, desc, initial, unit, enabled=self._writes)

    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGINT has arrived, here or in any other process of this run.

        Every process must call it once per step, so that all of them stop at the same one. The
        caller then saves its state and raises `Interrupted`.
        """
        if (owner := self._lost_to()) is not None:
            raise UserError(f"{self.workdir} was taken over by another run ({owner})")
        if processes.count() > 1:
            return processes.stop_reached()
        return self._stop.signal is not None

    def _lost_to(self) -> str | None:
        """The run that has taken this workdir over, if one has (only in a bucket)."""
        return None if self._lock is None else self._lock.lost_to

    def results(self, **figures: Any) -> None:
        """Merges figures (JSON values, NumPy and JAX scalars) into the manifest's `results`."""
        self._manifest["results"].update({k: _plain(v, k) for k, v in figures.items()})
        self._write_manifest()

    def complete(self, digest: str | None = None) -> None:
        """Marks the run done. `digest` is a hash of what it made (array values, record bytes).

        To be called last, when everything the run made is on disk.
        """
        self.metrics.close()
        self._manifest.update(status="done", digest=digest, finished_at=_now(), error=None)
        self._write_manifest()
        processes.barrier(f"complete {self.identity}")

    def _write_manifest(self) -> None:
        if self._writes:
            _write_json(self.workdir / MANIFEST_FILE, self._manifest)


def check_inputs(config: ConfigDict, names: Iterable[str] | None = None) -> None:
    """UserError unless every one of config.inputs is given, or those of `names` are."""
    for name in config.inputs if names is None else names:
        if not config.inputs[name]:
            raise UserError(f"config.inputs.{name} is not set: give that stage's workdir")


def open_run(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    stage: str,
    *,
    files: Mapping[str, RawFiles] | None = None,
) -> Run:
    """Opens a new run in `workdir`, or goes on with the same run there.

    Args:
      config: the stage's config. `config.inputs`, if present, names the artifacts it reads.
      workdir: a directory on a disk or in a bucket (gs://...); made if missing.
      stage: the program's name, 'pretrain' say.
      files: raw inputs by name, as paths or {name: path}; they count by content and name. What is
        no file counts by the digest that the caller gives (`Known`).

    Returns:
      The run, to be used in a with statement. If `run.finished`, there is nothing left to do.

    Raises:
      UserError: an input is missing or unfinished; the workdir belongs to another run (with the
        keys that differ), or is in use by another process.
    """
    directory = storage.resolve(workdir)
    plain = _plain(config.to_dict(), "config")
    inputs = _inputs(plain, directory)
    raw = {name: _file_entry(paths) for name, paths in (files or {}).items()}
    identities = _identities(inputs, raw)
    if processes.is_first():
        _make_directory(directory)
    held = lock.take(directory) if processes.is_first() else None
    try:
        previous = _read_json(directory / MANIFEST_FILE)
        if previous is not None and _left_nothing(directory, previous):
            previous = None
        continued = _continued(directory, previous, stage, plain, identities)
        own = identity(stage, config, identities, continued)
        # Not by comparing identities: those that earlier versions computed stay as they are.
        finished = (
            previous is not None
            and previous["status"] == "done"
            and previous["continued"] == continued
        )
        if finished and previous is not None:
            manifest = previous
        else:
            manifest = _new_manifest(stage, own, inputs, raw, previous)
            manifest["continued"] = continued
            if processes.is_first():
                _write_json(directory / CONFIG_FILE, plain)
                _write_json(directory / MANIFEST_FILE, manifest)
        processes.barrier(f"open {own}")
        return Run(config, directory, stage, manifest, finished, held)
    except BaseException:
        if held is not None:
            held.close()
        raise


def identity(
    stage: str,
    config: ConfigDict | Mapping[str, Any],
    inputs: Mapping[str, str],
    continued: Iterable[Mapping[str, Any]] = (),
) -> str:
    """The identity (12 hex digits) of what `stage` makes from `config` and `inputs`.

    Args:
      stage: the program's name.
      config: as given to the stage. `inputs` (paths) and the CADENCE keys do not count.
      inputs: identities of the inputs by name; raw files by their digest.
      continued: earlier values of RESUMABLE keys under which the run spent some of its steps.
    """
    plain = _plain(config.to_dict() if isinstance(config, ConfigDict) else config, "config")
    relevant = _without(plain, ("inputs", *CADENCE, *_switched_off(stage, plain)))
    content: dict[str, Any] = {"stage": stage, "config": relevant, "inputs": dict(inputs)}
    if continued := list(continued):
        content["continued"] = continued
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps runs out of a workdir that exists. Raises UserError if one is in it."""
    held = lock.take(storage.resolve(workdir))
    try:
        yield
    finally:
        held.close()


def read_manifest(
    workdir: str | os.PathLike[str], allow_unfinished: bool = False
) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises UserError if there is none, if a newer gptlab wrote it, or if the run isn't done (unless
    `allow_unfinished`).
    """
    directory = storage.resolve(workdir)
    manifest = _read_json(directory / MANIFEST_FILE)
    if manifest is None:
        raise UserError(
            f"{directory} has no {MANIFEST_FILE}, so it is no artifact; "
            "give the --workdir of an earlier stage"
        )
    if manifest["status"] != "done" and not allow_unfinished:
        raise UserError(
            f"{directory} is not finished ({manifest['stage']} is {manifest['status']}); "
            f"let it finish first: {manifest['starts'][-1]['command']}"
        )
    return manifest


def lineage(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything an artifact was made from, back to the raw files.

    Returns:
      {'path': str, 'manifest': dict, 'inputs': {name: the same for that input}}.

    Raises:
      UserError: an input is gone, or is no longer the artifact that was read.
    """
    directory = storage.resolve(workdir)
    manifest = read_manifest(directory, allow_unfinished=True)
    inputs = {name: lineage(input_workdir(directory, name)) for name in manifest["inputs"]}
    return {"path": str(directory), "manifest": manifest, "inputs": inputs}


def input_workdir(workdir: str | os.PathLike[str], name: str) -> epath.Path:
    """Where an artifact's input is now: a tree of artifacts may have been moved as a whole.

    Raises UserError if the input is gone, or is no longer the artifact that was read.
    """
    directory = storage.resolve(workdir)
    entry = read_manifest(directory, allow_unfinished=True)["inputs"][name]
    found = None
    for place in (storage.joined(directory, entry["relative"]), entry["path"]):
        path = storage.resolve(place)
        manifest = _read_json(path / MANIFEST_FILE)
        if manifest is not None:
            if manifest["identity"] == entry["identity"]:
                return path
            found = manifest["identity"]
    state = f"now holds {found}" if found else "is gone"
    raise UserError(
        f"{directory} was made from {entry['identity']} as its input {name}, but {entry['path']} "
        f"{state}; restore that artifact, or run this stage again in a new workdir"
    )


def _inputs(config: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
    """What `config.inputs` points at: {name: {path, relative, stage, identity, digest}}."""
    entries = {}
    for name, path in (config.get("inputs") or {}).items():
        if path is None:
            continue
        try:
            manifest = read_manifest(path)
        except UserError as error:
            raise UserError(f"config.inputs.{name}: {error}") from error
        place = storage.resolve(path)
        entries[name] = {
            "path": str(place),
            "relative": storage.relative(place, directory),
            "stage": manifest["stage"],
            "identity": manifest["identity"],
            "digest": manifest["digest"],
        }
    return entries


def _file_entry(raw: RawFiles) -> dict[str, Any]:
    if isinstance(raw, Known):
        return {"paths": [raw.where], "count": 1, "digest": raw.digest}
    kept = raw if isinstance(raw, Mapping) else list(raw)
    listed = [os.fspath(p) for p in (kept.values() if isinstance(kept, Mapping) else kept)]
    return {"paths": listed[:20], "count": len(listed), "digest": files.digest_files(kept)}


def _identities(inputs: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, str]:
    """One identity per input; raw files are told from artifacts by their prefix."""
    artifacts = {name: entry["identity"] for name, entry in inputs.items()}
    return artifacts | {f"files:{name}": entry["digest"] for name, entry in raw.items()}


def _left_nothing(directory: epath.Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a run ended before it made anything, say because its batch didn't fit its mesh.

    Then another config may take its place: correcting a mistake needs no new workdir.
    """
    own = {directory / name for name in (MANIFEST_FILE, CONFIG_FILE, LOCK_FILE)}
    made = (path for path in files.below(directory) if path not in own)
    return manifest["status"] != "done" and not manifest["results"] and not any(made)


def _continued(
    directory: epath.Path,
    previous: Mapping[str, Any] | None,
    stage: str,
    config: Mapping[str, Any],
    identities: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Checks that `directory` holds the same run, or none.

    Returns the values of RESUMABLE keys under which the run was made so far, oldest first, if they
    are different now.
    """
    if previous is None:
        return []
    if previous["stage"] != stage:
        raise UserError(
            f"{directory} holds a run of {previous['stage']}, not of {stage}; "
            "choose another --workdir"
        )
    old = _read_json(directory / CONFIG_FILE) or {}
    free = ("inputs", *CADENCE, *RESUMABLE)
    differences = _differences(
        _without(old, (*free, *_switched_off(stage, old))),
        _without(config, (*free, *_switched_off(stage, config))),
        "config.",
    ) + _differences(_identities(previous["inputs"], previous["files"]), identities, "inputs.")
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        raise UserError(
            f"{directory} holds another run of {stage}: "
            + "; ".join(differences[:_SHOWN_DIFFERENCES])
            + (f"; and {more} more" if more > 0 else "")
            + ". Choose another --workdir, or change these back to go on with that run"
        )
    if all(_value(old, key) == _value(config, key) for key in RESUMABLE):
        return previous["continued"]
    values = {key: _value(old, key) for key in RESUMABLE}
    return [*previous["continued"], {k: v for k, v in values.items() if v is not _ABSENT}]


def _without(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """`config` less some keys; 'a.b' is b within a."""
    kept = {}
    for name, value in config.items():
        if name in keys:
            continue
        below = [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]
        kept[name] = _without(value, below) if isinstance(value, Mapping) else value
    return kept


def _switched_off(stage: str, config: Mapping[str, Any]) -> list[str]:
    """The sections of SWITCHED_OFF that this config does not use."""
    sections = SWITCHED_OFF.get(stage, {})
    return [name for name, key in sections.items() if _value(config, f"{name}.{key}") == 0]


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key, where 'a.b' is b within a; _ABSENT if there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    """'config.optimizer.lr: 0.001 -> 0.002' for each leaf that is not the same."""
    old, new = dict(_leaves(before, prefix)), dict(_leaves(now, prefix))
    missing = "(absent)"
    return [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value, ensure_ascii=False)


def _new_manifest(
    stage: str,
    own_identity: str,
    inputs: Mapping[str, Any],
    raw: Mapping[str, Any],
    previous: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A manifest of a run that starts now, or starts again."""
    start = {
        "time": _now(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": git_commit(),
        "versions": _versions(),
        "host": socket.gethostname(),
        "processes": processes.count(),
    }
    return {
        "schema": SCHEMA_VERSION,
        "stage": stage,
        "identity": own_identity,
        "status": "running",
        "inputs": dict(inputs),
        "files": dict(raw),
        "created_at": previous["created_at"] if previous else _now(),
        "finished_at": None,
        "digest": None,
        "error": None,
        "results": dict(previous["results"]) if previous else {},
        "starts": [*(previous["starts"] if previous else []), start],
    }


def git_commit() -> str | None:
    """The code's commit, with '+changes' if the checkout differs from it.

    Outside of git it is what $GPTLAB_COMMIT says: launch/tpu.sh copies files without their history.
    """
    root = Path(gptlab.__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        # --no-optional-locks: looking must never get in the way of the user's own git command.
        changes = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GPTLAB_COMMIT")


def _versions() -> dict[str, str]:
    """Versions of what decides the numbers; looked up without importing anything."""
    versions = {"python": platform.python_version(), "gptlab": gptlab.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _make_directory(directory: epath.Path) -> None:
    if storage.in_bucket(directory):
        return  # there are only objects
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir={directory} is a file; choose a directory") from error
    except OSError as error:
        raise UserError(f"cannot make --workdir={directory}: {error.strerror}") from error


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    """A JSON object written by this module, or None if there is no such file."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if path.name == MANIFEST_FILE and content["schema"] > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {content['schema']}, this gptlab reads up to {SCHEMA_VERSION}; "
            "it was written by a newer gptlab: update this one"
        )
    return content


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    files.atomic_write(path, files.to_json(content, indent=2) + "\n")


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON would give it back, so that what is compared later compares equal."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return files.finite(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(f"{where}: {type(value).__name__} {value!r} can't be written as JSON")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
