"""The chat: conversations, replies as they are written, feedback on them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gptlab.people.backend import Ask, Busy, Unavailable
from gptlab.people.disconnect import unless_gone
from gptlab.people.store import Invalid, NotFound
from gptlab.people.store.conversations import MAX_CHARACTERS, Conversation, Message
from gptlab.people.store.database import storable
from gptlab.people.store.feedback import FLAGGING, REASONS, Given
from gptlab.people.web import markdown, replies
from gptlab.people.web.entry import asks_consent
from gptlab.people.web.security import SignedIn
from gptlab.people.web.site import Site, SiteOf

_LISTED = 100  # conversations in one answer
_TITLE = 60  # characters of the first message that become a conversation's title
router = APIRouter()


class Begin(BaseModel):
    """A new conversation's first turn, with a system prompt if one is wanted."""

    content: str
    context: str | None = None
    system: str = ""


class Say(BaseModel):
    """A turn after the reply `parent`; None for the first one, in another version."""

    content: str
    parent: str | None = None
    context: str | None = None


class Rename(BaseModel):
    """A conversation's new title."""

    title: str


class AskReply(BaseModel):
    """Which model is to answer; None: the first one."""

    model: str | None = None


class Thumb(BaseModel):
    """Feedback on a reply. `severity` is 1 to 3 where a reason is a flag."""

    up: bool
    reasons: list[str] = []
    note: str = ""
    severity: int | None = None


class Choice(BaseModel):
    """1: the message is better than `other`, -1: worse, 0: neither."""

    other: str
    value: int
    note: str = ""


class Better(BaseModel):
    """A person's own version of a reply."""

    content: str


@router.get("/chat", include_in_schema=False)
@router.get("/chat/{conversation}", include_in_schema=False)
def page(
    request: Request, site: SiteOf, visitor: SignedIn, conversation: str | None = None
) -> Response:
    """The chat page; its script asks for all the rest."""
    if conversation is not None:
        site.store.conversations.get(visitor.person.id, conversation)
    return site.page(
        request,
        "chat.html",
        visitor,
        conversation=conversation or "",
        models=site.backend.models(),
        ask_consent=asks_consent(site, visitor),
        reasons=REASONS,
        flagging=FLAGGING,
    )


@router.get("/api/conversations", tags=["chat"])
def conversations(
    site: SiteOf,
    visitor: SignedIn,
    before: float | None = None,
    limit: Annotated[int, Query(ge=1, le=_LISTED)] = _LISTED,
) -> list[dict[str, Any]]:
    """The person's conversations, the one changed last first; `before`: those changed before it."""
    found = site.store.conversations.of(visitor.person.id, limit, before)
    return [_conversation(item) for item in found]


@router.post("/api/conversations", tags=["chat"])
def begin(body: Begin, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """Begins a conversation; its title is how the first turn begins, on one line."""
    if not body.content.strip():
        raise Invalid("a message can't be empty")
    first = " ".join(body.content.split())
    title = first if len(first) <= _TITLE else first[: _TITLE - 1].rstrip() + "…"
    # What can't be said leaves no empty conversation behind.
    storable(body.content, MAX_CHARACTERS, "a message")
    storable(body.context or "", MAX_CHARACTERS, "the additional context")
    store, person = site.store.conversations, visitor.person.id
    made = store.create(person, title, body.system.strip())
    message = store.say(person, made.id, None, body.content, body.context)
    return {"conversation": _conversation(made), "message": _message(message)}


@router.get("/api/conversations/{conversation}", tags=["chat"])
def conversation(conversation: str, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """A conversation's whole tree, and the person's feedback in it."""
    store, person = site.store, visitor.person.id
    return {
        "conversation": _conversation(store.conversations.get(person, conversation)),
        "messages": [_message(m) for m in store.conversations.messages(person, conversation)],
        "feedback": [_given(item) for item in store.feedback.of(person, conversation)],
    }


@router.patch("/api/conversations/{conversation}", tags=["chat"])
def rename(conversation: str, body: Rename, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """Gives a conversation another title."""
    store = site.store.conversations
    return _conversation(store.rename(visitor.person.id, conversation, body.title))


@router.delete("/api/conversations/{conversation}", tags=["chat"], status_code=204)
def delete(conversation: str, site: SiteOf, visitor: SignedIn) -> Response:
    """Deletes a conversation, with everything that hangs on it."""
    site.store.conversations.delete(visitor.person.id, conversation)
    return Response(status_code=204)


@router.post("/api/conversations/{conversation}/messages", tags=["chat"])
def say(conversation: str, body: Say, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """The person's next turn, or another version of an earlier one."""
    store = site.store.conversations
    person = visitor.person.id
    return _message(store.say(person, conversation, body.parent, body.content, body.context))


@router.post(
    "/api/messages/{message}/reply",
    tags=["chat"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def reply(
    request: Request, message: str, body: AskReply, site: SiteOf, visitor: SignedIn
) -> Response:
    """A reply to a turn, as server-sent events (`replies.Running.events` says which)."""
    person, settings = visitor.person.id, site.settings
    path = await run_in_threadpool(site.store.conversations.path, person, message)
    if path[-1].role != "user":
        raise Invalid("a reply follows a person's turn")
    model = find_model(site, body.model)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    ask = Ask(
        model.name,
        tuple(item.record() for item in path),
        settings.max_tokens,
        settings.temperature,
        settings.top_p,
    )

    def keep(text: str, finished: bool, refusal: str | None, policy: str | None) -> Any:
        return _message(
            site.store.conversations.reply(
                person, message, text, model.name, policy or model.policy, finished, sampling,
                refusal,
            )
        )  # fmt: skip

    return await stream(request, site, ask, person, keep)


@router.post("/api/replies/{token}/stop", tags=["chat"], status_code=204)
async def stop(token: str, site: SiteOf, visitor: SignedIn) -> Response:
    """Stops a reply; its stream ends with what there is."""
    running = site.running.get(token)
    if running is not None and running.person == visitor.person.id:
        running.stop()
    return Response(status_code=204)


@router.post("/api/messages/{message}/thumb", tags=["chat"])
def thumb(message: str, body: Thumb, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """Thumbs up or down; a second one supersedes the first."""
    given = site.store.feedback.thumb(
        visitor.person.id, message, body.up, body.reasons, body.note, body.severity
    )
    return _given(given)


@router.post("/api/messages/{message}/choose", tags=["chat"])
def choose(message: str, body: Choice, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """Which of two replies to the same turn is better."""
    person = visitor.person.id
    return _given(site.store.feedback.choose(person, message, body.other, body.value, body.note))


@router.post("/api/messages/{message}/improve", tags=["chat"])
def improve(message: str, body: Better, site: SiteOf, visitor: SignedIn) -> dict[str, Any]:
    """The person's own version of a reply, from which the conversation can go on."""
    given, better = site.store.feedback.improve(visitor.person.id, message, body.content)
    return {"feedback": _given(given), "message": _message(better)}


def find_model(site: Site, name: str | None) -> Any:
    """A model by its name, or the first one. Raises NotFound, or Unavailable if there is none."""
    models = site.backend.models()
    if not models:
        raise Unavailable("there is no model to answer")
    if name is None:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    raise NotFound("there is no such model (any more): reload the page")


async def stream(request: Request, site: Site, ask: Ask, person: str, keep: Any) -> Response:
    """Starts a reply and answers with its events; what can't begin is an error of its own."""
    if sum(r.person == person for r in site.running.values()) >= site.settings.replies_at_once:
        raise Busy(2.0)
    running = replies.begin(
        site.running, site.backend, ask, site.settings.reply_seconds, person, keep
    )
    try:
        await unless_gone(request, running.begun())
    except BaseException:
        running.stop()
        raise
    return StreamingResponse(
        running.events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


def _conversation(item: Conversation) -> dict[str, Any]:
    return {"id": item.id, "title": item.title, "changed_at": item.changed_at}


def _message(item: Message) -> dict[str, Any]:
    """A message as the page shows it: HTML only of what isn't the person's own turn."""
    return {
        "id": item.id,
        "conversation": item.conversation,
        "parent": item.parent,
        "role": item.role,
        "content": item.content,
        "context": item.context,
        "model": item.model,
        "finished": item.finished,
        "refusal": item.refusal,
        "improves": item.improves,
        "html": markdown.render(item.content) if item.role == "assistant" else None,
    }


def _given(item: Given) -> dict[str, Any]:
    return {
        "message": item.message,
        "kind": item.kind,
        "value": item.value,
        "other": item.other,
        "reasons": item.reasons,
        "note": item.note,
    }
