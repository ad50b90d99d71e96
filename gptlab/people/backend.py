"""What answers: the one interface between those who ask (API, web app) and what generates text.

Two parts implement `Backend`: `embedded.py` (models in this process) and `upstream.py` (any server
with OpenAI's API). `moderation.py` wraps either. Nobody else knows which of them is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from gptlab.data.records import Message

FINISH_REASONS = ("stop", "length", "deadline", "content_filter")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request for one reply. `index` tells several replies to one prompt and seed apart."""

    model: str  # a name from models()
    prompt: tuple[Message, ...] | str  # a conversation, or plain text to continue
    max_tokens: int | None = None  # None: as many as the window has room for
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int | None = None  # None: another reply every time
    stop: tuple[str, ...] = ()  # the reply ends before the first of these
    logprobs: int | None = None  # None: none; n: of each token, and n alternatives to it
    index: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token of a reply; `top` are the likeliest tokens in its place, likeliest first.

    Logarithms of softmax(logits / temperature) over the whole vocabulary (at temperature 0, of
    softmax(logits)). The bytes of one token need not be whole characters.
    """

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a reply cost, in tokens. `cached_tokens` of the prompt were not computed anew."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a reply, as it comes. The last one has a finish_reason and the usage."""

    text: str  # whole characters only; may be empty
    tokens: tuple[TokenLogprob, ...] = ()  # empty unless asked for
    finish_reason: str | None = None  # one of FINISH_REASONS on the last piece, else None
    usage: Usage | None = None  # on the last piece
    policy: str | None = None  # the identity of what writes this reply
    # On the last piece, what the person should know: that the window had no room for the oldest
    # turns, say.
    notice: str | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """What can be asked."""

    name: str
    policy: str  # identity of the artifact that answers now: the `policy` of a records.Candidate
    created: int  # seconds since 1970
    window: int | None  # tokens of prompt and reply together; None: unknown


@dataclasses.dataclass(frozen=True)
class Caller:
    """An API key that asks, by a name of its own: its requests are counted apart from others'.

    `requests_per_minute` None: the server's default.
    """

    name: str
    requests_per_minute: int | None = None


class Invalid(Exception):
    """An Ask that can't be answered, whenever it is asked. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class UnknownModel(Invalid):
    """There is no model of that name."""


class Refused(Exception):
    """Moderation refuses the prompt."""


class Busy(Exception):
    """The queue is full, or the server is about to end (`draining`): ask again later."""

    def __init__(self, retry_after: float, draining: bool = False):
        super().__init__("the server is shutting down" if draining else "the queue is full")
        self.retry_after, self.draining = retry_after, draining  # retry_after in seconds


class Unavailable(Exception):
    """What generates text can't be reached, or has failed."""


class Backend(Protocol):
    """See the head of this file. All of it belongs to one event loop."""

    def models(self) -> Sequence[Model]:
        """What can be asked, the default first."""
        ...

    def reply(self, ask: Ask, deadline: float | None = None) -> AsyncGenerator[Piece, None]:
        """The pieces of one reply.

        Args:
          ask: what is asked for.
          deadline: seconds from now after which the reply is cut off, with what there is by then
            and finish_reason 'deadline'; waiting counts. None: the backend's own.

        Returns:
          An asynchronous generator. Closing it (`aclose`) cancels the reply and frees its place.
          With the first piece, asking for it may raise Invalid, Refused, Busy or Unavailable;
          later ones Unavailable only.
        """
        ...

    async def close(self, drain_seconds: float) -> None:
        """Takes no more asks, waits so long for running replies, and cuts off the rest."""
        ...
