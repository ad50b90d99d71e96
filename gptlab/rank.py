"""Ranks candidate replies: candidate sets in, comparisons out.

    python -m gptlab.rank --config=configs/rank.py --workdir=runs/rank \
        --config.inputs.candidates=runs/collect

With `config.backend='simulated'` the ranking is made by a simulated labeller: a scorer
(`config.scorer`) plus Gumbel noise of a known level (`config.labeller`), see people/labellers.py.
Its records have the schema of people's rankings and always say that they are simulated, by what
scorer and with how much noise. Takes seconds (VADER: about 3,500 replies a second). Asked to stop
(SIGTERM, Ctrl-C), it stops within a few hundred sets, and starts anew next time.

With 'store' (configs/rank.py:people) people rank: the sets are queued in a campaign of the store,
see people/campaign_ranking.py. That takes as long as people need. Asked to stop, it leaves the
queue to them, and the same command goes on waiting.

Every split of the candidates stays a split: prompts never cross. Results, for each split: the
figures that say how far such labels can be trusted. Of a simulated labeller, `ceiling/accuracy` is
the best that any reward model can score on these labels, `agreement` what two such labellers reach:
with the default noise on human dialogue about as much as InstructGPT's, 72.6%.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from gptlab.data import records
from gptlab.data.records import CandidateSet, Comparison
from gptlab.people import labellers
from gptlab.run import artifact, processes, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.scorers import registry

_SAMPLES = 10  # comparisons of each split shown in samples.jsonl
_CHUNK = 256  # sets ranked before the progress bar moves, and a stop is seen


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Ranks the candidate sets of `config.inputs.candidates`.

    Raises:
      UserError: no candidates, a set that can't be ranked, or no such backend, scorer or store; or
        the finished rankings hold data of people who were deleted or withdrew consent since.
      Interrupted: SIGTERM or SIGINT.
    """
    check(config)
    artifact.check_inputs(config)
    with artifact.open_run(config, workdir, "rank") as run:
        if run.finished:
            if config.backend == "store":
                _campaign_ranking().check_finished(run)
            print(f"rank: {run.workdir} is done")
            return
        source = epath.Path(config.inputs.candidates) / "records"
        sets = {split: _read(source, split) for split in _splits(source)}
        run.metrics.rewind(-1)  # A run that was killed starts anew: it takes seconds.
        if config.backend == "store":
            _rank_by_people(run, sets)
        else:
            _rank_by_labeller(run, sets)
        processes.barrier("rank")
        run.complete(records.digest(run.workdir / "records"))


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    if config.backend not in ("simulated", "store"):
        raise UserError(f"config.backend={config.backend!r}: there are 'simulated' and 'store'")
    if config.backend == "store":
        _campaign_ranking().check(config)


def _rank_by_labeller(run: artifact.Run, sets: Mapping[str, list[CandidateSet]]) -> None:
    """Every split, by the simulated labeller of the config."""
    config = run.config
    labeller = labellers.SimulatedLabeller(
        registry.make(config.scorer, config.inputs),
        noise=config.labeller.noise,
        tie_margin=config.labeller.tie_margin,
        seed=config.seed,
    )
    for split, own in sets.items():
        comparisons = _compare(run, labeller, own, split)
        figures = _figures(comparisons, labeller)
        _write(run, split, comparisons, figures)
        processes.say(
            f"rank: {split}: {len(own)} sets ranked by {labeller.name}; "
            f"accuracy at best {figures['ceiling/accuracy']:.3f}, "
            f"two labellers agree {figures['agreement']:.3f}"
        )


def _rank_by_people(run: artifact.Run, sets: Mapping[str, list[CandidateSet]]) -> None:
    """All splits at once, by the people of a store."""
    for split, ranked in _campaign_ranking().rank(run, sets).items():
        _write(run, split, ranked.comparisons, ranked.figures)
        print(
            f"rank: {split}: {len(ranked.comparisons)} rankings of {len(sets[split])} sets, "
            f"{ranked.figures['simulated']:.0f} of them by simulated people"
        )


def _campaign_ranking() -> ModuleType:
    """The part that needs a database: who has labels simulated needs none of its packages."""
    try:
        from gptlab.people import campaign_ranking
    except ModuleNotFoundError as error:
        raise UserError(
            f"config.backend='store' needs the package {error.name}: pip install 'gptlab[serve]'"
        ) from error
    return campaign_ranking


def _write(
    run: artifact.Run, split: str, comparisons: Sequence[Comparison], figures: dict[str, float]
) -> None:
    """Records, results and a few samples of one split."""
    if processes.is_first():
        records.write_shards(run.workdir / "records", "comparisons", split, comparisons)
    run.results(**{f"{split}/{name}": value for name, value in figures.items()})
    for comparison in comparisons[:_SAMPLES]:
        run.metrics.write_sample({"step": 0, "split": split, **_sample(comparison)})


def _read(directory: epath.Path, split: str) -> list[CandidateSet]:
    sets = list(records.RecordReader(directory, "candidates", split, CandidateSet))
    if not sets:
        raise UserError(f"records candidates-{split} in {directory} are empty")
    return sets


def _splits(directory: epath.Path) -> list[str]:
    prefix = "candidates-"
    found = [name for name in records.record_sets(directory) if name.startswith(prefix)]
    if not found:
        raise UserError(f"no records candidates-* in {directory}: was it made by gptlab.collect?")
    return [name.removeprefix(prefix) for name in found]


def _compare(
    run: artifact.Run, labeller: labellers.SimulatedLabeller, sets: list[CandidateSet], split: str
) -> list[Comparison]:
    """All comparisons of a split; each has a seed of its own, so chunks make no difference."""
    comparisons: list[Comparison] = []
    with run.progress(len(sets), f"ranking {split}", unit="set") as bar:
        for begin in range(0, len(sets), _CHUNK):
            chunk = sets[begin : begin + _CHUNK]
            if run.stop_requested():
                raise Interrupted(f"stopped while ranking {split}, which will start anew")
            comparisons += labeller.compare(chunk)
            bar.update(len(chunk))
    return comparisons


def _figures(
    comparisons: list[Comparison], labeller: labellers.SimulatedLabeller
) -> dict[str, float]:
    """Numbers of a split. All are about clean scores and this labeller, simulated both."""
    scores = [comparison.scores or () for comparison in comparisons]
    expected = labellers.ceiling(scores, labeller.noise, labeller.tie_margin)
    observed = labellers.observe(comparisons)
    return {
        "sets": len(comparisons),
        "pairs": observed.pairs,
        "tie_rate": observed.tie_rate,
        "clean_tie_rate": expected.clean_tie_rate,
        "accuracy": observed.accuracy,
        "ceiling/accuracy": expected.accuracy,
        "agreement": expected.agreement,
        "mean_score": float(np.mean([np.mean(own) for own in scores])),
        "best_score": float(np.mean([np.max(own) for own in scores])),
        "score_std": float(np.std(np.concatenate(scores))),
    }


def _sample(comparison: Comparison) -> dict[str, object]:
    scores = comparison.scores or (None,) * len(comparison.ranks)
    ranking = sorted(
        zip(comparison.ranks, scores, comparison.candidates, strict=True),
        key=lambda entry: entry[0],
    )
    return {
        "prompt": [dataclasses.asdict(message) for message in comparison.prompt.messages],
        "ranking": [
            {"rank": rank, "score": score, "reply": candidate.content}
            for rank, score, candidate in ranking
        ],
        "labeller": comparison.labeller,
    }


if __name__ == "__main__":
    program.main(run, "rank")
