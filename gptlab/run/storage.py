"""Paths that may lie in a bucket (gs://BUCKET/...), by etils.epath and gcsfs.

What a bucket lacks of a file system, and what stands in for it here:

- Nothing is appended to and no directory is renamed; an object is there as a whole or not at all.
  So files are written at once, and a set of files counts once the one written last is there.
- Libraries in C++ (ArrayRecord) read and write local files: what they read is copied below
  `cache_directory()` once, what they write is made there and then copied into the bucket.
- There are no locks: see run/lock.py.
"""

import contextlib
import hashlib
import importlib.util
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
from etils import epath

from gptlab.run.errors import UserError

PathLike = str | os.PathLike[str]

# By default epath reads buckets through TensorFlow wherever that is installed, ten seconds' import.
os.environ.setdefault("EPATH_USE_TF", "false")
# Other processes write as well: what a directory held a while ago is nothing to go by.
for _name in ("gs", "gcs"):
    fsspec.config.conf.setdefault(_name, {})["use_listings_cache"] = False


def in_bucket(path: PathLike) -> bool:
    """Whether a path is the address of something in a bucket."""
    return "://" in os.fspath(path)


def resolve(path: PathLike) -> epath.Path:
    """The absolute path, without '..' and (on a disk) symbolic links.

    Raises UserError for an address of another kind than gs://, or without gcsfs.
    """
    text = os.fspath(path)
    if not in_bucket(text):
        return epath.Path(Path(text).resolve())
    scheme, _, place = text.partition("://")
    if scheme != "gs" or not place.strip("/"):
        raise UserError(f"{text}: buckets are given as gs://BUCKET/DIRECTORY; mount any other kind")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need gcsfs; pip install -e '.[cloud]' -c constraints.txt")
    return epath.Path(f"gs://{posixpath.normpath(place.strip('/'))}")


def relative(path: PathLike, start: PathLike) -> str:
    """`path` as seen from the directory `start`; as it is if only one of them is in a bucket."""
    path, start = os.fspath(path), os.fspath(start)
    return path if in_bucket(path) != in_bucket(start) else os.path.relpath(path, start)


def joined(directory: PathLike, path: str) -> epath.Path:
    """Inverse of `relative`."""
    if in_bucket(path):
        return resolve(path)
    if in_bucket(directory) and not path.startswith("/"):
        return resolve(f"{os.fspath(directory)}/{path}")
    return epath.Path(Path(directory) / path) if not path.startswith("/") else epath.Path(path)


def below(directory: PathLike) -> list[epath.Path]:
    """All objects below a directory of a bucket, sorted."""
    system, name = _system(directory)
    return [epath.Path(f"gs://{found}") for found in sorted(system.find(name))]


def write(path: PathLike, data: bytes) -> None:
    """Makes an object of a bucket, or replaces it, in one step. Raises UserError if it can't."""
    system, name = _system(path)
    with _explained(f"cannot write {os.fspath(path)}"):
        system.pipe_file(name, data)


def upload(source: PathLike, target: PathLike) -> None:
    """Copies a local file into a bucket in one step, or all files of a local directory."""
    system, name = _system(target)
    with _explained(f"cannot write {os.fspath(target)}"):
        if not os.path.isdir(source):
            system.put_file(os.fspath(source), name)
            return
        for path in sorted(Path(source).rglob("*")):
            if path.is_file():
                system.put_file(str(path), f"{name}/{path.relative_to(source).as_posix()}")


def local_copy(path: PathLike) -> Path:
    """A local file with the content of `path`: itself, or a copy below `cache_directory()`.

    A copy is kept under the object's version and made once. UserError if there is no such object.
    """
    if not in_bucket(path):
        return Path(path)
    system, name = _system(path)
    with _explained(f"cannot read {os.fspath(path)}"):
        info = system.info(name)
        version = " ".join(str(info.get(key)) for key in ("size", "generation", "etag", "md5Hash"))
        tag = hashlib.sha256(version.encode()).hexdigest()[:12]
        place = Path(name)
        copy = cache_directory() / "objects" / place.parent / tag / place.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as temporary:
                system.get_file(name, f"{temporary}/{place.name}")
                os.replace(f"{temporary}/{place.name}", copy)
    return copy


@contextlib.contextmanager
def written_locally(path: PathLike) -> Iterator[Path]:
    """A temporary local path to be written in the with block, copied to `path` after it."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
        temporary = Path(directory) / epath.Path(path).name
        yield temporary
        upload(temporary, path)


def move(source: epath.Path, target: epath.Path) -> None:
    """Renames a directory; in a bucket its objects one by one."""
    if not in_bucket(source):
        source.rename(target)
        return
    system, name = _system(source)
    with _explained(f"cannot move {source}"):
        for found in sorted(system.find(name)):
            system.mv(found, f"{_system(target)[1]}{found.removeprefix(name)}")


def local_directory(workdir: PathLike, name: str) -> Path:
    """A directory of this machine for what belongs to a workdir: within it, or stands in for it."""
    if not in_bucket(workdir):
        return Path(workdir)
    tag = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:12]
    directory = cache_directory() / name / tag
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def cache_directory() -> Path:
    """Where copies of objects are: $GPTLAB_BUCKET_CACHE or ~/.cache/gptlab/buckets.

    May be deleted whenever no program runs.
    """
    found = os.environ.get("GPTLAB_BUCKET_CACHE")
    return Path(found) if found else Path.home() / ".cache" / "gptlab" / "buckets"


def remove(directory: epath.Path) -> None:
    """Removes a directory with what is in it, if it is there."""
    if not in_bucket(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    system, name = _system(directory)
    for found in system.find(name):
        system.rm_file(found)


def _system(path: PathLike) -> tuple[Any, str]:
    """fsspec's file system of a path in a bucket, and the name it gives the path."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.fspath(path))


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, aiohttp and google.auth have errors of many kinds
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{what}: {type(error).__name__}: {reason}; check the bucket's name and your rights "
            "(gcloud auth application-default login)"
        ) from error
