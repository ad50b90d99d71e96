"""Feedback in chats as records: better replies, choices, thumbs, flags.

Nothing is compared with a reply that is blank, or that moderation refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from gptlab.data.records import Candidate, Comparison, Conversation, Prompt
from gptlab.people.items import Item, Row, name_of, safety_prompt, source
from gptlab.people.sieve import Sieve
from gptlab.people.store.campaigns import prompt_id
from gptlab.people.store.content import Content
from gptlab.people.store.conversations import Message as Stored
from gptlab.people.store.feedback import Given

_EMPTY = "a blank or refused reply"
MAX_REPLIES = 4  # of a comparison: a reward model's batch is as wide as its widest comparison


def improved(content: Content, sieve: Sieve, weight: float) -> Iterator[Item]:
    """A better reply is a demonstration, and above the one that it improves.

    It alone is to be learnt: the replies before it are a model's, which nobody has approved, or
    better ones, which have conversations of their own.
    """
    for given in content.feedback:
        if given.kind != "better" or given.other is None:
            continue
        about = _about(content, given.message)
        if not sieve.passes("better", given.person, [about.owner]):
            continue
        simulated, better = sieve.simulated(given.person), content.messages[given.other]
        rows = (*about.rows, ("messages", better.id, given.person), _row(given))
        before = about.prompt.messages
        yield Item(
            "better",
            "",
            Conversation(
                f"better:{given.id}",
                (*before, better.record()),
                source("better", simulated),
                about.prompt.conversation_id,
                learnt=(len(before),),
            ),
            rows,
            simulated,
        )
        if weight and _says_something(content.messages[given.message]):
            yield _compared(
                content, sieve, "better", given.id, given.person, about,
                (better.id, given.message), (1, 2), weight, [_row(given)],
            )  # fmt: skip
        elif weight:
            sieve.leave_out("better", _EMPTY)


def choices(content: Content, sieve: Sieve, weight: float) -> Iterator[Item]:
    for given in content.feedback:
        if given.kind != "choice" or given.other is None or not weight:
            continue
        about = _about(content, given.message)
        pair = (given.message, given.other)
        if not sieve.passes("choice", given.person, [about.owner]):
            continue
        if all(_says_something(content.messages[reply]) for reply in pair):
            ranks = {1: (1, 2), 0: (1, 1), -1: (2, 1)}[given.value]
            yield _compared(
                content, sieve, "choice", given.id, given.person, about,
                pair, ranks, weight, [_row(given)],
            )  # fmt: skip
        else:
            sieve.leave_out("choice", _EMPTY)


def thumbs(content: Content, sieve: Sieve, weight: float) -> Iterator[Item]:
    """Replies to one turn that got a thumb: those up above those down, the newest of each."""
    by_turn: dict[tuple[str, str], list[Given]] = {}
    for given in content.feedback:
        if given.kind == "thumb" and weight:
            reply = content.messages[given.message]
            if _says_something(reply):
                by_turn.setdefault((reply.parent or "", given.person), []).append(given)
            else:
                sieve.leave_out("thumb", _EMPTY)
    for (turn, person), thumbs in by_turn.items():
        if len({given.value for given in thumbs}) < 2:
            for _ in thumbs:
                sieve.leave_out("thumb", "nothing to compare with")
            continue
        ups = [given for given in thumbs if given.value > 0][-MAX_REPLIES // 2 :]
        downs = [given for given in thumbs if given.value < 0][-MAX_REPLIES // 2 :]
        compared = [*ups, *downs]
        about = _about(content, compared[0].message)
        if sieve.passes("thumb", person, [about.owner]):
            yield _compared(
                content, sieve, "thumb", turn, person, about,
                [given.message for given in compared],
                [1] * len(ups) + [2] * len(downs),
                weight, [_row(given) for given in compared],
            )  # fmt: skip


def flags(content: Content, sieve: Sieve, weights: Sequence[float]) -> Iterator[Item]:
    """Flagged replies below the newest that weren't, and the prompts they were given to."""
    down: dict[str, set[str]] = {}  # turn -> texts; the same text may have come twice
    for given in content.feedback:
        if given.kind == "thumb" and given.value < 0:
            reply = content.messages[given.message]
            down.setdefault(reply.parent or "", set()).add(reply.content)
    replies: dict[str, list[Stored]] = {}
    for message in content.messages.values():
        if message.role == "assistant" and message.parent is not None and _says_something(message):
            replies.setdefault(message.parent, []).append(message)
    for given in content.feedback:
        if given.kind != "thumb" or not given.severity:
            continue
        about = _about(content, given.message)
        if not sieve.passes("flag", given.person, [about.owner]):
            continue
        rows = (*about.rows, _row(given))
        kinds, judge = ",".join(given.reasons), content.people[given.person]
        yield safety_prompt(about.prompt, kinds, given.severity, judge, rows, "")
        flagged = content.messages[given.message]
        turn = flagged.parent or ""
        others = [m.id for m in replies.get(turn, ()) if m.content not in down[turn]]
        others = others[-(MAX_REPLIES - 1) :]
        weight = weights[given.severity - 1]
        if not _says_something(flagged):
            sieve.leave_out("flag", _EMPTY)
        elif not others:
            sieve.leave_out("flag", "nothing to compare with")
        elif weight:
            yield _compared(
                content, sieve, "flag", given.id, given.person, about,
                (*others, given.message), (*[1] * len(others), 2), weight, [_row(given)],
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _About:
    """What feedback in a chat is about: the turn that was answered, and whose chat it is."""

    prompt: Prompt
    owner: str
    rows: tuple[Row, ...]


def _about(content: Content, reply: str) -> _About:
    path = content.path(content.messages[reply].parent)
    owner = content.owners[path[-1].conversation]
    prompt = Prompt(
        prompt_id(path[-1].conversation, path[-1].row), tuple(m.record() for m in path), "chat"
    )
    return _About(prompt, owner, tuple(("messages", m.id, owner) for m in path))


def _compared(
    content: Content, sieve: Sieve, kind: str, key: str, judge: str, about: _About,
    replies: Sequence[str], ranks: Sequence[int], weight: float,
    rows: Iterable[Row],
) -> Item:  # fmt: skip
    """A comparison of replies in a chat."""
    shown = tuple(("messages", reply, about.owner) for reply in replies)
    comparison = Comparison(
        id=f"{kind}:{key}",
        prompt=about.prompt,
        candidates=tuple(_candidate(content.messages[reply]) for reply in replies),
        ranks=tuple(ranks),
        labeller=name_of(content.people[judge]),
        simulated=sieve.simulated(judge),
        weight=weight,
    )
    return Item(kind, "", comparison, (*about.rows, *shown, *rows), comparison.simulated)


def _says_something(message: Stored) -> bool:
    return message.refusal is None and bool(message.content.strip())


def _candidate(message: Stored) -> Candidate:
    return Candidate(message.id, message.content, message.policy or "human", message.finished)


def _row(given: Given) -> Row:
    return ("feedback", given.id, given.person)
