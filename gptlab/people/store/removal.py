"""Removing content: what goes with a conversation, or with a person.

Rows go in the order that foreign keys ask for. What only refers to the removed content by id
(exports, the audit) stays.
"""

from __future__ import annotations

import sqlalchemy as sa

from gptlab.people.store.database import Writer, new_id
from gptlab.people.store.schema import (
    conversations,
    feedback,
    flags,
    judgements,
    leases,
    messages,
    tasks,
)

_ID_LENGTH = len(new_id())


def remove_conversations(writer: Writer, where: sa.ColumnElement[bool]) -> None:
    """Removes conversations: messages, feedback on them, and the content of tasks made of them.

    A task may have come by way of an export: the id of a prompt, and of a candidate set for it,
    begins with its conversation's.
    """
    gone = sa.select(conversations.c.id).where(where)
    inside = sa.select(messages.c.id).where(messages.c.conversation_id.in_(gone))
    begin = sa.func.substr(tasks.c.source, 1, _ID_LENGTH)
    empty_tasks(writer, sa.or_(tasks.c.message_id.in_(inside), begin.in_(gone)))
    remove(writer, feedback, feedback.c.message_id.in_(inside))
    remove(writer, messages, messages.c.id.in_(inside))
    remove(writer, conversations, where)


def empty_tasks(writer: Writer, where: sa.ColumnElement[bool]) -> None:
    """Removes what tasks show, and every answer to them; an empty row stays, never given out."""
    ids = sa.select(tasks.c.id).where(where)
    remove_answers(writer, judgements.c.task_id.in_(ids))
    writer.execute(leases.delete().where(leases.c.task_id.in_(ids)))
    emptied = {"payload": "", "gold": None, "state": "deleted", "message_id": None}
    writer.execute(tasks.update().where(where).values(person_id=None, **emptied))


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
