"""Candidate sets, ranked by the people of a store: queued in a campaign, waited for, read back.

Everything before the reading may be repeated: queueing what is queued does nothing, and waiting has
no state of its own. So a program that was stopped, or killed, goes on where people stand. Closing
the campaign ends the waiting early: what is ranked by then is taken.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from gptlab.data.records import CandidateSet, Comparison
from gptlab.evals.preference import Bootstrap
from gptlab.people import agreement, task_feedback
from gptlab.people.items import Item
from gptlab.people.sieve import Sieve, filters_of
from gptlab.people.store import Invalid, NotFound, Store, resolve_url
from gptlab.people.store.audit import SYSTEM
from gptlab.people.store.campaigns import Campaign, Settings
from gptlab.run import artifact, processes
from gptlab.run.errors import Interrupted, UserError

_STOP_SECONDS = 0.2  # how soon a request to stop is seen
_FINISHED = ("done", "withheld", "deleted")  # nobody is given such a task


@dataclasses.dataclass(frozen=True)
class Ranked:
    """What people made of one split."""

    comparisons: list[Comparison]
    figures: dict[str, float]


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    resolve_url(config.store.url)
    filters_of(config.filters)
    if not config.campaign.name:
        raise UserError("config.campaign.name is not set: give the campaign that people work on")
    if not config.store.poll_seconds > 0:
        raise UserError(f"config.store.poll_seconds={config.store.poll_seconds} must be positive")
    if processes.count() > 1:
        raise UserError("config.backend='store' waits for people: one process is enough for that")


def rank(run: artifact.Run, sets: Mapping[str, Sequence[CandidateSet]]) -> dict[str, Ranked]:
    """Queues the sets of each split, waits until they are ranked, and returns the rankings.

    Raises:
      UserError: the store can't be used, or no ranking of a split may be used.
      Interrupted: a stop was requested; people can go on meanwhile.
    """
    config = run.config
    with Store.open(resolve_url(config.store.url)) as store:
        try:
            campaign = _campaign(store, config)
            for split, own in sets.items():
                store.campaigns.queue(campaign.id, own, SYSTEM, split)
        except Invalid as error:
            raise UserError(f"config.campaign: {error}") from error
        sources = {item.id for own in sets.values() for item in own}
        if len(sources) != sum(len(own) for own in sets.values()):
            raise UserError("config.inputs.candidates: two candidate sets have the same id")
        _wait(run, store, campaign, sources, config.store.poll_seconds)
        return _read(run, store, campaign, sets)


def check_finished(run: artifact.Run) -> None:
    """UserError if a finished run's rankings hold data of somebody who may not be used any more.

    That is who was deleted since, or has withdrawn what config.filters.consent asks for: who has
    ranked, or whose text was ranked.
    """
    with Store.open(resolve_url(run.config.store.url), create=False) as store:
        noted = [export for export in store.exports.all() if export.identity == run.identity]
    here = [export for export in noted if export.workdir == str(run.workdir)]
    # The newest is what is there now. A workdir that was moved may be any of them.
    if any(export.stale for export in here[:1] or noted):
        raise UserError(
            f"{run.workdir} holds data of people who were deleted or have withdrawn their consent "
            "since: remove it and what was made of it, and rank again, which takes what the others "
            "have ranked from the store"
        )


def _campaign(store: Store, config: ConfigDict) -> Campaign:
    """The campaign of that name; made if there is none."""
    settings = config.campaign.to_dict()
    name = settings.pop("name")
    try:
        return store.campaigns.get(name)
    except NotFound:
        made = Settings(seed=config.seed, **settings)
        return store.campaigns.create(name, "ranking", made, SYSTEM)


def _wait(
    run: artifact.Run, store: Store, campaign: Campaign, sources: set[str], poll_seconds: float
) -> None:
    """Until every set is ranked, or the campaign is closed."""
    with run.progress(len(sources), f"ranked in {campaign.name}", unit="set") as bar:
        while True:
            states = store.campaigns.states(campaign.id)
            finished = sum(states[source][1] in _FINISHED for source in sources)
            bar.update(finished - bar.count)
            if finished == len(sources) or store.campaigns.get(campaign.id).state == "closed":
                return
            until = time.monotonic() + poll_seconds
            while time.monotonic() < until:
                if run.stop_requested():
                    raise Interrupted(
                        f"{finished} of {len(sources)} sets are ranked, and people can go on"
                    )
                time.sleep(min(_STOP_SECONDS, poll_seconds))


def _read(
    run: artifact.Run,
    store: Store,
    campaign: Campaign,
    sets: Mapping[str, Sequence[CandidateSet]],
) -> dict[str, Ranked]:
    """The rankings of these sets, by the rules of every export."""
    content = store.content()
    states = store.campaigns.states(campaign.id)
    tasks = {states[item.id][0] for own in sets.values() for item in own}
    left_out: Counter[tuple[str, str]] = Counter()
    sieve = Sieve(content, filters_of(run.config.filters), left_out)
    items = list(task_feedback.rankings(content, sieve, 1.0, only=tasks))
    reasons = ", ".join(f"{count} x {reason}" for (_, reason), count in sorted(left_out.items()))
    ranked = {}
    for split in sets:
        own = [item for item in items if item.split == split]
        if not own:
            raise UserError(
                f"no ranking of candidates-{split} in campaign {campaign.name!r} may be used: "
                + (reasons or f"nothing of it is ranked, and {campaign.name!r} is closed")
            )
        ranked[split] = Ranked(_comparisons(own), _figures(own, len(sets[split])))
    try:
        rows = {row for item in items for row in item.rows}
        noted = (run.identity, str(run.workdir), content.state, rows)
        store.exports.register(*noted, run.config.filters.consent)
    except Invalid as error:
        raise UserError(str(error)) from error
    head = store.audit.head()
    run.results(
        left_out=sum(left_out.values()), store=content.state.store,
        audit_row=head.row, audit_hash=head.hash,
    )  # fmt: skip
    return ranked


def _comparisons(items: Sequence[Item]) -> list[Comparison]:
    return [item.record for item in items if isinstance(item.record, Comparison)]


def _figures(items: Sequence[Item], sets: int) -> dict[str, float]:
    """Numbers of a split; agreement is between people who ranked the same set."""
    comparisons = _comparisons(items)
    by_set: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for comparison in comparisons:
        key = tuple(candidate.id for candidate in comparison.candidates)
        by_set.setdefault(key, {})[comparison.labeller] = comparison.ranks
    given = agreement.Preferences.of(list(by_set.values()))
    agreed, pairs = agreement.pair_agreement(given, Bootstrap())
    return {
        "sets": sets,
        "ranked_sets": len(by_set),
        "rankings": len(comparisons),
        "simulated": sum(comparison.simulated for comparison in comparisons),
        "labellers": len({comparison.labeller for comparison in comparisons}),
        "agreement": agreed.mean,
        "agreement_pairs": pairs,
    }
