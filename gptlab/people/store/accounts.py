"""People and how they come in: roles, invitations, sessions, API keys, consent.

Nobody has a password. An invitation is a link with a token; whoever follows it becomes a person
with the role it says and gets a session. A token (of an invitation, a session, an API key) is 256
random bits that are shown once: the store has its SHA-256 only, and finds it by that hash, so that
neither a copy of the database nor the time that a look-up takes tells a token.
"""

from __future__ import annotations

import dataclasses

from gptlab.people.backend import Caller
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database

# Each may do what those before it may: chat and give feedback; work on campaigns; decide where
# labellers disagree; everything.
ROLES = ("user", "labeller", "reviewer", "admin")
# What can be consented to. 'training': what I write and judge may train models. 'publication': it
# may be in data sets that are given to others.
SCOPES = ("training", "publication")


@dataclasses.dataclass(frozen=True)
class Person:
    """`simulated`: a program that acts as a person; whatever it does is marked as such."""

    id: str
    name: str
    role: str
    simulated: bool
    created_at: float

    def may(self, role: str) -> bool:
        """Whether this role includes that one."""
        return ROLES.index(self.role) >= ROLES.index(role)


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


@dataclasses.dataclass(frozen=True)
class Consent:
    """A person's newest answer about one scope, to a text of this version."""

    scope: str
    given: bool
    text_version: str
    at: float


class Accounts:
    """See the head of this file. `actor` is the id of the person who does it, or 'system'."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def add_person(self, name: str, role: str, actor: str, simulated: bool = False) -> Person:
        """A new person; the first admin is made so. Raises Invalid for a wrong role or name."""
        raise NotImplementedError

    def person(self, person: str) -> Person:
        """Raises NotFound, also for one who was deleted."""
        raise NotImplementedError

    def people(self) -> list[Person]:
        """Everybody who wasn't deleted, oldest first."""
        raise NotImplementedError

    def set_role(self, person: str, role: str, actor: str) -> Person:
        """Invalid if nobody would be left as admin."""
        raise NotImplementedError

    def invite(
        self,
        role: str,
        actor: str,
        uses: int = 1,
        valid_seconds: float = 7 * 86400.0,
        simulated: bool = False,
        campaign: str | None = None,
    ) -> tuple[Invitation, str]:
        """(the invitation, its token, which is never shown again)."""
        raise NotImplementedError

    def sign_in_link(
        self, person: str, actor: str, valid_seconds: float = 86400.0
    ) -> tuple[Invitation, str]:
        """A link by which a person who has lost their session gets a new one; used once."""
        raise NotImplementedError

    def invitation(self, token: str) -> Invitation | None:
        """What a link is good for, before it is used; None if for nothing (any more)."""
        raise NotImplementedError

    def invitations(self) -> list[Invitation]:
        """Those that still can be used, newest first."""
        raise NotImplementedError

    def revoke_invitation(self, invitation: str, actor: str) -> None:
        """Nobody can use it from now on."""
        raise NotImplementedError

    def accept(self, token: str, name: str) -> Person:
        """Uses an invitation: the new person, or the one whose sign-in link it is.

        Raises NotFound if the link is unknown, used up, revoked or too old.
        """
        raise NotImplementedError

    def open_session(self, person: str, valid_seconds: float = 30 * 86400.0) -> tuple[Session, str]:
        """(the session, its token, which goes into the cookie)."""
        raise NotImplementedError

    def check_session(self, token: str) -> Session | None:
        """The session of a cookie, if it is one that is still valid."""
        raise NotImplementedError

    def close_session(self, token: str) -> None:
        """Signs out; nothing happens if there is no such session."""
        raise NotImplementedError

    def close_sessions(self, person: str, actor: str) -> int:
        """Signs a person out everywhere; returns of how many sessions."""
        raise NotImplementedError

    def create_api_key(
        self,
        person: str,
        name: str,
        actor: str,
        per_minute: int | None = None,
        valid_seconds: float | None = None,
    ) -> tuple[ApiKey, str]:
        """(the key, its token, which is never shown again). Tokens begin with 'gptlab-'."""
        raise NotImplementedError

    def api_keys(self, person: str | None = None) -> list[ApiKey]:
        """Keys that weren't revoked, of one person or of all, newest first."""
        raise NotImplementedError

    def revoke_api_key(self, key: str, actor: str) -> None:
        """Raises NotFound."""
        raise NotImplementedError

    def check_api_key(self, token: str) -> Caller | None:
        """Who calls the API with this key; None: it is no valid key."""
        raise NotImplementedError

    def api_person(self, token: str) -> Person | None:
        """Whose key it is: for clients that work on campaigns through the API."""
        raise NotImplementedError

    def consent(self, person: str, scope: str, given: bool, text_version: str) -> Consent:
        """Notes a person's answer. Withdrawing is an answer too: later exports go by it."""
        raise NotImplementedError

    def consents(self, person: str) -> dict[str, Consent]:
        """The newest answer for each scope that the person was asked about."""
        raise NotImplementedError
