"""Held-out prompts stay held out: which prompts has any ancestor of a model been trained on?

The answer is read from the artifacts themselves, by lineage, and not from the splits' names: a
corpus that was prepared anew with another seed has the same names and other contents.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from gptlab.data import mixtures, readers, records
from gptlab.data.records import Comparison, Conversation, Document, Prompt
from gptlab.run import artifact, storage
from gptlab.run.errors import UserError

# The weights of a reward model depend on both: one trains it, the other chooses its checkpoint.
_LABEL_SPLITS = ("train", "validation")
# Tasks of `prepare`, and the records they are made of. Some documents are texts of conversations.
_MADE_OF = {"pretrain": "documents", "dialogues": "conversations"}


def check_disjoint(prompts: Iterable[Prompt], models: Iterable[str]) -> list[str]:
    """Checks that no model, nor any model that it was made from, has seen one of the prompts.

    Prompts are seen in three ways: as the beginning of a conversation that a language model was
    trained on (fine-tuning; pretraining, if it read the conversation's text as a document or the
    dialogues were mixed in), as a training prompt that PPO answered, and in the comparisons that a
    reward model is fitted on.

    Args:
      prompts: to be evaluated on.
      models: workdirs of policies and reward models.

    Returns:
      A line for each ancestor that could not be checked, because it is gone, or because it learnt
      from a task of the user's own, whose examples have other ids than conversations.

    Raises:
      UserError: some prompts were seen; says by which artifact, and names one of them.
    """
    conversations = {prompt.id: prompt.conversation_id for prompt in prompts}
    unchecked: list[str] = []
    checked: set[epath.Path] = set()
    looked_at: set[tuple[epath.Path, str, str]] = (
        set()
    )  # many ancestors learn from the same records
    for model in models:
        for directory, manifest in _ancestors(epath.Path(model), checked, unchecked):
            for source, kind, split in _learnt_from(directory, manifest, unchecked):
                if (source, kind, split) in looked_at:
                    continue
                looked_at.add((source, kind, split))
                both = _seen(conversations, source / "records", kind, split)
                if both:
                    raise UserError(
                        f"{len(both)} of {len(conversations)} prompts to be evaluated on were seen "
                        f"in training: {both[0]!r} is in {source}/records/{kind}-{split}, which "
                        f"{directory} learnt from; evaluate on held-out prompts of the corpus that "
                        "the models were made from"
                    )
    return unchecked


def _ancestors(
    directory: epath.Path, checked: set[epath.Path], unchecked: list[str]
) -> Iterator[tuple[epath.Path, dict[str, Any]]]:
    """An artifact and everything that it was made from, each once."""
    directory = storage.resolve(directory)
    if directory in checked:
        return
    checked.add(directory)
    manifest = artifact.read_manifest(directory, allow_unfinished=True)
    yield directory, manifest
    for name in manifest["inputs"]:
        found = _input(directory, name, unchecked)
        if found is not None:
            yield from _ancestors(found, checked, unchecked)


def _learnt_from(
    directory: epath.Path, manifest: dict[str, Any], unchecked: list[str]
) -> Iterator[tuple[epath.Path, str, str]]:
    """(artifact, records, split) that an artifact's own training used, where prompts may stand."""
    stage = manifest["stage"]
    for name in manifest["inputs"]:
        if stage == "reward" and name.startswith("comparisons"):
            wanted = [("comparisons", split) for split in _LABEL_SPLITS]
        elif stage == "ppo" and name == "prompts":
            wanted = [("prompts", "train")]
        elif stage in ("pretrain", "sft", "ppo") and name == "tokens":
            yield from _tokenised(directory, stage, unchecked)
            continue
        else:
            continue
        source = _input(directory, name, unchecked)
        if source is not None:
            yield from ((source, *records_and_split) for records_and_split in wanted)


def _tokenised(
    directory: epath.Path, stage: str, unchecked: list[str]
) -> Iterator[tuple[epath.Path, str, str]]:
    """The conversations and documents behind the tokens that a language model was trained on."""
    config = json.loads((directory / artifact.CONFIG_FILE).read_text())
    if stage == "ppo" and not config["ptx"]["coef"]:
        return
    name = config["ptx" if stage == "ppo" else "data"]["name"]
    tokens = _input(directory, "tokens", unchecked)
    if tokens is None:
        return
    try:
        tasks = mixtures.members(tokens, name)
    except UserError as error:  # its records are gone
        unchecked.append(f"{directory}: {error}")
        return
    for task in tasks:
        if task in _MADE_OF:
            corpus = _input(tokens, "corpus", unchecked)
            if corpus is not None:
                yield corpus, _MADE_OF[task], "train"
        else:
            unchecked.append(f"{directory}: the conversations of task {task!r} are not known")


def _seen(
    conversations: Mapping[str, str], directory: epath.Path, kind: str, split: str
) -> list[str]:
    """Those of the prompts {id: its conversation's id} that a record set has, sorted."""
    if f"{kind}-{split}" not in records.record_sets(directory):
        return []
    if kind == "documents":  # of which there may be many: none but the prompts' texts is looked for
        texts = records.RecordReader(directory, kind, split, Document)
        return sorted(p for p, c in conversations.items() if texts.has(readers.text_id(c)))
    ids, whole = _ids(directory, kind, split), kind == "conversations"
    return sorted(p for p, c in conversations.items() if (c if whole else p) in ids)


def _ids(directory: epath.Path, kind: str, split: str) -> set[str]:
    """Ids of a record set's prompts or conversations."""
    if kind == "comparisons":
        labels = records.RecordReader(directory, kind, split, Comparison)
        return {comparison.prompt.id for comparison in labels}
    if kind == "prompts":
        return {prompt.id for prompt in records.RecordReader(directory, kind, split, Prompt)}
    # What people improved out of one conversation has ids of its own, and that one as its topic.
    reader = records.RecordReader(directory, kind, split, Conversation)
    return {key for record in reader for key in (record.id, record.topic) if key is not None}


def _input(directory: epath.Path, name: str, unchecked: list[str]) -> epath.Path | None:
    try:
        return artifact.input_workdir(directory, name)
    except UserError as error:
        if str(error) not in unchecked:
            unchecked.append(str(error))
        return None
