"""What people said becomes training data: the store's content -> records, with what was left out.

    demonstrations, better replies   -> conversations
    rankings, choices                -> comparisons
    thumbs on replies to one turn    -> weak comparisons, ups above downs
    flags                            -> comparisons against replies that weren't flagged, weighed
                                        by severity, and the prompts, to collect new replies to;
                                        or of a share of them the prompts alone, to evaluate on

Who a record is of is known (`Item.rows`), so that an export can be looked up by person. A record is
made only if everybody whose words or judgement it holds has consented; simulated people are
programs, and need not. Records of simulated people say so. splits.py says what is trained on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gptlab.data.records import Comparison, Message
from gptlab.people import chat_feedback, scrubbing, splits, task_feedback
from gptlab.people.items import Item, Record
from gptlab.people.sieve import Filters, Sieve
from gptlab.people.store.content import Content


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much a comparison counts; 0 leaves the kind out.

    A ranking's is shared by all rankings of its task; a flag's is that of its severity (1, 2, 3),
    shared by all who flag the same task.
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


def harvest(content: Content, filters: Filters, weights: Weights, shares: splits.Shares) -> Harvest:
    """All items of a store's content, in an order that depends on the content alone."""
    left_out: Counter[tuple[str, str]] = Counter()
    sieve = Sieve(content, filters, left_out)
    items = [
        *task_feedback.rankings(content, sieve, weights.ranking),
        *task_feedback.demonstrations(content, sieve),
        *chat_feedback.improved(content, sieve, weights.better),
        *chat_feedback.choices(content, sieve, weights.choice),
        *chat_feedback.thumbs(content, sieve, weights.thumb),
        *task_feedback.flags(content, sieve, weights.flag),
        *chat_feedback.flags(content, sieve, weights.flag),
    ]
    return Harvest(tuple(_merged(splits.assign(items, shares, left_out))), dict(left_out))


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
