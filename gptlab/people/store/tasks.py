"""Tasks as rows: what one shows, the ranks of its replies, its place in the queue."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.data.records import Candidate, CandidateSet, Prompt
from gptlab.people.store.database import Reader
from gptlab.people.store.errors import Invalid, NotFound
from gptlab.people.store.schema import tasks, to_json

MAX_CANDIDATES = 26  # they are shown as A to Z
_TASK = sa.select(tasks).where(tasks.c.id == sa.bindparam("key"))


@dataclasses.dataclass(frozen=True)
class Task:
    """A task as managers see it. `gold`: the known ranks of a gold check.

    `prompt` is None where the labeller writes about `topic` from the start; `person` is whose chat
    it shows.
    """

    id: str
    campaign: str
    source: str
    split: str
    state: str
    prompt: Prompt | None
    topic: str
    candidates: tuple[Candidate, ...]  # none in a demonstration campaign
    gold: tuple[int, ...] | None
    person: str | None


def find_task(reader: Reader, task: str) -> Task:
    """Raises NotFound, also for one whose content was deleted."""
    row = reader.execute(_TASK, {"key": task}).first()
    if row is None or row.state == "deleted":
        raise NotFound("there is no such task")
    return task_of(row)


def task_of(row: Any) -> Task:
    """A row of the table; nothing is shown of one whose content was deleted."""
    prompt: Prompt | None = None
    topic = ""
    candidates: tuple[Candidate, ...] = ()
    content = json.loads(row.payload) if row.payload else {}
    if content.get("kind") == "CandidateSet":
        item = CandidateSet.from_json(row.payload)
        prompt, candidates = item.prompt, item.candidates
    elif content.get("kind") == "Prompt":
        prompt = Prompt.from_json(row.payload)
    else:
        topic = content.get("topic", "")
    return Task(
        row.id, row.campaign_id, row.source, row.split, row.state, prompt, topic, candidates,
        None if row.gold is None else tuple(json.loads(row.gold)), row.person_id,
    )  # fmt: skip


def dense_ranks(ranks: Sequence[int], count: int) -> list[int]:
    """Ranks from 1 without gaps, in the same order. Raises Invalid unless there are `count`."""
    whole = all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
    if len(ranks) != count or not whole or not all(1 <= rank <= 1000 for rank in ranks):
        raise Invalid(f"a ranking has a whole number from 1 on for each of the {count} replies")
    order = sorted(set(ranks))
    return [order.index(rank) + 1 for rank in ranks]


def rankable(sets: Iterable[CandidateSet]) -> Iterator[CandidateSet]:
    """The sets. Raises Invalid for one that has too few replies, or too many."""
    for item in sets:
        if not 2 <= len(item.candidates) <= MAX_CANDIDATES:
            raise Invalid(
                f"candidate set {item.id} has {len(item.candidates)} replies; 2 to "
                f"{MAX_CANDIDATES} can be ranked"
            )
        yield item


def payload(record: CandidateSet | Prompt) -> str:
    """ASCII: what a model said may hold what PostgreSQL doesn't keep as text."""
    return to_json(json.loads(record.to_json()))


def place(seed: int, source: str) -> int:
    """Where in the queue a task stands that was made of `source`: random, and always the same."""
    digest = hashlib.sha256(f"{seed}:{source}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1
