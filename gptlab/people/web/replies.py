"""Replies that run: generated in a task of their own, followed by a stream, stopped, kept.

The task doesn't hang on the request that began it: when the browser goes away it is stopped in an
orderly way, and what came by then is kept as an unfinished reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from gptlab.people.backend import Ask, Backend, Piece, Refused, Unavailable
from gptlab.people.web.markdown import Streamed
from gptlab.run import errors

_LOG = logging.getLogger(__name__)
_PAUSE = 0.04  # seconds between two events: faster than people read
_REST = 9  # times what an event took to make: one reply takes a tenth of the time at most
REFUSED = "moderation refused the message"
REPLY_REFUSED = "moderation refused the reply"


class Running:
    """One reply. Make it with `begin`."""

    def __init__(self, person: str, pieces: AsyncIterator[Piece], keep: Callable[..., Any]):
        self.token = secrets.token_urlsafe(12)
        self.person = person
        self.message: Any = None  # what `keep` has returned
        self.notice: str | None = None
        self._pieces, self._keep = pieces, keep
        self._text, self._sent = "", 0
        self._changed = asyncio.Event()
        self._generating = True
        self._task: asyncio.Task[None] = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Ends the reply where it is."""
        if self._generating:
            self._task.cancel()

    async def ended(self) -> None:
        """Waits until the reply is kept."""
        await asyncio.wait([self._task])

    async def begun(self) -> None:
        """Waits for the first piece. Raises what asking for it raised."""
        await self._change()
        if self._task.done():
            self._task.result()

    async def events(self) -> AsyncIterator[str]:
        """The reply as server-sent events; the last one is 'done', or 'failed'.

        'start': {token}, to stop it by. 'text': {text, settled, tail}: more text, all of it by the
        end; HTML of blocks that are complete, to be added, and of the last block, to be shown in
        place of the one before. 'done': {message, notice}.
        """
        html = Streamed()
        try:
            yield _event("start", {"token": self.token})
            while self._sent < len(self._text) or not self._task.done():
                await self._change()
                self._changed.clear()
                pause = _PAUSE
                if self._sent < len(self._text):
                    text, self._sent = self._text[self._sent :], len(self._text)
                    begin = time.monotonic()
                    settled, tail = html.add(text)
                    # A block takes the longer the more it grows, and nobody else is served then.
                    pause = max(_PAUSE, _REST * (time.monotonic() - begin))
                    yield _event("text", {"text": text, "settled": settled, "tail": tail})
                await asyncio.sleep(pause)
            if self._task.cancelled():  # before it began
                yield _event("done", {"message": None, "notice": None})
            elif error := self._task.exception():
                yield _event("failed", {"message": _explained(error)})
            else:
                yield _event("done", {"message": self.message, "notice": self.notice})
        finally:
            self.stop()

    async def _change(self) -> None:
        """Waits until something has come, or the end."""
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait([changed, self._task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _run(self) -> None:
        finished, refusal, policy = False, None, None
        try:
            async for piece in self._pieces:
                self._text += piece.text
                finished = piece.finish_reason == "stop"
                refusal = REPLY_REFUSED if piece.finish_reason == "content_filter" else None
                policy, self.notice = piece.policy or policy, piece.notice or self.notice
                self._changed.set()
        except asyncio.CancelledError:
            finished = False
        except Refused as error:
            refusal, self.notice = REFUSED, str(error)
        except Unavailable:
            if not self._text:
                raise
            self.notice = "the model failed before the reply was complete"
        finally:
            self._generating = False
            with contextlib.suppress(Exception):
                await self._pieces.aclose()  # type: ignore[attr-defined]
        if self._text or finished or refusal:
            self.message = await run_in_threadpool(
                self._keep, self._text, finished, refusal, policy
            )


def begin(
    running: dict[str, Running],
    backend: Backend,
    ask: Ask,
    deadline: float,
    person: str,
    keep: Callable[..., Any],
) -> Running:
    """Starts a reply and enters it in `running`, until it is kept.

    `keep(text, finished, refusal, policy)` stores it and returns what the page shows of it.
    """
    reply = Running(person, backend.reply(ask, deadline), keep)
    running[reply.token] = reply

    def ended(task: asyncio.Task[None]) -> None:
        running.pop(reply.token, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Unavailable):
            _LOG.error("a reply failed: %s", errors.place(error))

    reply._task.add_done_callback(ended)
    return reply


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=True)}\n\n"


def _explained(error: BaseException) -> str:
    if isinstance(error, Unavailable):
        return str(error) or "the model can't be reached"
    return "something went wrong with this reply"
