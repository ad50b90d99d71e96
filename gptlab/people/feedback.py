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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from gptlab.data.records import Candidate, Comparison, Conversation, Message, Prompt
from gptlab.people import scrubbing
from gptlab.people.store.accounts import ROLES, SCOPES, Person
from gptlab.people.store.campaigns import Task, prompt_id
from gptlab.people.store.content import Content
from gptlab.people.store.conversations import Message as Stored
from gptlab.people.store.feedback import Given
from gptlab.people.store.judgements import Judgement
from gptlab.people.store.settle import DECIDING, disagreement, state_of
from gptlab.run.errors import UserError

Record = Conversation | Comparison | Prompt
Row = tuple[str, str, str]  # table, id, person
# What an item comes from, in the order of reports.
KINDS = ("demonstration", "better", "ranking", "choice", "thumb", "flag", "safety prompt")


@dataclasses.dataclass(frozen=True)
class Filters:
    """What may become training data.

    Attributes:
      consent: the scope that people must have consented to: 'training' or 'publication'.
      roles: whose feedback and judgements count.
      simulated: whether those of simulated people do.
      max_disagreement: rankings of a task whose labellers order more than this share of the pairs
        differently are left out, unless a reviewer has decided.
      min_gold: labellers with a smaller share of right gold checks are left out altogether,
      gold_checks: if they had at least so many.
    """

    consent: str
    roles: tuple[str, ...]
    simulated: bool
    max_disagreement: float
    min_gold: float
    gold_checks: int


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
class Item:
    """A record to be exported: where it comes from, of whom it is, how bad what was flagged is."""

    kind: str  # one of KINDS
    split: str
    record: Record
    rows: tuple[Row, ...]
    simulated: bool
    severity: int = 0


@dataclasses.dataclass(frozen=True)
class Harvest:
    """What goes in, and how many of what kind were left out for which reason."""

    items: tuple[Item, ...]
    left_out: Mapping[tuple[str, str], int]  # (kind, reason)


def filters_of(config: ConfigDict) -> Filters:
    """The filters of a config. Raises UserError."""
    if config.consent not in SCOPES:
        raise UserError(f"config.filters.consent={config.consent!r} is one of {', '.join(SCOPES)}")
    if unknown := set(config.roles) - set(ROLES):
        raise UserError(f"config.filters.roles: {min(unknown)!r} is none of {', '.join(ROLES)}")
    return Filters(**{**config.to_dict(), "roles": tuple(config.roles)})


def harvest(
    content: Content, filters: Filters, weights: Weights, validation_fraction: float, seed: int
) -> Harvest:
    """All items of a store's content, in an order that depends on the content alone."""

    def split_of(messages: Sequence[Message], own: str = "") -> str:
        return own or hashed_split(messages, validation_fraction, seed)

    left_out: Counter[tuple[str, str]] = Counter()
    sieve = Sieve(content, filters, left_out)
    items = [
        *rankings(content, sieve, weights.ranking, split_of),
        *_demonstrations(content, sieve, split_of),
        *_improved(content, sieve, weights.better, split_of),
        *_choices(content, sieve, weights.choice, split_of),
        *_thumbs(content, sieve, weights.thumb, split_of),
        *_flags(content, sieve, weights.flag, split_of),
    ]
    return Harvest(tuple(_merged(items)), dict(left_out))


def hashed_split(messages: Sequence[Message], validation_fraction: float, seed: int) -> str:
    """'train' or 'validation', by a hash of the first turn that isn't the system's."""
    first = next((m for m in messages if m.role != "system"), None)
    text = "" if first is None else " ".join(first.content.casefold().split())
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:7], "big") / 2**56
    return "validation" if share < validation_fraction else "train"


class Sieve:
    """Says why something is left out, and counts it."""

    def __init__(
        self, content: Content, filters: Filters, left_out: Counter[tuple[str, str]]
    ) -> None:
        self._content, self._filters, self._left_out = content, filters, left_out
        self._unreliable = _fail_gold(content.judgements, filters)

    def passes(self, kind: str, judge: str, owners: Iterable[str | None] = ()) -> bool:
        """Whether what `judge` said about the text of `owners` may be used; counted if not."""
        reason = self._reason(judge, owners)
        if reason is not None:
            self.leave_out(kind, reason)
        return reason is None

    def leave_out(self, kind: str, reason: str) -> None:
        """Counts one."""
        self._left_out[kind, reason] += 1

    def simulated(self, person: str) -> bool:
        """Whether a person is a program."""
        return self._content.people[person].simulated

    def agrees(self, rankings: Sequence[Sequence[int]]) -> bool:
        """Whether a task's labellers agree as far as the filters ask."""
        return not disagreement(rankings) > self._filters.max_disagreement

    def _reason(self, judge: str, owners: Iterable[str | None]) -> str | None:
        people = [self._content.people.get(p) for p in (judge, *owners) if p is not None]
        if any(person is None for person in people):
            return "deleted person"
        known = [person for person in people if person is not None]
        agreed = self._content.consenting[self._filters.consent]
        if any(not person.simulated and person.id not in agreed for person in known):
            return f"no consent to {self._filters.consent}"
        if not self._filters.simulated and any(person.simulated for person in known):
            return "simulated"
        if known[0].role not in self._filters.roles:
            return f"role {known[0].role}"
        return "failed gold checks" if judge in self._unreliable else None


SplitOf = Callable[..., str]


def rankings(
    content: Content,
    sieve: Sieve,
    weight: float,
    split_of: SplitOf,
    only: Collection[str] | None = None,
) -> Iterator[Item]:
    """Comparisons of ranked tasks: the reviewer's decision, or else one a labeller.

    Args:
      content: the store's.
      sieve: what leaves out.
      weight: of a task; shared by its rankings.
      split_of: messages and a task's own split -> split.
      only: ids of the tasks wanted; None: all.
    """
    for task, answers in _answers_by_task(content):
        if not task.candidates or task.prompt is None or not weight:
            continue
        if only is not None and task.id not in only:
            continue
        judged = _counting(content, task, answers, sieve)
        used = [a for a in judged if sieve.passes("ranking", a.person, [task.person])]
        for answer in used:
            yield Item(
                "ranking",
                split_of(task.prompt.messages, task.split),
                Comparison(
                    id=f"{task.source}:{answer.id}",
                    prompt=task.prompt,
                    candidates=task.candidates,
                    ranks=answer.ranks or (),
                    labeller=name_of(content.people[answer.person]),
                    simulated=sieve.simulated(answer.person),
                    weight=weight / len(used),
                ),
                _rows_of(answer, task),
                sieve.simulated(answer.person),
            )


def name_of(person: Person) -> str:
    """A labeller's name in records: people by a number that only the store can resolve."""
    return f"simulated:{person.name}" if person.simulated else f"person:{person.id}"


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


def _fail_gold(judgements: Iterable[Judgement], filters: Filters) -> set[str]:
    checks: dict[str, list[bool]] = {}
    for judgement in judgements:
        if judgement.gold_right is not None:
            checks.setdefault(judgement.person, []).append(judgement.gold_right)
    return {
        person
        for person, right in checks.items()
        if len(right) >= filters.gold_checks and sum(right) / len(right) < filters.min_gold
    }


def _answers_by_task(content: Content) -> Iterator[tuple[Task, list[Judgement]]]:
    """Tasks that are no gold checks, with their answers."""
    by_task: dict[str, list[Judgement]] = {}
    for judgement in content.judgements:
        by_task.setdefault(judgement.task, []).append(judgement)
    for task in content.tasks.values():
        if task.gold is None and task.id in by_task:
            yield task, by_task[task.id]


def _counting(
    content: Content, task: Task, answers: Sequence[Judgement], sieve: Sieve
) -> list[Judgement]:
    """The rankings that count of a task; those that don't are counted as left out."""
    decisions = [a for a in answers if a.kind in DECIDING]
    ranked = [a for a in answers if a.kind == "ranking"]
    if decisions:
        for _ in ranked:
            sieve.leave_out("ranking", "a reviewer decided")
        return [a for a in decisions[-1:] if a.kind == "decision"]
    settings = content.campaigns[task.campaign].settings
    state = state_of(answers, settings.overlap, settings.disagreement, settings.max_skips)
    reason = None
    if state == "review":
        reason = "to be decided by a reviewer"
    elif not sieve.agrees([a.ranks or () for a in ranked]):
        reason = "labellers disagree"
    if reason is None:
        return ranked
    for _ in ranked:
        sieve.leave_out("ranking", reason)
    return []


def _rows_of(answer: Judgement, task: Task) -> tuple[Row, ...]:
    rows = [("judgements", answer.id, answer.person)]
    if task.person is not None:
        rows.append(("tasks", task.id, task.person))
    return tuple(rows)


def _demonstrations(content: Content, sieve: Sieve, split_of: SplitOf) -> Iterator[Item]:
    for task, answers in _answers_by_task(content):
        dropped = any(a.kind == "drop" for a in answers)
        for answer in answers:
            if answer.kind != "demonstration":
                continue
            if dropped:
                sieve.leave_out("demonstration", "a reviewer decided")
            elif sieve.passes("demonstration", answer.person, [task.person]):
                before = () if task.prompt is None else task.prompt.messages
                messages = (*before, *(turn.message for turn in answer.turns))
                simulated = sieve.simulated(answer.person)
                yield Item(
                    "demonstration",
                    split_of(messages, task.split),
                    Conversation(
                        f"demonstration:{answer.id}",
                        messages,
                        _source("demonstration", simulated),
                        None if task.prompt is None else task.prompt.conversation_id,
                    ),
                    _rows_of(answer, task),
                    simulated,
                )


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


def _candidate(message: Stored) -> Candidate:
    return Candidate(message.id, message.content, message.policy or "human", message.finished)


def _compared(
    content: Content, sieve: Sieve, kind: str, key: str, judge: str, about: _About,
    replies: Sequence[str], ranks: Sequence[int], weight: float, split_of: SplitOf,
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
    split = split_of(about.prompt.messages)
    return Item(kind, split, comparison, (*about.rows, *shown, *rows), comparison.simulated)


def _row(given: Given) -> Row:
    return ("feedback", given.id, given.person)


def _improved(content: Content, sieve: Sieve, weight: float, split_of: SplitOf) -> Iterator[Item]:
    """A better reply is a demonstration, and above the one that it improves."""
    for given in content.feedback:
        if given.kind != "better" or given.other is None:
            continue
        about = _about(content, given.message)
        if not sieve.passes("better", given.person, [about.owner]):
            continue
        simulated, better = sieve.simulated(given.person), content.messages[given.other]
        rows = (*about.rows, ("messages", better.id, given.person), _row(given))
        yield Item(
            "better",
            split_of(about.prompt.messages),
            Conversation(
                f"better:{given.id}",
                (*about.prompt.messages, better.record()),
                _source("better", simulated),
                about.prompt.conversation_id,
            ),
            rows,
            simulated,
        )
        if weight:
            yield _compared(
                content, sieve, "better", given.id, given.person, about,
                (better.id, given.message), (1, 2), weight, split_of, [_row(given)],
            )  # fmt: skip


def _choices(content: Content, sieve: Sieve, weight: float, split_of: SplitOf) -> Iterator[Item]:
    for given in content.feedback:
        if given.kind != "choice" or given.other is None or not weight:
            continue
        about = _about(content, given.message)
        if sieve.passes("choice", given.person, [about.owner]):
            ranks = {1: (1, 2), 0: (1, 1), -1: (2, 1)}[given.value]
            yield _compared(
                content, sieve, "choice", given.id, given.person, about,
                (given.message, given.other), ranks, weight, split_of, [_row(given)],
            )  # fmt: skip


def _thumbs(content: Content, sieve: Sieve, weight: float, split_of: SplitOf) -> Iterator[Item]:
    """Replies to one turn that got a thumb: those up above those down."""
    by_turn: dict[tuple[str, str], list[Given]] = {}
    for given in content.feedback:
        if given.kind == "thumb" and weight:
            turn = content.messages[given.message].parent or ""
            by_turn.setdefault((turn, given.person), []).append(given)
    for (turn, person), thumbs in by_turn.items():
        if len({given.value for given in thumbs}) < 2:
            for _ in thumbs:
                sieve.leave_out("thumb", "nothing to compare with")
            continue
        about = _about(content, thumbs[0].message)
        if sieve.passes("thumb", person, [about.owner]):
            yield _compared(
                content, sieve, "thumb", turn, person, about,
                [given.message for given in thumbs],
                [1 if given.value > 0 else 2 for given in thumbs],
                weight, split_of, [_row(given) for given in thumbs],
            )  # fmt: skip


def _flags(
    content: Content, sieve: Sieve, weights: Sequence[float], split_of: SplitOf
) -> Iterator[Item]:
    """Flagged replies below those that weren't flagged, and the prompts they were given to."""
    yield from _flagged_in_tasks(content, sieve, weights, split_of)
    down = {g.message for g in content.feedback if g.kind == "thumb" and g.value < 0}
    replies: dict[str, list[Stored]] = {}
    for message in content.messages.values():
        if message.role == "assistant" and message.refusal is None and message.parent is not None:
            replies.setdefault(message.parent, []).append(message)
    for given in content.feedback:
        if given.kind != "thumb" or not given.severity:
            continue
        about = _about(content, given.message)
        if not sieve.passes("flag", given.person, [about.owner]):
            continue
        rows = (*about.rows, _row(given))
        kinds = ",".join(given.reasons)
        yield _safety_prompt(about.prompt, kinds, given.severity, given.id, rows, sieve, split_of)
        turn = content.messages[given.message].parent or ""
        others = [m.id for m in replies[turn] if m.id not in down and m.id != given.message]
        weight = weights[given.severity - 1]
        if not others:
            sieve.leave_out("flag", "nothing to compare with")
        elif weight:
            yield _compared(
                content, sieve, "flag", given.id, given.person, about,
                (*others, given.message), (*[1] * len(others), 2), weight, split_of,
                [_row(given)],
            )  # fmt: skip


def _flagged_in_tasks(
    content: Content, sieve: Sieve, weights: Sequence[float], split_of: SplitOf
) -> Iterator[Item]:
    """Flags of rankings; where a reviewer has decided, that one's."""
    for task, answers in _answers_by_task(content):
        decisions = [a for a in answers if a.kind in DECIDING]
        for answer in decisions[-1:] or answers:
            if not answer.flags or task.prompt is None:
                continue
            if not sieve.passes("flag", answer.person, [task.person]):
                continue
            worst = max(flag.severity for flag in answer.flags)
            rows, prompt = _rows_of(answer, task), task.prompt
            kinds = ",".join(sorted({flag.kind for flag in answer.flags}))
            split = split_of(prompt.messages, task.split)
            yield _safety_prompt(
                prompt, kinds, worst, answer.id, rows, sieve, lambda _, split=split: split
            )
            flagged = {flag.reply for flag in answer.flags}
            ranks = tuple(2 if i in flagged else 1 for i in range(len(task.candidates)))
            if len(set(ranks)) < 2:
                sieve.leave_out("flag", "nothing to compare with")
            elif weights[worst - 1]:
                person = content.people[answer.person]
                comparison = Comparison(
                    f"flag:{answer.id}", prompt, task.candidates, ranks, name_of(person),
                    person.simulated, None, weights[worst - 1],
                )  # fmt: skip
                yield Item("flag", split, comparison, rows, person.simulated, worst)


def _safety_prompt(
    prompt: Prompt, kinds: str, severity: int, key: str, rows: tuple[Row, ...], sieve: Sieve,
    split_of: SplitOf,
) -> Item:  # fmt: skip
    simulated = sieve.simulated(rows[-1][2])
    source = f"{_source('flag', simulated)}:{kinds}:severity={severity}"
    record = dataclasses.replace(prompt, source=source)
    return Item("safety prompt", split_of(prompt.messages), record, rows, simulated, severity)


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


def _source(kind: str, simulated: bool) -> str:
    return f"{'simulated' if simulated else 'people'}:{kind}"
