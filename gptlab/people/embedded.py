"""The backend that answers by itself: a model, or several, each with an engine in this process.

A model is named by a workdir. Of a rounds workdir it is the promoted policy, and that is watched:
when a newer one is promoted, it is loaded and compiled beside the old one, new requests go to it,
and the old engine ends when its last request has. For that time both are in memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from etils import epath
from jax.sharding import Mesh

from gptlab.data import chat, chat_template
from gptlab.data.records import Message
from gptlab.people import policy as policies
from gptlab.people.backend import (
    Ask,
    Busy,
    Invalid,
    Model,
    Piece,
    Unavailable,
    UnknownModel,
    Usage,
)
from gptlab.people.engine import ALTERNATIVES, Engine, Options, Request, Stats, Ticket, Token
from gptlab.people.reply import Reader
from gptlab.run.errors import UserError

_SEEDS = 2**64
_LEAST_ROOM = 8  # tokens for a prompt, whatever the reply may take
_LONG_TEXT = 20_000  # characters; tokenizing more would hold up the event loop


@dataclasses.dataclass
class _Served:
    """A name, and what answers under it now."""

    workdir: str
    path: epath.Path  # the artifact
    engine: Engine
    created: int


class Embedded:
    """A Backend (backend.py)."""

    def __init__(
        self,
        workdirs: Mapping[str, str],
        options: Options,
        dtype: str,
        mesh: Mesh,
        deadline_seconds: float,
        watch_seconds: float | None,
        load: Callable[[epath.PathLike, str, Mesh], policies.Policy] = policies.load,
    ):
        """Loads and compiles every model.

        Args:
          workdirs: by name; the first is the default.
          options: of every engine.
          dtype: what the models compute in.
          mesh: where they live.
          deadline_seconds: of requests without one of their own.
          watch_seconds: how often to look for newly promoted policies; None: never.
          load: makes a policy of an artifact.

        Raises:
          UserError: a workdir holds no language model, or the options don't fit it.
        """
        if not workdirs:
            raise UserError("config.models names no model")
        self._options, self._dtype, self._mesh = options, dtype, mesh
        self._deadline, self._draining, self._load = deadline_seconds, False, load
        self._served = {name: self._serve(workdir) for name, workdir in workdirs.items()}
        self._retiring: set[Engine] = set()
        self._closed = threading.Event()
        self._changing = threading.Lock()  # no engine is put in place after `close` has looked
        self._watcher = threading.Thread(target=self._watch, args=(watch_seconds,), daemon=True)
        if watch_seconds is not None:
            self._watcher.start()

    def models(self) -> Sequence[Model]:
        """See Backend."""
        return [
            Model(name, one.engine.policy.identity, one.created, one.engine.window)
            for name, one in self._served.items()
        ]

    def stats(self) -> Mapping[str, Stats]:
        """Of each model's engine, by name."""
        return {name: one.engine.stats() for name, one in self._served.items()}

    def failures(self) -> list[str]:
        """One line for each engine that has failed."""
        return [
            f"{name}: {one.engine.failure}"
            for name, one in self._served.items()
            if one.engine.failure is not None
        ]

    async def reply(self, ask: Ask, deadline: float | None = None) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        until = time.monotonic() + (self._deadline if deadline is None else deadline)
        if isinstance(ask.prompt, str):
            length = len(ask.prompt)
        else:
            length = sum(len(m.content) + len(m.context or "") for m in ask.prompt)
        while True:
            engine = self._engine(ask.model)
            if length > _LONG_TEXT:
                prepared = await asyncio.to_thread(prepare, engine, ask, until)
            else:
                prepared = prepare(engine, ask, until)
            try:
                ticket = engine.submit(prepared[0])
            except Busy as busy:
                if busy.draining and not self._draining and engine is not self._engine(ask.model):
                    continue  # it has just been replaced
                raise
            break
        try:
            async for piece in _pieces(engine, ask, ticket, prepared[1]):
                yield piece
        finally:
            engine.cancel(ticket)

    async def close(self, drain_seconds: float) -> None:
        """See Backend."""
        self._draining = True
        with self._changing:
            self._closed.set()
            engines = [one.engine for one in self._served.values()] + [*self._retiring]
        await asyncio.gather(*(asyncio.to_thread(e.stop, drain_seconds) for e in engines))
        if self._watcher.is_alive():  # it stops what it is compiling
            await asyncio.to_thread(self._watcher.join, drain_seconds)

    def _engine(self, name: str) -> Engine:
        if name not in self._served:
            raise UnknownModel(
                f"there is no model {name!r}; there are {', '.join(self._served)}", "model"
            )
        return self._served[name].engine

    def _serve(self, workdir: str) -> _Served:
        path = policies.find(workdir)
        policy = self._load(path, self._dtype, self._mesh)
        return _Served(workdir, path, Engine(policy, self._options, self._mesh), int(time.time()))

    def _watch(self, seconds: float) -> None:
        """Looks for promoted policies until the end; what goes wrong is told of once."""
        passed_over: dict[str, epath.Path | None] = {}
        while not self._closed.wait(seconds):
            for name in self._served:
                self._follow(name, passed_over)

    def _follow(self, name: str, passed_over: dict[str, epath.Path | None]) -> None:
        """Puts the promoted policy in place of an older one. (Its variables die with the call.)"""
        one, path = self._served[name], None
        try:
            path = policies.find(one.workdir)
            if path in (one.path, passed_over.get(name)) or self._closed.is_set():
                return
            newer = self._serve(one.workdir)
        except Exception as error:  # whatever it is, the old one goes on
            if name not in passed_over or passed_over[name] != path:
                _say(f"{name} stays at {one.path}: {error}")
            passed_over[name] = path
            return
        with self._changing:
            if self._closed.is_set():
                newer.engine.stop(0)
                return
            self._served[name] = newer
            self._retire(one.engine)
        _say(f"{name} is now {newer.path}")

    def _retire(self, engine: Engine) -> None:
        """Ends an engine when its last request has, each by its own deadline, and forgets it."""

        def stop() -> None:
            engine.stop(threading.TIMEOUT_MAX)
            with self._changing:
                self._retiring.remove(engine)

        self._retiring.add(engine)
        threading.Thread(target=stop, daemon=True).start()


def _say(line: str) -> None:
    print(f"gptlab serve: {line}", file=sys.stderr, flush=True)


def prepare(engine: Engine, ask: Ask, until: float) -> tuple[Request, str | None]:
    """The request in tokens, and what the person should know of its prompt.

    Raises Invalid for what this model can't do.
    """
    tokenizer, window = engine.policy.tokenizer, engine.window
    if ask.max_tokens is not None and not 1 <= ask.max_tokens <= window - _LEAST_ROOM:
        raise Invalid(
            f"max_tokens={ask.max_tokens} is not between 1 and {window - _LEAST_ROOM}: this "
            f"model's window is {window} tokens, for prompt and reply together",
            "max_tokens",
        )
    if ask.logprobs is not None and not 0 <= ask.logprobs <= ALTERNATIVES:
        raise Invalid(f"logprobs={ask.logprobs} is not between 0 and {ALTERNATIVES}", "logprobs")
    # A quarter is kept for a reply of any length: the window has room for more of the next ones.
    room = window - (ask.max_tokens or max(1, window // 4))
    notice = None
    if isinstance(ask.prompt, str):
        ids = tokenizer.encode_document(ask.prompt)
        if len(ids) > room:
            raise Invalid(
                f"the prompt has {len(ids)} tokens, which leaves no room for a reply of "
                f"{window - room} in this model's window of {window}: shorten either",
                "prompt",
            )
    else:
        ids, notice = _chat_prompt(engine, ask.prompt, room)
    seed = secrets.randbelow(_SEEDS) if ask.seed is None else ask.seed % _SEEDS
    request = Request(
        ids=tuple(ids),
        max_tokens=ask.max_tokens or window - len(ids),
        temperature=ask.temperature,
        top_k=min(ask.top_k, engine.policy.model.config.vocab_size),
        top_p=ask.top_p,
        seed=seed,
        index=ask.index,
        alternatives=ask.logprobs or 0,
        deadline=until,
    )
    return request, notice


def _chat_prompt(
    engine: Engine, messages: Sequence[Message], room: int
) -> tuple[list[int], str | None]:
    if not messages:
        raise Invalid("a conversation needs at least one message", "messages")
    try:
        asked = chat.ask(engine.policy.tokenizer, messages, room)
    except chat_template.Refused as error:
        raise Invalid(str(error), "messages") from None
    except UserError as error:
        raise Invalid(f"{error}; this model's window is {engine.window}", "messages") from None
    turns = len(messages) - (messages[0].role == "system" and len(messages) > 1)
    return asked.ids, chat.left_out(asked, turns, engine.window)


async def _pieces(
    engine: Engine, ask: Ask, ticket: Ticket, notice: str | None
) -> AsyncGenerator[Piece, None]:
    tokenizer = engine.policy.tokenizer
    before = "" if isinstance(ask.prompt, str) else chat.blanks_before_reply(tokenizer)
    reader = Reader(tokenizer, ask.stop, before, ask.logprobs is not None)
    finish, count = None, 0
    while finish is None:
        event = await ticket.events.get()
        while True:  # all that has come: a slow reader gets longer pieces
            if isinstance(event, Exception):
                raise event if isinstance(event, Unavailable) else Unavailable(str(event))
            if isinstance(event, str):
                finish = event
                reader.end()
                break
            assert isinstance(event, Token)
            reader.feed(event.id, event.logprob, event.top)
            count += 1
            if reader.stopped:
                finish = "stop"
                break
            if ticket.events.empty():
                break
            event = ticket.events.get_nowait()
        if finish is not None and reader.stopped:
            finish = "stop"
        text, tokens = reader.take()
        if finish is None and (text or tokens):
            yield Piece(text, tokens, policy=engine.policy.identity)
    usage = Usage(len(ticket.request.ids), count, ticket.cached_tokens)
    yield Piece(text, tokens, finish, usage, engine.policy.identity, notice)
