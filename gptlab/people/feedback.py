"""What people said becomes training data: the store's content -> records, with what was left out.

    demonstrations, better replies   -> conversations
    rankings, choices                -> comparisons
    thumbs on replies to one turn    -> weak comparisons, ups above downs
    flags                            -> comparisons against replies that weren't flagged, weighed
                                        by severity; and the prompts, to evaluate on and to collect
                                        new replies to

Who a record is of is known (`Item.rows`), so that an export can be looked up by person. A record is
made only if everybody whose words or judgement it holds has consented; simulated people are
programs, and need not. Records of simulated people say so.

Splits: a task's own split stays; anything else goes by a hash of the conversation's first turn, so
that all turns of a conversation, and conversations that begin alike, are on one side.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gptlab.data.records import Comparison, Message
from gptlab.people import chat_feedback, scrubbing, task_feedback
from gptlab.people.items import Item, Record
from gptlab.people.sieve import Filters, Sieve
from gptlab.people.store.content import Content


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much a comparison counts; 0 leaves the kind out.

    A ranking's is shared by all rankings of its task; a flag's is that of its severity (1, 2, 3).
    """

    ranking: float
    choice: float
    better: float
    thumb: float
    flag: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Harvest:
    """What goes in, and how many of what kind were left out for which reason."""

    items: tuple[Item, ...]
    left_out: Mapping[tuple[str, str], int]  # (kind, reason)


def harvest(
    content: Content, filters: Filters, weights: Weights, validation_fraction: float, seed: int
) -> Harvest:
    """All items of a store's content, in an order that depends on the content alone."""

    def split_of(messages: Sequence[Message], own: str = "") -> str:
        return own or hashed_split(messages, validation_fraction, seed)

    left_out: Counter[tuple[str, str]] = Counter()
    sieve = Sieve(content, filters, left_out)
    items = [
        *task_feedback.rankings(content, sieve, weights.ranking, split_of),
        *task_feedback.demonstrations(content, sieve, split_of),
        *chat_feedback.improved(content, sieve, weights.better, split_of),
        *chat_feedback.choices(content, sieve, weights.choice, split_of),
        *chat_feedback.thumbs(content, sieve, weights.thumb, split_of),
        *task_feedback.flags(content, sieve, weights.flag, split_of),
        *chat_feedback.flags(content, sieve, weights.flag, split_of),
    ]
    return Harvest(tuple(_merged(items)), dict(left_out))


def hashed_split(messages: Sequence[Message], validation_fraction: float, seed: int) -> str:
    """'train' or 'validation', by a hash of the first turn that isn't the system's."""
    first = next((m for m in messages if m.role != "system"), None)
    text = "" if first is None else " ".join(first.content.casefold().split())
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:7], "big") / 2**56
    return "validation" if share < validation_fraction else "train"


def scrubbed(item: Item) -> tuple[Item, Counter[str]]:
    """The item without what scrubbing.py finds, and how much that was."""
    found: Counter[str] = Counter()

    def clean(text: str) -> str:
        cleaned, own = scrubbing.scrub(text)
        found.update(own)
        return cleaned

    def clean_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(
            dataclasses.replace(
                m, content=clean(m.content), context=None if m.context is None else clean(m.context)
            )
            for m in messages
        )

    record: Record = item.record
    if isinstance(record, Comparison):
        prompt = dataclasses.replace(record.prompt, messages=clean_messages(record.prompt.messages))
        candidates = tuple(
            dataclasses.replace(c, content=clean(c.content)) for c in record.candidates
        )
        record = dataclasses.replace(record, prompt=prompt, candidates=candidates)
    else:
        record = dataclasses.replace(record, messages=clean_messages(record.messages))
    return dataclasses.replace(item, record=record), found


def _merged(items: Iterable[Item]) -> list[Item]:
    """A prompt that was flagged several times is there once, by its worst flag."""
    merged: dict[tuple[type, str], Item] = {}
    for item in items:
        key = (type(item.record), item.record.id)
        before = merged.setdefault(key, item)
        if before is not item:
            worst = max(before, item, key=lambda either: either.severity)
            merged[key] = dataclasses.replace(worst, rows=(*before.rows, *item.rows))
    return list(merged.values())
