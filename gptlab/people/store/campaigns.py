"""Campaigns and their tasks.

A ranking campaign asks people to rank the candidate replies of each task; a demonstration campaign
to write both sides of a conversation. Tasks are queued from candidate sets (`gptlab.collect`), from
a reply picked out of somebody's chat with alternatives to it, or from prompts. Queueing the same
thing again does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from gptlab.data.records import Candidate, CandidateSet, Message, Prompt
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database

KINDS = ("ranking", "demonstration")
STATES = ("open", "paused", "closed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a campaign is run.

    Attributes:
      instructions: Markdown, shown to labellers.
      overlap: how many people judge each task.
      lease_seconds: how long one may take; then the task may go to somebody else.
      gold_rate: share of leases that are gold checks, while there are any left for the person.
      disagreement: a task goes to reviewers if its labellers order more than this share of the
        pairs differently (0 to 1; 1: never). Flags of severity 2 and more go there always.
      max_skips: a task that so many people skip goes to reviewers.
      seed: of the order of tasks and candidates, and of where gold checks come.
    """

    instructions: str = ""
    overlap: int = 1
    lease_seconds: float = 900.0
    gold_rate: float = 0.0
    disagreement: float = 0.5
    max_skips: int = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Campaign:
    id: str
    name: str
    kind: str
    state: str
    settings: Settings
    created_at: float


@dataclasses.dataclass(frozen=True)
class Task:
    """A task as managers see it. `gold`: the known ranks of a gold check."""

    id: str
    campaign: str
    source: str
    split: str
    state: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]  # none in a demonstration campaign
    gold: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Picked:
    """A model's reply out of a chat, to which alternatives are to be sampled."""

    message: str
    prompt: Prompt
    reply: Candidate
    model: str


class Campaigns:
    """See the head of this file. What changes something takes an admin, or 'system', as `actor`."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def create(self, name: str, kind: str, settings: Settings, actor: str) -> Campaign:
        """A new, open campaign. Raises Invalid: a taken name, or settings that make no sense."""
        raise NotImplementedError

    def configure(self, campaign: str, settings: Settings, actor: str) -> Campaign:
        """Changes the settings; the audit keeps the old ones."""
        raise NotImplementedError

    def set_state(self, campaign: str, state: str, actor: str) -> Campaign:
        """No task is given out while a campaign is paused or closed."""
        raise NotImplementedError

    def get(self, campaign: str) -> Campaign:
        """By its id or its name. Raises NotFound."""
        raise NotImplementedError

    def all(self, state: str | None = None) -> list[Campaign]:
        """All campaigns, or those of a state, newest first."""
        raise NotImplementedError

    def queue(
        self, campaign: str, sets: Iterable[CandidateSet], actor: str, split: str = ""
    ) -> int:
        """Queues candidate sets to be ranked; returns how many were new."""
        raise NotImplementedError

    def queue_gold(
        self, campaign: str, item: CandidateSet, ranks: Sequence[int], actor: str
    ) -> int:
        """Queues a gold check, whose right ranks are known; returns 1 if it was new, else 0."""
        raise NotImplementedError

    def queue_prompts(self, campaign: str, prompts: Iterable[Prompt], actor: str) -> int:
        """Queues beginnings of conversations for a demonstration campaign; returns the new ones."""
        raise NotImplementedError

    def pick(self, campaign: str, count: int, seed: int) -> list[Picked]:
        """Replies drawn at random from chats whose owners consent to training.

        Those that the campaign already has are left out. Sample alternatives, then `queue_picked`.
        """
        raise NotImplementedError

    def queue_picked(
        self, campaign: str, picked: Picked, alternatives: Sequence[Candidate], actor: str
    ) -> int:
        """Queues a picked reply with alternatives to it; returns 1 if it was new, else 0."""
        raise NotImplementedError

    def tasks(
        self, campaign: str, state: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Task]:
        """Tasks in the order in which they are given out."""
        raise NotImplementedError

    def task(self, task: str) -> Task:
        """Raises NotFound."""
        raise NotImplementedError


def prompt_of(messages: Sequence[Message], source: str, identity: str) -> Prompt:
    """A prompt of messages that end with the user's turn."""
    return Prompt(identity, tuple(messages), source)
