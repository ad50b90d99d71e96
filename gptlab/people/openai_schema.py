"""OpenAI's requests and answers as schemas: what is taken, what is refused, what is sent.

A field that would change the result and that this server doesn't know is refused, unless its value
asks for nothing (`tools: []`). So is a field that OpenAI doesn't know either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES, MAX_STOPS, MAX_STOP_CHARS, MAX_MESSAGES, MAX_PROMPTS = 128, 4, 200, 2048, 64
_INT64 = 2**63

# Fields of OpenAI's that can't be had, by the values that don't ask for them. None never does.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
}
# What says something about the caller and nothing about the result.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Chat templates have no place for names, and a name that changed nothing would be one ignored.
_NAME = "Who speaks: the model reads it before the message's text, as 'NAME: TEXT'."
# Of an answer that is sent back as a message.
_NEUTRAL_IN_MESSAGES = ("refusal", "annotations", "audio", "function_call", "tool_calls")


def _same(value: Any, other: Any) -> bool:
    return (
        type(value) is type(other)
        and value == other
        or ({type(value), type(other)} == {int, float} and value == other)
    )


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _NEUTRAL and (
                value is None or any(_same(value, x) for x in _NEUTRAL[name])
            ):
                continue
            elif name in _NEUTRAL:
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "'{name}' is not supported by this server",
                    {"name": name},
                )
            elif name not in _IGNORED:
                kept[name] = value
        return kept


class TextPart(BaseModel):
    """A part of a message's content; only text can be read."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn. 'developer' is another name of 'system'."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$", description=_NAME)] | None = None
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        empty = {k for k in _NEUTRAL_IN_MESSAGES if k in data and data[k] in (None, [])}
        return {k: v for k, v in data.items() if k not in empty}

    def text(self) -> str:
        """All of it, and before it who speaks, if a name is given."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return text if self.name is None else f"{self.name}: {text}"


class StreamOptions(BaseModel):
    """What a stream holds beside the reply."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Sampled(_Request):
    """What both kinds of requests have."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, description="Not OpenAI's; 0: off.")] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class PromptDetails(BaseModel):
    """What of a prompt was not computed anew."""

    cached_tokens: int


class UsageBody(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ModelBody(BaseModel):
    """GET /v1/models/{model}; `policy` and `window` are not OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptlab"
    policy: str
    window: int | None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class AnswerMessage(BaseModel):
    """A reply."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of n replies."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextChoice(BaseModel):
    """One of n continuations."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None  # the identity of the policy that wrote it
    usage: UsageBody
    notice: str | None = None  # not OpenAI's: what of the conversation was not read


class ChatAnswer(_Answer):
    """The whole reply."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextAnswer(_Answer):
    """The whole continuation."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
