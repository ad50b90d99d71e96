"""Removing content: what goes with a conversation, or with a person.

Rows go in the order that foreign keys ask for. What only refers to the removed content by id
(exports, the audit) stays.
"""

from __future__ import annotations

import sqlalchemy as sa

from gptlab.people.store.database import Writer
from gptlab.people.store.provenance import tasks_of
from gptlab.people.store.schema import (
    conversations,
    feedback,
    flags,
    judgements,
    leases,
    messages,
    tasks,
)

# What is left of a task whose content was deleted: it is never given out.
EMPTY = {"payload": "", "gold": None, "state": "deleted", "person_id": None, "message_id": None}


def remove_conversations(writer: Writer, where: sa.ColumnElement[bool]) -> None:
    """Removes conversations: messages, feedback on them, and the content of tasks made of them."""
    gone = sa.select(conversations.c.id).where(where)
    inside = sa.select(messages.c.id).where(messages.c.conversation_id.in_(gone))
    for task in tasks_of(writer, set(writer.execute(gone).scalars())):
        empty_task(writer, task)
    remove(writer, feedback, feedback.c.message_id.in_(inside))
    remove(writer, messages, messages.c.id.in_(inside))
    remove(writer, conversations, where)


def empty_task(writer: Writer, task: str) -> None:
    """Removes what a task shows, and every answer to it."""
    remove_answers(writer, judgements.c.task_id == task)
    writer.execute(leases.delete().where(leases.c.task_id == task))
    writer.execute(tasks.update().where(tasks.c.id == task).values(**EMPTY))


def remove_answers(writer: Writer, where: sa.ColumnElement[bool]) -> None:
    """Removes judgements with their flags."""
    ids = sa.select(judgements.c.id).where(where)
    writer.execute(flags.delete().where(flags.c.judgement_id.in_(ids)))
    remove(writer, judgements, where)


def remove(writer: Writer, table: sa.Table, where: sa.ColumnElement[bool]) -> None:
    """Deletes rows of a table whose rows refer to one another."""
    ids = sa.select(table.c.id).where(where)
    for name in ("supersedes", "improves", "parent_id"):
        if name in table.c:
            update = table.update().where(table.c[name].in_(ids)).values({name: None})
            writer.execute(update)
    writer.execute(table.delete().where(where))
