"""Tokens that let somebody in: of invitations, sessions and API keys.

A token is 256 random bits that are shown once: the store has its SHA-256 only, and finds it by that
hash, so that neither a copy of the database nor the time that a look-up takes tells a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import SYSTEM
from gptlab.people.store.person import Person
from gptlab.people.store.schema import invitations, people


@dataclasses.dataclass(frozen=True)
class Invitation:
    """A link to join by (`person` None), or for a person to sign in again."""

    id: str
    role: str
    simulated: bool
    person: str | None
    campaign: str | None
    uses_left: int
    created_at: float
    expires_at: float


@dataclasses.dataclass(frozen=True)
class Session:
    """A signed-in browser. `csrf` goes into its forms."""

    person: Person
    csrf: str
    created_at: float
    expires_at: float


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """An API key without its token. `per_minute` None: the server's default."""

    id: str
    person: str
    name: str
    per_minute: int | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None


def new_token() -> str:
    """256 random bits that are safe in a URL."""
    return secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """What the store has of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def valid_invitation(now: float) -> sa.ColumnElement[bool]:
    """Of invitations: they can be used, and who made them still may invite."""
    admins = sa.select(people.c.id).where(people.c.role == "admin", people.c.deleted_at.is_(None))
    made_by = invitations.c.created_by
    return sa.and_(
        invitations.c.uses_left > 0,
        invitations.c.expires_at > now,
        sa.or_(made_by == SYSTEM, made_by.in_(admins)),
    )


def invitation_of(row: Any) -> Invitation:
    """A row of the table."""
    return Invitation(
        row.id, row.role, row.simulated, row.person_id, row.campaign_id, row.uses_left,
        row.created_at, row.expires_at,
    )  # fmt: skip


def api_key_of(row: Any) -> ApiKey:
    """A row of the table."""
    return ApiKey(
        row.id, row.person_id, row.name, row.per_minute, row.created_at, row.expires_at,
        row.revoked_at,
    )  # fmt: skip
