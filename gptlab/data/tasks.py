"""seqio: Tasks that turn a clean corpus into token examples, and Mixtures. TensorFlow lives here.

Our own Tasks are 'pretrain' ([bos] text [eos], everything learnt but bos) over documents, and
'dialogues' (the chat format with its loss mask) over conversations. A module of the user's
(config.module) may register more:

    import seqio
    from gptlab.data import tasks

    seqio.TaskRegistry.add(
        "poems",
        source=seqio.TfdsDataSource("my_poems:1.0.0", tfds_data_dir="..."),
        preprocessors=[
            my_map_to_targets,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            tasks.learn_everything,
        ],
        output_features=tasks.output_features(),
    )

What an example becomes depends on its features: targets and loss_mask as they are; inputs and
targets joined, with the loss on targets; targets alone learnt throughout.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from gptlab.data import chat, chat_template, raw, records
from gptlab.data.dedup import SPLITS
from gptlab.data.records import Conversation, Document, RecordReader, TokenExample
from gptlab.data.tokenizer import Tokenizer
from gptlab.run.errors import UserError

_PARTS = 1024  # record sets are offered to seqio in as many parts; a part is a range of records


class _Now:
    """Set by `use`: Tasks are registered once in a process, corpora and vocabularies change."""

    corpus: str | None = None
    tokenizer: Tokenizer | None = None
    vocabulary_path: str | None = None


def use(corpus: str, vocabulary_path: str, module: str | None) -> None:
    """Sets the corpus and the vocabulary that all Tasks read, and imports the user's module."""
    _Now.corpus = corpus
    if _Now.vocabulary_path != vocabulary_path:
        _Now.tokenizer = Tokenizer.load(vocabulary_path)
        _Now.vocabulary_path = vocabulary_path
    if module is not None:
        load_module(module)


def load_module(name: str) -> None:
    """Imports a module of Tasks or TFDS builders; the current directory counts too."""
    raw.look_here()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise UserError(
            f"config.module: there is no module {name!r}; give its dotted name, as in an import, "
            "and start in the directory it can be imported from"
        ) from None


class Vocabulary(seqio.Vocabulary):
    """Our tokenizer for seqio: always the one set by `use`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use."""
        if _Now.tokenizer is None:
            raise UserError("no vocabulary is in use yet: call gptlab.data.tasks.use first")
        return _Now.tokenizer

    @property
    def bos_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int:
        return self.tokenizer.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """String tensor [] -> int32 [n]; [B] -> ragged int32 [B, n]."""
        if s.shape.rank == 0:
            return _encode_text(s)
        return tf.map_fn(
            _encode_text, s, fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, 0)
        )

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """int32 [n] -> string []; [B, n] -> string [B]."""

        def decode(row: np.ndarray) -> bytes:
            return self.tokenizer.decode_bytes(row.tolist())

        if ids.shape.rank == 1:
            return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), [])
        return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary)


def _encode_text(text: tf.Tensor) -> tf.Tensor:
    def encode(data: Any) -> np.ndarray:
        data = np.asarray(data).item()  # bytes in a graph, a 0-d array when run eagerly
        return np.array(vocabulary().tokenizer.encode(data.decode("utf-8", "replace")), np.int32)

    return tf.ensure_shape(tf.numpy_function(encode, [text], tf.int32), [None])


_VOCABULARY = Vocabulary()


def vocabulary() -> Vocabulary:
    """The Vocabulary for a Task's output features."""
    return _VOCABULARY


class RecordSource(seqio.DataSource):
    """A record set of the corpus in use, as {'id', 'record'} with the record's JSON."""

    def __init__(self, name: str, cls: type):
        self._name, self._cls = name, cls
        super().__init__(splits=SPLITS)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    @property
    def performs_internal_shuffling(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [f"{i}" for i in range(_PARTS)]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = False,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        """A contiguous part of the record set; nothing if the corpus has no such set."""
        index, count = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        name, cls = self._name, self._cls
        directory = epath.Path(str(_Now.corpus)) / "records"

        def rows() -> Iterator[dict[str, Any]]:
            if f"{name}-{split}" not in records.record_sets(directory):
                return
            reader: RecordReader = RecordReader(directory, name, split, cls)
            for i in range(len(reader) * index // count, len(reader) * (index + 1) // count):
                record = reader[i]
                yield {
                    "id": record.id.encode("utf-8", "surrogatepass"),
                    "record": record.to_bytes(),
                }

        spec = tf.TensorSpec([], tf.string)
        return tf.data.Dataset.from_generator(rows, output_signature={"id": spec, "record": spec})


def _to_pretrain(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def encode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = vocabulary().tokenizer
        text = Document.from_bytes(data).text
        ids = [*tokenizer.encode_document(text), tokenizer.eos_id]
        mask = np.ones(len(ids), np.int32)
        mask[0] = 0
        return np.array(ids, np.int32), mask

    return _map_records(dataset, encode)


def _to_dialogue(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def encode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        record = Conversation.from_bytes(data)
        try:
            tokens, mask = chat.encode_conversation(
                vocabulary().tokenizer, record.messages, record.learnt
            )
        except chat_template.Refused:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        return tokens, mask.astype(np.int32)

    return _map_records(dataset, encode)


def _map_records(dataset: tf.data.Dataset, encode: Any) -> tf.data.Dataset:
    def features(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        targets, mask = tf.numpy_function(encode, [row["record"]], (tf.int32, tf.int32))
        return {
            "id": row["id"],
            "targets": tf.ensure_shape(targets, [None]),
            "loss_mask": tf.ensure_shape(mask, [None]),
        }

    return dataset.map(features)


def output_features() -> dict[str, seqio.Feature]:
    """Features of our Tasks: targets and a loss_mask. Those of a Mixture must all agree."""
    return {
        "targets": seqio.Feature(_VOCABULARY, add_eos=True),
        "loss_mask": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False),
    }


def learn_everything(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A last preprocessor for Tasks of plain text: a loss_mask of ones."""
    return dataset.map(lambda row: row | {"loss_mask": tf.ones_like(row["targets"])})


def _register() -> None:
    for name, record_set, cls, preprocess in (
        ("pretrain", "documents", Document, _to_pretrain),
        ("dialogues", "conversations", Conversation, _to_dialogue),
    ):
        seqio.TaskRegistry.add(
            name,
            source=RecordSource(record_set, cls),
            preprocessors=[preprocess],
            output_features=output_features(),
        )


_register()
tf.config.set_visible_devices([], "GPU")  # text only: the accelerators are left to JAX
logging.set_verbosity(logging.WARNING)  # seqio announces every slice


def add_mixture(name: str, rates: Mapping[str, float]) -> None:
    """Registers a seqio Mixture with the config's rates, in place of one of that name."""
    for task in rates:
        _known(task, "config.mixtures")
    if not rates or min(rates.values()) <= 0:
        raise UserError(f"config.mixtures.{name}: every rate must be above 0, got {dict(rates)}")
    if name in seqio.TaskRegistry.names():
        raise UserError(f"config.mixtures.{name}: there is a Task of that name")
    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    try:
        seqio.MixtureRegistry.add(name, [(task, float(rate)) for task, rate in rates.items()])
    except ValueError as error:
        raise UserError(
            f"config.mixtures.{name}: {error}; Tasks of a Mixture need the same features: use "
            "gptlab.data.tasks.output_features() and end the preprocessors with learn_everything"
        ) from None


def mixture_rates(names: Iterable[str]) -> dict[str, dict[str, float]]:
    """{mixture: {task: rate}} of the Mixtures among these names, a user's module's own included."""
    rates = {}
    for name in names:
        provider = _known(name, "config.tasks")
        if isinstance(provider, seqio.Mixture):
            rates[name] = {task.name: float(provider.get_rate(task)) for task in provider.tasks}
    return rates


@dataclasses.dataclass(frozen=True)
class Slice:
    """Part `index` of `count` of a task's split."""

    task: str
    split: str
    index: int
    count: int


def slices(names: Iterable[str], count: int) -> list[Slice]:
    """The work of tokenising Tasks, or all Tasks of Mixtures: up to `count` slices a split.

    A TFDS source can't be divided finer than into its files. Raises UserError for an unknown name.
    """
    tasks: dict[str, seqio.Task] = {}
    for name in names:
        provider = _known(name, "config.tasks")
        for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
            tasks[task.name] = task
    if not tasks:
        raise UserError("config.tasks is empty: nothing to tokenise")
    parts = []
    for name, task in sorted(tasks.items()):
        for split in SPLITS:
            if split in task.splits:
                n = min(count, len(task.source.list_shards(split)))
                parts += [Slice(name, split, i, n) for i in range(n)]
    return parts


def source_files(module: str, names: Iterable[str]) -> dict[str, str]:
    """{name: path} of the files that Tasks, or all Tasks of Mixtures, read on this machine.

    TFDS data sets and seqio's file sources say them; those of a FunctionDataSource nobody knows.
    Raises UserError for an unknown name or module.
    """
    load_module(module)
    found = {}
    for name in names:
        provider = _known(name, "config.tasks")
        for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
            if isinstance(task.source, RecordSource):
                continue  # the corpus: an artifact
            for split in sorted(set(SPLITS) & set(task.splits)):
                for i, path in enumerate(task.source.list_shards(split)):
                    if os.path.isfile(path):
                        found[f"{task.name}-{split}-{i:05d}"] = str(path)
    return found


def _known(name: str, where: str) -> seqio.Task | seqio.Mixture:
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise UserError(
            f"{where}: no Task or Mixture {name!r} is registered; there are "
            f"{', '.join(sorted(known))}"
        )
    return seqio.get_mixture_or_task(name)


def examples(part: Slice) -> Iterator[TokenExample]:
    """Token examples of a slice, in the source's order.

    An example is named by its 'id' feature, or by its place. One without tokens is a conversation
    that the chat template refuses. Raises UserError for features that are none of ours.
    """
    shard = seqio.ShardInfo(part.index, part.count) if part.count > 1 else None
    dataset = seqio.TaskRegistry.get(part.task).get_dataset(
        sequence_length=None, split=part.split, shuffle=False, shard_info=shard
    )
    for i, row in enumerate(dataset.as_numpy_iterator()):
        key = row.get("id")
        name = key.decode("utf-8", "surrogatepass") if isinstance(key, bytes) else None
        place = f"{part.task}:{part.split}:{part.index:04d}:{i:09d}"
        tokens, mask = _joined(row, part.task)
        yield TokenExample(name or place, tokens, mask)


def _joined(row: Mapping[str, Any], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and loss mask uint8 [n] of one example of a Task."""
    if "targets" not in row:
        raise UserError(f"task {task!r} has no feature 'targets', only {sorted(row)}")
    targets = np.asarray(row["targets"], np.int32)
    if "loss_mask" in row:
        mask = np.asarray(row["loss_mask"])
        if mask.shape != targets.shape:
            raise UserError(
                f"task {task!r}: loss_mask {mask.shape} is not as long as targets {targets.shape}"
            )
        return targets, mask.astype(np.uint8)
    inputs = np.asarray(row["inputs"] if "inputs" in row else [], np.int32)
    mask = np.concatenate([np.zeros(len(inputs), np.uint8), np.ones(len(targets), np.uint8)])
    return np.concatenate([inputs, targets]), mask


def tfds_texts(name: str, data_dir: str | None, feature: str, module: str | None) -> Iterator[str]:
    """Texts of a TFDS data set prepared on this machine (`name` or `name/split`, else train).

    Never downloads. Raises UserError when it is not there, or has no text under `feature`.
    """
    import tensorflow_datasets as tfds

    if module is not None:
        load_module(module)
    name, _, split = name.partition("/")
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        dataset = builder.as_dataset(split=split or "train", shuffle_files=False)
    except (tfds.core.registered.DatasetNotFoundError, AssertionError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"config.data.sources: tfds:{name} is not prepared under "
            f"config.data.tfds_dir={data_dir} ({reason}); "
            "prepare it first with download_and_prepare(): nothing is downloaded here"
        ) from None
    for row in dataset.as_numpy_iterator():
        if not isinstance(row, dict) or not isinstance(row.get(feature), bytes):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"tfds:{name} has no text {feature!r} but {has}; set config.data.tfds_feature"
            )
        yield row[feature].decode("utf-8", "replace")
