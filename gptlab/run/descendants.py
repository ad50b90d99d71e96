"""What was made of an artifact: its lineage the other way round.

A manifest names what its artifact was made from, and nothing names what was made of it. So the
manifests below some directories are read, and each is walked back as far as it is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from gptlab.run import artifact

# No artifact is below these directories of one, but many files may be.
_LEAVES = ("checkpoints", "packed", "records")


@dataclasses.dataclass(frozen=True)
class Descendant:
    """An artifact that was made of one asked for, or may have been.

    Attributes:
      path: its workdir.
      stage: the program's name.
      identity: its own.
      created_at: when its run began, as its manifest says.
      of: which of the identities asked for it was made of, directly or by way of others.
      unknown: what it was made of and is not to be found, so that nobody can say what was in that:
        '<stage> <identity>'; or the manifest or directory that can't be read.
    """

    path: str
    stage: str
    identity: str
    created_at: str
    of: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Manifest:
    path: str
    stage: str
    identity: str
    created_at: str
    inputs: tuple[tuple[str, str], ...]  # (stage, identity)


def find(
    identities: Collection[str], directories: Iterable[str | os.PathLike[str]]
) -> list[Descendant]:
    """Artifacts below directories (of this machine) that were made of these, the oldest first.

    Those of which it can't be told are there, too. An artifact that was made anew in the place of
    another has the same identity; the time tells which of both was read.
    """
    manifests, unreadable = _manifests(directories)
    of: dict[str, set[str]] = {one.identity: set() for one in manifests}
    unknown: dict[str, set[str]] = {one.identity: set() for one in manifests}
    known = 0
    while True:  # once for each generation
        for one in manifests:
            for stage, parent in one.inputs:
                if parent in identities:
                    of[one.identity].add(parent)
                elif parent not in of:
                    unknown[one.identity].add(f"{stage} {parent}")
                of[one.identity] |= of.get(parent, set())
                unknown[one.identity] |= unknown.get(parent, set())
        before, known = known, sum(map(len, (*of.values(), *unknown.values())))
        if known == before:
            break
    found = [
        Descendant(
            one.path, one.stage, one.identity, one.created_at,
            tuple(sorted(of[one.identity])), tuple(sorted(unknown[one.identity])),
        )
        for one in manifests
        if of[one.identity] or unknown[one.identity]
    ]  # fmt: skip
    found += [Descendant(path, "", "", "", (), (path,)) for path in unreadable]
    return sorted(found, key=lambda one: (one.created_at, one.path))


def _manifests(
    directories: Iterable[str | os.PathLike[str]],
) -> tuple[list[_Manifest], list[str]]:
    """All manifests, and the paths of what can't be read."""
    found: list[_Manifest] = []
    unreadable: list[str] = []
    for directory in directories:
        for place, below, names in os.walk(
            directory, onerror=lambda error: unreadable.append(_shown(error.filename))
        ):
            below[:] = sorted(name for name in below if name not in _LEAVES)
            if artifact.MANIFEST_FILE not in names:
                continue
            path = Path(place, artifact.MANIFEST_FILE)
            try:
                manifest = _read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                unreadable.append(_shown(path))
                continue
            if manifest is not None:
                found.append(manifest)
    return found, unreadable


def _read(path: Path) -> _Manifest | None:
    """A manifest; None for another program's file of that name."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not {"stage", "identity"} <= content.keys():
        return None
    if content["schema"] > artifact.SCHEMA_VERSION:
        raise ValueError(f"schema {content['schema']}")
    inputs = tuple((entry["stage"], entry["identity"]) for entry in content["inputs"].values())
    return _Manifest(
        _shown(path.parent), content["stage"], content["identity"], content["created_at"], inputs
    )


def _shown(path: str | os.PathLike[str]) -> str:
    """A path as text: a file system's names may be none."""
    return os.fsencode(path).decode("utf-8", "replace")
