"""Alembic's environment: the connection comes from database.py, inside its transaction."""

from alembic import context

from gptlab.people.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    render_as_batch=True,  # SQLite can't alter most of a table
)
with context.begin_transaction():
    context.run_migrations()
