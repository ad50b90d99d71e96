"""The web app on a FastAPI app: its routes, and what is shown when something goes wrong."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from gptlab.people import backend as backend_lib
from gptlab.people.backend import Backend
from gptlab.people.store import Forbidden, Invalid, LeaseLost, NotFound, Store
from gptlab.people.web import campaigns, chat, entry, labelling, people, review, security
from gptlab.people.web.site import Settings, Site, load_templates

STATIC = Path(__file__).parent / "static"


def add_pages(app: FastAPI, backend: Backend, store: Store, settings: Settings) -> None:
    """Adds the web app's routes, static files, error pages and security headers to an app.

    Call `stop_work` when the app ends, before the backend is closed.
    """
    app.state.site = Site(backend, store, settings, load_templates(), {}, {})
    app.add_middleware(security.SecurityHeaders, secure=settings.secure)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for part in (entry, chat, labelling, review, campaigns, people):
        app.include_router(part.router)
    for error, status in _STATUS.items():
        app.add_exception_handler(error, _answer(status))
    app.add_exception_handler(security.Denied, _answer(None))


async def stop_work(app: FastAPI) -> None:
    """Ends what runs for the pages: replies are kept as far as they came."""
    site: Site = app.state.site
    works = [*site.running.values(), *site.sampling.values()]
    for work in works:
        work.stop()
    await asyncio.gather(*(work.ended() for work in works))


def first_invitation(store: Store, valid_seconds: float = 86400.0) -> str | None:
    """The path of a link by which the first admin comes in; None if there is an admin."""
    if any(person.role == "admin" for person in store.accounts.people()):
        return None
    _, token = store.accounts.invite("admin", "system", valid_seconds=valid_seconds)
    return f"/join/{token}"


_STATUS: dict[type[Exception], int] = {
    NotFound: 404,
    Invalid: 400,
    Forbidden: 403,
    LeaseLost: 409,
    backend_lib.Invalid: 400,
    backend_lib.Busy: 429,
    backend_lib.Unavailable: 503,
}


def _answer(status: int | None) -> Any:
    """A handler of an exception: JSON for programs and scripts, a page for people."""

    async def handler(request: Request, error: Exception) -> Response:
        code = status or getattr(error, "status", 500)
        headers = {}
        if isinstance(error, backend_lib.Busy):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
            code = 503 if error.draining else code
        message = str(error)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": {"message": message}}, code, headers)
        if code == 401:
            return RedirectResponse("/", 303)
        site: Site = request.app.state.site
        response = site.page(request, "error.html", None, code, code=code, message=message)
        response.headers.update(headers)
        return response

    return handler


