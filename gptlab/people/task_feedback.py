"""Answers to a campaign's tasks as records: rankings, demonstrations, flags."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from gptlab.data.records import Comparison, Conversation
from gptlab.people.items import Item, Row, name_of, safety_prompt, source
from gptlab.people.sieve import Sieve
from gptlab.people.store.content import Content
from gptlab.people.store.judgements import Judgement
from gptlab.people.store.settle import DECIDING, state_of
from gptlab.people.store.tasks import Task

_WAITING = "to be decided by a reviewer"


def rankings(
    content: Content,
    sieve: Sieve,
    weight: float,
    only: Collection[str] | None = None,
) -> Iterator[Item]:
    """Comparisons of ranked tasks: the reviewer's decision, or else one a labeller.

    Args:
      content: the store's.
      sieve: what leaves out.
      weight: of a task; shared by its rankings.
      only: ids of the tasks wanted; None: all.
    """
    for task, answers in _answers_by_task(content):
        if not task.candidates or task.prompt is None or not weight:
            continue
        if only is not None and task.id not in only:
            continue
        judged = _counting(content, task, answers, sieve)
        used = [a for a in judged if sieve.passes("ranking", a.person, [task.person])]
        # Among those whose word counts: one who fails the gold checks spoils no task.
        if not sieve.agrees([a.ranks or () for a in used]):
            for _ in used:
                sieve.leave_out("ranking", "labellers disagree")
            continue
        for answer in used:
            yield Item(
                "ranking",
                task.split,
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


def demonstrations(content: Content, sieve: Sieve) -> Iterator[Item]:
    """Conversations that people wrote, of which all that is theirs is learnt.

    A suggestion that they took as it was counts as theirs; replies in the prompt don't.
    """
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
                written = range(len(before), len(messages))
                simulated = sieve.simulated(answer.person)
                yield Item(
                    "demonstration",
                    task.split,
                    Conversation(
                        f"demonstration:{answer.id}",
                        messages,
                        source("demonstration", simulated),
                        None if task.prompt is None else task.prompt.conversation_id,
                        learnt=tuple(i for i in written if messages[i].role == "assistant"),
                    ),
                    _rows_of(answer, task),
                    simulated,
                )


def flags(content: Content, sieve: Sieve, weights: Sequence[float]) -> Iterator[Item]:
    """Flags of rankings; where a reviewer has decided, that one's, and where one is to, none yet.

    The weight of a severity is shared by those who have flagged something of a task.
    """
    for task, answers in _answers_by_task(content):
        if task.prompt is None:
            continue
        decisions = [a for a in answers if a.kind in DECIDING]
        raised = [a for a in decisions[-1:] or answers if a.flags]
        if not decisions and _in_review(content, task, answers):
            for _ in raised:
                sieve.leave_out("flag", _WAITING)
            continue
        used = [a for a in raised if sieve.passes("flag", a.person, [task.person])]
        for answer in used:
            worst = max(flag.severity for flag in answer.flags)
            rows, prompt = _rows_of(answer, task), task.prompt
            person = content.people[answer.person]
            kinds = ",".join(sorted({flag.kind for flag in answer.flags}))
            yield safety_prompt(prompt, kinds, worst, person, rows, task.split)
            flagged = {flag.reply for flag in answer.flags}
            ranks = tuple(2 if i in flagged else 1 for i in range(len(task.candidates)))
            if len(set(ranks)) < 2:
                sieve.leave_out("flag", "nothing to compare with")
            elif weights[worst - 1]:
                comparison = Comparison(
                    f"flag:{answer.id}", prompt, task.candidates, ranks, name_of(person),
                    person.simulated, None, weights[worst - 1] / len(used),
                )  # fmt: skip
                yield Item("flag", task.split, comparison, rows, person.simulated, worst)


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
    if _in_review(content, task, answers):
        for _ in ranked:
            sieve.leave_out("ranking", _WAITING)
        return []
    return ranked


def _in_review(content: Content, task: Task, answers: Sequence[Judgement]) -> bool:
    settings = content.campaigns[task.campaign].settings
    state = state_of(answers, settings.overlap, settings.disagreement, settings.max_skips)
    return state == "review"


def _rows_of(answer: Judgement, task: Task) -> tuple[Row, ...]:
    rows = [("judgements", answer.id, answer.person)]
    if task.person is not None:
        rows.append(("tasks", task.id, task.person))
    return tuple(rows)
