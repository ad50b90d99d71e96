"""Who somebody is, and what they may do."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import SYSTEM
from gptlab.people.store.database import Reader, storable
from gptlab.people.store.errors import Forbidden, Invalid, NotFound
from gptlab.people.store.schema import people

# Each may do what those before it may: chat and give feedback; work on campaigns; decide where
# labellers disagree; everything.
ROLES = ("user", "labeller", "reviewer", "admin")
MAX_NAME = 100  # characters
_PERSON = sa.select(people).where(people.c.id == sa.bindparam("key"), people.c.deleted_at.is_(None))


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


def find_person(reader: Reader, person: str) -> Person:
    """Raises NotFound, also for one who was deleted."""
    row = reader.execute(_PERSON, {"key": person}).first()
    if row is None:
        raise NotFound("there is no such person")
    return person_of(row)


def require(reader: Reader, actor: str, role: str, own: str | None = None) -> None:
    """Forbidden unless the actor is 'system', has the role, or it is about themselves (`own`)."""
    if actor == SYSTEM or (own is not None and actor == own):
        return
    if not find_person(reader, actor).may(role):
        raise Forbidden(f"this takes the role of {role}")


def check_not_last_admin(reader: Reader, person: str) -> None:
    """Invalid if there is no other admin."""
    query = sa.select(sa.func.count()).where(
        people.c.role == "admin", people.c.deleted_at.is_(None), people.c.id != person
    )
    if not reader.execute(query).scalar_one():
        raise Invalid("this is the only admin: make somebody else one first")


def check_role(role: str) -> None:
    """Raises Invalid."""
    if role not in ROLES:
        raise Invalid(f"a role is one of {', '.join(ROLES)}")


def check_name(name: str) -> str:
    """The name with single blanks. Raises Invalid."""
    name = " ".join(storable(name, MAX_NAME, "a name").split())
    if not name:
        raise Invalid("a name can't be empty")
    return name


def person_of(row: Any) -> Person:
    """A row of the table."""
    return Person(row.id, row.name, row.role, row.simulated, row.created_at)
