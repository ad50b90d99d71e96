"""People, their roles and invitations, API keys, the audit, and what was exported: for admins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import RedirectResponse, Response

from gptlab.people.store.deletion import Export
from gptlab.people.store.person import ROLES
from gptlab.people.web.entry import delete_someone
from gptlab.people.web.security import Admin, Denied, Visitor
from gptlab.people.web.site import Site, SiteOf
from gptlab.run import descendants
from gptlab.run.descendants import Descendant

_DAY = 86400.0  # seconds
_MAX_DAYS = 36_500
_MAX_PER_MINUTE = 1_000_000
_ROWS = 100
router = APIRouter(include_in_schema=False)
Text = Annotated[str, Form()]


@router.get("/people")
def overview(request: Request, site: SiteOf, visitor: Admin) -> Response:
    """Everybody, and the links that can still be used."""
    return _people(request, site, visitor)


@router.post("/people/invite")
def invite(
    request: Request,
    site: SiteOf,
    visitor: Admin,
    role: Text,
    uses: Annotated[int, Form(ge=1, le=10_000)] = 1,
    days: Annotated[float, Form(gt=0, le=_MAX_DAYS, allow_inf_nan=False)] = 7.0,
    campaign: Text = "",
    simulated: Annotated[bool, Form()] = False,
) -> Response:
    """A link by which people join; it is shown once."""
    leads_to = site.store.campaigns.get(campaign).id if campaign else None
    _, token = site.store.accounts.invite(
        role, visitor.person.id, uses, days * _DAY, simulated, leads_to
    )
    return _people(request, site, visitor, link=_link(request, token))


@router.post("/people/{person}/link")
def sign_in_link(person: str, request: Request, site: SiteOf, visitor: Admin) -> Response:
    """A link for a person who has lost their session; it is shown once."""
    _, token = site.store.accounts.sign_in_link(person, visitor.person.id)
    return _people(request, site, visitor, link=_link(request, token))


@router.post("/people/{person}/role")
def set_role(person: str, site: SiteOf, visitor: Admin, role: Text) -> Response:
    """Changes what a person may do."""
    site.store.accounts.set_role(person, role, visitor.person.id)
    return RedirectResponse("/people", 303)


@router.post("/people/{person}/signout")
def sign_out(person: str, site: SiteOf, visitor: Admin) -> Response:
    """Ends all sessions of a person."""
    site.store.accounts.close_sessions(person, visitor.person.id)
    return RedirectResponse("/people", 303)


@router.post("/people/{person}/delete")
async def delete(
    person: str, request: Request, site: SiteOf, visitor: Admin, confirm: Text = ""
) -> Response:
    """Deletes somebody with everything that is theirs, and shows what was exported of it."""
    if confirm.strip().lower() != "delete":
        raise Denied(400, "nothing was deleted: type the word delete to confirm")
    found = await delete_someone(site, person, visitor.person.id)
    if person == visitor.person.id:  # from now on a stranger
        return site.page(request, "deleted.html", None, exports=found)
    return RedirectResponse(f"/people/{person}/exports", 303)


@router.get("/people/{person}/exports")
def exports_of(person: str, request: Request, site: SiteOf, visitor: Admin) -> Response:
    """Which exports contain something of a person, and what was made of those."""
    found = site.store.exports.containing(person)
    names = site.store.accounts.names()
    return site.page(
        request,
        "exports.html",
        visitor,
        id=person,
        name=names.get(person),
        deleted=person not in names,
        exports=found,
        descendants=_descendants(site, found),
    )


@router.post("/invitations/{invitation}/revoke")
def revoke_invitation(invitation: str, site: SiteOf, visitor: Admin) -> Response:
    """Nobody can use the link from now on."""
    site.store.accounts.revoke_invitation(invitation, visitor.person.id)
    return RedirectResponse("/people", 303)


@router.get("/keys")
def keys(request: Request, site: SiteOf, visitor: Admin) -> Response:
    """The API keys that are valid."""
    return _keys(request, site, visitor)


@router.post("/keys")
def create_key(
    request: Request,
    site: SiteOf,
    visitor: Admin,
    person: Text,
    name: Text,
    per_minute: Text = "",
    days: Text = "",
) -> Response:
    """A new key; it is shown once."""
    _, token = site.store.accounts.create_api_key(
        person,
        name,
        visitor.person.id,
        int(_number(per_minute, 1, _MAX_PER_MINUTE, "requests a minute")) if per_minute else None,
        _number(days, 0.001, _MAX_DAYS, "days") * _DAY if days else None,
    )
    return _keys(request, site, visitor, token=token)


@router.post("/keys/{key}/revoke")
def revoke_key(key: str, site: SiteOf, visitor: Admin) -> Response:
    """The key is refused from now on."""
    site.store.accounts.revoke_api_key(key, visitor.person.id)
    return RedirectResponse("/keys", 303)


@router.get("/audit")
def audit(
    request: Request, site: SiteOf, visitor: Admin, after: int | None = None, check: bool = False
) -> Response:
    """Who did what: the newest rows, or those from one on."""
    head = site.store.audit.head()
    begin = max(0, head.row - _ROWS) if after is None else min(max(0, after), head.row)
    entries = site.store.audit.entries(begin, _ROWS)
    exports = site.store.exports.all()
    return site.page(
        request,
        "audit.html",
        visitor,
        entries=entries,
        head=head,
        before=max(0, begin - _ROWS) if begin else None,
        after=begin + _ROWS if begin + _ROWS < head.row else None,
        names=site.store.accounts.names(),
        exports=exports,
        descendants=_descendants(site, [export for export in exports if export.stale]),
        checked=check,
        wrong=site.store.audit.verify() if check else None,
    )


def _people(request: Request, site: Site, visitor: Visitor, link: str | None = None) -> Response:
    return site.page(
        request,
        "people.html",
        visitor,
        people=site.store.accounts.people(),
        invitations=site.store.accounts.invitations(),
        campaigns=site.store.campaigns.all(),
        roles=ROLES,
        link=link,
    )


def _descendants(site: Site, exports: Sequence[Export]) -> list[Descendant] | None:
    """What was made of exports, in the artifacts that the server knows; None: it knows none."""
    if site.settings.artifacts is None:
        return None
    identities = {export.identity for export in exports}
    return descendants.find(identities, [site.settings.artifacts]) if identities else []


def _keys(request: Request, site: Site, visitor: Visitor, token: str | None = None) -> Response:
    people = site.store.accounts.people()
    return site.page(
        request,
        "keys.html",
        visitor,
        keys=site.store.accounts.api_keys(),
        people=people,
        names={person.id: person.name for person in people},
        token=token,
    )


def _link(request: Request, token: str) -> str:
    return str(request.url_for("invitation", token=token))


def _number(text: str, least: float, most: float, name: str) -> float:
    """What a field says that may be empty."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise Denied(400, f"{name}: give a number from {least:g} to {most:,}")
    return number
