"""What of a store's content may become training data, and why the rest may not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from gptlab.people.store.consent import SCOPES
from gptlab.people.store.content import Content
from gptlab.people.store.judgements import Judgement
from gptlab.people.store.person import ROLES
from gptlab.people.store.settle import disagreement
from gptlab.run.errors import UserError


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


def filters_of(config: ConfigDict) -> Filters:
    """The filters of a config. Raises UserError."""
    if config.consent not in SCOPES:
        raise UserError(f"config.filters.consent={config.consent!r} is one of {', '.join(SCOPES)}")
    if unknown := set(config.roles) - set(ROLES):
        raise UserError(f"config.filters.roles: {min(unknown)!r} is none of {', '.join(ROLES)}")
    return Filters(**{**config.to_dict(), "roles": tuple(config.roles)})


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
