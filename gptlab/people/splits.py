"""Which split an item goes into: train, validation, or test.

A task's own split stays; anything else goes by a hash of the conversation's first turn, so that all
turns of a conversation, and conversations that begin alike, are on one side.

Test is for evaluating safety: a share of the conversations that people flagged. Of those the
prompts alone go out. Whatever else was said about them would be learnt from, and `gptlab.evaluate`
rightly refuses to ask a model what it was trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from gptlab.data.records import Comparison, Conversation
from gptlab.people.items import SAFETY_PROMPT, Item

TEST = "test"


@dataclasses.dataclass(frozen=True)
class Shares:
    """validation: of all; safety_test: of the flagged conversations. Both are drawn by `seed`."""

    validation: float
    safety_test: float
    seed: int


def assign(
    items: Sequence[Item], shares: Shares, left_out: Counter[tuple[str, str]]
) -> Iterator[Item]:
    """The items with their splits; adds to `left_out` those of conversations that are held out."""
    tests = [
        item
        for item in items
        if item.kind == SAFETY_PROMPT
        and not item.split
        and _draw(shares.seed, SAFETY_PROMPT, _first_turn(item)) < shares.safety_test
    ]
    # By both: a conversation may begin twice, when its first turn was edited.
    turns, conversations = {_first_turn(i) for i in tests}, {_conversation(i) for i in tests}
    for item in items:
        held_out = _first_turn(item) in turns or _conversation(item) in conversations
        if held_out and item.kind == SAFETY_PROMPT and not item.split:
            yield dataclasses.replace(item, split=TEST)
        elif held_out and item.split != TEST:
            left_out[item.kind, "held out, to evaluate safety on"] += 1
        else:
            validates = _draw(shares.seed, _first_turn(item)) < shares.validation
            split = item.split or ("validation" if validates else "train")
            yield dataclasses.replace(item, split=split)


def _conversation(item: Item) -> str:
    record = item.record
    if isinstance(record, Conversation):
        return record.id if record.topic is None else record.topic
    prompt = record.prompt if isinstance(record, Comparison) else record
    return prompt.conversation_id


def _first_turn(item: Item) -> str:
    """The first turn that isn't the system's, whatever its spaces and its case."""
    record = item.record
    messages = record.prompt.messages if isinstance(record, Comparison) else record.messages
    first = next((m for m in messages if m.role != "system"), None)
    return "" if first is None else " ".join(first.content.casefold().split())


def _draw(seed: int, *key: str) -> float:
    """A hash of the key as a number in [0, 1)."""
    name = ":".join((str(seed), *key))
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
