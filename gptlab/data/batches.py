"""Batches for the loops. Each is a pure function of (seed, step), so resuming needs the step only.

A global batch is `batch_size` consecutive entries of a shuffled, endless order that reshuffles
every epoch (`grain.MapDataset`). Each process takes a contiguous block of its rows, so that the
blocks of all processes one after another are the batch of a single process.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import flax.struct
import grain.python as grain
import numpy as np

from gptlab.data import chat
from gptlab.data.mixtures import PackedMixture
from gptlab.data.packing import FIELDS, PackedSource
from gptlab.data.records import Comparison, Prompt
from gptlab.data.tokenizer import Tokenizer
from gptlab.run.errors import UserError

_PREFETCH = 2  # batches
_MIN_PROMPT_TOKENS = 16  # A reply that leaves its prompt less room than this is not used.


def _per_token() -> Any:
    """A field [B, T]: a mesh may split its tokens (train/mesh.py); of others, the rows alone."""
    return flax.struct.field(metadata={"axes": ("batch", "length")})


@flax.struct.dataclass
class TokenBatch:
    """Packed rows."""

    tokens: np.ndarray = _per_token()  # int32 [B, T]
    targets: np.ndarray = _per_token()  # int32 [B, T]
    loss_mask: np.ndarray = _per_token()  # float32 [B, T], 1 where the target counts
    segment_ids: np.ndarray = _per_token()  # int32 [B, T], from 1; 0 is padding
    positions: np.ndarray = _per_token()  # int32 [B, T], from 0 in each segment


@flax.struct.dataclass
class ComparisonBatch:
    """Prompts with ranked replies; with fewer than N candidates, the rest are absent."""

    tokens: np.ndarray  # int32 [B, N, T], prompt + reply, right padded
    last_index: np.ndarray  # int32 [B, N], the last real token; 0 for an absent candidate
    ranks: np.ndarray  # int32 [B, N], 1 is best, equal is a tie; 0 for an absent candidate
    weight: np.ndarray  # float32 [B], the comparison's own; 0 for a padding row


@flax.struct.dataclass
class PromptBatch:
    """Prompts to be answered, each ending with the assistant's header."""

    tokens: np.ndarray  # int32 [B, P], right padded
    lengths: np.ndarray  # int32 [B]
    index: np.ndarray  # int32 [B], row in the list of prompts; -1 for a padding row


BatchT = TypeVar("BatchT", TokenBatch, ComparisonBatch, PromptBatch)


class _Batches(Generic[BatchT]):
    """What the batch sources share: which entries make up the batch at a step, and prefetching.

    What is left over of an epoch is not lost: it begins the first batch of the next one.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        entries: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        what: str,
    ):
        if batch_size % process_count:
            raise UserError(
                f"batch_size={batch_size} can't be divided among {process_count} processes"
            )
        if entries < batch_size:
            raise UserError(
                f"too little data for one batch: {what}, batch_size={batch_size}; "
                "lower batch_size or add data"
            )
        self._order = order
        self._batch_size = batch_size
        self._local = batch_size // process_count
        self._first = process_index * self._local
        self._entries = entries
        self._process = (process_index, process_count)

    def __len__(self) -> int:
        """Entries of an epoch."""
        return self._entries

    def at(self, step: int) -> BatchT:
        """This process's rows of the batch at a step (numpy)."""
        begin = step * self._batch_size + self._first
        return self._make([self._order[i] for i in range(begin, begin + self._local)])

    def iterate(self, start_step: int = 0) -> Generator[BatchT, None, None]:
        """Yields the batches from a step on, for ever, prepared ahead in a thread.

        `close` it, so that the thread ends.
        """
        return _prefetch(self.at, start_step)

    def _eval_rows(self, max_batches: int | None) -> Iterator[list[int]]:
        return _eval_rows(self._entries, self._batch_size, max_batches, *self._process)

    def _make(self, entries: list[Any]) -> BatchT:
        raise NotImplementedError


class TrainBatches(_Batches[TokenBatch]):
    """Training batches of packed rows, of one task or of a mixture at its rates."""

    def __init__(
        self,
        source: PackedSource | PackedMixture,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Makes the order of rows.

        Args:
          source: packed rows. Every member of a mixture is shuffled for itself and repeated as
            needed; an epoch is as many rows as all of them have together.
          batch_size: rows in a global batch.
          seed: of the order.
          process_index: which block of rows is returned.
          process_count: into how many blocks a batch is divided.

        Raises:
          UserError: fewer rows than one batch, or batch_size can't be divided among the processes.
        """
        mixture = _as_mixture(source)
        order = _mixed(
            mixture, [_shuffled(len(rows), seed, i) for i, rows in enumerate(mixture.sources)]
        )
        what = " + ".join(
            f"{len(s)} packed rows of {s.seq_len} in {s.directory}" for s in mixture.sources
        )
        super().__init__(order, len(mixture), batch_size, process_index, process_count, what)
        self._sources = mixture.sources

    def _make(self, entries: list[tuple[int, int]]) -> TokenBatch:
        return _token_batch(self._sources, entries)


def eval_batches(
    source: PackedSource | PackedMixture,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[TokenBatch]:
    """Every row once, in order; the last batch is filled up with rows whose loss_mask is 0.

    Of a mixture: its members' rows at their rates, until one of them has no more. So any part of
    it has the same shares of the members as training has, and no row counts twice.
    """
    mixture = _as_mixture(source)
    order = _mixed(mixture, [grain.MapDataset.range(len(rows)) for rows in mixture.sources])
    for rows in _eval_rows(len(order), batch_size, max_batches, process_index, process_count):
        yield _token_batch(mixture.sources, [order[row] if row >= 0 else None for row in rows])


class ComparisonBatches(_Batches[ComparisonBatch]):
    """Batches of ranked replies, encoded once at the start.

    All candidates of a comparison follow the same prompt, trimmed by whole turns from the left to
    `prompt_len` and until it fits beside the longest reply: replies differ in what they say, never
    in what they answer. With the prompt_len of PPO and evaluation, a reward model is trained on
    the very tokens that it will score there.

    Attributes:
      comparisons: those in use, in order; row i of `eval` is comparisons[i] and column j its
        candidate j.
      dropped: how many have fewer than two candidates whose reply fits.
    """

    def __init__(
        self,
        comparisons: Iterable[Comparison],
        tokenizer: Tokenizer,
        batch_size: int,
        max_candidates: int,
        seq_len: int,
        prompt_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Encodes the comparisons.

        Args:
          comparisons: rankings by people or simulated labellers.
          tokenizer: of the model to be trained.
          batch_size: comparisons in a global batch.
          max_candidates: N, the width of a batch.
          seq_len: T, tokens of prompt and reply.
          prompt_len: tokens of the prompt at most.
          seed: of the order.
          process_index: which block of rows is returned.
          process_count: into how many blocks a batch is divided.

        Raises:
          UserError: a comparison has more than max_candidates candidates, or too few comparisons
            fit.
        """
        self._shape = (max_candidates, seq_len)
        self.comparisons: list[Comparison] = []
        self._encoded: list[list[np.ndarray | None]] = []
        self.dropped = 0
        for comparison in comparisons:
            if len(comparison.candidates) > max_candidates:
                raise UserError(
                    f"comparison {comparison.id} has {len(comparison.candidates)} candidates: "
                    f"raise data.max_candidates={max_candidates}"
                )
            encoded = _encode_candidates(tokenizer, comparison, seq_len, prompt_len)
            if sum(tokens is not None for tokens in encoded) < 2:
                self.dropped += 1
                continue
            self.comparisons.append(comparison)
            self._encoded.append(encoded)
        what = f"{len(self.comparisons)} comparisons ({self.dropped} do not fit {seq_len} tokens)"
        order = _shuffled(len(self.comparisons), seed)
        super().__init__(
            order, len(self.comparisons), batch_size, process_index, process_count, what
        )

    def eval(self, max_batches: int | None = None) -> Iterator[ComparisonBatch]:
        """Yields every comparison once, in order; the last batch is filled up with weight 0."""
        for rows in self._eval_rows(max_batches):
            yield self._make(rows)

    def _make(self, entries: list[int]) -> ComparisonBatch:
        candidates, seq_len = self._shape
        tokens = np.zeros((len(entries), candidates, seq_len), np.int32)
        last_index = np.zeros((len(entries), candidates), np.int32)
        ranks = np.zeros((len(entries), candidates), np.int32)
        weight = np.zeros(len(entries), np.float32)
        for row, entry in enumerate(entries):
            if entry < 0:
                continue
            weight[row] = self.comparisons[entry].weight
            for column, ids in enumerate(self._encoded[entry]):
                if ids is not None:
                    tokens[row, column, : len(ids)] = ids
                    last_index[row, column] = len(ids) - 1
                    ranks[row, column] = self.comparisons[entry].ranks[column]
        return ComparisonBatch(tokens=tokens, last_index=last_index, ranks=ranks, weight=weight)


class PromptBatches(_Batches[PromptBatch]):
    """Batches of prompts, encoded once at the start; `prompts[index]` is the prompt of a row."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        tokenizer: Tokenizer,
        batch_size: int,
        prompt_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Encodes the prompts, each in at most `prompt_len` tokens.

        Raises:
          UserError: fewer prompts than one batch, or a system message fills `prompt_len` alone.
        """
        self.prompts = list(prompts)
        self._prompt_len = prompt_len
        self._encoded = [
            np.array(chat.encode_prompt(tokenizer, prompt.messages, prompt_len), np.int32)
            for prompt in self.prompts
        ]
        what = f"{len(self.prompts)} prompts"
        order = _shuffled(len(self.prompts), seed)
        super().__init__(order, len(self.prompts), batch_size, process_index, process_count, what)

    def eval(self, max_batches: int | None = None) -> Iterator[PromptBatch]:
        """Yields every prompt once, in order; the last batch is filled up with index -1."""
        for rows in self._eval_rows(max_batches):
            yield self._make(rows)

    def _make(self, entries: list[int]) -> PromptBatch:
        tokens = np.zeros((len(entries), self._prompt_len), np.int32)
        # A padding row holds one token, so that nothing downstream meets an empty prompt.
        lengths = np.ones(len(entries), np.int32)
        for row, entry in enumerate(entries):
            if entry >= 0:
                lengths[row] = len(self._encoded[entry])
                tokens[row, : lengths[row]] = self._encoded[entry]
        return PromptBatch(tokens=tokens, lengths=lengths, index=np.array(entries, np.int32))


def _encode_candidates(
    tokenizer: Tokenizer, comparison: Comparison, seq_len: int, prompt_len: int
) -> list[np.ndarray | None]:
    """Prompt + reply of each candidate; None for a reply that leaves the prompt too little room."""
    replies = [
        chat.encode_reply(tokenizer, candidate.content, candidate.finished)
        for candidate in comparison.candidates
    ]
    fits = [len(reply) + _MIN_PROMPT_TOKENS <= seq_len for reply in replies]
    if not any(fits):
        return [None] * len(replies)
    longest = max(len(reply) for reply, fit in zip(replies, fits, strict=True) if fit)
    room = min(prompt_len, seq_len - longest)
    prompt = chat.encode_prompt(tokenizer, comparison.prompt.messages, room)
    return [
        np.array(prompt + reply, np.int32) if fit else None
        for reply, fit in zip(replies, fits, strict=True)
    ]


def _shuffled(length: int, seed: int, stream: int = 0) -> grain.MapDataset:
    """An endless order of 0..length-1 that is shuffled anew in every epoch."""
    # Grain shuffles epoch e by seed + e: neighbouring seeds would share their epochs.
    state = int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
    return grain.MapDataset.range(length).shuffle(seed=state).repeat()


def _eval_rows(
    length: int, batch_size: int, max_batches: int | None, process_index: int, process_count: int
) -> Iterator[list[int]]:
    """Yields this process's rows of each evaluation batch, -1 where there are none left."""
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} can't be divided among {process_count} processes")
    local = batch_size // process_count
    batches = -(-length // batch_size)
    for batch in range(batches if max_batches is None else min(batches, max_batches)):
        begin = batch * batch_size + process_index * local
        yield [row if row < length else -1 for row in range(begin, begin + local)]


def _as_mixture(source: PackedSource | PackedMixture) -> PackedMixture:
    return source if isinstance(source, PackedMixture) else PackedMixture((source,), (1.0,))


def _mixed(mixture: PackedMixture, orders: list[grain.MapDataset]) -> grain.MapDataset:
    """(number of the source, row in it), the sources taking turns at the mixture's rates."""
    entries = [
        order.map(lambda row, number=number: (number, row)) for number, order in enumerate(orders)
    ]
    return entries[0] if len(entries) == 1 else grain.MapDataset.mix(entries, list(mixture.rates))


def _token_batch(
    sources: Sequence[PackedSource], entries: Sequence[tuple[int, int] | None]
) -> TokenBatch:
    """The rows (source, row) of several sources as one batch; None is a row of padding."""
    shape = (len(entries), sources[0].seq_len)
    fields: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in FIELDS}
    for number, source in enumerate(sources):
        wanted = [(i, entry[1]) for i, entry in enumerate(entries) if entry and entry[0] == number]
        if wanted:
            at, rows = zip(*wanted, strict=True)
            for name, values in source.rows(rows).items():
                fields[name][list(at)] = values
    return TokenBatch(**{**fields, "loss_mask": fields["loss_mask"].astype(np.float32)})


def _prefetch(at: Callable[[int], BatchT], start_step: int) -> Generator[BatchT, None, None]:
    """Yields at(start_step), at(start_step + 1), ... made ahead in a thread that it owns."""
    ready: queue.Queue[BatchT | BaseException] = queue.Queue(_PREFETCH)
    stop = threading.Event()

    def put(item: BatchT | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in itertools.count(start_step):
                put(at(step))
                if stop.is_set():
                    return
        except BaseException as error:  # Raised where the batch is asked for.
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
