"""The store: what people say, rank, flag and improve, in one SQL database.

    store = Store.open("sqlite:///runs/serve/store.sqlite")  # or postgresql+psycopg://host/name

    store.accounts       people, roles, invitations, sessions, keys, consent  accounts.py
    store.conversations  conversations as trees of messages                   conversations.py
    store.feedback       thumbs, choices between two replies, better replies  feedback.py
    store.campaigns      campaigns and their tasks                            campaigns.py
    store.work           leases, judgements, demonstrations, skips            work.py
    store.review         the adjudication queue and reviewers' decisions      review.py
    store.figures        progress, time, agreement, bias                      figures.py
    store.exports        which artifacts hold whose data; deletion            deletion.py
    store.audit          who did what, chained by hashes                      audit.py

Every method is one transaction, synchronous and safe to call from several threads and processes.
One writer at a time: SQLite's BEGIN IMMEDIATE, on PostgreSQL a lock on the audit's newest row, so
that two leases never race and the audit is one chain. What methods return are frozen dataclasses.

They raise `NotFound` (no such thing, or not this person's), `Invalid` (input that can't be taken;
the message is for the person who gave it), `Forbidden` (the role doesn't allow it) and `LeaseLost`;
a database that can't be opened or used is a UserError.
"""

from gptlab.people.store.database import resolve_url
from gptlab.people.store.errors import Forbidden, Invalid, LeaseLost, NotFound
from gptlab.people.store.store import Store

__all__ = ["Forbidden", "Invalid", "LeaseLost", "NotFound", "Store", "resolve_url"]
