"""Held-out prompts stay held out: which prompts has any ancestor of a model been trained on?

The answer is read from the artifacts themselves, by lineage, and not from the splits' names: a
corpus that was prepared anew with another seed has the same names and other contents.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptlab.data import records
from gptlab.data.records import Comparison, Prompt
from gptlab.run import artifact
from gptlab.run.errors import UserError

# The weights of a reward model depend on both: one trains it, the other chooses its checkpoint.
_LABEL_SPLITS = ("train", "validation")


def check_disjoint(prompts: Iterable[Prompt], models: Iterable[str]) -> list[str]:
    """Checks that no model, nor any model that it was made from, has seen one of the prompts.

    Prompts are seen in two ways: PPO answers the training prompts of its corpus, and a reward model
    is fitted on comparisons of replies to prompts.

    Args:
      prompts: to be evaluated on.
      models: workdirs of policies and reward models.

    Returns:
      A line for each ancestor that could not be checked, because it is gone.

    Raises:
      UserError: some prompts were seen; says by which artifact, and names one of them.
    """
    evaluated = {prompt.id for prompt in prompts}
    gone: list[str] = []
    checked: set[Path] = set()
    for model in models:
        for directory, manifest in _ancestors(Path(model), checked, gone):
            for source, seen in _seen(directory, manifest, gone):
                both = sorted(evaluated & seen)
                if both:
                    raise UserError(
                        f"{len(both)} of {len(evaluated)} prompts to be evaluated on were seen in "
                        f"training: {both[0]!r} is in {source}, which {directory} learnt from; "
                        "evaluate on held-out prompts of the corpus that the models were made from"
                    )
    return gone


def _ancestors(
    directory: Path, checked: set[Path], gone: list[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """An artifact and everything that it was made from, each once."""
    directory = directory.resolve()
    if directory in checked:
        return
    checked.add(directory)
    manifest = artifact.read_manifest(directory, allow_unfinished=True)
    yield directory, manifest
    for name in manifest["inputs"]:
        found = _input(directory, name, gone)
        if found is not None:
            yield from _ancestors(found, checked, gone)


def _seen(
    directory: Path, manifest: dict[str, Any], gone: list[str]
) -> Iterator[tuple[str, set[str]]]:
    """The ids of prompts that an artifact's own training used, by where they stand."""
    for name in manifest["inputs"]:
        if manifest["stage"] == "reward" and name.startswith("comparisons"):
            wanted = [("comparisons", split) for split in _LABEL_SPLITS]
        elif manifest["stage"] == "ppo" and name == "prompts":
            wanted = [("prompts", "train")]
        else:
            continue
        source = _input(directory, name, gone)
        if source is None:
            continue
        for kind, split in wanted:
            yield f"{source}/records/{kind}-{split}", _prompt_ids(source / "records", kind, split)


def _prompt_ids(directory: Path, kind: str, split: str) -> set[str]:
    if f"{kind}-{split}" not in records.record_sets(directory):
        return set()
    if kind == "prompts":
        return {prompt.id for prompt in records.RecordReader(directory, kind, split, Prompt)}
    reader = records.RecordReader(directory, kind, split, Comparison)
    return {comparison.prompt.id for comparison in reader}


def _input(directory: Path, name: str, gone: list[str]) -> Path | None:
    try:
        return artifact.input_workdir(directory, name)
    except UserError as error:
        if str(error) not in gone:
            gone.append(str(error))
        return None
