"""What labellers do: take a lease of a task, then judge, demonstrate, skip or give it back.

A task is held by at most as many people as its campaign's overlap asks for, counting those who have
judged it; a lease that runs out frees its place. Nobody gets a task again that they have judged or
skipped. A person has one lease at a time in a campaign: asking again returns the same one, so that
a page can be reloaded. All answers are by the lease's token and may be sent twice: the second time
returns what the first one wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gptlab.data.records import Message
from gptlab.people.store.audit import Audit
from gptlab.people.store.database import Database

FLAGS = ("harmful", "untrue", "biased", "personal_data", "off_topic")
SEVERITIES = (1, 2, 3)  # low, medium, high
RATINGS = (1, 7)  # Likert: from the worst to the best
SKIP_REASONS = ("unclear", "too_hard", "offensive", "broken", "other")


@dataclasses.dataclass(frozen=True)
class Lease:
    """A task as a labeller sees it: which model wrote what, and which is a check, is not told.

    `replies` are in the order to be shown; ranks, ratings and flags follow that order. A
    demonstration has none.
    """

    token: str
    campaign: str
    kind: str
    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    granted_at: float
    expires_at: float


@dataclasses.dataclass(frozen=True)
class Flag:
    """`reply` counts from 0, in the order shown for labellers, in the task's own for reviewers."""

    reply: int
    kind: str
    severity: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of a demonstration; how much of it is a model's is kept with it.

    `origin`: 'written', 'taken' (a suggestion as it was) or 'edited'; `policy`: whose suggestion.
    """

    message: Message
    origin: str = "written"
    policy: str | None = None


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What somebody answered. Ranks, ratings and flags are in the task's own order.

    `kind`: 'ranking', 'demonstration', 'skip'; of reviewers 'decision' and 'drop' (left out).
    """

    id: str
    task: str
    campaign: str
    person: str
    kind: str
    ranks: tuple[int, ...] | None
    ratings: tuple[int | None, ...] | None
    flags: tuple[Flag, ...]
    turns: tuple[Turn, ...]
    note: str
    seconds: float
    supersedes: str | None
    created_at: float


class Work:
    """See the head of this file. Raises Forbidden for a person who is no labeller."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def lease(self, campaign: str, person: str) -> Lease | None:
        """The next task for a person, or the one they hold; None: there is none for them now."""
        raise NotImplementedError

    def renew(self, token: str, person: str) -> Lease:
        """Starts the lease's time anew, while its task isn't somebody else's. Raises LeaseLost."""
        raise NotImplementedError

    def release(self, token: str, person: str) -> None:
        """Gives a task back, unjudged; the person may get it again."""
        raise NotImplementedError

    def judge(
        self,
        token: str,
        person: str,
        ranks: Sequence[int],
        ratings: Sequence[int | None] | None = None,
        flags: Sequence[Flag] = (),
        note: str = "",
        seconds: float | None = None,
    ) -> Judgement:
        """The ranking of the replies of a lease, in the order shown.

        Args:
          token: the lease's.
          person: who holds it.
          ranks: 1 is best, equal ranks are ties; gaps are closed.
          ratings: from RATINGS, or None for a reply that isn't rated.
          flags: what is wrong with which reply.
          note: anything else.
          seconds: time spent; None: since the lease.

        Raises:
          Invalid, NotFound (no such lease of this person), LeaseLost.
        """
        raise NotImplementedError

    def demonstrate(
        self,
        token: str,
        person: str,
        turns: Sequence[Turn],
        note: str = "",
        seconds: float | None = None,
    ) -> Judgement:
        """The whole conversation of a demonstration.

        It goes on from the prompt, user and assistant take turns, the assistant has the last word.
        """
        raise NotImplementedError

    def skip(self, token: str, person: str, reason: str, note: str = "") -> Judgement:
        """The task goes to somebody else; `reason` is one of SKIP_REASONS."""
        raise NotImplementedError

    def correct(
        self,
        judgement: str,
        person: str,
        ranks: Sequence[int],
        ratings: Sequence[int | None] | None = None,
        flags: Sequence[Flag] = (),
        note: str = "",
    ) -> Judgement:
        """A new judgement in place of an own earlier one, in the order that was shown then."""
        raise NotImplementedError

    def mine(self, campaign: str, person: str, limit: int = 50) -> list[Judgement]:
        """A person's judgements in a campaign that count, newest first."""
        raise NotImplementedError
