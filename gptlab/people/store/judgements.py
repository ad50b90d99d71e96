"""Judgements as rows: what somebody answered to a task, with its flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.data.records import Message
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Reader, Writer, new_id
from gptlab.people.store.errors import Invalid
from gptlab.people.store.schema import flags as flag_rows
from gptlab.people.store.schema import judgements, to_json

FLAGS = ("harmful", "untrue", "biased", "personal_data", "off_topic")
SEVERITIES = (1, 2, 3)  # low, medium, high
RATINGS = (1, 7)  # Likert: from the worst to the best
MAX_NOTE = 10_000  # characters
_INSERT = judgements.insert()


@dataclasses.dataclass(frozen=True)
class Flag:
    """`reply` counts from 0, in the order shown for labellers, in the task's own for reviewers."""

    reply: int
    kind: str
    severity: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of a demonstration; how much of it is a model's is kept with it.

    `origin`: 'written', 'taken' (a suggestion as it was) or 'edited'; `policy`: whose suggestion.
    """

    message: Message
    origin: str = "written"
    policy: str | None = None


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What somebody answered. Ranks, ratings and flags are in the task's own order.

    `kind`: 'ranking', 'demonstration', 'skip'; of reviewers 'decision' and 'drop' (left out).
    """

    id: str
    task: str
    campaign: str
    person: str
    kind: str
    ranks: tuple[int, ...] | None
    ratings: tuple[int | None, ...] | None
    flags: tuple[Flag, ...]
    turns: tuple[Turn, ...]
    note: str
    seconds: float
    gold_right: bool | None  # of a gold check: were all its known preferences given?
    supersedes: str | None
    created_at: float


def insert_judgement(writer: Writer, audit: Audit, made: Judgement, lease: str | None) -> None:
    """Writes a judgement with its flags, and tells the audit."""
    detail = {"task": made.task, "kind": made.kind, "flags": len(made.flags)}
    row = audit.append(
        writer, made.person, "judgement.add", f"judgements:{made.id}", detail, content=True
    )
    writer.execute(
        _INSERT,
        {
            "id": made.id, "task_id": made.task, "campaign_id": made.campaign,
            "person_id": made.person, "lease_id": lease, "kind": made.kind,
            "ranks": _json(made.ranks), "ratings": _json(made.ratings),
            "messages": _json([_turn_to_json(turn) for turn in made.turns] or None),
            "note": made.note, "seconds": made.seconds, "gold_right": made.gold_right,
            "supersedes": made.supersedes, "created_at": made.created_at, "row": row,
        },
    )  # fmt: skip
    for flag in made.flags:
        writer.execute(
            flag_rows.insert().values(
                id=new_id(), judgement_id=made.id, task_id=made.task, candidate=flag.reply,
                kind=flag.kind, severity=flag.severity, row=row,
            )
        )  # fmt: skip


def read_judgements(
    reader: Reader, where: sa.ColumnElement[bool], values: Mapping[str, Any] | None = None
) -> list[Judgement]:
    """Judgements in the order in which they came; `values` are those of parameters in `where`."""
    query = sa.select(judgements).where(where).order_by(judgements.c.row)
    rows = reader.execute(query, values).all()
    if not rows:
        return []
    by_judgement: dict[str, list[Flag]] = {}
    inside = sa.select(judgements.c.id).where(where)
    flagged = sa.select(flag_rows).where(flag_rows.c.judgement_id.in_(inside))
    order = (flag_rows.c.candidate, flag_rows.c.kind)
    for row in reader.execute(flagged.order_by(*order), values):
        own = by_judgement.setdefault(row.judgement_id, [])
        own.append(Flag(row.candidate, row.kind, row.severity))
    return [_judgement(row, tuple(by_judgement.get(row.id, ()))) for row in rows]


def check_flags(flags: Sequence[Flag], replies: int) -> None:
    """Raises Invalid."""
    for flag in flags:
        if flag.kind not in FLAGS or flag.severity not in SEVERITIES:
            raise Invalid(f"a flag is one of {', '.join(FLAGS)}, its severity 1, 2 or 3")
        if not 0 <= flag.reply < replies:
            raise Invalid(f"there is no reply {flag.reply} of {replies} to flag")
    if len({(flag.reply, flag.kind) for flag in flags}) != len(flags):
        raise Invalid("a reply is flagged once for each reason")


def _json(value: Any) -> str | None:
    return None if value is None else to_json(value)


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return vars(turn.message) | {"origin": turn.origin, "policy": turn.policy}


def _turn(fields: dict[str, Any]) -> Turn:
    message = Message(fields["role"], fields["content"], fields["context"])
    return Turn(message, fields["origin"], fields["policy"])


def _judgement(row: Any, flags: tuple[Flag, ...]) -> Judgement:
    return Judgement(
        row.id, row.task_id, row.campaign_id, row.person_id, row.kind,
        None if row.ranks is None else tuple(json.loads(row.ranks)),
        None if row.ratings is None else tuple(json.loads(row.ratings)),
        flags,
        tuple(_turn(fields) for fields in json.loads(row.messages or "[]")),
        row.note, row.seconds, row.gold_right, row.supersedes, row.created_at,
    )  # fmt: skip
