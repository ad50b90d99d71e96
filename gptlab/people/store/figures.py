"""A campaign in figures: how far it is, and how far its labels can be trusted."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from gptlab.evals.preference import Bootstrap, Interval
from gptlab.people import agreement
from gptlab.people.store.campaigns import find_campaign
from gptlab.people.store.database import Database, Reader
from gptlab.people.store.schema import flags, judgements, leases, people, tasks
from gptlab.people.store.settle import DECIDING, standing

_COUNTED = ("task_id", "person_id", "kind", "ranks", "ratings", "note", "seconds", "gold_right")
_BOOTSTRAP = Bootstrap(1000, 0, 0.95)


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
        self._turn = threading.Lock()  # who asks for statistics while they are computed waits
        self._known: dict[str, tuple[Any, Statistics]] = {}  # by campaign: of which judgements

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

    def statistics(self, campaign: str) -> Statistics:
        """All figures; computed anew only when judgements have come or gone."""
        with self._turn:
            with self._database.read() as reader:
                found = find_campaign(reader, campaign)
                which = _which(reader, found.id)
                known = self._known.get(found.id)
                if known is not None and known[0] == which:
                    return known[1]
                answers = _read(reader, found.id)
            made = _statistics(answers)
            self._known[found.id] = which, made
        return made


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What a campaign's labellers have answered, as far as it is counted."""

    rows: Sequence[Any]  # of judgements, what _COUNTED names, and the order shown
    flags: dict[str, int]
    people: dict[str, Any]


def _which(reader: Reader, campaign: str) -> tuple[Any, ...]:
    """What tells a campaign's judgements from those of another time: none is ever changed."""
    query = sa.select(sa.func.count(), sa.func.max(judgements.c.row))
    return tuple(reader.execute(query.where(judgements.c.campaign_id == campaign)).one())


def _read(reader: Reader, campaign: str) -> _Answers:
    own = (judgements.c.campaign_id == campaign, judgements.c.kind.not_in(DECIDING), standing())
    # A correction has no lease of its own: what was shown is known by task and person.
    shown = sa.and_(
        leases.c.task_id == judgements.c.task_id,
        leases.c.person_id == judgements.c.person_id,
        leases.c.state == "judged",
    )
    query = (
        sa.select(*(judgements.c[name] for name in _COUNTED), leases.c.shown)
        .join(leases, shown, isouter=True)
        .where(*own)
        .order_by(judgements.c.row)
    )
    flagged = (
        sa.select(flags.c.kind, sa.func.count())
        .join(judgements, judgements.c.id == flags.c.judgement_id)
        .where(*own)
        .group_by(flags.c.kind)
    )
    rows = reader.execute(query).all()
    who = sa.select(people).where(people.c.id.in_(sa.select(judgements.c.person_id).where(*own)))
    known = {row.id: row for row in reader.execute(who)}
    return _Answers(rows, {kind: n for kind, n in reader.execute(flagged)}, known)


@functools.lru_cache(10_000)
def _numbers(text: str) -> tuple[Any, ...]:
    """Ranks, ratings or places as they are stored; there are few different ones."""
    return tuple(json.loads(text))


@dataclasses.dataclass
class _Work:
    """What one person has answered: seconds of each judgement, gold checks that are right."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    gold: list[bool] = dataclasses.field(default_factory=list)
    skipped: int = 0


def _statistics(given: _Answers) -> Statistics:
    work: dict[str, _Work] = {}
    by_task: dict[str, dict[str, tuple[int, ...]]] = {}
    orders: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    ratings: Counter[int] = Counter()
    skips: Counter[str] = Counter()
    for task, person, kind, ranks, rated, note, seconds, right, shown in given.rows:
        own = work.setdefault(person, _Work())
        if kind == "skip":
            own.skipped += 1
            skips[note.split(":")[0]] += 1
            continue
        own.seconds.append(seconds)
        if right is not None:
            own.gold.append(right)
        if rated is not None:
            ratings.update(value for value in _numbers(rated) if value is not None)
        if ranks is not None:
            orders.append((_numbers(ranks), _numbers(shown)))
            if right is None:
                by_task.setdefault(task, {})[person] = orders[-1][0]
    preferences = agreement.Preferences.of([own for own in by_task.values() if len(own) > 1])
    agreed, pairs = agreement.pair_agreement(preferences, _BOOTSTRAP)
    bias, bias_pairs = agreement.position_bias(orders, _BOOTSTRAP)
    everything = [second for own in work.values() for second in own.seconds]
    return Statistics(
        median_seconds=_median(everything),
        mean_seconds=float(np.mean(everything)) if everything else float("nan"),
        agreement=agreed,
        agreement_pairs=pairs,
        alpha=agreement.preference_alpha(preferences, _BOOTSTRAP),
        position_bias=bias,
        position_pairs=bias_pairs,
        tie_rate=agreement.tie_rate([ranks for ranks, _ in orders]),
        flags=given.flags,
        skips=dict(skips),
        ratings=dict(ratings),
        labellers=tuple(
            _labeller(given.people[person], work[person], preferences) for person in sorted(work)
        ),
    )


def _labeller(person: Any, own: _Work, preferences: agreement.Preferences) -> Labeller:
    sums = np.array([[right, 1.0] for right in own.gold]).reshape(-1, 2)
    agreed, pairs = agreement.pair_agreement(preferences, _BOOTSTRAP, person.id)
    return Labeller(
        person.id, person.name, person.simulated, len(own.seconds), own.skipped,
        _median(own.seconds), agreement.share(sums, _BOOTSTRAP), len(own.gold), agreed, pairs,
    )  # fmt: skip


def _count(reader: Reader, campaign: str, *where: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(leases)
    return reader.execute(query.where(leases.c.campaign_id == campaign, *where)).scalar_one()


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else float("nan")
