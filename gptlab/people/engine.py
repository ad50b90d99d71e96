"""Continuous batching: requests join and leave a running batch between its steps.

The engine is a thread of its own. Each turn it starts at most one chunk of a prompt and one step
of all running slots (slots.py), so that a long prompt can't hold up the others, and then reads what
the turn before has drawn, while the device works on this one. Stop tokens and lengths are seen on
the device; the host learns of them a turn later.

A free slot remembers the chunks that it holds: a conversation's next turn, which begins with the
same ones, takes that slot (or copies from one that is needed as it is) and computes what is new.

All of the schedule belongs to the thread. Others leave it commands, and get events through their
event loops.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.model import decode
from gptlab.people import slots as device
from gptlab.people.backend import Busy, Unavailable
from gptlab.people.policy import Policy
from gptlab.run.errors import UserError

ALTERNATIVES = 20  # the most that OpenAI's API gives for a token
_RECENT = 0.1  # weight of the newest request in the mean time of one


@dataclasses.dataclass(frozen=True)
class Options:
    """How an engine is laid out; part of what is compiled."""

    slots: int  # requests that run at the same time
    chunk: int  # W, tokens of a prompt that are computed at once
    max_len: int | None  # tokens of prompt and reply together; None: the model's window
    queue: int  # requests that may wait for a slot
    block: int = decode.KEY_BLOCK  # positions that are read at once, where the window has more

    def __post_init__(self) -> None:
        """Refuses values without a meaning."""
        for name, least in (("slots", 1), ("chunk", 1), ("queue", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"config.engine.{name}={getattr(self, name)} must be at least {least}"
                )
        if self.max_len is not None and self.max_len < 2:
            raise UserError(f"config.engine.max_len={self.max_len} must be at least 2")

    def window(self, max_len: int) -> int:
        """Tokens of prompt and reply together, of a model with max_len: whole chunks only."""
        length = min(self.max_len or max_len, max_len) // self.chunk * self.chunk
        if length < 2:
            raise UserError(
                f"config.engine.chunk={self.chunk} does not fit the window of "
                f"{min(self.max_len or max_len, max_len)} tokens: choose a smaller one"
            )
        return length


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt in tokens, and how its reply is drawn."""

    ids: tuple[int, ...]
    max_tokens: int  # together with ids they fit the window
    temperature: float
    top_k: int
    top_p: float
    seed: int  # 0 <= seed < 2^64
    index: int  # the reply's key is fold_in(key(seed), index)
    alternatives: int  # at each token, ALTERNATIVES at most
    deadline: float | None  # of time.monotonic()


@dataclasses.dataclass(frozen=True)
class Token:
    """One of a reply."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest, as many as were asked for


Event = Token | str | Exception  # a finish_reason of backend.py or an error is the last one


class Ticket:
    """A request's place in the engine. But for `events` it belongs to the engine's thread."""

    def __init__(self, request: Request, width: int):
        """Belongs to the event loop that runs now."""
        self.request, self._width = request, width
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.since = time.monotonic()
        ids = request.ids
        self.chunks = [ids[at : at + width] for at in range(0, len(ids), width)]
        self.cached_tokens = 0  # of the prompt, not computed anew
        self.computed = 0  # chunks
        self.started = 0  # tokens that prefill or steps were started for
        self.seen = 0  # tokens that the host has read
        self.slot: int | None = None
        self.over = False

    def steps(self) -> bool:
        """Whether a step may draw for it: its last token is not yet on its way."""
        return self.computed == len(self.chunks) and self.started < self.request.max_tokens

    def chunk(self, slot: int) -> device.Chunk:
        """The next one, for the device."""
        request, own = self.request, self.chunks[self.computed]
        tokens = np.zeros((self._width,), np.int32)
        tokens[: len(own)] = own
        last = self.computed + 1 == len(self.chunks)
        numbers = (slot, self.computed * self._width, len(own), last, request.max_tokens)
        drawing = (request.top_k, request.alternatives > 0, request.index)
        return device.Chunk(
            tokens,
            np.array([*numbers, *drawing], np.int32),
            np.array([request.temperature, request.top_p], np.float32),
            np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32),
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """Gauges, and counters since the engine began."""

    waiting: int = 0
    running: int = 0
    slots: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompt_tokens, not computed anew
    steps: int = 0


class Engine:
    """One policy, answering. `submit`, `cancel`, `stop` and the rest in public: from any thread."""

    def __init__(self, policy: Policy, options: Options, mesh: Mesh):
        """Compiles everything and starts the thread. UserError if the options don't fit."""
        self.policy, self.options, self._mesh = policy, options, mesh
        config = policy.model.config
        self.window = options.window(config.max_len)
        # Shared, under the condition:
        self._condition = threading.Condition()
        self._inbox: list[tuple[Ticket, bool]] = []  # (ticket, is it cancelled)
        self._queued = 0  # submitted, and in no slot yet
        self._stopping = self._cut = False
        self._failure: Exception | None = None
        self._seconds = 1.0  # that a request takes, about
        self._stats = Stats(slots=options.slots)
        # The thread's own:
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._rows: list[Ticket | None] = [None] * options.slots  # who is in which slot
        self._prefilling: Ticket | None = None
        self._held: list[list[tuple[int, ...]]] = [[] for _ in self._rows]  # chunks in the cache
        self._freed = [0.0] * options.slots  # when
        self._keep = np.ones(options.slots, bool)
        self._unread: list[tuple[list[Ticket | None], device.Drawn]] = []
        self._outbox: list[tuple[Ticket, Event]] = []
        self._prompt_tokens = self._cached_tokens = self._steps = 0
        ends = np.zeros(config.vocab_size, bool)
        ends[list(policy.end_tokens)] = True
        self._is_end = ends.tolist()
        with jax.set_mesh(mesh):
            self._ends = jax.device_put(ends, NamedSharding(mesh, PartitionSpec()))
            self._warm_up()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Takes a request of this thread's event loop.

        Raises:
            Busy: as many wait as may, or the engine takes no more.
            Unavailable: the engine has failed.
        """
        ticket = Ticket(request, self.options.chunk)
        with self._condition:
            if self._failure is not None:
                raise Unavailable("the engine has failed") from self._failure
            if self._stopping:
                raise Busy(1.0, draining=True)
            slots = self.options.slots
            if self._queued >= slots - self._stats.running + self.options.queue:
                raise Busy(max(1.0, self._seconds * (1 + self._queued // slots)))
            self._queued += 1
            self._inbox.append((ticket, False))
            self._condition.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the place of a request that nobody waits for any more. Idempotent."""
        with self._condition:
            self._inbox.append((ticket, True))
            self._condition.notify()

    def stats(self) -> Stats:
        """The state of things, a turn ago at most."""
        with self._condition:
            return dataclasses.replace(self._stats, waiting=self._queued)

    @property
    def failure(self) -> Exception | None:
        """What ended the thread too early."""
        return self._failure

    def stop(self, seconds: float) -> None:
        """Takes no more requests, waits for those that are there, then cuts off the rest."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(seconds)
        with self._condition:
            self._cut = True
            self._condition.notify()
        self._thread.join()

    def _warm_up(self) -> None:
        """Compiles by running everything: twice, as results may lie elsewhere than the first."""
        config, size = self.policy.model.config, self.options.slots
        begin = jax.jit(device.init, static_argnums=(0, 1, 2))
        self._slots = begin(config, size, self.window)
        chunk = device.Chunk(
            np.zeros((self.options.chunk,), np.int32),
            np.array([0, 0, 1, 0, 1, 0, 0, 0], np.int32),
            np.zeros((2,), np.float32),
            np.zeros((2,), np.uint32),
        )
        for _ in range(2):
            self._call(device.prefill, chunk)
            drawn = self._call(device.step, self._keep.copy())
            self._slots = device.copy(self._slots, np.zeros((2,), np.int32))
        jax.block_until_ready((self._slots, drawn))

    def _call(self, function: Any, argument: Any) -> device.Drawn:
        """Starts `prefill` or `step`, and returns what it will have drawn."""
        policy = self.policy
        alternatives = min(ALTERNATIVES, policy.model.config.vocab_size)
        self._slots, drawn = function(
            policy.model, policy.params, self._slots, argument, self._ends, alternatives,
            self.options.block,
        )  # fmt: skip
        return drawn

    def _main(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while self._take_commands():
                    self._turn()
                    self._publish()
        except Exception as error:
            with self._condition:
                self._failure = error
                self._stopping = True
            self._take_inbox()
            self._end_all(Unavailable(f"the engine has failed: {error}"))
            self._publish()
            raise

    def _take_commands(self) -> bool:
        """Does what others asked for, waiting if there is nothing else; False at the end."""
        with self._condition:
            while not (self._inbox or self._cut or self._waiting or self._unread or self._active()):
                if self._stopping:
                    return False
                self._condition.wait()
            cut = self._cut
        self._take_inbox()
        if cut:
            self._end_all("deadline")
            self._publish()
        return not cut

    def _take_inbox(self) -> None:
        with self._condition:
            commands, self._inbox = self._inbox, []
        for ticket, cancelled in commands:
            if cancelled:
                self._end(ticket, None)
            elif not ticket.over:
                self._waiting.append(ticket)

    def _active(self) -> bool:
        return any(row is not None for row in self._rows)

    def _turn(self) -> None:
        """One chunk, one step, and what the turn before has drawn."""
        now = time.monotonic()
        for ticket in [*self._waiting, *self._rows]:
            deadline = None if ticket is None else ticket.request.deadline
            if ticket is not None and deadline is not None and deadline <= now:
                self._end(ticket, "deadline")
        started = []
        if self._prefilling is None and self._waiting and None in self._rows:
            self._place(self._waiting.popleft())
        if self._prefilling is not None:
            started += self._prefill(self._prefilling)
        rows = [row if row is not None and row.steps() else None for row in self._rows]
        if any(row is not None for row in rows):
            started.append((rows, self._call(device.step, self._keep.copy())))
            self._steps += 1
            for row in rows:
                if row is not None:
                    row.started += 1
        before, self._unread = self._unread, started
        for rows, drawn in before:
            self._read(rows, drawn)

    def _place(self, ticket: Ticket) -> None:
        """Gives a request a slot, with the longest beginning of its prompt that any slot has."""
        common = [_common(held, ticket.chunks) for held in self._held]
        best = max(range(len(common)), key=common.__getitem__)
        # The last chunk is computed in any case, for what it says of the token after it.
        reused = min(common[best], len(ticket.chunks) - 1)
        slot = min(
            (s for s, row in enumerate(self._rows) if row is None), key=self._freed.__getitem__
        )
        whole = self._rows[best] is None and common[best] == len(self._held[best])
        if reused and whole:
            slot = best  # what it has beyond these chunks is nothing
        elif reused and slot != best:
            self._slots = device.copy(self._slots, np.array([best, slot], np.int32))
        self._held[slot] = ticket.chunks[:reused]
        self._rows[slot] = self._prefilling = ticket
        ticket.slot, ticket.computed = slot, reused
        ticket.cached_tokens = reused * self.options.chunk
        self._keep[slot] = True  # `prefill` says when it begins
        self._prompt_tokens += len(ticket.request.ids)
        self._cached_tokens += ticket.cached_tokens
        with self._condition:
            self._queued -= 1

    def _prefill(self, ticket: Ticket) -> list[tuple[list[Ticket | None], device.Drawn]]:
        """Starts one chunk; returns what it draws if it is the last."""
        assert ticket.slot is not None
        drawn = self._call(device.prefill, ticket.chunk(ticket.slot))
        own = ticket.chunks[ticket.computed]
        if len(own) == self.options.chunk:
            self._held[ticket.slot].append(own)
        ticket.computed += 1
        if ticket.computed < len(ticket.chunks):
            return []
        self._prefilling = None
        ticket.started = 1
        return [([ticket], drawn)]

    def _read(self, rows: list[Ticket | None], drawn: device.Drawn) -> None:
        """Waits for what was drawn, and hands it out."""
        tokens, logprobs = np.asarray(drawn.tokens).tolist(), np.asarray(drawn.logprobs).tolist()
        for row, ticket in enumerate(rows):
            if ticket is None or ticket.over:
                continue
            token = tokens[row]
            if self._is_end[token]:
                self._end(ticket, "stop")
                continue
            top: tuple[tuple[int, float], ...] = ()
            if count := ticket.request.alternatives:
                ids = np.asarray(drawn.top_tokens)[row, :count].tolist()
                values = np.asarray(drawn.top_logprobs)[row, :count].tolist()
                top = tuple(zip(ids, values, strict=True))
            self._outbox.append((ticket, Token(token, logprobs[row], top)))
            ticket.seen += 1
            if ticket.seen == ticket.request.max_tokens:
                self._end(ticket, "length")

    def _end(self, ticket: Ticket, event: Event | None) -> None:
        """Frees a request's place; None: nobody wants to know. Idempotent."""
        if ticket.over:
            return
        ticket.over = True
        if event is not None:
            self._outbox.append((ticket, event))
        if ticket.slot is None:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            with self._condition:
                self._queued -= 1
            return
        now = time.monotonic()
        self._rows[ticket.slot], self._freed[ticket.slot] = None, now
        self._keep[ticket.slot] = False
        if self._prefilling is ticket:
            self._prefilling = None
        with self._condition:
            self._seconds += _RECENT * (now - ticket.since - self._seconds)

    def _end_all(self, event: Event) -> None:
        for ticket in [*self._waiting, *self._rows]:
            if ticket is not None:
                self._end(ticket, event)

    def _publish(self) -> None:
        """Tells the others what has come."""
        with self._condition:
            self._stats = Stats(
                running=sum(row is not None for row in self._rows),
                slots=len(self._rows),
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                steps=self._steps,
            )
        events, self._outbox = self._outbox, []
        for loop in {ticket.loop for ticket, _ in events}:
            own = [pair for pair in events if pair[0].loop is loop]
            try:
                loop.call_soon_threadsafe(_hand_over, own)
            except RuntimeError:  # the loop is closed: nobody is left there
                for ticket, _ in own:
                    self._end(ticket, None)


def _common(held: list[tuple[int, ...]], chunks: list[tuple[int, ...]]) -> int:
    """How many chunks two prompts begin with alike."""
    count = 0
    for one, other in zip(held, chunks, strict=False):
        if one != other:
            break
        count += 1
    return count


def _hand_over(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
