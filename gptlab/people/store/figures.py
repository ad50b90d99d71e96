"""A campaign in figures: how far it is, and how far its labels can be trusted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import sqlalchemy as sa

from gptlab.evals.preference import Bootstrap, Interval
from gptlab.people import agreement
from gptlab.people.store.campaigns import find_campaign
from gptlab.people.store.database import Database, Reader
from gptlab.people.store.judgements import Judgement, read_judgements
from gptlab.people.store.schema import judgements, leases, people, tasks
from gptlab.people.store.settle import DECIDING, standing

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Progress:
    """Gold checks don't count. `wanted` judgements are tasks x overlap; `judged` never exceeds it.

    A decision of a reviewer, or a dropped task, counts as all that its task wanted.
    """

    tasks: int
    done: int
    review: int
    wanted: int
    judged: int
    skipped: int
    held: int  # leases that run

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be judged or decided."""
        return self.done == self.tasks


@dataclasses.dataclass(frozen=True)
class Labeller:
    """One labeller's figures.

    `gold`: share of the gold checks whose known preferences were all given. `agreement`: with the
    others, of the pairs of replies that both order strictly.
    """

    person: str
    name: str
    simulated: bool
    judged: int
    skipped: int
    median_seconds: float
    gold: Interval
    gold_checks: int
    agreement: Interval
    agreement_pairs: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Intervals are 95%, by a bootstrap over tasks; NaN where there is nothing to count.

    `agreement`: of the pairs of replies that two labellers both order strictly, the share they
    order alike. `alpha`: Krippendorff's, of pairwise preferences (first, tie, second), ordinal.
    `position_bias`: how often the reply shown first of a strict pair was preferred, minus 1/2.
    `flags`, `skips`, `ratings`: how many of each kind, reason, Likert value. Decisions of reviewers
    count in none of these.
    """

    median_seconds: float
    mean_seconds: float
    agreement: Interval
    agreement_pairs: int
    alpha: Interval
    position_bias: Interval
    position_pairs: int
    tie_rate: float
    flags: dict[str, int]
    skips: dict[str, int]
    ratings: dict[int, int]
    labellers: tuple[Labeller, ...]


class Figures:
    """See the head of this file."""

    def __init__(self, database: Database):
        self._database = database

    def progress(self, campaign: str) -> Progress:
        """How far a campaign is; cheap enough to ask every second."""
        with self._database.read() as reader:
            found = find_campaign(reader, campaign)
            real = (tasks.c.campaign_id == found.id, tasks.c.gold.is_(None))
            by_state = sa.select(tasks.c.state, sa.func.count()).where(*real)
            states: dict[str, int] = {
                state: count for state, count in reader.execute(by_state.group_by(tasks.c.state))
            }
            done, review, begun = (states.get(s, 0) for s in ("done", "review", "open"))
            overlap = found.settings.overlap
            # Of tasks that are open or under review, what there is so far.
            query = (
                sa.select(leases.c.task_id, sa.func.count().label("judged"))
                .join(tasks, tasks.c.id == leases.c.task_id)
                .where(*real, tasks.c.state.in_(("open", "review")), leases.c.state == "judged")
                .group_by(leases.c.task_id)
            )
            partly = sum(min(row.judged, overlap) for row in reader.execute(query))
            total = done + review + begun
            return Progress(
                total, done, review, total * overlap, done * overlap + partly,
                _count(reader, found.id, leases.c.state == "skipped"),
                _count(
                    reader, found.id, leases.c.state == "held",
                    leases.c.expires_at > self._database.clock(),
                ),
            )  # fmt: skip

    def statistics(self, campaign: str, seed: int = 0) -> Statistics:
        """All figures; seconds for 10,000 tasks. `seed` is the bootstrap's."""
        bootstrap = Bootstrap(_RESAMPLES, seed, 0.95)
        with self._database.read() as reader:
            found = find_campaign(reader, campaign)
            own = judgements.c.campaign_id == found.id
            everything = read_judgements(reader, sa.and_(own, standing()))
            given = [j for j in everything if j.kind not in DECIDING]
            query = sa.select(leases.c.task_id, leases.c.person_id, leases.c.shown).where(
                leases.c.campaign_id == found.id, leases.c.state == "judged"
            )
            shown = {(r.task_id, r.person_id): json.loads(r.shown) for r in reader.execute(query)}
            names = {row.id: row for row in reader.execute(sa.select(people))}
        answers = [j for j in given if j.kind != "skip"]
        ranked = [j for j in answers if j.ranks is not None]
        by_task: dict[str, dict[str, tuple[int, ...]]] = {}
        for j in ranked:
            if j.gold_right is None:
                by_task.setdefault(j.task, {})[j.person] = j.ranks or ()
        rankings = [own for own in by_task.values() if len(own) > 1]
        agreed, pairs = agreement.pair_agreement(rankings, bootstrap)
        orders = [(j.ranks or (), shown[j.task, j.person]) for j in ranked]
        bias, bias_pairs = agreement.position_bias(orders, bootstrap)
        seconds = [j.seconds for j in answers]
        return Statistics(
            median_seconds=_median(seconds),
            mean_seconds=float(np.mean(seconds)) if seconds else float("nan"),
            agreement=agreed,
            agreement_pairs=pairs,
            alpha=agreement.preference_alpha(rankings, bootstrap),
            position_bias=bias,
            position_pairs=bias_pairs,
            tie_rate=_tie_rate(ranked),
            flags=dict(Counter(flag.kind for j in answers for flag in j.flags)),
            skips=dict(Counter(j.note.split(":")[0] for j in given if j.kind == "skip")),
            ratings=dict(Counter(r for j in answers for r in j.ratings or () if r is not None)),
            labellers=tuple(
                _labeller(names[person], given, rankings, bootstrap)
                for person in sorted({j.person for j in given})
            ),
        )


def gold_share(given: list[Judgement], bootstrap: Bootstrap) -> tuple[Interval, int]:
    """Share of gold checks that are right among these judgements, and how many there are."""
    right = [j.gold_right for j in given if j.gold_right is not None]
    sums = np.array([[float(value), 1.0] for value in right]).reshape(-1, 2)
    return agreement.share(sums, bootstrap), len(right)


def _labeller(
    person: Any, given: list[Judgement], rankings: list[Any], bootstrap: Bootstrap
) -> Labeller:
    own = [j for j in given if j.person == person.id]
    answers = [j for j in own if j.kind != "skip"]
    gold, checks = gold_share(own, bootstrap)
    shared = [task for task in rankings if person.id in task]
    agreed, pairs = agreement.pair_agreement(shared, bootstrap, person.id)
    return Labeller(
        person.id, person.name, person.simulated, len(answers), len(own) - len(answers),
        _median([j.seconds for j in answers]), gold, checks, agreed, pairs,
    )  # fmt: skip


def _count(reader: Reader, campaign: str, *where: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(leases)
    return reader.execute(query.where(leases.c.campaign_id == campaign, *where)).scalar_one()


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def _tie_rate(ranked: list[Judgement]) -> float:
    ties = pairs = 0
    for j in ranked:
        ranks = j.ranks or ()
        pairs += len(ranks) * (len(ranks) - 1) // 2
        ties += sum(ranks[a] == ranks[b] for a in range(len(ranks)) for b in range(a))
    return ties / pairs if pairs else float("nan")
