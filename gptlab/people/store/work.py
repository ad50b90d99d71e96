"""What labellers do: take a lease of a task, then judge, demonstrate, skip or give it back.

A task is held by at most as many people as its campaign's overlap asks for, counting those who have
judged it; a lease that runs out frees its place. Nobody gets a task again that they have judged or
skipped. A person has one lease at a time in a campaign: asking again returns the same one, so that
a page can be reloaded. All answers are by the lease's token and may be sent twice: the second time
returns what the first one wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from gptlab.people.store.audit import Audit
from gptlab.people.store.campaigns import Campaign, find_campaign
from gptlab.people.store.conversations import MAX_CHARACTERS
from gptlab.people.store.database import Database, Reader, Writer, new_id, storable
from gptlab.people.store.errors import Invalid
from gptlab.people.store.judgements import (
    MAX_NOTE,
    RATINGS,
    Flag,
    Judgement,
    Turn,
    check_flags,
    insert_judgement,
    read_judgements,
)
from gptlab.people.store.leases import (
    ANSWERED,
    Lease,
    check_held,
    close_lease,
    has_room,
    lease_of,
    next_task,
    order_shown,
    own_lease,
    show,
)
from gptlab.people.store.person import require
from gptlab.people.store.schema import judgements, leases, to_json
from gptlab.people.store.settle import settle
from gptlab.people.store.tasks import Task, dense_ranks, find_task

SKIP_REASONS = ("unclear", "too_hard", "offensive", "broken", "other")
ORIGINS = ("written", "taken", "edited")
MAX_TURNS = 200
_DAY = 86400.0  # seconds


class Work:
    """See the head of this file. Raises Forbidden for a person who is no labeller."""

    def __init__(self, database: Database, audit: Audit):
        self._database, self._audit = database, audit

    def lease(self, campaign: str, person: str) -> Lease | None:
        """The next task for a person, or the one they hold; None: there is none for them now."""
        now = self._database.clock()
        with self._database.write() as writer:
            require(writer, person, "labeller")
            found = find_campaign(writer, campaign)
            if found.state != "open":
                return None
            query = sa.select(leases).where(
                leases.c.campaign_id == found.id,
                leases.c.person_id == person,
                leases.c.state == "held",
            )
            held = writer.execute(query).first()
            if held is not None and held.expires_at > now:
                return show(writer, found, held)
            if held is not None:
                if has_room(writer, found, held, now):
                    return self._extend(writer, found, held, now)
                close_lease(writer, held.id, "released")
            task = next_task(writer, found, person, now)
            if task is None:
                return None
            values: dict[str, Any] = {
                "id": new_id(), "task_id": task.id, "campaign_id": found.id, "person_id": person,
                "created_at": now, "expires_at": now + found.settings.lease_seconds,
                "shown": to_json(order_shown(found, task, person)), "state": "held",
            }  # fmt: skip
            writer.execute(leases.insert(), values)
            return lease_of(found, task, values["id"], now, values["expires_at"], values["shown"])

    def renew(self, token: str, person: str) -> Lease:
        """Starts the lease's time anew, while its task isn't somebody else's. Raises LeaseLost."""
        now = self._database.clock()
        with self._database.write() as writer:
            held = own_lease(writer, token, person)
            campaign = check_held(writer, held, now)
            return self._extend(writer, campaign, held, now)

    def release(self, token: str, person: str) -> None:
        """Gives a task back, unjudged; the person may get it again."""
        with self._database.write() as writer:
            held = own_lease(writer, token, person)
            if held.state == "held":
                close_lease(writer, token, "released")

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
        with self._database.write() as writer:
            held = own_lease(writer, token, person)
            if held.state in ANSWERED:
                return _answer(writer, held)
            campaign = check_held(writer, held, self._database.clock())
            task = find_task(writer, held.task_id)
            if campaign.kind != "ranking":
                raise Invalid("this task asks for a conversation, not for a ranking")
            answer = _ranking(task, json.loads(held.shown), ranks, ratings, flags)
            made = self._made(held, "ranking", note, seconds)
            right = None if task.gold is None else _follows(answer.ranks, task.gold)
            made = dataclasses.replace(made, gold_right=right, **vars(answer))
            return self._write(writer, made, held.id)

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
        with self._database.write() as writer:
            held = own_lease(writer, token, person)
            if held.state in ANSWERED:
                return _answer(writer, held)
            campaign = check_held(writer, held, self._database.clock())
            if campaign.kind != "demonstration":
                raise Invalid("this task asks for a ranking, not for a conversation")
            _check_turns(find_task(writer, held.task_id), turns)
            made = self._made(held, "demonstration", note, seconds)
            return self._write(writer, dataclasses.replace(made, turns=tuple(turns)), held.id)

    def skip(self, token: str, person: str, reason: str, note: str = "") -> Judgement:
        """The task goes to somebody else; `reason` is one of SKIP_REASONS."""
        if reason not in SKIP_REASONS:
            raise Invalid(f"the reason is one of {', '.join(SKIP_REASONS)}")
        with self._database.write() as writer:
            held = own_lease(writer, token, person)
            if held.state in ANSWERED:
                return _answer(writer, held)
            check_held(writer, held, self._database.clock())
            made = self._made(held, "skip", f"{reason}: {note}" if note else reason, None)
            return self._write(writer, made, held.id)

    def _extend(self, writer: Writer, campaign: Campaign, held: Any, now: float) -> Lease:
        expires = now + campaign.settings.lease_seconds
        update = leases.update().where(leases.c.id == held.id)
        writer.execute(update.values(expires_at=expires))
        task = find_task(writer, held.task_id)
        return lease_of(campaign, task, held.id, held.created_at, expires, held.shown)

    def _made(self, lease: Any, kind: str, note: str, seconds: float | None) -> Judgement:
        now = self._database.clock()
        spent = now - lease.created_at if seconds is None else seconds
        if not 0 <= spent <= 30 * _DAY:
            raise Invalid("the time spent is in seconds, from 0 on")
        return Judgement(
            new_id(), lease.task_id, lease.campaign_id, lease.person_id, kind, None, None, (), (),
            storable(note, MAX_NOTE, "a note"), float(spent), None, None, now,
        )  # fmt: skip

    def _write(self, writer: Writer, made: Judgement, lease: str) -> Judgement:
        insert_judgement(writer, self._audit, made, lease)
        close_lease(writer, lease, "skipped" if made.kind == "skip" else "judged")
        settle(writer, [made.task])
        return made


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """The part of a judgement that the labeller has given, in the task's own order."""

    ranks: tuple[int, ...]
    ratings: tuple[int | None, ...] | None
    flags: tuple[Flag, ...]


def _ranking(
    task: Task, shown: list[int], ranks: Sequence[int], ratings: Sequence[int | None] | None,
    flags: Sequence[Flag],
) -> _Ranking:  # fmt: skip
    """Checks an answer, and turns it from the order shown into the task's own."""
    count = len(task.candidates)
    dense = dense_ranks(ranks, count)
    if ratings is not None:
        low, high = RATINGS
        if len(ratings) != count or not all(r is None or low <= r <= high for r in ratings):
            raise Invalid(f"a rating is {low} to {high}, or none, for each of the {count} replies")
    check_flags(flags, count)
    place = {number: i for i, number in enumerate(shown)}  # candidate -> where it was shown
    own = [place[number] for number in range(count)]
    return _Ranking(
        tuple(dense[i] for i in own),
        None if ratings is None else tuple(ratings[i] for i in own),
        tuple(dataclasses.replace(flag, reply=shown[flag.reply]) for flag in flags),
    )


def _check_turns(task: Task, turns: Sequence[Turn]) -> None:
    roles = [turn.message.role for turn in turns]
    first = "user" if task.prompt is None else "assistant"
    other = {"user": "assistant", "assistant": "user"}
    if not turns or len(turns) > MAX_TURNS or roles[0] != first or roles[-1] != "assistant":
        raise Invalid(f"a demonstration begins with the {first}'s turn and ends with a reply")
    if any(role != other[before] for before, role in zip(roles, roles[1:], strict=False)):
        raise Invalid("user and assistant take turns")
    for turn in turns:
        storable(turn.message.content, MAX_CHARACTERS, "a turn")
        storable(turn.message.context or "", MAX_CHARACTERS, "a turn's context")
        if not turn.message.content.strip():
            raise Invalid("a turn can't be empty")
        if turn.origin not in ORIGINS or (turn.origin != "written" and not turn.policy):
            raise Invalid("a turn is written, or taken or edited from a model that is named")


def _follows(ranks: Sequence[int], gold: Sequence[int]) -> bool:
    """Whether every strict preference of the gold ranks is given."""
    count = range(len(gold))
    return all(ranks[a] < ranks[b] for a in count for b in count if gold[a] < gold[b])


def _answer(reader: Reader, lease: Any) -> Judgement:
    """What a lease has already brought: a request may be sent twice."""
    (answer,) = read_judgements(reader, judgements.c.lease_id == lease.id)
    return answer
