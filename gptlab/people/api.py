"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models, over any Backend.

Checked with OpenAI's own Python client. Beyond it, requests take `top_k`; answers say which policy
wrote them (`system_fingerprint`) and what of a conversation had no room (`notice`). A reply that
its deadline cuts off has finish_reason 'length', as OpenAI knows no other word for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from gptlab.data.records import Message
from gptlab.people import openai_schema as schema
from gptlab.people.backend import Ask, Backend, Caller, Invalid, Model, Piece, TokenLogprob, Usage
from gptlab.people.disconnect import unless_gone
from gptlab.people.limits import RateLimit
from gptlab.people.openai_errors import ApiError, explain

ANONYMOUS = Caller("anonymous")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody} for status in (400, 401, 404, 408, 413, 429, 502, 503)
}
_STREAM = {"description": "The answer; as server-sent events if `stream` is true.",
           "content": {"text/event-stream": {}}}  # fmt: skip
_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one caller may ask for."""

    requests_per_minute: int | None  # None: any number; a key's own limit comes first
    max_choices: int  # n, times the prompts of one request


def router(
    backend: Backend, check_key: Callable[[str], Caller | None] | None, limits: Limits
) -> APIRouter:
    """The routes.

    Args:
      backend: what answers.
      check_key: whose key this is, None if it is nobody's; may wait for a database. Without it
        no keys are needed, which is for servers that only this machine reaches.
      limits: of each caller.
    """
    bucket = RateLimit()

    async def admit(request: Request) -> None:
        caller = await _caller(request, check_key)
        per_minute = caller.requests_per_minute or limits.requests_per_minute
        wait = bucket.take(caller.name, per_minute) if per_minute else 0.0
        if wait:
            raise ApiError(
                429,
                f"more than {per_minute} requests a minute",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait) + 1)},
            )

    async def known(request: Request) -> None:
        await _caller(request, check_key)

    routes = APIRouter(prefix="/v1", responses=_ERRORS, tags=["OpenAI"])

    @routes.get("/models", dependencies=[Depends(known)])
    async def models() -> schema.ModelList:
        """The models that can be asked."""
        return schema.ModelList(data=[_model_body(model) for model in backend.models()])

    @routes.get("/models/{model:path}", dependencies=[Depends(known)])
    async def model(model: str) -> schema.ModelBody:
        """One of them."""
        for one in backend.models():
            if one.name == model:
                return _model_body(one)
        raise ApiError(404, f"there is no model {model!r}", "model", "model_not_found")

    @routes.post(
        "/chat/completions",
        dependencies=[Depends(admit)],
        response_model=schema.ChatAnswer,
        responses={200: _STREAM},
    )
    async def chat(request: Request, asked: schema.ChatRequest) -> Any:
        """The assistant's next message."""
        asks = _checked(_chat_asks(asked), asked, limits)
        return await _answer(request, backend, asks, asked, _Chat(asked.model))

    @routes.post(
        "/completions",
        dependencies=[Depends(admit)],
        response_model=schema.TextAnswer,
        responses={200: _STREAM},
    )
    async def completions(request: Request, asked: schema.CompletionRequest) -> Any:
        """How a text goes on."""
        asks = _checked(_text_asks(asked), asked, limits)
        return await _answer(request, backend, asks, asked, _Text(asked.model))

    return routes


async def _caller(request: Request, check_key: Callable[[str], Caller | None] | None) -> Caller:
    if check_key is None:
        return ANONYMOUS
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    caller = None
    if scheme.lower() == "bearer" and token.strip():
        caller = await run_in_threadpool(check_key, token.strip())
    if caller is None:
        raise ApiError(
            401,
            "no valid API key: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return caller


def _model_body(model: Model) -> schema.ModelBody:
    return schema.ModelBody(
        id=model.name, created=model.created, policy=model.policy, window=model.window
    )


def _chat_asks(asked: schema.ChatRequest) -> list[Ask]:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    most = asked.max_completion_tokens
    if most is not None and asked.max_tokens is not None and most != asked.max_tokens:
        raise Invalid("max_tokens and max_completion_tokens differ", "max_tokens")
    names = {"developer": "system"}
    messages = tuple(Message(names.get(m.role, m.role), m.text()) for m in asked.messages)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return [_ask(asked, messages, most or asked.max_tokens, logprobs)]


def _text_asks(asked: schema.CompletionRequest) -> list[Ask]:
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    most = asked.max_tokens or _COMPLETION_TOKENS
    return [_ask(asked, prompt, most, asked.logprobs) for prompt in prompts]


def _ask(
    asked: schema.Sampled,
    prompt: tuple[Message, ...] | str,
    max_tokens: int | None,
    logprobs: int | None,
) -> Ask:
    return Ask(
        model=asked.model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        stop=asked.stops(),
        logprobs=logprobs,
    )


def _checked(prompts: list[Ask], asked: schema.Sampled, limits: Limits) -> list[Ask]:
    """One Ask for each choice: n of each prompt."""
    if asked.stream_options is not None and not asked.stream:
        raise Invalid("stream_options needs stream to be true", "stream_options")
    count = (asked.n or 1) * len(prompts)
    if count > limits.max_choices:
        raise Invalid(f"{count} choices are more than {limits.max_choices}", "n")
    return [
        dataclasses.replace(ask, index=index) for ask in prompts for index in range(asked.n or 1)
    ]


async def _answer(
    request: Request,
    backend: Backend,
    asks: list[Ask],
    asked: schema.Sampled,
    form: _Chat | _Text,
) -> Any:
    pieces = merged(backend, asks)
    if not asked.stream:
        return await unless_gone(request, _whole(pieces, len(asks), asked.n or 1, form))
    # What can't be answered is known with the first piece, while an error can have its own status.
    first = await unless_gone(request, anext(pieces))
    options = asked.stream_options
    usage = bool(options is not None and options.include_usage)
    return StreamingResponse(
        _events(first, pieces, asked.n or 1, form, usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def merged(backend: Backend, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several replies as they come, each with its reply's number.

    Whatever ends it (an error of one, its closing) cancels all.
    """
    if len(asks) == 1:
        async with contextlib.aclosing(backend.reply(asks[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def one(number: int, ask: Ask) -> None:
        try:
            async with contextlib.aclosing(backend.reply(ask)) as pieces:
                async for piece in pieces:
                    queue.put_nowait((number, piece))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(one(number, ask)) for number, ask in enumerate(asks)]
    try:
        left = len(tasks)
        while left:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(
    pieces: AsyncGenerator[tuple[int, Piece], None], count: int, n: int, form: _Chat | _Text
) -> Any:
    """The answer when it is complete."""
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[TokenLogprob]] = [[] for _ in range(count)]
    last: dict[int, Piece] = {}
    wants = False
    async with contextlib.aclosing(pieces):
        async for number, piece in pieces:
            texts[number].append(piece.text)
            tokens[number] += piece.tokens
            wants |= bool(piece.tokens)
            if piece.finish_reason is not None:
                last[number] = piece
    choices = [
        form.choice(i, "".join(texts[i]), tokens[i] if wants else None, _reason(last[i]))
        for i in range(count)
    ]
    notices = [piece.notice for piece in last.values() if piece.notice]
    return form.answer(choices, _usage(last, n), last[0].policy, notices[0] if notices else None)


async def _events(
    first: tuple[int, Piece],
    pieces: AsyncGenerator[tuple[int, Piece], None],
    n: int,
    form: _Chat | _Text,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    begun: set[int] = set()
    last: dict[int, Piece] = {}
    extra = {"usage": None} if with_usage else {}
    async with contextlib.aclosing(pieces):
        try:
            number, piece = first
            while True:
                if number not in begun:
                    begun.add(number)
                    for chunk in form.opening(number):
                        yield _event({**form.head(piece), **extra, "choices": [chunk]})
                done = piece.finish_reason is not None
                if piece.text or piece.tokens or (done and form.one_chunk):
                    reason = _reason(piece) if done and form.one_chunk else None
                    delta = form.delta(number, piece.text, piece.tokens or None, reason)
                    yield _event({**form.head(piece), **extra, "choices": [delta]})
                if done:
                    last[number] = piece
                    notice = {"notice": piece.notice} if piece.notice else {}
                    if not form.one_chunk:
                        closing = form.closing(number, _reason(piece))
                        yield _event({**form.head(piece), **extra, "choices": [closing], **notice})
                try:
                    number, piece = await anext(pieces)
                except StopAsyncIteration:
                    break
            if with_usage:
                usage = _usage(last, n).model_dump()
                yield _event({**form.head(piece), "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except Exception as error:  # too late for a status
            yield _event(explain(error).body())


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _reason(piece: Piece) -> str:
    assert piece.finish_reason is not None
    return "length" if piece.finish_reason == "deadline" else piece.finish_reason


def _usage(last: dict[int, Piece], n: int) -> schema.UsageBody:
    """Of all choices; a prompt counts once, however many replies it gets."""
    usages = {number: piece.usage or Usage(0, 0) for number, piece in last.items()}
    prompts = [usage for number, usage in usages.items() if number % n == 0]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages.values())
    return schema.UsageBody(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=schema.PromptDetails(
            cached_tokens=sum(usage.cached_tokens for usage in prompts)
        ),
    )


def _spelt(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class _Form:
    """What both forms of an answer have in common: the id, the model, the time."""

    prefix, chunk_object = "", ""

    def __init__(self, model: str):
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.model = model

    def head(self, piece: Piece) -> dict[str, Any]:
        """What every event begins with."""
        return {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": piece.policy,
        }


class _Chat(_Form):
    """How chat answers look."""

    prefix, chunk_object, one_chunk = "chatcmpl", "chat.completion.chunk", False

    def choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, reason: str
    ) -> schema.ChatChoice:
        return schema.ChatChoice(
            index=index,
            message=schema.AnswerMessage(content=text),
            logprobs=self._logprobs(tokens),
            finish_reason=reason,
        )

    def answer(
        self, choices: list[Any], usage: schema.UsageBody, policy: str | None, notice: str | None
    ) -> schema.ChatAnswer:
        return schema.ChatAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage,
            system_fingerprint=policy, notice=notice,
        )  # fmt: skip

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def delta(
        self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        content = [
            {**_token(t.data, t.logprob), "top_logprobs": [_token(*other) for other in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": _spelt(data),
        "logprob": max(logprob, _LEAST_LOGPROB),
        "bytes": list(data),
    }


class _Text(_Form):
    """How plain answers look."""

    prefix, chunk_object, one_chunk = "cmpl", "text_completion", True

    def __init__(self, model: str):
        super().__init__(model)
        self._offsets: dict[int, int] = {}

    def choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, reason: str
    ) -> schema.TextChoice:
        return schema.TextChoice(
            index=index, text=text, logprobs=self._logprobs(index, tokens), finish_reason=reason
        )

    def answer(
        self, choices: list[Any], usage: schema.UsageBody, policy: str | None, notice: str | None
    ) -> schema.TextAnswer:
        return schema.TextAnswer(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage,
            system_fingerprint=policy, notice=notice,
        )  # fmt: skip

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def delta(
        self, index: int, text: str, tokens: Sequence[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        raise AssertionError("the last piece is its own closing")

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        spelt, offsets = [_spelt(t.data) for t in tokens], []
        for text in spelt:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": spelt,
            "token_logprobs": [max(t.logprob, _LEAST_LOGPROB) for t in tokens],
            "top_logprobs": [
                {_spelt(data): max(value, _LEAST_LOGPROB) for data, value in t.top} for t in tokens
            ],
            "text_offset": offsets,
        }
