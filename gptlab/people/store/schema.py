"""The store's tables.

Ids are random texts, except those of the audit, which count from 1 without a gap. Times are seconds
since 1970 (UTC). What is JSON is written by `to_json` and is small.

    people ─┬─ invitations, sessions, api_keys, consents
            ├─ conversations ── messages (a tree: `parent_id`) ── feedback
            └─ leases ── judgements ── flags
    campaigns ── tasks ─┴─ leases, judgements
    exports ── export_rows (what went into which artifact)
    audit (who, when, what, on what; chained by hashes), head (its newest row; the writers' lock)

Messages, feedback, consents, judgements and flags are only ever added to: a correction is a new row
that names the one it `supersedes`. Their `row` is the audit row of the change that wrote them, so
that the content up to an audit row is well defined. Deleting a person's data is the exception: see
deletion.py.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

# Names of constraints are part of the schema: migrations refer to them.
metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_ID = sa.String(32)
_HASH = sa.String(64)
_TIME = sa.Double


def _key() -> sa.Column:
    return sa.Column("id", _ID, primary_key=True)


def _to(table: str, name: str, nullable: bool = False, index: bool = True) -> sa.Column:
    return sa.Column(name, _ID, sa.ForeignKey(f"{table}.id"), nullable=nullable, index=index)


def _time(name: str = "created_at", nullable: bool = False) -> sa.Column:
    return sa.Column(name, _TIME, nullable=nullable)


def _text(name: str, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.Text, nullable=nullable)


def _integer(name: str, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.Integer, nullable=nullable)


def _flag(name: str, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.Boolean, nullable=nullable)


def _row() -> sa.Column:
    """The audit row of the change that wrote this."""
    return sa.Column("row", sa.Integer, sa.ForeignKey("audit.id"), nullable=False, index=True)


store = sa.Table(
    "store",
    metadata,
    _key(),  # one row; random, so that no two stores have the same content by chance
    _time(),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _time("at"),
    _text("actor"),  # a person's id, or 'system'
    _text("action"),  # 'judgement.add'
    _text("object"),  # 'judgements:<id>'
    _text("detail"),  # JSON; never what a person wrote or is called
    _flag("content"),  # whether what an export reads has changed
    sa.Column("previous", _HASH, nullable=False),  # hash of the row before
    sa.Column("hash", _HASH, nullable=False),  # SHA-256 over all of the above
)

head = sa.Table(
    "head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # 1: there is one row
    _integer("row"),
    sa.Column("hash", _HASH, nullable=False),
)

people = sa.Table(
    "people",
    metadata,
    _key(),
    _text("name"),  # empty once deleted
    _text("role"),
    _flag("simulated"),
    _time(),
    _time("deleted_at", nullable=True),
)

invitations = sa.Table(
    "invitations",
    metadata,
    _key(),
    sa.Column("token_hash", _HASH, nullable=False, unique=True),
    _text("role"),
    _flag("simulated"),
    _to("people", "person_id", nullable=True),  # set: a link to sign in again, not to join
    _to("campaigns", "campaign_id", nullable=True),  # where the link leads
    _text("created_by"),
    _integer("uses_left"),
    _time(),
    _time("expires_at"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("token_hash", _HASH, primary_key=True),
    _to("people", "person_id"),
    _text("csrf"),
    _time(),
    _time("expires_at"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _key(),
    sa.Column("token_hash", _HASH, nullable=False, unique=True),
    _to("people", "person_id"),
    _text("name"),
    _integer("per_minute", nullable=True),  # requests; None: the server's default
    _time(),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
)

consents = sa.Table(
    "consents",
    metadata,
    _key(),
    _to("people", "person_id"),
    _text("scope"),
    _flag("given"),
    _text("text_version"),
    _time(),
    _row(),
)

conversations = sa.Table(
    "conversations",
    metadata,
    _key(),
    _to("people", "person_id"),
    _text("title"),
    _time(),
    _time("changed_at"),
)

messages = sa.Table(
    "messages",
    metadata,
    _key(),
    _to("conversations", "conversation_id"),
    _to("messages", "parent_id", nullable=True),
    _text("role"),
    _text("content"),
    _text("context", nullable=True),
    _text("model", nullable=True),  # the name it was asked by
    _text("policy", nullable=True),  # identity of what wrote it; None: the person
    _flag("finished"),
    _text("refusal", nullable=True),  # why moderation refused, if it did
    _text("settings"),  # JSON: temperature, seed, ...
    _to("messages", "improves", nullable=True, index=False),  # a person's better version of it
    _time(),
    _row(),
)

feedback = sa.Table(
    "feedback",
    metadata,
    _key(),
    _to("people", "person_id"),
    _to("messages", "message_id"),
    _text("kind"),  # 'thumb', 'choice', 'better'
    _integer("value"),  # thumb: 1 up, -1 down; choice: 1 message, -1 other, 0 neither; better: 1
    _to("messages", "other_id", nullable=True),  # the other choice, or the better version
    _text("reasons"),  # JSON list
    _integer("severity"),  # 0: nothing was flagged; 1 low, 2 medium, 3 high
    _text("note"),
    _to("feedback", "supersedes", nullable=True),
    _time(),
    _row(),
)

campaigns = sa.Table(
    "campaigns",
    metadata,
    _key(),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    _text("kind"),  # 'ranking' or 'demonstration'
    _text("instructions"),
    _integer("overlap"),
    _time("lease_seconds"),
    sa.Column("gold_rate", sa.Double, nullable=False),
    sa.Column("disagreement", sa.Double, nullable=False),
    _integer("max_skips"),
    _integer("seed"),
    _text("state"),  # 'open', 'paused', 'closed'
    _time(),
)

tasks = sa.Table(
    "tasks",
    metadata,
    _key(),
    _to("campaigns", "campaign_id", index=False),
    _text("source"),  # a candidate set's or a message's id: the same is never queued twice
    _integer("place"),  # order in which tasks are given out
    _text("split"),  # the split of the candidate set it came from, or ''
    _text("payload"),  # JSON: a CandidateSet, or a prompt; '' once deleted
    _text("gold", nullable=True),  # JSON: the known ranks of a gold check
    _text("state"),  # 'open', 'review', 'done', 'withheld', 'deleted'
    _to("people", "person_id", nullable=True),  # whose text it shows
    _to("messages", "message_id", nullable=True),  # the reply it was made of
    _time(),
    _row(),
    sa.UniqueConstraint("campaign_id", "source"),
    sa.Index("ix_tasks_next", "campaign_id", "state", "place"),
)

leases = sa.Table(
    "leases",
    metadata,
    _key(),  # the lease's token
    _to("tasks", "task_id"),
    _to("campaigns", "campaign_id", index=False),
    _to("people", "person_id", index=False),
    _time(),
    _time("expires_at"),
    _text("shown"),  # JSON: shown[i] is the number of the candidate in place i
    _text("state"),  # 'held', 'judged', 'skipped', 'released'
    sa.Index("ix_leases_mine", "campaign_id", "person_id", "state"),
)

judgements = sa.Table(
    "judgements",
    metadata,
    _key(),
    _to("tasks", "task_id"),
    _to("campaigns", "campaign_id", index=False),
    _to("people", "person_id"),
    sa.Column("lease_id", _ID, sa.ForeignKey("leases.id"), nullable=True, unique=True),
    _text("kind"),  # 'ranking', 'demonstration', 'skip', 'decision', 'drop'
    _text("ranks", nullable=True),  # JSON, in the candidates' own order
    _text("ratings", nullable=True),  # JSON: 1 to 7 or null, a candidate each
    _text("messages", nullable=True),  # JSON: what a demonstration says
    _text("note"),
    sa.Column("seconds", sa.Double, nullable=False),
    _flag("gold_right", nullable=True),
    _to("judgements", "supersedes", nullable=True),
    _time(),
    _row(),
    sa.Index("ix_judgements_campaign_kind", "campaign_id", "kind"),
)

flags = sa.Table(
    "flags",
    metadata,
    _key(),
    _to("judgements", "judgement_id"),
    _to("tasks", "task_id"),
    _integer("candidate"),
    _text("kind"),
    _integer("severity"),
    _row(),
)

exports = sa.Table(
    "exports",
    metadata,
    _key(),
    sa.Column("identity", sa.Text, nullable=False),
    _text("workdir"),
    _integer("until"),
    _time(),
    # What the people in it had to consent to.
    sa.Column("consent", sa.Text, nullable=False, server_default="training"),
)

export_rows = sa.Table(
    "export_rows",
    metadata,
    sa.Column("export_id", _ID, sa.ForeignKey("exports.id"), primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),  # the table of the row
    sa.Column("row_id", _ID, primary_key=True),
    sa.Column("person_id", _ID, primary_key=True),  # whose it is; one row may be of several people
    sa.Index("ix_export_rows_person", "person_id"),
)


def to_json(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
