"""seqio Tasks: ours, a user's own, a TFDS builder of one's own, mixtures and errors."""

import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gptlab.data import chat, records, tasks
from gptlab.data import tokenizer as tokenizer_lib
from gptlab.data.records import Conversation, Document, Message
from gptlab.run.errors import UserError
from tests.data import hf_vocabularies as hf

TEXT = "<|end|> Hello there \u2581 you. " * 5
TURNS = (Message("user", "Hi", "page"), Message("assistant", "Ho <|end|>"))
TALK = (*TURNS, Message("user", "you"), Message("assistant", "Hello there"))


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    documents = [Document(f"d{i}", f"{TEXT} {i}", "s") for i in range(10)]
    records.write_shards(root / "corpus" / "records", "documents", "train", documents)
    conversations = [Conversation("c", TURNS, "s"), Conversation("p", TALK, "s", None, (3,))]
    records.write_shards(root / "corpus" / "records", "conversations", "train", conversations)
    tokenizer_lib.train(
        [TEXT] * 50, root / "vocabulary.model", vocab_size=280, model_type="bpe",
        character_coverage=1.0, max_sentences=0, num_threads=1, seed=0,
    )  # fmt: skip
    tasks.use(str(root / "corpus"), str(root / "vocabulary.model"), None)
    return root


def read(names, count=3):
    sets = {}
    for part in tasks.slices(names, count):
        sets.setdefault((part.task, part.split), []).extend(tasks.examples(part))
    return sets


def test_pretrain_and_dialogues(workdirs):
    tokenizer = tasks.vocabulary().tokenizer
    sets = read(["pretrain", "dialogues"])
    examples = sets["pretrain", "train"]
    assert sorted(e.id for e in examples) == [f"d{i}" for i in range(10)]
    for e in examples:
        text = f"{TEXT} {e.id[1:]}"
        assert e.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert e.loss_mask.tolist() == [0] + [1] * (len(e.tokens) - 1)
    dialogue, improved = sorted(sets["dialogues", "train"], key=lambda example: example.id)
    tokens, mask = chat.encode_conversation(tokenizer, TURNS)
    np.testing.assert_array_equal(dialogue.tokens, tokens)
    np.testing.assert_array_equal(dialogue.loss_mask, mask)
    # Of a chat with one better reply, that one is learnt and no other.
    assert improved.tokens[: len(tokens)].tolist() == tokens.tolist()
    learnt = improved.tokens[improved.loss_mask == 1].tolist()
    assert learnt == [*tokenizer.encode("Hello there"), tokenizer.end_id]
    assert sets["pretrain", "test"] == []


@pytest.mark.parametrize("count", [1, 4, 12])
def test_slices_are_a_partition(workdirs, count):
    ids = [e.id for e in read(["pretrain"], count)["pretrain", "train"]]
    assert sorted(ids) == [f"d{i}" for i in range(10)]


def test_vocabulary_for_seqio(workdirs):
    vocabulary = tasks.vocabulary()
    ids = vocabulary.encode(TEXT)
    assert vocabulary.decode(ids) == TEXT
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, 1, 3)
    assert vocabulary.vocab_size == 280
    assert vocabulary.encode_tf(tf.constant(TEXT)).numpy().tolist() == ids
    batch = vocabulary.encode_tf(tf.constant([TEXT, "Hi"]))
    assert batch.to_list() == [ids, vocabulary.encode("Hi")]
    assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == TEXT


def test_a_hugging_face_vocabulary_and_its_template(workdirs):
    """Ids, eos and the mask are that vocabulary's; what its template refuses has no tokens."""
    imported = hf.write(workdirs / "imported", hf.files("llama2"))
    refused = Conversation("d", (TURNS[0], TURNS[0]), "s")
    accepted = Conversation("c", TURNS, "s")
    corpus = workdirs / "two"
    records.write_shards(corpus / "records", "conversations", "train", [accepted, refused])
    records.write_shards(corpus / "records", "documents", "train", [Document("d", TEXT, "s")])
    tasks.use(str(corpus), str(imported), None)
    try:
        tokenizer = hf.tokenizer("llama2")
        sets = read(["pretrain", "dialogues"])
        (document,) = sets["pretrain", "train"]
        ids = [tokenizer.bos_id, *tokenizer.encode(" " + TEXT), tokenizer.eos_id]
        assert document.tokens.tolist() == ids and ids[0] == 1 and ids[-1] == 2
        found = {e.id: e for e in sets["dialogues", "train"]}
        tokens, mask = chat.encode_conversation(tokenizer, TURNS)
        assert found["c"].tokens.tolist() == tokens.tolist() and tokens[-1] == 2
        assert found["c"].loss_mask.tolist() == mask.tolist() and mask[-1] == 1
        assert len(found["d"].tokens) == 0
        vocabulary = tasks.vocabulary()
        assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (2, 1, 0)
        assert vocabulary.vocab_size == tokenizer.vocab_size
        assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT
    finally:
        tasks.use(str(workdirs / "corpus"), str(workdirs / "vocabulary.model"), None)


OWN = """
import seqio, tensorflow as tf
from gptlab.data import tasks

def poems(split, shuffle_files, seed=None):
    lines = ["roses are red", "violets are blue"] if split == "train" else ["sugar is sweet"]
    return tf.data.Dataset.from_tensor_slices({"inputs": [w[:5] for w in lines], "targets": lines})

seqio.TaskRegistry.add(
    "poems",
    source=seqio.FunctionDataSource(poems, splits=("train", "validation")),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={
        "inputs": seqio.Feature(tasks.vocabulary(), add_eos=False),
        "targets": seqio.Feature(tasks.vocabulary(), add_eos=True),
    },
)
"""


def test_a_task_of_the_users_own_module(workdirs, monkeypatch):
    (workdirs / "poems_module.py").write_text(OWN)
    monkeypatch.chdir(workdirs)
    tasks.load_module("poems_module")
    tokenizer = tasks.vocabulary().tokenizer
    sets = read(["poems"])
    assert set(sets) == {("poems", "train"), ("poems", "validation")}
    first = sets["poems", "train"][0]
    inputs, targets = tokenizer.encode("roses"), tokenizer.encode("roses are red")
    assert first.tokens.tolist() == [*inputs, *targets, tokenizer.eos_id]
    assert first.loss_mask.tolist() == [0] * len(inputs) + [1] * (len(targets) + 1)
    assert len({e.id for e in sets["poems", "train"]}) == 2

    with pytest.raises(UserError, match="different output features.*learn_everything"):
        tasks.add_mixture("unlike", {"poems": 1, "pretrain": 1})


def test_mixtures(workdirs):
    tasks.add_mixture("both", {"dialogues": 0.25, "pretrain": 1})
    rates = tasks.mixture_rates(["pretrain", "both"])
    assert rates == {"both": {"dialogues": 0.25, "pretrain": 1.0}}
    assert {p.task for p in tasks.slices(["both"], 2)} == {"dialogues", "pretrain"}
    tasks.add_mixture("both", {"dialogues": 0.5})  # rates of another run in this process
    assert {p.task for p in tasks.slices(["both"], 2)} == {"dialogues"}
    assert seqio.MixtureRegistry.get("both").get_rate(seqio.TaskRegistry.get("dialogues")) == 0.5


TFDS = """
import tensorflow_datasets as tfds

class MyPoems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._examples()}

    def _examples(self):
        for i in range(5):
            yield i, {"text": f"poem {i}: roses are red"}

    _generate_examples = _examples
"""


def test_a_tfds_builder_of_the_users_own(workdirs, monkeypatch):
    (workdirs / "my_poems_module.py").write_text(TFDS)
    monkeypatch.chdir(workdirs)
    data_dir = str(workdirs / "tfds")
    with pytest.raises(
        UserError, match="tfds:my_poems is not prepared under .*download_and_prepare"
    ):
        list(tasks.tfds_texts("my_poems", data_dir, "text", "my_poems_module"))
    sys.modules["my_poems_module"].MyPoems(data_dir=data_dir).download_and_prepare()
    found = sorted(tasks.tfds_texts("my_poems", data_dir, "text", "my_poems_module"))
    assert found == [f"poem {i}: roses are red" for i in range(5)]
    with pytest.raises(UserError, match="has no text 'body' but .'text'"):
        list(tasks.tfds_texts("my_poems", data_dir, "body", None))
    with pytest.raises(UserError, match="not prepared"):
        list(tasks.tfds_texts("my_poems/dev", data_dir, "text", None))

    seqio.TaskRegistry.add(
        "tfds_poems",
        source=seqio.TfdsDataSource("my_poems:1.0.0", tfds_data_dir=data_dir, splits=("train",)),
        preprocessors=[
            lambda ds: ds.map(lambda row: {"targets": row["text"]}),
            seqio.preprocessors.tokenize,
        ],
        output_features={"targets": seqio.Feature(tasks.vocabulary(), add_eos=False)},
    )
    decode = tasks.vocabulary().tokenizer.decode
    examples = read(["tfds_poems"])["tfds_poems", "train"]
    assert sorted(decode(e.tokens) for e in examples) == found
    assert all(e.loss_mask.all() for e in examples)


def test_errors(workdirs, monkeypatch):
    with pytest.raises(UserError, match="config.tasks: no Task or Mixture 'pretrian'.*dialogues, "):
        tasks.slices(["pretrian"], 2)
    with pytest.raises(UserError, match="config.tasks is empty"):
        tasks.slices([], 2)
    with pytest.raises(UserError, match="config.mixtures: no Task"):
        tasks.add_mixture("m", {"nothing": 1})
    for rates in ({}, {"pretrain": 0}, {"pretrain": 1, "dialogues": -1}):
        with pytest.raises(UserError, match="config.mixtures.m: every rate must be above 0"):
            tasks.add_mixture("m", rates)
    with pytest.raises(UserError, match="there is a Task of that name"):
        tasks.add_mixture("pretrain", {"pretrain": 1})
    with pytest.raises(UserError, match="no module 'nowhere.tasks'"):
        tasks.load_module("nowhere.tasks")
    (workdirs / "broken_module.py").write_text("import nothing_at_all")
    monkeypatch.chdir(workdirs)
    with pytest.raises(ModuleNotFoundError, match="nothing_at_all"):
        tasks.load_module("broken_module")
