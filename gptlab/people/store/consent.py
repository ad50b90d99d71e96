"""Consent: what people have agreed to, asked with a text of a known version."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.schema import consents, people

# What can be consented to. 'training': what I write and judge may train models, and be shown to
# labellers for it. 'publication': it may be in data sets that are given to others.
SCOPES = ("training", "publication")


@dataclasses.dataclass(frozen=True)
class Consent:
    """A person's newest answer about one scope, to a text of this version."""

    scope: str
    given: bool
    text_version: str
    at: float


def consenting(scope: str) -> sa.Select[Any]:
    """Ids of the people whose newest answer is that they consent."""
    newer = consents.alias("newer")
    later = sa.select(newer.c.id).where(
        newer.c.person_id == consents.c.person_id,
        newer.c.scope == scope,
        newer.c.row > consents.c.row,
    )
    query = sa.select(consents.c.person_id).where(consents.c.scope == scope, consents.c.given)
    return query.where(~later.exists())


def usable(scope: str) -> sa.ColumnElement[bool]:
    """Of people: they consent, or are simulated, and so need not."""
    return sa.or_(people.c.simulated, people.c.id.in_(consenting(scope)))
