"""Writing files so that a kill or a full disk leaves the old content or the new, never half."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gptlab.run import storage
from gptlab.run.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replaces `path` by `data` (str as UTF-8) in one step, durably.

    In a bucket that is how objects are written; elsewhere it is a temporary file and a rename.
    Raises UserError when the disk is full; what was there before is still there then.
    """
    content = data.encode() if isinstance(data, str) else data
    if storage.in_bucket(path):
        storage.write(path, content)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, which every reader takes: nan and infinities are the strings of `finite`."""
    return json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """`value` with each float that JSON has no word for as 'nan', 'inf' or '-inf'.

    float() turns these back. They say more than null, which stands for what was not measured.
    """
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns 'no space left', 'read-only' and 'permission denied' into a UserError naming `path`."""
    try:
        yield
    except OSError as error:
        message = explain(error, path)
        if message is None:
            raise
        raise UserError(message) from error


def explain(error: BaseException, path: str | os.PathLike[str] | None = None) -> str | None:
    """One line for an exception that is the disk's doing, or None if it is something else.

    Looks through the exception's causes and also at messages, as Orbax and TensorStore report a
    full disk as a ValueError that quotes the system's message.
    """
    where = f" while writing {path}" if path is not None else ""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _DISK_FULL or os.strerror(errno.ENOSPC) in str(cause):
            return (
                f"the disk is full{where}{_free_space(path)}; free some space and run the same "
                "command again: nothing that was finished is lost"
            )
        if number in (errno.EACCES, errno.EPERM, errno.EROFS) and path is not None:
            return f"{os.strerror(number)}{where}; choose a place that you may write to"
        cause = cause.__cause__ or cause.__context__
    return None


def _free_space(path: str | os.PathLike[str] | None) -> str:
    if path is None or storage.in_bucket(path):
        return ""
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(Path(path).parent).free / 2**20:.0f} MiB left)"
    return ""


def digest_files(
    paths: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
) -> str:
    """Hash (16 hex digits) of the names and contents of files; directories count recursively.

    A file counts by the name it is given in a mapping, or else by its place below the directory
    that all paths share, so the same files elsewhere, or in another order, have the same digest.
    One that is there but can't be read counts as 'unreadable': who reads it says so. A file in a
    bucket is copied here first (run/storage.py).

    Raises UserError for a path that does not exist, and for a directory that can't be listed.
    """
    entries = []
    for name, path in _named(paths).items():
        if path.is_dir():
            entries += [
                (f"{name}/{file.relative_to(path).as_posix()}", _content_digest(file))
                for file in below(path)
            ]
        else:
            entries.append((name, _content_digest(path)))
    total = hashlib.sha256()
    for name, content in sorted(entries):
        total.update(f"{len(name)}:{name}:{content}\n".encode())
    return total.hexdigest()[:16]


def _named(
    paths: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
) -> dict[str, Path]:
    if isinstance(paths, Mapping):
        return {name: storage.local_copy(path) for name, path in paths.items()}
    given = list(paths)
    if any(map(storage.in_bucket, given)):
        common = os.path.commonpath([os.path.dirname(os.fspath(path)) for path in given])
        return {os.path.relpath(path, common): storage.local_copy(path) for path in given}
    listed = [Path(os.path.abspath(path)) for path in given]
    if not listed:
        return {}
    root = os.path.commonpath([p if p.is_dir() else p.parent for p in listed])
    return {path.relative_to(root).as_posix(): path for path in listed}


def below(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """All files below a directory; UserError for a part of it that can't be listed."""
    if storage.in_bucket(directory):
        yield from storage.below(directory)
        return
    for place, _, names in os.walk(directory, onerror=_not_listable):
        yield from (path for name in names if is_file(path := Path(place, name)))


def check_listable(directory: str | os.PathLike[str]) -> None:
    """UserError if a directory can't be listed."""
    try:
        os.scandir(directory).close()
    except OSError as error:
        _not_listable(error)


def _not_listable(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot read the directory {error.filename}: {error.strerror}; check its permissions"
    ) from error


def is_file(path: Path) -> bool:
    """Whether there is a file, or something that can't even be looked at: reading it will tell."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _content_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if os.path.lexists(path) or not isinstance(error, FileNotFoundError):
            return "unreadable"
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
