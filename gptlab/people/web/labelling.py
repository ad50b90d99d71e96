"""Work on campaigns: the labellers' API, and the pages whose scripts use it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gptlab.data.records import Message
from gptlab.people.backend import Ask
from gptlab.people.store import Invalid
from gptlab.people.store.judgements import FLAGS, RATINGS, Flag, Turn
from gptlab.people.store.leases import Lease
from gptlab.people.store.work import SKIP_REASONS
from gptlab.people.web import markdown
from gptlab.people.web.chat import find_model, stream
from gptlab.people.web.entry import asks_consent
from gptlab.people.web.security import Labeller
from gptlab.people.web.site import SiteOf

router = APIRouter()


class CampaignOut(BaseModel):
    """A campaign that can be worked on. `judged` of `wanted` judgements are there."""

    id: str
    name: str
    kind: str
    judged: int
    wanted: int


class Shown(BaseModel):
    """A text as it is, and as HTML where a model may have written it."""

    role: str
    content: str
    context: str | None
    html: str | None


class TaskOut(BaseModel):
    """A task on loan. Replies are in the order in which they must be shown.

    `seconds_left`: after that it may go to somebody else; `renew` starts the time anew.
    """

    lease: str
    kind: str
    prompt: list[Shown]
    topic: str
    replies: list[Shown]
    seconds_left: float


class Leased(BaseModel):
    """A task, or None: there is none for this person now."""

    task: TaskOut | None


class FlagIn(BaseModel):
    """What is wrong with a reply, counted from 0 in the order shown. `severity` is 1 to 3."""

    reply: int
    kind: str
    severity: int = 2


class JudgementIn(BaseModel):
    """A ranking in the order shown: 1 is best, equal ranks are ties. Ratings are 1 to 7 or None."""

    ranks: list[int]
    ratings: list[int | None] | None = None
    flags: list[FlagIn] = []
    note: str = ""
    seconds: float | None = None


class TurnIn(BaseModel):
    """A turn of a demonstration. `origin`: 'written', 'taken' or 'edited', from `policy`."""

    role: str
    content: str
    origin: str = "written"
    policy: str | None = None


class DemonstrationIn(BaseModel):
    """The whole conversation after the prompt, up to a reply."""

    turns: list[TurnIn]
    note: str = ""
    seconds: float | None = None


class SkipIn(BaseModel):
    """Why a task is left to others."""

    reason: str
    note: str = ""


class SuggestIn(BaseModel):
    """The turns so far, of which the last is a user's."""

    turns: list[TurnIn]
    model: str | None = None


class Answered(BaseModel):
    """The id of the judgement that was written, or of the one that was there already."""

    judgement: str


@router.get("/api/campaigns", tags=["labelling"])
def campaigns(site: SiteOf, visitor: Labeller) -> list[CampaignOut]:
    """The campaigns that are open."""
    return [
        CampaignOut(id=c.id, name=c.name, kind=c.kind, judged=p.judged, wanted=p.wanted)
        for c in site.store.campaigns.all("open")
        for p in (site.store.figures.progress(c.id),)
    ]


@router.post("/api/campaigns/{campaign}/lease", tags=["labelling"])
def lease(campaign: str, site: SiteOf, visitor: Labeller) -> Leased:
    """The next task, or the one that the person holds already."""
    found = site.store.work.lease(campaign, visitor.person.id)
    return Leased(task=None if found is None else _task(found, site.store.database.clock()))


@router.post("/api/leases/{lease}/judge", tags=["labelling"])
def judge(lease: str, body: JudgementIn, site: SiteOf, visitor: Labeller) -> Answered:
    """A ranking with ratings and flags. Sent twice, it counts once."""
    flags = [Flag(flag.reply, flag.kind, flag.severity) for flag in body.flags]
    made = site.store.work.judge(
        lease, visitor.person.id, body.ranks, body.ratings, flags, body.note, body.seconds
    )
    return Answered(judgement=made.id)


@router.post("/api/leases/{lease}/demonstrate", tags=["labelling"])
def demonstrate(lease: str, body: DemonstrationIn, site: SiteOf, visitor: Labeller) -> Answered:
    """A conversation of which both sides were written. Sent twice, it counts once."""
    turns = [
        Turn(message, turn.origin, turn.policy)
        for turn, message in zip(body.turns, _messages(body.turns), strict=True)
    ]
    made = site.store.work.demonstrate(lease, visitor.person.id, turns, body.note, body.seconds)
    return Answered(judgement=made.id)


@router.post("/api/leases/{lease}/skip", tags=["labelling"])
def skip(lease: str, body: SkipIn, site: SiteOf, visitor: Labeller) -> Answered:
    """Leaves a task to others, for a reason."""
    made = site.store.work.skip(lease, visitor.person.id, body.reason, body.note)
    return Answered(judgement=made.id)


@router.post("/api/leases/{lease}/release", tags=["labelling"], status_code=204)
def release(lease: str, site: SiteOf, visitor: Labeller) -> Response:
    """Gives a task back without an answer; one may get it again."""
    site.store.work.release(lease, visitor.person.id)
    return Response(status_code=204)


@router.post("/api/leases/{lease}/renew", tags=["labelling"])
def renew(lease: str, site: SiteOf, visitor: Labeller) -> Leased:
    """Starts the time of a lease anew."""
    found = site.store.work.renew(lease, visitor.person.id)
    return Leased(task=_task(found, site.store.database.clock()))


@router.post(
    "/api/leases/{lease}/suggest",
    tags=["labelling"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def suggest(
    request: Request, lease: str, body: SuggestIn, site: SiteOf, visitor: Labeller
) -> Response:
    """A model's suggestion for the next reply of a demonstration, as server-sent events.

    The last one, 'done', has it as {content, html, policy}.
    """
    person, settings = visitor.person.id, site.settings
    held = await run_in_threadpool(site.store.work.renew, lease, person)
    prompt = (*held.prompt, *_messages(body.turns))
    if held.kind != "demonstration" or not prompt or prompt[-1].role != "user":
        raise Invalid("a suggestion follows a user's turn of a demonstration")
    model = find_model(site, body.model)
    ask = Ask(model.name, prompt, settings.max_tokens, settings.temperature, top_p=settings.top_p)

    def keep(text: str, finished: bool, refusal: str | None, policy: str | None) -> Any:
        if refusal is not None:
            return None
        return {
            "content": text,
            "html": markdown.render(text),
            "policy": policy or model.policy,
            "finished": finished,
        }

    return await stream(request, site, ask, person, keep)


@router.get("/label", include_in_schema=False)
def overview(request: Request, site: SiteOf, visitor: Labeller) -> Response:
    """What there is to do."""
    return site.page(
        request,
        "label.html",
        visitor,
        campaigns=campaigns(site, visitor),
        ask_consent=asks_consent(site, visitor),
    )


@router.get("/label/{campaign}", include_in_schema=False)
def page(campaign: str, request: Request, site: SiteOf, visitor: Labeller) -> Response:
    """The page that tasks of a campaign are worked on; its script leases them."""
    found = site.store.campaigns.get(campaign)
    template = {"ranking": "rank.html", "demonstration": "demonstrate.html"}[found.kind]
    return site.page(
        request,
        template,
        visitor,
        campaign=found,
        ask_consent=asks_consent(site, visitor),
        flags=FLAGS,
        ratings=range(RATINGS[0], RATINGS[1] + 1),
        skip_reasons=SKIP_REASONS,
        models=site.backend.models(),
    )


@router.get("/label/{campaign}/instructions", include_in_schema=False)
def instructions(campaign: str, request: Request, site: SiteOf, visitor: Labeller) -> Response:
    """How the campaign wants tasks to be judged."""
    found = site.store.campaigns.get(campaign)
    return site.page(request, "instructions.html", visitor, campaign=found)


def _messages(turns: list[TurnIn]) -> tuple[Message, ...]:
    try:
        return tuple(Message(turn.role, turn.content) for turn in turns)
    except ValueError as error:
        raise Invalid(str(error)) from error


def _shown(message: Message) -> Shown:
    html = markdown.render(message.content) if message.role == "assistant" else None
    return Shown(role=message.role, content=message.content, context=message.context, html=html)


def _task(found: Lease, now: float) -> TaskOut:
    return TaskOut(
        lease=found.token,
        kind=found.kind,
        prompt=[_shown(message) for message in found.prompt],
        topic=found.topic,
        replies=[_shown(Message("assistant", reply)) for reply in found.replies],
        seconds_left=found.expires_at - now,
    )
