"""Campaigns: set-up, tasks, progress and statistics, for admins."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from gptlab.data.records import Candidate, CandidateSet, Message, Prompt, RecordReader
from gptlab.people.store import Invalid
from gptlab.people.store.campaigns import KINDS, STATES, Campaign, Settings
from gptlab.people.store.judgements import RATINGS
from gptlab.people.web import sampling
from gptlab.people.web.security import Admin
from gptlab.people.web.site import Site, SiteOf
from gptlab.run import artifact
from gptlab.run.errors import UserError

_TASKS = 50  # on a page
_MOST = 1_000_000
_SOURCE = "web"  # of prompts written by an admin
router = APIRouter(include_in_schema=False)
Text = Annotated[str, Form()]
Whole = Annotated[int, Form(ge=0, le=_MOST)]
Real = Annotated[float, Form(ge=0, le=_MOST, allow_inf_nan=False)]


@router.get("/campaigns")
def overview(request: Request, site: SiteOf, visitor: Admin) -> Response:
    """All campaigns, and the form for a new one."""
    found = [(c, site.store.figures.progress(c.id)) for c in site.store.campaigns.all()]
    return site.page(
        request, "campaigns.html", visitor, campaigns=found, kinds=KINDS, defaults=Settings()
    )


@router.post("/campaigns")
def create(
    site: SiteOf,
    visitor: Admin,
    name: Text,
    kind: Text,
    overlap: Whole,
    lease_minutes: Real,
    gold_percent: Real,
    disagreement_percent: Real,
    max_skips: Whole,
    instructions: Text = "",
) -> Response:
    """A new campaign."""
    settings = Settings(
        instructions, overlap, lease_minutes * 60, gold_percent / 100, disagreement_percent / 100,
        max_skips, random.SystemRandom().randrange(2**31),
    )  # fmt: skip
    made = site.store.campaigns.create(name, kind, settings, visitor.person.id)
    return RedirectResponse(f"/campaigns/{made.id}", 303)


@router.get("/campaigns/{campaign}")
def page(
    campaign: str,
    request: Request,
    site: SiteOf,
    visitor: Admin,
    said: str = "",
    after: Annotated[int, Query(ge=0, le=_MOST)] = 0,
) -> Response:
    """One campaign: progress, statistics, settings, and its tasks from one on."""
    found = site.store.campaigns.get(campaign)
    tasks = site.store.campaigns.tasks(found.id, offset=after, limit=_TASKS + 1)
    return site.page(
        request,
        "campaign.html",
        visitor,
        campaign=found,
        progress=site.store.figures.progress(found.id),
        statistics=site.store.figures.statistics(found.id),
        tasks=tasks[:_TASKS],
        after=after,
        before=max(0, after - _TASKS) if after else None,
        more=after + _TASKS if len(tasks) > _TASKS else None,
        ratings=range(RATINGS[0], RATINGS[1] + 1),
        states=STATES,
        sampling=site.sampling.get(found.id),
        artifacts=site.settings.artifacts,
        said=_said(said),
    )


@router.get("/campaigns/{campaign}/progress")
def progress(campaign: str, site: SiteOf, visitor: Admin) -> dict[str, Any]:
    """How far a campaign is, for its page."""
    now, work = site.store.figures.progress(campaign), site.sampling.get(campaign)
    return {
        "judged": now.judged,
        "wanted": now.wanted,
        "held": now.held,
        "review": now.review,
        "sampling": work is not None and work.running,
    }


@router.post("/campaigns/{campaign}/settings")
def configure(
    campaign: str,
    site: SiteOf,
    visitor: Admin,
    overlap: Whole,
    lease_minutes: Real,
    gold_percent: Real,
    disagreement_percent: Real,
    max_skips: Whole,
    instructions: Text = "",
) -> Response:
    """Changes a campaign's settings; the order of its tasks stays."""
    found = site.store.campaigns.get(campaign)
    settings = Settings(
        instructions, overlap, lease_minutes * 60, gold_percent / 100, disagreement_percent / 100,
        max_skips, found.settings.seed,
    )  # fmt: skip
    site.store.campaigns.configure(found.id, settings, visitor.person.id)
    return _back(found, "saved")


@router.post("/campaigns/{campaign}/state")
def set_state(campaign: str, site: SiteOf, visitor: Admin, state: Text) -> Response:
    """Opens, pauses or closes a campaign."""
    return _back(site.store.campaigns.set_state(campaign, state, visitor.person.id), "saved")


@router.post("/campaigns/{campaign}/tasks/artifact")
def queue_artifact(
    campaign: str, site: SiteOf, visitor: Admin, workdir: Text, split: Text
) -> Response:
    """Queues the candidate sets of a `collect` artifact."""
    found = site.store.campaigns.get(campaign)
    try:
        path = _artifact(site, workdir)
        stage = artifact.read_manifest(path)["stage"]
        if stage != "collect":
            raise Invalid(f"{workdir!r} is an artifact of {stage}; candidates come from collect")
        sets = RecordReader(path / "records", "candidates", split, CandidateSet)
        added = site.store.campaigns.queue(found.id, sets, visitor.person.id, split)
    except UserError as error:
        raise Invalid(str(error)) from error
    return _back(found, f"queued-{added}")


@router.post("/campaigns/{campaign}/tasks/chats")
async def queue_chats(
    campaign: str, site: SiteOf, visitor: Admin, count: Whole, alternatives: Whole
) -> Response:
    """Picks replies from chats and samples alternatives to them, in the background."""
    found = await run_in_threadpool(site.store.campaigns.get, campaign)
    if found.kind != "ranking" or not 1 <= count <= 1000 or not 1 <= alternatives <= 8:
        raise Invalid("pick 1 to 1,000 replies with 1 to 8 alternatives, to be ranked")
    sampling.begin(site, found.id, visitor.person.id, count, alternatives)
    return _back(found, "sampling")


@router.post("/campaigns/{campaign}/tasks/texts")
def queue_texts(campaign: str, site: SiteOf, visitor: Admin, kind: Text, texts: Text) -> Response:
    """Queues questions to be answered, or topics to write about: one a line."""
    found = site.store.campaigns.get(campaign)
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    if kind == "topics":
        added = site.store.campaigns.queue_topics(found.id, lines, visitor.person.id)
    else:
        prompts = [Prompt(_key(line), (Message("user", line),), _SOURCE) for line in lines]
        added = site.store.campaigns.queue_prompts(found.id, prompts, visitor.person.id)
    return _back(found, f"queued-{added}")


@router.post("/campaigns/{campaign}/tasks/gold")
def queue_gold(
    campaign: str, site: SiteOf, visitor: Admin, question: Text, replies: Text
) -> Response:
    """Queues a gold check: replies from best to worst, with a line of --- between them."""
    found = site.store.campaigns.get(campaign)
    parts = [part.strip() for part in "\n".join(replies.splitlines()).split("\n---\n")]
    if not question.strip() or not all(parts):
        raise Invalid("a gold check is a question and replies with a line of --- between them")
    key = _key("\n---\n".join((question, *parts)))
    candidates = tuple(Candidate(f"{key}-{i}", part, "human", True) for i, part in enumerate(parts))
    item = CandidateSet(key, Prompt(key, (Message("user", question.strip()),), _SOURCE), candidates)
    ranks = range(1, len(parts) + 1)
    added = site.store.campaigns.queue_gold(found.id, item, ranks, visitor.person.id)
    return _back(found, f"queued-{added}")


def _artifact(site: Site, workdir: str) -> Path:
    """The directory of an artifact that is named below settings.artifacts."""
    if site.settings.artifacts is None:
        raise Invalid("this server reads no artifacts: see config.web.artifacts")
    root = Path(site.settings.artifacts).resolve()
    try:
        path = (root / workdir.strip()).resolve()
        found = path.is_relative_to(root) and path.is_dir()
    except (OSError, ValueError):  # too long, or no name at all
        found = False
    if not found:
        raise Invalid(f"there is no artifact {workdir!r} below the server's artifacts")
    return path


def _key(text: str) -> str:
    return f"{_SOURCE}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def _said(code: str) -> str:
    """What a form's answer tells the page; not a text, which anybody could put into a link."""
    count = code.removeprefix("queued-")
    # (An int of thousands of digits would be an error of its own.)
    if code.startswith("queued-") and count.isdecimal() and len(count) < 10:
        return f"{int(count):,} new {'task' if count == '1' else 'tasks'} queued."
    return {
        "saved": "Saved.",
        "sampling": "Sampling has begun; tasks appear as they are ready.",
    }.get(code, "")


def _back(campaign: Campaign, said: str) -> Response:
    return RedirectResponse(f"/campaigns/{campaign.id}?said={said}", 303)
