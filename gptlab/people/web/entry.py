"""How people come in, and go: invitations, sessions, consent, deletion of one's own data."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, RedirectResponse, Response

from gptlab.people.store import NotFound
from gptlab.people.store.consent import SCOPES
from gptlab.people.store.deletion import Export
from gptlab.people.store.person import Person
from gptlab.people.web import security
from gptlab.people.web.security import Denied, MaybeVisitor, SignedIn, Visitor
from gptlab.people.web.site import Site, SiteOf

CONSENT_VERSION = "2026-11"  # of the text in templates/consent.html
_GUEST = "Guest"  # the name of those who come in without one
router = APIRouter()


class Join(BaseModel):
    """An invitation's token, and what one wants to be called."""

    token: str
    name: str


class Me(BaseModel):
    """Who is signed in. `csrf` is the header X-CSRF-Token of every request but GET."""

    id: str
    name: str
    role: str
    simulated: bool
    csrf: str | None


class ConsentAnswer(BaseModel):
    """An answer about one scope."""

    scope: str
    given: bool


@router.get("/", include_in_schema=False)
async def welcome(request: Request, site: SiteOf, visitor: MaybeVisitor) -> Response:
    """The chat, or what a stranger sees."""
    if visitor is not None:
        return RedirectResponse("/chat", 303)
    return site.page(request, "welcome.html", None)


@router.post("/start", include_in_schema=False)
async def start(request: Request, site: SiteOf, visitor: MaybeVisitor) -> Response:
    """An account for a guest, where anybody may chat."""
    if visitor is not None:
        return RedirectResponse("/chat", 303)
    if not site.settings.open_chat:
        raise Denied(403, "an invitation is needed to chat here")
    person = await run_in_threadpool(site.store.accounts.add_person, _GUEST, "user", "system")
    return await _signed_in(site, person, RedirectResponse("/chat", 303))


@router.get("/join/{token}", include_in_schema=False)
def invitation(token: str, request: Request, site: SiteOf) -> Response:
    """What an invitation is good for. Only the form uses it: programs look into links, too."""
    found = site.store.accounts.invitation(token)
    if found is None:
        raise NotFound("this link is not valid (any more): ask for a new one")
    return site.page(request, "join.html", None, invitation=found, token=token)


@router.post("/join/{token}", include_in_schema=False)
async def join(
    token: str, request: Request, site: SiteOf, name: Annotated[str, Form()] = ""
) -> Response:
    """Uses an invitation from its page."""
    security.check_origin(request)
    accounts = site.store.accounts
    found = await run_in_threadpool(accounts.invitation, token)
    person = await run_in_threadpool(accounts.accept, token, name)
    to = f"/label/{found.campaign}" if found is not None and found.campaign else _home(person)
    return await _signed_in(site, person, RedirectResponse(to, 303))


@router.post("/api/join", tags=["account"])
async def join_by_program(body: Join, request: Request, site: SiteOf) -> Me:
    """Uses an invitation; the answer sets the session's cookie."""
    security.check_origin(request)
    person = await run_in_threadpool(site.store.accounts.accept, body.token, body.name)
    session, token = await run_in_threadpool(_open_session, site, person)
    answer = JSONResponse(_me(Visitor(person, session.csrf)).model_dump())
    security.set_session(site, answer, token)
    return answer  # type: ignore[return-value]


@router.get("/api/me", tags=["account"])
def me(visitor: SignedIn) -> Me:
    """Who is signed in."""
    return _me(visitor)


@router.post("/signout", include_in_schema=False)
async def sign_out(request: Request, site: SiteOf, visitor: SignedIn) -> Response:
    """Ends this browser's session."""
    token = request.cookies.get(security.cookie_name(site), "")
    await run_in_threadpool(site.store.accounts.close_session, token)
    answer = RedirectResponse("/", 303)
    security.end_session(site, answer)
    return answer


@router.get("/you", include_in_schema=False)
def your_data(request: Request, site: SiteOf, visitor: SignedIn) -> Response:
    """What is kept of a person, and what they may do about it."""
    consents = site.store.accounts.consents(visitor.person.id)
    return site.page(request, "you.html", visitor, consents=consents, scopes=SCOPES)


@router.post("/you/consent", include_in_schema=False)
async def consent_form(request: Request, site: SiteOf, visitor: SignedIn) -> Response:
    """Answers about all scopes at once."""
    form = await request.form()
    known = await run_in_threadpool(site.store.accounts.consents, visitor.person.id)
    for scope in SCOPES:
        given = form.get(scope) == "yes"
        if scope not in known or known[scope].given != given:
            answer = (visitor.person.id, scope, given, CONSENT_VERSION)
            await run_in_threadpool(site.store.accounts.consent, *answer)
    return RedirectResponse("/you?saved=1", 303)


@router.post("/api/consent", tags=["account"])
def consent(body: ConsentAnswer, site: SiteOf, visitor: SignedIn) -> dict[str, bool]:
    """An answer about one scope; it can be changed at any time."""
    person = visitor.person.id
    answer = site.store.accounts.consent(person, body.scope, body.given, CONSENT_VERSION)
    return {answer.scope: answer.given}


@router.post("/you/delete", include_in_schema=False)
async def delete(
    request: Request, site: SiteOf, visitor: SignedIn, confirm: Annotated[str, Form()] = ""
) -> Response:
    """Deletes the person with everything that is theirs."""
    if confirm.strip().lower() != "delete":
        raise Denied(400, "nothing was deleted: type the word delete to confirm")
    person = visitor.person.id
    exports = await delete_someone(site, person, person)
    answer = site.page(request, "deleted.html", None, exports=exports)
    security.end_session(site, answer)
    return answer


async def delete_someone(site: Site, person: str, actor: str) -> list[Export]:
    """Deletes a person; a reply that still runs for them can't come after that."""
    for reply in [r for r in site.running.values() if r.person == person]:
        reply.stop()
        await reply.ended()
    return await run_in_threadpool(site.store.delete_person, person, actor)


def asks_consent(site: Site, visitor: Visitor) -> bool:
    """Whether the person has still to be asked whether models may learn from them."""
    return "training" not in site.store.accounts.consents(visitor.person.id)


def _home(person: Person) -> str:
    return {"admin": "/campaigns", "reviewer": "/review", "labeller": "/label"}.get(
        person.role, "/chat"
    )


async def _signed_in(site: Site, person: Person, answer: Response) -> Response:
    _, token = await run_in_threadpool(_open_session, site, person)
    security.set_session(site, answer, token)
    return answer


def _open_session(site: Site, person: Person) -> Any:
    return site.store.accounts.open_session(person.id, security.SESSION_SECONDS)


def _me(visitor: Visitor) -> Me:
    person = visitor.person
    return Me(
        id=person.id,
        name=person.name,
        role=person.role,
        simulated=person.simulated,
        csrf=visitor.csrf,
    )
