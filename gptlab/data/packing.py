"""Packs tokenised examples into rows of a fixed length, once per length, and serves the rows.

Several examples share a row; `segment_ids` keep them apart in attention and positions restart for
each. An example of n + 1 tokens takes n slots: slot i holds token i as input and token i + 1 as
target. Rows are filled best-fit-decreasing over a histogram of lengths (Krell et al. 2021, arXiv
2107.02027), in blocks, so that memory stays bounded for any corpus.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from gptlab.data import records
from gptlab.run import files, processes, storage
from gptlab.run.errors import UserError

SCHEMA_VERSION = 2
FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
_STORED = ("tokens", "targets", "loss_mask", "segment_ids")
_STATS = "packed.json"
# Examples are packed block by block, so that memory does not grow with the corpus.
_BLOCK_TOKENS = 2**22

Overlong = Literal["split", "drop"]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Pieces of examples; piece c is tokens[start[c] : start[c] + slots[c] + 1], one segment."""

    tokens: np.ndarray  # int32 [n], all examples one after another
    loss_mask: np.ndarray  # uint8 [n]
    start: np.ndarray  # int64 [C]
    slots: np.ndarray  # int64 [C], 1..seq_len
    dropped_overlong: int  # examples
    dropped_without_loss: int  # chunks


def packed(
    workdir: epath.PathLike,
    name: str,
    split: str,
    seq_len: int,
    *,
    overlong: Overlong = "split",
    max_reply_tokens: int = 0,
) -> PackedSource:
    """Packed rows of `<workdir>/records/<name>-<split>`, made on first use and kept beside it.

    All processes of a run must call it in the same order: the first makes the rows.

    They are made again when the records or the settings are not those they were made from. See
    `cut` for the settings.

    Raises:
      UserError: no such records, one of them is corrupt, or nothing in them fits.
    """
    if overlong not in ("split", "drop"):
        raise UserError(f"data.overlong={overlong!r}: expected 'split' or 'drop'")
    if max_reply_tokens < 0:
        raise UserError(f"data.max_reply_tokens={max_reply_tokens}: expected 0 (off) or more")
    workdir = epath.Path(workdir)
    reader = records.RecordReader(workdir / "records", name, split, records.TokenExample)
    suffix = "" if overlong == "split" else f"-{overlong}"
    suffix += f"-R{max_reply_tokens}" if max_reply_tokens else ""
    directory = workdir / "packed" / f"{name}-{split}-T{seq_len}{suffix}"
    key = _key(reader.paths, seq_len, overlong, max_reply_tokens)
    if processes.is_first() and _settings(directory) != key:
        _build(reader, directory, key)
    processes.barrier(f"packed {directory}")
    return PackedSource(directory)


class PackedSource:
    """Random access to the packed rows of a directory."""

    def __init__(self, directory: epath.PathLike):
        """Opens the rows that `packed` wrote."""
        # Grain takes 1.5 s to import; programs that train nothing should not pay for it.
        import grain.python as grain

        self.directory = epath.Path(directory)
        self.stats: dict[str, Any] = json.loads((self.directory / _STATS).read_text())
        self.seq_len: int = self.stats["seq_len"]
        paths = [
            str(storage.local_copy(_row_path(self.directory, block)))
            for block in range(self.stats["blocks"])
        ]
        try:
            self._rows = grain.ArrayRecordDataSource(paths)
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(error) from error
        if len(self._rows) != self.stats["rows"]:
            raise self._damaged(f"{len(self._rows)} of {self.stats['rows']} rows are there")

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of several indices: the fields of `FIELDS`, each int32 [len(indices), T]."""
        try:
            data = b"".join(self._rows.__getitems__(list(indices)))
        except RuntimeError as error:
            raise self._damaged(error) from error
        stacked = np.frombuffer(data, "<i4").reshape(len(indices), len(_STORED), self.seq_len)
        fields = dict(zip(_STORED, np.moveaxis(stacked, 1, 0), strict=True))
        return fields | {"positions": _positions(fields["segment_ids"])}

    def _damaged(self, reason: object) -> UserError:
        return UserError(
            f"packed rows in {self.directory} are damaged ({str(reason).splitlines()[0]}); delete "
            "that directory and they are made again"
        )


def cut(
    examples: Iterable[records.TokenExample],
    seq_len: int,
    overlong: Overlong,
    max_reply_tokens: int = 0,
) -> Chunks:
    """Cuts examples into chunks that fit a row of `seq_len` slots.

    An example of more than seq_len + 1 tokens becomes chunks that overlap by one token, so that
    every token but the first is a target exactly once ('split'), or is left out ('drop'). A reply
    (an unbroken run of loss tokens) of more than `max_reply_tokens` stays as context but is not
    learnt from; 0 allows any length. Chunks without a loss token are left out.
    """
    kept = [example for example in examples if len(example.tokens) > 1]
    if overlong == "drop":
        fitting = [example for example in kept if len(example.tokens) <= seq_len + 1]
    else:
        fitting = kept
    lengths = np.array([len(example.tokens) for example in fitting], np.int64)
    pieces = -(-(lengths - 1) // seq_len)  # ceil(slots / seq_len)
    example_of = np.repeat(np.arange(len(fitting)), pieces)
    # Within an example, chunk j starts j * seq_len tokens in.
    piece = np.arange(len(example_of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.cumsum(lengths) - lengths
    start = begin[example_of] + piece * seq_len
    slots = np.minimum(seq_len, lengths[example_of] - 1 - piece * seq_len)
    tokens = _concatenate([example.tokens for example in fitting], np.int32)
    mask = _concatenate([example.loss_mask for example in fitting], np.uint8)
    if max_reply_tokens:
        mask = _without_long_runs(mask, begin, max_reply_tokens)
    seen = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    has_loss = seen[start + slots + 1] > seen[start + 1]
    return Chunks(
        tokens=tokens,
        loss_mask=mask,
        start=start[has_loss],
        slots=slots[has_loss],
        dropped_overlong=len(kept) - len(fitting),
        dropped_without_loss=int((~has_loss).sum()),
    )


def _without_long_runs(mask: np.ndarray, begin: np.ndarray, longest: int) -> np.ndarray:
    """The 0/1 mask [n] with runs of more than `longest` ones cleared.

    No run passes an example's first token, at `begin`: nothing predicts that token.
    """
    mask = mask.copy()
    mask[begin] = 0
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    first, after = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = after - first > longest
    cleared = np.zeros(len(mask) + 1, np.int64)
    cleared[first[long]] += 1
    cleared[after[long]] -= 1
    return np.where(np.cumsum(cleared[:-1]) > 0, 0, mask).astype(mask.dtype)


def _concatenate(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def assign_rows(slots: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Best-fit-decreasing: the longest chunks first, each into the fullest row that still holds it.

    All chunks of one length are placed together, so the work grows with the number of distinct
    lengths, not of chunks.

    Args:
      slots: int64 [C], each in 1..seq_len.
      seq_len: slots in a row.

    Returns:
      For every chunk its row, the slot it begins at and its segment id (from 1), int64 [C] each;
      and the number of rows.
    """
    row, offset, segment, segments_in = (np.zeros(len(slots), np.int64) for _ in range(4))
    order = np.argsort(-slots, kind="stable")
    open_rows: dict[int, list[np.ndarray]] = {}  # free slots -> lots of rows with so many
    sizes: list[int] = []  # the keys of open_rows, sorted
    num_rows = done = 0
    for length, count in zip(*np.unique(-slots, return_counts=True), strict=True):
        length, end = -int(length), done + int(count)
        while done < end:
            at = bisect.bisect_left(sizes, length)
            if at < len(sizes):
                free = sizes[at]
                rows = open_rows[free].pop()
                if not open_rows[free]:
                    del open_rows[free], sizes[at]
            else:  # Nowhere to put it: as many new rows as all chunks of this length fill.
                free = seq_len
                rows = num_rows + np.arange(-(-(end - done) // (free // length)))
                num_rows += len(rows)
            each = (
                free // length
            )  # A row takes all it can: what is left of it is again the best fit.
            chunks = order[done : min(end, done + each * len(rows))]
            nth = np.arange(len(chunks))
            owner, nth = rows[nth // each], nth % each
            row[chunks], offset[chunks] = owner, seq_len - free + nth * length
            segment[chunks] = segments_in[owner] + nth + 1
            placed = np.clip(len(chunks) - each * np.arange(len(rows)), 0, each)
            segments_in[rows] += placed
            for number in np.unique(placed):
                remaining = free - int(number) * length
                if remaining and remaining not in open_rows:
                    bisect.insort(sizes, remaining)
                if remaining:
                    open_rows.setdefault(remaining, []).append(rows[placed == number])
            done += len(chunks)
    return row, offset, segment, num_rows


def lay_out(chunks: Chunks, seq_len: int) -> dict[str, np.ndarray]:
    """Puts chunks into rows of `seq_len` slots.

    Returns:
      tokens, targets, segment_ids (from 1; 0 is padding), positions: int32 [rows, T]; loss_mask:
      uint8 [rows, T].
    """
    row, offset, segment, num_rows = assign_rows(chunks.slots, seq_len)
    # One entry per slot filled: where it is read (flat tokens) and where it is written (flat rows).
    position = np.arange(chunks.slots.sum()) - np.repeat(
        np.cumsum(chunks.slots) - chunks.slots, chunks.slots
    )
    source = np.repeat(chunks.start, chunks.slots) + position
    target = np.repeat(row * seq_len + offset, chunks.slots) + position
    values = {
        "tokens": chunks.tokens[source],
        "targets": chunks.tokens[source + 1],
        "loss_mask": chunks.loss_mask[source + 1],
        "segment_ids": np.repeat(segment, chunks.slots),
        "positions": position,
    }
    packed_rows = {}
    for field in FIELDS:
        flat = np.zeros(num_rows * seq_len, np.uint8 if field == "loss_mask" else np.int32)
        flat[target] = values[field]
        packed_rows[field] = flat.reshape(num_rows, seq_len)
    return packed_rows


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """Positions int32 [rows, T] that restart at every segment; 0 on padding."""
    slot = np.broadcast_to(np.arange(segment_ids.shape[1], dtype=np.int32), segment_ids.shape)
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    begin = np.maximum.accumulate(np.where(begins, slot, 0), axis=1)
    return np.where(segment_ids > 0, slot - begin, 0)


def _build(
    reader: records.RecordReader,
    directory: epath.Path,
    key: dict[str, Any],
) -> None:
    """Packs everything into a temporary directory and renames it: nobody sees half an artifact.

    For a bucket, that is a directory of this machine; what says what the rows are is copied last.
    """
    seq_len = key["seq_len"]
    parent = epath.Path(tempfile.gettempdir()) if storage.in_bucket(directory) else directory.parent
    temporary = parent / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    totals = dict.fromkeys(
        ("rows", "slots", "loss_tokens", "segments", "dropped_overlong", "dropped_without_loss"), 0
    )
    blocks = 0
    try:
        for blocks, examples in enumerate(_blocks(reader), start=1):
            chunks = cut(examples, seq_len, key["overlong"], key["max_reply_tokens"])
            fields = lay_out(chunks, seq_len)
            rows = np.stack([fields[name].astype("<i4") for name in _STORED], axis=1)
            # Rows come out longest chunk first. Shuffled, any leading part of them is a fair
            # sample.
            order = np.random.default_rng(blocks).permutation(len(rows))
            records.write_ordered(
                _row_path(temporary, blocks - 1), (rows[i].tobytes() for i in order)
            )
            totals["rows"] += len(rows)
            totals["slots"] += int(chunks.slots.sum())
            totals["loss_tokens"] += int(fields["loss_mask"].sum())
            totals["segments"] += len(chunks.slots)
            totals["dropped_overlong"] += chunks.dropped_overlong
            totals["dropped_without_loss"] += chunks.dropped_without_loss
        if not totals["rows"]:
            raise UserError(
                f"no example of {reader.paths[0]} fits rows of {seq_len} tokens "
                f"({totals['dropped_overlong']} are longer, {totals['dropped_without_loss']} "
                "pieces have nothing to learn from): raise data.seq_len or data.max_reply_tokens, "
                "or data.overlong='split'"
            )
        files.atomic_write(
            temporary / _STATS, json.dumps({**key, **totals, "blocks": blocks}, indent=2) + "\n"
        )
        if _settings(directory) == key:
            return  # Another run was first, and may be reading: its rows are the same.
        if storage.in_bucket(directory):
            storage.remove(directory)
            for block in range(blocks):
                storage.upload(_row_path(temporary, block), _row_path(directory, block))
            storage.upload(temporary / _STATS, directory / _STATS)
            return
        if directory.exists():
            directory.rmtree()
        temporary.replace(directory)
    except OSError as error:
        if _settings(directory) != key:  # Else it came first between the last two lines.
            reason = files.explain(error, directory) or f"can't write {directory}: {error}"
            raise UserError(reason) from error
    finally:
        if temporary.exists():
            temporary.rmtree()


def _blocks(reader: records.RecordReader) -> Iterator[list[records.TokenExample]]:
    block: list[records.TokenExample] = []
    size = 0
    for example in reader:
        block.append(example)
        size += len(example.tokens)
        if size >= _BLOCK_TOKENS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _row_path(directory: epath.Path, block: int) -> epath.Path:
    return directory / f"rows-{block:05d}.array_record"


def _key(
    paths: Sequence[epath.Path], seq_len: int, overlong: str, max_reply_tokens: int
) -> dict[str, Any]:
    """What the packed rows depend on: the source's bytes and the settings."""
    return {
        "schema": SCHEMA_VERSION,
        "source": files.digest_files(paths),
        "seq_len": seq_len,
        "overlong": overlong,
        "max_reply_tokens": max_reply_tokens,
    }


def _settings(directory: epath.Path) -> dict[str, Any] | None:
    """The key that the rows in a directory were made with; None if there are none."""
    path = directory / _STATS
    if not path.exists():
        return None
    try:
        stats = json.loads(path.read_text())
    except ValueError:
        return None  # Damaged: the rows are made again.
    names = ("schema", "source", "seq_len", "overlong", "max_reply_tokens")
    return {name: stats.get(name) for name in names}
