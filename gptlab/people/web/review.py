"""The adjudication queue: what labellers don't agree on, flag or skip."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.responses import RedirectResponse, Response

from gptlab.people.store import Invalid
from gptlab.people.store.judgements import FLAGS, Flag
from gptlab.people.web.security import Reviewer, Visitor
from gptlab.people.web.site import Site, SiteOf

_SHOWN = 50
router = APIRouter(include_in_schema=False)


@router.get("/review")
def overview(request: Request, site: SiteOf, visitor: Reviewer) -> Response:
    """All campaigns with the cases that wait."""
    queues = [
        (campaign, site.store.review.queue(campaign.id, visitor.person.id, _SHOWN))
        for campaign in site.store.campaigns.all()
    ]
    return site.page(request, "review.html", visitor, queues=[q for q in queues if q[1]])


@router.get("/review/{campaign}/{task}")
def case(campaign: str, task: str, request: Request, site: SiteOf, visitor: Reviewer) -> Response:
    """One case: what was answered, and the form to decide it."""
    found = site.store.review.case(campaign, task, visitor.person.id)
    return site.page(
        request,
        "case.html",
        visitor,
        case=found,
        campaign=site.store.campaigns.get(campaign),
        names=site.store.accounts.names(),
        flags=FLAGS,
    )


@router.post("/review/{campaign}/{task}")
async def decide(
    campaign: str, task: str, request: Request, site: SiteOf, visitor: Reviewer
) -> Response:
    """Decides a case, or leaves its task out."""
    form = await request.form()
    await run_in_threadpool(_decide, site, campaign, task, visitor, form)
    return RedirectResponse("/review", 303)


def _decide(site: Site, campaign: str, task: str, visitor: Visitor, form: FormData) -> None:
    found = site.store.review.case(campaign, task, visitor.person.id).task
    note = str(form.get("note", ""))
    if form.get("action") == "drop":
        site.store.review.drop(found.id, visitor.person.id, note)
        return
    count = range(len(found.candidates))
    ranks = [str(form.get(f"rank-{i}", "")) for i in count]
    # (An int of thousands of digits would be an error of its own.)
    if not all(rank.isdecimal() and len(rank) < 10 for rank in ranks):
        raise Invalid("give every reply a rank")
    flags = [
        Flag(i, kind, int(severity))
        for i in count
        for kind in FLAGS
        if (severity := str(form.get(f"flag-{i}-{kind}", "0"))) in ("1", "2", "3")
    ]
    site.store.review.decide(
        found.id, visitor.person.id, [int(rank) for rank in ranks], flags, note
    )
