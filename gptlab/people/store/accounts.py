"""People and how they come in: roles, invitations, sessions, API keys, consent.

Nobody has a password. An invitation is a link with a token; whoever follows it becomes a person
with the role it says and gets a session.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa

from gptlab.people.backend import Caller
from gptlab.people.store.audit import SYSTEM, Audit
from gptlab.people.store.consent import SCOPES, Consent
from gptlab.people.store.database import Database, Reader, Writer, new_id, storable
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.people.store.person import (
    Person,
    check_name,
    check_not_last_admin,
    check_role,
    find_person,
    person_of,
    require,
)
from gptlab.people.store.schema import (
    api_keys,
    campaigns,
    consents,
    invitations,
    people,
    sessions,
    tasks,
)
from gptlab.people.store.settle import settle
from gptlab.people.store.tokens import (
    ApiKey,
    Invitation,
    Session,
    api_key_of,
    hashed,
    invitation_of,
    new_token,
    valid_invitation,
)

_SESSION = (
    sa.select(people, sessions.c.csrf, sessions.c.created_at.label("since"))
    .add_columns(sessions.c.expires_at)
    .join(people, people.c.id == sessions.c.person_id)
    .where(sessions.c.token_hash == sa.bindparam("key"))
    .where(sessions.c.expires_at > sa.bindparam("now"))
)


class Accounts:
    """See the head of this file. `actor` is the id of the person who does it, or 'system'."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def add_person(self, name: str, role: str, actor: str, simulated: bool = False) -> Person:
        """A new person; the first admin is made so. Raises Invalid for a wrong role or name."""
        with self._database.write() as writer:
            require(writer, actor, "admin")
            return self._add(writer, name, role, simulated, actor)

    def person(self, person: str) -> Person:
        """Raises NotFound, also for one who was deleted."""
        with self._database.read() as reader:
            return find_person(reader, person)

    def people(self) -> list[Person]:
        """Everybody who wasn't deleted, oldest first."""
        query = sa.select(people).where(people.c.deleted_at.is_(None))
        with self._database.read() as reader:
            rows = reader.execute(query.order_by(people.c.created_at, people.c.id))
            return [person_of(row) for row in rows]

    def names(self) -> dict[str, str]:
        """The names of everybody who wasn't deleted, by id."""
        return {person.id: person.name for person in self.people()}

    def set_role(self, person: str, role: str, actor: str) -> Person:
        """Invalid if nobody would be left as admin."""
        check_role(role)
        with self._database.write() as writer:
            require(writer, actor, "admin")
            before = find_person(writer, person)
            if before.role == "admin" and role != "admin":
                check_not_last_admin(writer, person)
            writer.execute(people.update().where(people.c.id == person).values(role=role))
            detail = {"from": before.role, "to": role}
            self._audit.append(writer, actor, "person.role", f"people:{person}", detail, True)
            return dataclasses.replace(before, role=role)

    def invite(
        self,
        role: str,
        actor: str,
        uses: int = 1,
        valid_seconds: float = 7 * 86400.0,
        simulated: bool = False,
        campaign: str | None = None,
    ) -> tuple[Invitation, str]:
        """(the invitation, its token, which is never shown again).

        `campaign`: the id of one to which the link leads. Raises Invalid, or NotFound for that one.
        """
        check_role(role)
        if not 1 <= uses <= 10_000:
            raise Invalid("an invitation is good for 1 to 10,000 people")
        return self._invite(role, actor, uses, valid_seconds, simulated, campaign, None)

    def sign_in_link(
        self, person: str, actor: str, valid_seconds: float = 86400.0
    ) -> tuple[Invitation, str]:
        """A link by which a person who has lost their session gets a new one; used once."""
        known = self.person(person)
        return self._invite(known.role, actor, 1, valid_seconds, known.simulated, None, person)

    def invitation(self, token: str) -> Invitation | None:
        """What a link is good for, before it is used; None if for nothing (any more)."""
        with self._database.read() as reader:
            return self._usable(reader, token)

    def invitations(self) -> list[Invitation]:
        """Those that still can be used, newest first."""
        query = sa.select(invitations).where(valid_invitation(self._now()))
        with self._database.read() as reader:
            rows = reader.execute(query.order_by(invitations.c.created_at.desc()))
            return [invitation_of(row) for row in rows]

    def revoke_invitation(self, invitation: str, actor: str) -> None:
        """Nobody can use it from now on."""
        with self._database.write() as writer:
            require(writer, actor, "admin")
            update = invitations.update().where(invitations.c.id == invitation)
            if not writer.execute(update.values(uses_left=0)).rowcount:
                raise NotFound("there is no such invitation")
            self._audit.append(writer, actor, "invitation.revoke", f"invitations:{invitation}")

    def accept(self, token: str, name: str) -> Person:
        """Uses an invitation: the new person, or the one whose sign-in link it is.

        Raises NotFound if the link is unknown, used up, revoked or too old, or if the admin who
        made it is none any more.
        """
        with self._database.write() as writer:
            found = self._usable(writer, token)
            if found is None:
                raise NotFound("this link is not valid (any more): ask for a new one")
            left = invitations.c.uses_left - 1
            update = invitations.update().where(invitations.c.id == found.id)
            writer.execute(update.values(uses_left=left))
            where = f"invitations:{found.id}"
            if found.person is not None:
                self._audit.append(writer, found.person, "invitation.sign_in", where)
                return find_person(writer, found.person)
            person = self._add(writer, name, found.role, found.simulated, SYSTEM)
            self._audit.append(writer, person.id, "invitation.accept", where)
            return person

    def open_session(self, person: str, valid_seconds: float = 30 * 86400.0) -> tuple[Session, str]:
        """(the session, its token, which goes into the cookie)."""
        token, csrf, now = new_token(), new_token(), self._now()
        with self._database.write() as writer:
            known = find_person(writer, person)
            writer.execute(sessions.delete().where(sessions.c.expires_at <= now))
            writer.execute(
                sessions.insert().values(
                    token_hash=hashed(token), person_id=person, csrf=csrf,
                    created_at=now, expires_at=now + valid_seconds,
                )
            )  # fmt: skip
            self._audit.append(writer, person, "session.open", f"people:{person}")
            return Session(known, csrf, now, now + valid_seconds), token

    def check_session(self, token: str) -> Session | None:
        """The session of a cookie, if it is one that is still valid."""
        with self._database.read() as reader:
            row = reader.execute(_SESSION, {"key": hashed(token), "now": self._now()}).first()
        if row is None:
            return None
        return Session(person_of(row), row.csrf, row.since, row.expires_at)

    def signed_in(self, role: str) -> bool:
        """Whether anybody with just this role has a session that is still valid."""
        query = (
            sa.select(sessions.c.token_hash)
            .join(people, people.c.id == sessions.c.person_id)
            .where(people.c.role == role, sessions.c.expires_at > self._now())
        )
        with self._database.read() as reader:
            return reader.execute(query).first() is not None

    def close_session(self, token: str) -> None:
        """Signs out; nothing happens if there is no such session."""
        with self._database.write() as writer:
            where = sessions.c.token_hash == hashed(token)
            person = writer.execute(sa.select(sessions.c.person_id).where(where)).scalar()
            if person is not None:
                writer.execute(sessions.delete().where(where))
                self._audit.append(writer, person, "session.close", f"people:{person}")

    def close_sessions(self, person: str, actor: str) -> int:
        """Signs a person out everywhere; returns of how many sessions."""
        with self._database.write() as writer:
            require(writer, actor, "admin", own=person)
            closed = writer.execute(sessions.delete().where(sessions.c.person_id == person))
            detail = {"sessions": closed.rowcount}
            self._audit.append(writer, actor, "session.close_all", f"people:{person}", detail)
            return closed.rowcount

    def create_api_key(
        self,
        person: str,
        name: str,
        actor: str,
        per_minute: int | None = None,
        valid_seconds: float | None = None,
    ) -> tuple[ApiKey, str]:
        """(the key, its token, which is never shown again). Tokens begin with 'gptlab-'."""
        if per_minute is not None and per_minute < 1:
            raise Invalid("a key allows at least one request a minute")
        token, now = f"gptlab-{new_token()}", self._now()
        expires = None if valid_seconds is None else now + valid_seconds
        name = check_name(name)
        key = ApiKey(new_id(), person, name, per_minute, now, expires, None)
        with self._database.write() as writer:
            require(writer, actor, "admin", own=person)
            find_person(writer, person)
            writer.execute(
                api_keys.insert().values(
                    id=key.id, token_hash=hashed(token), person_id=person, name=name,
                    per_minute=per_minute, created_at=now, expires_at=expires,
                )
            )  # fmt: skip
            detail = {"person": person, "per_minute": per_minute}
            self._audit.append(writer, actor, "api_key.create", f"api_keys:{key.id}", detail)
        return key, token

    def api_keys(self, person: str | None = None) -> list[ApiKey]:
        """Keys that weren't revoked, of one person or of all, newest first."""
        query = sa.select(api_keys).where(api_keys.c.revoked_at.is_(None))
        if person is not None:
            query = query.where(api_keys.c.person_id == person)
        with self._database.read() as reader:
            rows = reader.execute(query.order_by(api_keys.c.created_at.desc()))
            return [api_key_of(row) for row in rows]

    def revoke_api_key(self, key: str, actor: str) -> None:
        """Raises NotFound."""
        with self._database.write() as writer:
            owner = sa.select(api_keys.c.person_id).where(api_keys.c.id == key)
            person = writer.execute(owner).scalar()
            if person is None:
                raise NotFound("there is no such key")
            require(writer, actor, "admin", own=person)
            update = api_keys.update().where(api_keys.c.id == key, api_keys.c.revoked_at.is_(None))
            writer.execute(update.values(revoked_at=self._now()))
            self._audit.append(writer, actor, "api_key.revoke", f"api_keys:{key}")

    def check_api_key(self, token: str) -> Caller | None:
        """Who calls the API with this key; None: it is no valid key."""
        row = self._api_key(token)
        return None if row is None else Caller(row.key_id, row.per_minute)

    def api_person(self, token: str) -> Person | None:
        """Whose key it is: for clients that work on campaigns through the API."""
        row = self._api_key(token)
        return None if row is None else person_of(row)

    def consent(self, person: str, scope: str, given: bool, text_version: str) -> Consent:
        """Notes a person's answer. Withdrawing is an answer too.

        Later exports go by it, and tasks that show the person's text are withheld or given out.
        """
        if scope not in SCOPES:
            raise Invalid(f"consent is about one of {', '.join(SCOPES)}")
        answer = Consent(scope, given, storable(text_version, 100, "the version"), self._now())
        with self._database.write() as writer:
            find_person(writer, person)
            key, detail = new_id(), {"scope": scope, "given": given}
            row = self._audit.append(writer, person, "consent.add", f"consents:{key}", detail, True)
            writer.execute(
                consents.insert().values(
                    id=key, person_id=person, scope=scope, given=given,
                    text_version=answer.text_version, created_at=answer.at, row=row,
                )
            )  # fmt: skip
            shows = sa.select(tasks.c.id).where(tasks.c.person_id == person)
            settle(writer, writer.execute(shows).scalars().all())
        return answer

    def consents(self, person: str) -> dict[str, Consent]:
        """The newest answer for each scope that the person was asked about."""
        query = sa.select(consents).where(consents.c.person_id == person).order_by(consents.c.row)
        with self._database.read() as reader:
            return {
                r.scope: Consent(r.scope, r.given, r.text_version, r.created_at)
                for r in reader.execute(query)
            }

    def _now(self) -> float:
        return self._database.clock()

    def _add(self, writer: Writer, name: str, role: str, simulated: bool, actor: str) -> Person:
        check_role(role)
        person = Person(new_id(), check_name(name), role, simulated, self._now())
        writer.execute(people.insert().values(**dataclasses.asdict(person)))
        detail = {"role": role, "simulated": simulated}
        self._audit.append(writer, actor, "person.add", f"people:{person.id}", detail)
        return person

    def _invite(
        self, role: str, actor: str, uses: int, valid_seconds: float, simulated: bool,
        campaign: str | None, person: str | None,
    ) -> tuple[Invitation, str]:  # fmt: skip
        token, now = new_token(), self._now()
        made = Invitation(
            new_id(), role, simulated, person, campaign, uses, now, now + valid_seconds
        )
        with self._database.write() as writer:
            require(writer, actor, "admin")
            there = sa.select(campaigns.c.id).where(campaigns.c.id == campaign)
            if campaign is not None and writer.execute(there).first() is None:
                raise NotFound(f"there is no campaign with the id {campaign!r}")
            writer.execute(
                invitations.insert().values(
                    id=made.id, token_hash=hashed(token), role=role, simulated=simulated,
                    person_id=person, campaign_id=campaign, created_by=actor, uses_left=uses,
                    created_at=now, expires_at=made.expires_at,
                )
            )  # fmt: skip
            detail = {"role": role, "uses": uses, "person": person, "campaign": campaign}
            self._audit.append(writer, actor, "invitation.add", f"invitations:{made.id}", detail)
        return made, token

    def _usable(self, reader: Reader, token: str) -> Invitation | None:
        query = sa.select(invitations).where(
            invitations.c.token_hash == hashed(token), valid_invitation(self._now())
        )
        row = reader.execute(query).first()
        return None if row is None else invitation_of(row)

    def _api_key(self, token: str) -> Any:
        query = (
            sa.select(people, api_keys.c.per_minute, api_keys.c.id.label("key_id"))
            .join(people, people.c.id == api_keys.c.person_id)
            .where(
                api_keys.c.token_hash == hashed(token),
                api_keys.c.revoked_at.is_(None),
                sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > self._now()),
            )
        )
        with self._database.read() as reader:
            return reader.execute(query).first()
