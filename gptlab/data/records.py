"""Versioned records, and the ArrayRecord shards they are kept in.

A record set is `<directory>/<name>-<split>-SSSSS-of-NNNNN.array_record`. A record's shard is a hash
of its id and records are sorted by id within a shard, so the bytes on disk depend on the records
alone and never on how many workers wrote them.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgpack
import numpy as np
from array_record.python import array_record_module
from etils import epath

from gptlab.run import files, storage
from gptlab.run.errors import UserError

ROLES = ("system", "user", "assistant")
# group_size:1 makes each record readable by itself, which random access needs.
_WRITER_OPTIONS = "group_size:1,zstd:3"
_SHARD_NAME = re.compile(r"(?P<set>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.array_record")
_READ_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class _JsonRecord:
    """A record kept as one line of JSON with sorted keys: equal records have equal bytes."""

    SCHEMA: ClassVar[int] = 1
    # Fields that came later: the schema they came with, and what their absence means. A record is
    # written in the oldest schema that can hold it, so that its bytes stay what they were.
    ADDED: ClassVar[Mapping[str, tuple[int, Any]]] = {}

    def to_json(self) -> str:
        """Returns the record as JSON, with its kind and schema."""
        fields, schema = dict(vars(self)), 1
        for name, (version, absent) in self.ADDED.items():
            if fields[name] == absent:
                del fields[name]
            else:
                schema = max(schema, version)
        return _ENCODER.encode({"kind": type(self).__name__, "schema": schema, **fields})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of `to_json`.

        Raises:
          UserError: the record was written by a newer gptlab.
          ValueError: it is no record of this kind.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"expected a {cls.__name__} object, got {type(fields).__name__}")
        schema = fields.pop("schema", None)
        _check_kind(cls, fields.pop("kind", None), schema)
        for name, (version, absent) in cls.ADDED.items():
            if name in fields and schema < version:
                raise ValueError(f"a {cls.__name__} record of schema {schema} with a {name}")
            fields.setdefault(name, absent)
        return _from_fields(cls, fields)

    def to_bytes(self) -> bytes:
        """The stored form of the record. Lone surrogates, which JSON can carry, survive."""
        return self.to_json().encode("utf-8", "surrogatepass")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`; errors as in `from_json`."""
        return cls.from_json(data)


@dataclasses.dataclass(frozen=True)
class Document(_JsonRecord):
    """A cleaned text."""

    id: str
    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `context` is material (a document, say) that accompanies a user's turn."""

    role: str
    content: str
    context: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")
        if self.context is not None and self.role != "user":
            raise ValueError(f"only a user's turn has a context, not a turn of {self.role!r}")


@dataclasses.dataclass(frozen=True)
class Conversation(_JsonRecord):
    """A dialogue; `topic` groups conversations that must stay on one side of a split.

    `learnt` are the numbers, from 0 on, of the assistant's messages that a model is to learn; None:
    all of them. The others are there as what came before.
    """

    SCHEMA: ClassVar[int] = 2
    ADDED: ClassVar[Mapping[str, tuple[int, Any]]] = {"learnt": (2, None)}

    id: str
    messages: tuple[Message, ...]
    source: str
    topic: str | None = None
    learnt: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.learnt is None:
            return
        replies = tuple(i for i, m in enumerate(self.messages) if m.role == "assistant")
        if not self.learnt or tuple(i for i in replies if i in self.learnt) != self.learnt:
            raise ValueError(
                f"conversation {self.id!r}: {self.learnt} are no numbers, in order, of the "
                f"assistant's messages, which are {replies}"
            )
        if self.learnt == replies:  # one form for one meaning: equal records have equal bytes
            object.__setattr__(self, "learnt", None)


@dataclasses.dataclass(frozen=True)
class Prompt(_JsonRecord):
    """A conversation that ends with the user's turn, to be answered.

    A prompt cut out of a conversation has the id '<the conversation's>:<the last turn's number>'.
    """

    id: str
    messages: tuple[Message, ...]
    source: str

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role != "user":
            raise ValueError(f"prompt {self.id!r} does not end with a user's message")

    @property
    def conversation_id(self) -> str:
        """The same for all prompts that were cut out of one conversation."""
        conversation, _, turn = self.id.rpartition(":")
        return conversation if turn.isdecimal() else self.id


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A reply.

    `policy` is the identity of the artifact that wrote it, or 'human'; `finished` says whether it
    ended by itself or was cut off.
    """

    id: str
    content: str
    policy: str
    finished: bool


@dataclasses.dataclass(frozen=True)
class CandidateSet(_JsonRecord):
    """Candidate replies to one prompt, to be ranked."""

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class Comparison(_JsonRecord):
    """A ranking of the replies to one prompt.

    `ranks[i]` belongs to `candidates[i]`: 1 is best, equal ranks are ties. `scores` are a simulated
    labeller's noise-free scores; people have none. `weight` is how much it counts in a loss beside
    others: a thumb says less than a ranking.
    """

    SCHEMA: ClassVar[int] = 2
    ADDED: ClassVar[Mapping[str, tuple[int, Any]]] = {"weight": (2, 1.0)}

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    ranks: tuple[int, ...]
    labeller: str
    simulated: bool
    scores: tuple[float, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.candidates) or min(self.ranks, default=0) < 1:
            raise ValueError(
                f"comparison {self.id!r}: {self.ranks} are no ranks from 1 of its "
                f"{len(self.candidates)} candidates"
            )
        if self.scores is not None and len(self.scores) != len(self.candidates):
            raise ValueError(
                f"comparison {self.id!r}: {len(self.scores)} scores for its "
                f"{len(self.candidates)} candidates"
            )
        if self.scores is not None and not self.simulated:
            raise ValueError(f"comparison {self.id!r}: a person's ranking carries no scores")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"comparison {self.id!r}: a weight is above 0, not {self.weight}")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenExample:
    """A tokenised text: tokens int32 [n], loss_mask uint8 [n] (1: learn to predict this token)."""

    id: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    SCHEMA: ClassVar[int] = 1

    def __post_init__(self) -> None:
        tokens, mask = np.asarray(self.tokens, np.int32), np.asarray(self.loss_mask, np.uint8)
        if tokens.ndim != 1 or tokens.shape != mask.shape:
            raise ValueError(
                f"example {self.id!r}: tokens {tokens.shape} and loss mask {mask.shape} differ"
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "loss_mask", mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenExample) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Compact MessagePack: tokens of two bytes where the ids allow it, the mask as bits."""
        dtype = "<u2" if not self.tokens.size or self.tokens.max() < 2**16 else "<i4"
        return msgpack.packb(
            [
                type(self).__name__,
                self.SCHEMA,
                self.id,
                dtype,
                self.tokens.astype(dtype).tobytes(),
                np.packbits(self.loss_mask).tobytes(),
            ]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenExample:
        """Inverse of `to_bytes`; errors as in `_JsonRecord.from_json`."""
        fields = msgpack.unpackb(data)
        if not isinstance(fields, list) or len(fields) < 2:
            raise ValueError("expected a TokenExample")
        _check_kind(cls, *fields[:2])
        _, _, key, dtype, tokens, mask = fields
        tokens = np.frombuffer(tokens, dtype).astype(np.int32)
        mask = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(tokens))
        return cls(key, tokens, mask)


def _fields_of(value: object) -> dict[str, Any]:
    """A record's part as JSON sees it. `dataclasses.asdict` would copy every string, slowly."""
    if isinstance(value, Message | Candidate | Prompt):
        return vars(value)
    raise TypeError(f"a {type(value).__name__} can't be part of a record")


_ENCODER = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_fields_of
)

Record = Document | Conversation | Prompt | CandidateSet | Comparison | TokenExample
R = TypeVar("R", Document, Conversation, Prompt, CandidateSet, Comparison, TokenExample)


def _check_kind(cls: type, kind: object, schema: object) -> None:
    if kind != cls.__name__:
        raise ValueError(f"expected a {cls.__name__} record, got {kind!r}")
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"a {kind} record with schema {schema!r}")
    newest = cls.SCHEMA  # type: ignore[attr-defined]
    if schema > newest:
        raise UserError(
            f"{kind} record of schema {schema}: this gptlab reads up to {newest}; update gptlab"
        )


@functools.cache
def _field_names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))


def _from_fields(cls: type, fields: dict[str, Any]) -> Any:
    """Builds a record of plain JSON values; nested records are restored by field name."""
    nested = {"messages": Message, "candidates": Candidate}
    expected = _field_names(cls)
    if fields.keys() != expected:
        raise ValueError(
            f"{cls.__name__} with fields {sorted(fields)}, expected {sorted(expected)}"
        )
    for name, value in fields.items():
        if name in nested:
            fields[name] = tuple(_from_fields(nested[name], item) for item in value)
        elif name == "prompt":
            fields[name] = _from_fields(Prompt, value)
        elif isinstance(value, list):
            fields[name] = tuple(value)
    return cls(**fields)


def shard_of(record_id: str, num_shards: int) -> int:
    """The shard a record belongs to: a hash of its id, the same on every machine."""
    digest = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_shards


def shard_path(
    directory: epath.PathLike, name: str, split: str, index: int, num_shards: int
) -> epath.Path:
    """`<directory>/<name>-<split>-00000-of-00001.array_record`."""
    return epath.Path(directory) / f"{name}-{split}-{index:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: epath.PathLike, items: Iterable[tuple[str, bytes]]) -> epath.Path:
    """Writes one shard of (id, record bytes), sorted, under a temporary name that is then renamed.

    Raises:
      UserError: the file can't be written (a full disk, no permission).
    """
    path = epath.Path(path)
    return write_ordered(path, (data for _, data in sorted(items)))


def write_ordered(path: epath.Path, payloads: Iterable[bytes]) -> epath.Path:
    """Writes an ArrayRecord file of payloads in the order given; otherwise as `write_shard`.

    One for a bucket is written on this machine, as ArrayRecord knows only files, and copied there.
    """
    if storage.in_bucket(path):
        with storage.written_locally(path) as local:
            write_ordered(epath.Path(local), payloads)
        return path
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for payload in payloads:
            writer.write(payload)
        writer.close()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = files.explain(error, path) or f"can't write {path}: {_first_line(error)}"
        raise UserError(reason) from error
    return path


def write_shards(
    directory: epath.PathLike, name: str, split: str, records: Iterable[Record], num_shards: int = 1
) -> list[epath.Path]:
    """Writes a record set (held in memory). A set of that name and split is replaced.

    Returns:
      The paths of the shards. Errors as in `write_shard`.
    """
    shards: list[list[tuple[str, bytes]]] = [[] for _ in range(num_shards)]
    for record in records:
        shards[shard_of(record.id, num_shards)].append((record.id, record.to_bytes()))
    paths = [
        write_shard(shard_path(directory, name, split, i, num_shards), items)
        for i, items in enumerate(shards)
    ]
    for stale in _files_of(directory, name, split):
        if stale not in paths:
            stale.unlink()
    return paths


def record_sets(directory: epath.PathLike) -> list[str]:
    """Sorted `<name>-<split>` of the record sets in a directory; empty if it does not exist."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    matches = (_SHARD_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted({match["set"] for match in matches if match})


def shard_paths(directory: epath.PathLike, name: str, split: str) -> list[epath.Path]:
    """Paths of a record set's shards, in order.

    Raises:
      UserError: there is no such set, or some of its shards are missing.
    """
    found = _files_of(directory, name, split)
    if not found:
        there = record_sets(directory)
        has = f"it has {', '.join(there)}" if there else "it has no records"
        raise UserError(f"no records {name}-{split} in {directory}: {has}")
    count = int(_SHARD_NAME.fullmatch(found[0].name)["count"])  # type: ignore[index]
    expected = [shard_path(directory, name, split, i, count) for i in range(count)]
    if found != expected:
        names = {path.name for path in found} ^ {path.name for path in expected}
        raise UserError(
            f"records {name}-{split} in {directory} are incomplete or mixed: see {min(names)}; "
            "write them again"
        )
    return expected


class RecordReader(Generic[R]):
    """Random access to the records of one name and split, in the order of their shards."""

    def __init__(self, directory: epath.PathLike, name: str, split: str, cls: type[R]):
        """Opens every shard.

        Raises:
          UserError: no such records in the directory, or a shard is incomplete or corrupt.
        """
        self.paths = shard_paths(directory, name, split)
        self._cls: type[R] = cls
        self._readers = [_open(path) for path in self.paths]
        self._ends = list(np.cumsum([reader.num_records() for reader in self._readers]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> R:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return self._parse(
            shard, index - start, self._read(shard, index - start, index - start + 1)[0]
        )

    def has(self, record_id: str) -> bool:
        """Whether a set of `write_shards` or of prepare has this id: looks at a few records only.

        The shard follows from the id, and a shard is sorted by ids.
        """
        shard = shard_of(record_id, len(self.paths))
        first, end = self._ends[shard - 1] if shard else 0, self._ends[shard]
        place = bisect.bisect_left(range(first, end), record_id, key=lambda i: self[i].id)
        return place < end - first and self[first + place].id == record_id

    def __iter__(self) -> Iterator[R]:
        for shard, reader in enumerate(self._readers):
            for position, data in enumerate(_iterate_bytes(reader, self.paths[shard])):
                yield self._parse(shard, position, data)

    def _read(self, shard: int, start: int, stop: int) -> Sequence[bytes]:
        return _read_bytes(self._readers[shard], self.paths[shard], start, stop)

    def _parse(self, shard: int, position: int, data: bytes) -> R:
        where = f"{self.paths[shard]}, record {position}"
        try:
            return self._cls.from_bytes(data)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise UserError(f"{where}: {_first_line(error)}") from error


def digest(directory: epath.PathLike) -> str:
    """16 hex digits over all record sets of a directory, for a manifest.

    Each set counts by the sum of its records' hashes: the same records in other shards or another
    order have the same digest.
    """
    total = hashlib.sha256()
    for key in record_sets(directory):
        name, split = key.rsplit("-", 1)
        count = sum_of_hashes = 0
        for path in shard_paths(directory, name, split):
            reader = _open(path)
            for data in _iterate_bytes(reader, path):
                sum_of_hashes += int.from_bytes(hashlib.sha256(data).digest(), "big")
                count += 1
        total.update(f"{key} {count} {sum_of_hashes % 2**256:064x}\n".encode())
    return total.hexdigest()[:16]


def _iterate_bytes(reader: Any, path: epath.Path) -> Iterator[bytes]:
    count = reader.num_records()
    for start in range(0, count, _READ_AT_ONCE):
        yield from _read_bytes(reader, path, start, min(start + _READ_AT_ONCE, count))


def _read_bytes(reader: Any, path: epath.Path, start: int, stop: int) -> Sequence[bytes]:
    try:
        return reader.read(start, stop)
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is corrupt near record {start}: {_first_line(error)}; write it again"
        ) from error


def _files_of(directory: epath.PathLike, name: str, split: str) -> list[epath.Path]:
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    found = []
    for path in directory.iterdir():
        match = _SHARD_NAME.fullmatch(path.name)
        if match and match["set"] == f"{name}-{split}":
            found.append(path)
    return sorted(found, key=lambda path: path.name)


def _open(path: epath.Path) -> Any:
    try:
        reader = array_record_module.ArrayRecordReader(str(storage.local_copy(path)))
        if not reader.ok():
            reader.close()  # Raises, and says what is wrong with the file.
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no ArrayRecord file: {_first_line(error)}; write it again"
        ) from error
    return reader


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].split("; ")[0]
