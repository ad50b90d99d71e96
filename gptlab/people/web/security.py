"""Who asks, and may they: headers, sessions, CSRF tokens and roles.

A session is a cookie that scripts can't read. What changes something needs, besides, the session's
CSRF token in a header or a form field; a page of another site can send neither. Browsers also say
where a request comes from (Sec-Fetch-Site, Origin), which is checked even where there is no session
yet. Programs may send an API key instead of a cookie; as nobody's browser adds one by itself, they
need no CSRF token.
"""

from __future__ import annotations

import dataclasses
import hmac
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptlab.people.store.person import Person
from gptlab.people.web.site import Site, SiteOf

SESSION_SECONDS = 30 * 86400.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # an invitation's link is nobody else's business
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def add_headers(headers: MutableHeaders, path: str, secure: bool) -> None:
    """HEADERS on a response to a path; what isn't a static file is never cached."""
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if secure:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")
    if not path.startswith("/static/"):
        headers.setdefault("Cache-Control", "no-store")


class SecurityHeaders:
    """ASGI middleware: `add_headers` on every response but those to defects.

    Starlette answers to those outside of all middleware.
    """

    def __init__(self, app: ASGIApp, secure: bool):
        self._app, self._secure = app, secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message), scope["path"], self._secure)
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class Denied(Exception):
    """A request that is refused, with its status code."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Visitor:
    """Who asks. `csrf` goes into the page's forms; None for a program with an API key."""

    person: Person
    csrf: str | None


def cookie_name(site: Site) -> str:
    """With the prefix, browsers take the cookie from this very host and over https only."""
    return "__Host-gptlab" if site.settings.secure else "gptlab"


def set_session(site: Site, response: Response, token: str) -> None:
    """Puts a session's token into the browser."""
    response.set_cookie(
        cookie_name(site),
        token,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="lax",  # 'strict' would sign people out who follow a link to the app
        secure=site.settings.secure,
    )


def end_session(site: Site, response: Response) -> None:
    """Removes the session's token from the browser."""
    response.delete_cookie(
        cookie_name(site), httponly=True, samesite="lax", secure=site.settings.secure
    )


async def visitor(request: Request, site: SiteOf) -> Visitor | None:
    """Who asks, if they are known. Raises Denied for a request that another site has sent."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        person = await run_in_threadpool(site.store.accounts.api_person, key)
        if person is None:
            raise Denied(401, "this API key is not valid")
        return Visitor(person, None)
    changes = request.method not in _SAFE_METHODS
    if changes:
        check_origin(request)
    token = request.cookies.get(cookie_name(site))
    session = await run_in_threadpool(site.store.accounts.check_session, token) if token else None
    if session is None:
        return None
    if changes and not hmac.compare_digest(
        (await _csrf_token(request)).encode("utf-8", "replace"), session.csrf.encode()
    ):
        raise Denied(403, "this page is out of date: reload it and try again")
    return Visitor(session.person, session.csrf)


def check_origin(request: Request) -> None:
    """Raises Denied if a browser says that the request comes from another site."""
    fetch_site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    try:
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    except ValueError:  # it is no address: no browser has sent it
        foreign = True
    if foreign or fetch_site not in ("same-origin", "none"):
        raise Denied(403, "this request comes from another site")


async def _csrf_token(request: Request) -> str:
    token = request.headers.get("x-csrf-token")
    if token is None and request.headers.get("content-type", "").startswith(
        ("application/x-www-form-urlencoded", "multipart/form-data")
    ):
        field = (await request.form()).get("csrf")
        token = field if isinstance(field, str) else None
    return token or ""


MaybeVisitor = Annotated[Visitor | None, Depends(visitor)]


async def signed_in(found: MaybeVisitor) -> Visitor:
    """Raises Denied for a visitor who isn't known."""
    if found is None:
        raise Denied(401, "sign in with your invitation link first")
    return found


SignedIn = Annotated[Visitor, Depends(signed_in)]


async def _labeller(found: SignedIn) -> Visitor:
    return _needs(found, "labeller")


async def _reviewer(found: SignedIn) -> Visitor:
    return _needs(found, "reviewer")


async def _admin(found: SignedIn) -> Visitor:
    return _needs(found, "admin")


def _needs(found: Visitor, role: str) -> Visitor:
    if not found.person.may(role):
        raise Denied(403, f"this is for {role}s: ask an admin for that role")
    return found


Labeller = Annotated[Visitor, Depends(_labeller)]
Reviewer = Annotated[Visitor, Depends(_reviewer)]
Admin = Annotated[Visitor, Depends(_admin)]
