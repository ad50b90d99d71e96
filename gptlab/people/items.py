"""Records on their way out of the store: each knows where it comes from, and of whom it is."""

from __future__ import annotations

import dataclasses

from gptlab.data.records import Comparison, Conversation, Prompt
from gptlab.people.store.person import Person

Record = Conversation | Comparison | Prompt
Row = tuple[str, str, str]  # table, id, person
# What an item comes from, in the order of reports.
SAFETY_PROMPT = "safety prompt"
KINDS = ("demonstration", "better", "ranking", "choice", "thumb", "flag", SAFETY_PROMPT)


@dataclasses.dataclass(frozen=True)
class Item:
    """A record to be exported: where it comes from, of whom it is, how bad what was flagged is."""

    kind: str  # one of KINDS
    split: str  # '': it has none yet
    record: Record
    rows: tuple[Row, ...]
    simulated: bool
    severity: int = 0


def name_of(person: Person) -> str:
    """A labeller's name in records: people by a number that only the store can resolve."""
    return f"simulated:{person.name}" if person.simulated else f"person:{person.id}"


def source(kind: str, simulated: bool) -> str:
    return f"{'simulated' if simulated else 'people'}:{kind}"


def safety_prompt(
    prompt: Prompt, kinds: str, severity: int, judge: Person, rows: tuple[Row, ...], split: str
) -> Item:  # fmt: skip
    """The prompt of a reply that `judge` has flagged; whose chat it is out of doesn't matter."""
    flagged = f"{source('flag', judge.simulated)}:{kinds}:severity={severity}"
    record = dataclasses.replace(prompt, source=flagged)
    return Item(SAFETY_PROMPT, split, record, rows, judge.simulated, severity)
