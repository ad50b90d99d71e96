"""Moderation: a scorer that a config names reads prompts, replies, or both.

A prompt that it refuses is never answered. A reply that is to be read is held back until it is
complete, as nobody can take back what was shown; what is refused of it arrives as an empty last
piece with finish_reason 'content_filter'.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence

from gptlab.data.records import Message, Prompt
from gptlab.people.backend import Ask, Backend, Model, Piece, Refused
from gptlab.scorers.registry import Scorer


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What was refused, for the record."""

    where: str  # 'input' or 'output'
    ask: Ask
    text: str  # that the scorer read
    score: float
    scorer: str


class Moderated:
    """A Backend whose prompts, replies, or both have to score at least so much."""

    def __init__(
        self,
        backend: Backend,
        scorer: Scorer,
        least: float,
        reads_input: bool,
        reads_output: bool,
        record: Callable[[Refusal], None],
    ):
        """`record` is called in a thread, once for each refusal."""
        self._backend, self._scorer, self._least, self._record = backend, scorer, least, record
        self._input, self._output = reads_input, reads_output

    def models(self) -> Sequence[Model]:
        """See Backend."""
        return self._backend.models()

    async def close(self, drain_seconds: float) -> None:
        """See Backend."""
        await self._backend.close(drain_seconds)

    async def reply(self, ask: Ask, deadline: float | None = None) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        if self._input and await asyncio.to_thread(self._refuses, "input", ask, _asked(ask)):
            raise Refused()
        async with contextlib.aclosing(self._backend.reply(ask, deadline)) as pieces:
            if not self._output:
                async for piece in pieces:
                    yield piece
                return
            held = [piece async for piece in pieces]
        text = "".join(piece.text for piece in held)
        last = held[-1]
        if await asyncio.to_thread(self._refuses, "output", ask, text):
            yield dataclasses.replace(last, text="", tokens=(), finish_reason="content_filter")
            return
        tokens = tuple(token for piece in held for token in piece.tokens)
        yield dataclasses.replace(last, text=text, tokens=tokens)

    def _refuses(self, where: str, ask: Ask, text: str) -> bool:
        messages = (Message("user", ask.prompt),) if isinstance(ask.prompt, str) else ask.prompt
        turns = [i for i, message in enumerate(messages) if message.role == "user"]
        # A prompt, as scorers know it, ends with a user's message.
        turn = messages[: turns[-1] + 1] if turns else (Message("user", ""),)
        score = float(self._scorer([Prompt("moderation", turn, "serve")], [text])[0])
        if score >= self._least:
            return False
        self._record(Refusal(where, ask, text, score, self._scorer.name))
        return True


def _asked(ask: Ask) -> str:
    """What of a prompt is read: all that the caller wrote, whatever its role."""
    if isinstance(ask.prompt, str):
        return ask.prompt
    texts = [text for m in ask.prompt for text in (m.content, m.context) if text]
    return "\n".join(texts)
