"""A reply's text out of its tokens: whole characters, and nothing of a stop string."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from gptlab.data import chat
from gptlab.data.tokenizer import Tokenizer
from gptlab.people.backend import TokenLogprob


class StopText:
    """Lets text through up to the first of some strings, across the borders of its pieces."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def feed(self, piece: str) -> str:
        """What may be shown with a piece more: what could begin a stop string is held back."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def end(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that a stop string begins with (not all of it)."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Reader:
    """Turns tokens into text and, where asked for, their log-probabilities, side by side.

    A token is handed out with the text that it ends in; of a reply that a stop string ends, those
    within the string are not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: str, logprobs: bool):
        """`before` is what the ids of a chat reply spell before its text."""
        self._tokenizer, self._stop = tokenizer, StopText(stop)
        self._text = chat.ReplyText(tokenizer, before)
        self._logprobs = logprobs
        self._tokens: collections.deque[tuple[int, TokenLogprob]] = collections.deque()
        self._read = self._shown = 0  # characters
        self._out: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.stopped

    def feed(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """Takes one token more."""
        piece = self._text.feed(token)
        self._read += len(piece)
        if self._logprobs:
            spell = self._tokenizer.decode_bytes
            alternatives = tuple((spell([other]), value) for other, value in top)
            entry = TokenLogprob(spell([token]), logprob, alternatives)
            self._tokens.append((self._read, entry))
        if piece:
            self._show(self._stop.feed(piece))

    def end(self) -> None:
        """No token follows."""
        self._show(self._stop.feed(self._text.end()))
        if not self.stopped:
            self._show(self._stop.end())

    def _show(self, text: str) -> None:
        self._shown += len(text)
        self._out.append(text)

    def take(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What can be shown since the last time."""
        text, self._out = "".join(self._out), []
        tokens = []
        while self._tokens and self._tokens[0][0] <= self._shown:
            tokens.append(self._tokens.popleft()[1])
        return text, tuple(tokens)
