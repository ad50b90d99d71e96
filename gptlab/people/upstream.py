"""The backend that asks another server: vLLM, llama.cpp, or whatever speaks OpenAI's API.

The same app stands before it. What that server refuses or fails at is told in its words. Its
`top_k` is sent where it is asked for, as vLLM takes it. Conversations are not trimmed here: only
that server knows its window. Many servers read what looks like a control token in a message as one;
so in text that is sent there such spellings are broken up by a character that nobody sees.

That server's models are asked for again and again: one that appears or goes there does so here, and
`failures` says while it can't be reached. Until it can be, the models are those it had last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from gptlab.data.tokenizer import valid_text
from gptlab.people.backend import (
    FINISH_REASONS,
    Ask,
    Busy,
    Invalid,
    Model,
    Piece,
    TokenLogprob,
    Unavailable,
    UnknownModel,
    Usage,
)
from gptlab.run.errors import UserError

_LOG = logging.getLogger(__name__)
_LIST_SECONDS = 10.0
_MOST_SECONDS = 3600.0  # that a client is asked to wait
_MOST_TOKENS = 2**53  # floats count so far
_ERROR_CHARS = 300
_JOINER = "\u2060"  # U+2060 WORD JOINER: no width, no line break


class Upstream:
    """A Backend (backend.py) over HTTP."""

    def __init__(
        self,
        url: str,
        key: str | None,
        deadline_seconds: float,
        watch_seconds: float | None,
        controls: Sequence[str] = (),
    ):
        """Asks for the list of models.

        Args:
          url: http://HOST:PORT or with /v1.
          key: of its API, or None.
          deadline_seconds: of requests without one of their own.
          watch_seconds: how often to ask for the models again; None: never.
          controls: how its control tokens are spelt, or begin; at least two characters each, and
            no U+2060.

        Raises:
          UserError: there is no such server, or it has no models.
        """
        base = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(base)
        except ValueError:
            parts = urlsplit("")
        if parts.username is not None or parts.password is not None:
            raise UserError(
                "config.upstream has a name or a password, which would be kept in config.json: "
                "put that server's key into $GPTLAB_UPSTREAM_KEY"
            )
        if parts.scheme not in ("http", "https"):
            raise UserError(f"config.upstream={url} is no URL: http://HOST:PORT")
        if any(len(spelling) < 2 or _JOINER in spelling for spelling in controls):
            raise UserError(
                f"config.upstream_controls={tuple(controls)} must be of two characters or more "
                "each, none of them U+2060"
            )
        self._controls = tuple(controls)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._deadline, self._closed = deadline_seconds, threading.Event()
        self._where = f"{base}/v1/models"
        self._settings: dict[str, Any] = {"base_url": f"{base}/v1/", "headers": headers}
        self._failure: str | None = None
        try:
            with httpx.Client(**self._settings, timeout=_LIST_SECONDS) as client:
                self._models = _listed(client)
        except (Unavailable, httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"config.upstream={url}: no list of models at {self._where}: {error}"
            ) from None
        timeout = httpx.Timeout(None, connect=_LIST_SECONDS)  # the deadline is ours
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(**self._settings, timeout=timeout, limits=limits)
        if watch_seconds is not None:
            threading.Thread(target=self._watch, args=(watch_seconds,), daemon=True).start()

    def models(self) -> Sequence[Model]:
        """See Backend."""
        return self._models

    def failures(self) -> list[str]:
        """One line while the server can't be reached, or has no models. It has no URL."""
        failure = self._failure
        return [] if failure is None else [f"upstream: {failure}"]

    async def close(self, drain_seconds: float) -> None:
        """See Backend. Replies that run are given as long as their requests are."""
        self._closed.set()
        await self._client.aclose()

    async def reply(self, ask: Ask, deadline: float | None = None) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        if self._closed.is_set():
            raise Busy(1.0, draining=True)
        known = {model.name: model for model in self._models}
        if ask.model not in known:
            raise UnknownModel(
                f"there is no model {ask.model!r}; there are {', '.join(known)}", "model"
            )
        until = time.monotonic() + (self._deadline if deadline is None else deadline)
        path, body = _request(ask, self._controls)
        policy = known[ask.model].policy
        known_by_policy = policy != ask.model  # else a fingerprint is of something else
        tokens, finish, usage = 0, None, None
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with _before(until):
                    response = await stack.enter_async_context(
                        self._client.stream("POST", path, json=body)
                    )
                    if response.status_code != 200:
                        raise _refusal(response, await response.aread())
                async for event in _events(response, until):
                    if event.get("error"):
                        raise Unavailable(_words(event))
                    if known_by_policy:  # which may be newer than the list
                        policy = str(event.get("system_fingerprint") or policy)
                    choices, counted = _read(event)
                    usage = counted or usage
                    for text, entries, reason in choices:
                        tokens += len(entries) or bool(text)
                        finish = reason or finish
                        if text or entries:
                            yield Piece(text, entries, policy=policy)
        except TimeoutError:
            finish = finish or "deadline"
        except httpx.HTTPError as error:
            raise Unavailable(f"the upstream server: {type(error).__name__}: {error}") from None
        if finish is None:
            raise Unavailable("the upstream server ended its reply without a finish_reason")
        reason = finish if finish in FINISH_REASONS else "stop"
        yield Piece("", (), reason, usage or Usage(0, tokens), policy)

    def _watch(self, seconds: float) -> None:
        """Asks for the models until the end; the log says when that fails, and when no more."""
        with httpx.Client(**self._settings, timeout=_LIST_SECONDS) as client:
            while not self._closed.wait(seconds):
                before = self._failure
                try:
                    self._models, self._failure = _listed(client), None
                except Unavailable as error:
                    self._failure = str(error)
                if (self._failure is None) != (before is None):
                    _LOG.warning("%s: %s", self._where, self._failure or "it answers again")


def _listed(client: httpx.Client) -> list[Model]:
    """The models of the server. Raises Unavailable, in words without its URL."""
    try:
        answer = client.get("models")
    except httpx.HTTPError as error:
        raise Unavailable(f"it can't be reached: {type(error).__name__}: {error}") from None
    if answer.status_code != 200:
        raise Unavailable(f"asked for its models it answers {answer.status_code}")
    try:
        models = [_model(one) for one in answer.json()["data"]]
    except Exception:  # whatever it is that was sent, the last list is still good
        raise Unavailable("what it sends is no list of models") from None
    if not models:
        raise Unavailable("it has no models")
    return models


def _model(listed: Mapping[str, Any]) -> Model:
    """`policy` is what a gptlab server says, else the name: that is all that is known."""
    name = str(listed["id"])
    window = listed.get("window") or listed.get("max_model_len")  # gptlab's and vLLM's words
    return Model(name, str(listed.get("policy") or name), int(listed.get("created") or 0), window)


def _request(ask: Ask, controls: Sequence[str]) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": ask.model,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.top_k:
        body["top_k"] = ask.top_k
    if ask.seed is not None:
        # Several replies to one seed: the other server knows only seeds.
        body["seed"] = (ask.seed + ask.index) % 2**63
    if ask.stop:
        body["stop"] = list(ask.stop)
    if ask.max_tokens is not None:
        body["max_tokens"] = ask.max_tokens
    if isinstance(ask.prompt, str):
        body["prompt"] = _plain(ask.prompt, controls)
        if ask.logprobs is not None:
            body["logprobs"] = ask.logprobs
        return "completions", body
    # A context stands after the content, with an empty line between, as in chat templates.
    texts = ("\n\n".join(text for text in (m.content, m.context) if text) for m in ask.prompt)
    body["messages"] = [
        {"role": message.role, "content": _plain(text, controls)}
        for message, text in zip(ask.prompt, texts, strict=True)
    ]
    if ask.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": ask.logprobs}
    return "chat/completions", body


def _plain(text: str, controls: Sequence[str]) -> str:
    """`text`, in which no control token is spelt out any more."""
    for spelling in controls:
        # Again, as in "aaa" one "aa" overlaps the next. It ends: no spelling has a joiner.
        while spelling in text:
            text = text.replace(spelling, spelling[0] + _JOINER + spelling[1:])
    return text


def _before(until: float) -> asyncio.Timeout:
    """Raises TimeoutError at `until`, of time.monotonic(), in what it stands around."""
    return asyncio.timeout(until - time.monotonic())


async def _events(response: httpx.Response, until: float) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of server-sent events up to [DONE]. Raises TimeoutError at `until`."""
    lines = response.aiter_lines()
    while True:
        # Around each line, as a server may send some without an event for ever, and not around the
        # loop: what reads the events would be cancelled, too.
        async with _before(until):
            line = await anext(lines, None)
        if line is None:
            return
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise Unavailable("the upstream server sent what is no JSON") from None
        if isinstance(event, dict):
            yield event


_Choice = tuple[str, tuple[TokenLogprob, ...], str | None]  # text, tokens, finish_reason


def _read(event: Mapping[str, Any]) -> tuple[list[_Choice], Usage | None]:
    """What an event says. Raises Unavailable for a form that isn't OpenAI's."""
    try:
        choices = [
            (_text(choice), _tokens(choice), choice.get("finish_reason"))
            for choice in event.get("choices") or ()
        ]
        usage = event.get("usage")
        return choices, _usage(usage) if usage else None
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Unavailable(
            f"the upstream server sent an event of another form than OpenAI's "
            f"({type(error).__name__}: {error})"[:_ERROR_CHARS]
        ) from None


def _refuse(constant: str) -> Any:
    """NaN and infinities are no JSON, and could not be passed on as such."""
    raise ValueError(constant)


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content")
    return valid_text(str(text or ""))


def _tokens(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    logprobs = choice.get("logprobs") or {}
    if content := logprobs.get("content"):
        return tuple(
            TokenLogprob(
                _bytes(t),
                _finite(t["logprob"]),
                tuple((_bytes(o), _finite(o["logprob"])) for o in t.get("top_logprobs") or ()),
            )
            for t in content
        )
    entries = zip(
        logprobs.get("tokens") or (),
        logprobs.get("token_logprobs") or (),
        logprobs.get("top_logprobs") or itertools.repeat({}),
        strict=False,
    )
    return tuple(
        TokenLogprob(
            token.encode(),
            _finite(value),
            tuple((other.encode(), _finite(v)) for other, v in (top or {}).items()),
        )
        for token, value, top in entries
    )


def _finite(value: Any) -> float:
    """A log-probability. 1e999 is JSON, but is read as an infinity."""
    if not math.isfinite(number := float(value)):
        raise ValueError(f"a log-probability is {number}")
    return number


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return entry["token"].encode() if entry.get("bytes") is None else bytes(entry["bytes"])


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        _count(details, "cached_tokens"),
    )


def _count(usage: Mapping[str, Any], name: str) -> int:
    """One of the numbers, 0 if it isn't there. Metrics count up, in floats."""
    number = int(usage.get(name) or 0)
    if not 0 <= number < _MOST_TOKENS:
        raise ValueError(f"{name} is no number of tokens")
    return number


def _words(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or body)[:_ERROR_CHARS]


def _refusal(response: httpx.Response, content: bytes) -> Exception:
    """What an answer other than 200 means."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = content.decode("utf-8", "replace")
    status, words = response.status_code, _words(body)
    if status in (429, 503):
        seconds = response.headers.get("retry-after", "")
        return Busy(min(float(seconds), _MOST_SECONDS) if seconds.isdecimal() else 1.0)
    if status in (400, 404, 413, 422):
        error = body.get("error") if isinstance(body, dict) else None
        return Invalid(words, error.get("param") if isinstance(error, dict) else None)
    return Unavailable(f"the upstream server answers {status}: {words}")
