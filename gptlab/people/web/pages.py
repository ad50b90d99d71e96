"""The web app on a FastAPI app: its routes, and what is shown when something goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from gptlab.people.backend import Backend
from gptlab.people.openai_errors import ApiError, explain
from gptlab.people.store import Forbidden, Invalid, LeaseLost, NotFound, Store
from gptlab.people.store.audit import SYSTEM
from gptlab.people.web import campaigns, chat, entry, labelling, people, review, security
from gptlab.people.web.site import Settings, Site, load_templates

STATIC = Path(__file__).parent / "static"
_STATUS = {NotFound: 404, Invalid: 400, Forbidden: 403, LeaseLost: 409}
_PROGRAMS = ("/api/", "/v1/", "/healthz", "/metrics")  # they are answered in JSON


def add_pages(app: FastAPI, backend: Backend, store: Store, settings: Settings) -> None:
    """Adds the web app's routes, static files, error pages and security headers to an app.

    When the app ends, replies that still run for the pages are stopped and kept, before the app's
    own lifespan closes the backend.
    """
    app.state.site = site = Site(backend, store, settings, load_templates(), {}, {})
    app.add_middleware(security.SecurityHeaders, secure=settings.secure)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for part in (entry, chat, labelling, review, campaigns, people):
        app.include_router(part.router)
    own = (*_STATUS, security.Denied, ApiError, RequestValidationError, HTTPException, Exception)
    for kind in own:
        app.add_exception_handler(kind, _answer)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
            await _end(site)

    app.router.lifespan_context = lifespan


def admin_link(store: Store, valid_seconds: float = 86400.0) -> str | None:
    """The path of a link by which an admin comes in; None if one is signed in.

    Without an admin it is an invitation for the first one, else the oldest one signs in again:
    nobody else could let them. Unused links of that kind are revoked: only the newest is good.
    """
    accounts = store.accounts
    admins = [person for person in accounts.people() if person.role == "admin"]
    if accounts.signed_in("admin"):
        return None
    person = admins[0].id if admins else None
    for unused in accounts.invitations():
        if (unused.role, unused.person) == ("admin", person):
            accounts.revoke_invitation(unused.id, SYSTEM)
    if person is None:
        _, token = accounts.invite("admin", SYSTEM, valid_seconds=valid_seconds)
    else:
        _, token = accounts.sign_in_link(person, SYSTEM, valid_seconds)
    return f"/join/{token}"


async def _end(site: Site) -> None:
    replies, samplings = list(site.running.values()), list(site.sampling.values())
    for reply in replies:
        reply.stop()
    for sampling in samplings:
        sampling.stop()
    for reply in replies:
        await reply.ended()
    for sampling in samplings:
        await sampling.ended()


async def _answer(request: Request, error: Exception) -> Response:
    """What went wrong: JSON for programs and scripts, a page for people."""
    site: Site = request.app.state.site
    answer = _told(request, site, error)
    # Of a defect, no middleware sees the answer.
    security.add_headers(answer.headers, request.url.path, site.settings.secure)
    return answer


def _told(request: Request, site: Site, error: Exception) -> Response:
    status = _STATUS.get(type(error)) or getattr(error, "status", None)
    known = isinstance(error, (*_STATUS, security.Denied))
    told = ApiError(status or 500, str(error)) if known else explain(error)
    if request.url.path.startswith(_PROGRAMS):
        return told.response()
    if told.status == 401:
        return RedirectResponse("/", 303)
    if isinstance(error, HTTPException) and told.status == 404:
        told = ApiError(404, "there is no such page")
    answer = site.page(
        request, "error.html", None, told.status, code=told.status, message=str(told)
    )
    answer.headers.update(told.headers)
    return answer
