"""prepare end to end: splits, files, workers, bad input; a user's own data up to the batches."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from configs import prepare as prepare_config
from configs import pretrain as pretrain_config
from configs import train_tokenizer as tokenizer_config
from gptlab import prepare, pretrain, rounds, train_tokenizer
from gptlab.data import chat, pipeline, raw, readers, records
from gptlab.data.records import Conversation, Document, Prompt, RecordReader, TokenExample
from gptlab.run import artifact, files
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import mesh as mesh_lib
from tests.data import hf_vocabularies as hf
from tests.fixtures import disk_full_after

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")


def clean_config(documents, **changes) -> ConfigDict:
    config = prepare_config.get_config("clean")
    config.data.documents = str(documents)
    config.split.validation_fraction = 0.2
    config.split.test_fraction = 0.2
    config.update_from_flattened_dict(changes)
    return config


def make_corpus(folder):
    """30 texts, 60 dialogues on 12 topics, duplicates, and some bad input."""
    folder.mkdir(parents=True)
    texts = [
        f"{n} went to town number {i} and came back with {i} apples."
        for i, n in enumerate(NAMES * 4)
    ]
    rows = [{"text": t} for t in texts[:30]] + [{"text": texts[0].upper()}] * 3
    for i in range(60):
        topic = f"Topic {i % 12}?"
        turns = ["Hello, how do you do today?", f"Fine, I am {NAMES[i % 8]} number {i}.",
                 f"What do you think of {topic}", f"I have {i} thoughts about it."]  # fmt: skip
        messages = [
            {"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, turns, strict=True)
        ]
        rows.append({"messages": messages, "topic": topic})
    rows.append({"text": "short"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"text": \n')
    (folder / "page.html").write_text(
        "<main><h1>Tea</h1><p>Tea is a drink made of leaves &amp; water.</p></main>"
    )
    (folder / "bad.txt").write_bytes(b"caf\xe9 au lait and a lot of other things")
    return folder


def read(workdir, name, split, cls):
    if f"{name}-{split}" not in records.record_sets(workdir / "records"):
        return []
    return list(RecordReader(workdir / "records", name, split, cls))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare")
    prepare.run(clean_config(make_corpus(root / "input")), str(root / "corpus"))
    return root / "corpus"


def test_splits_share_no_topic_and_no_prompt(corpus):
    topics, prompts, texts = {}, {}, {}
    for split in ("train", "validation", "test"):
        conversations = read(corpus, "conversations", split, Conversation)
        assert conversations
        topics[split] = {c.topic for c in conversations}
        texts[split] = {d.text.lower() for d in read(corpus, "documents", split, Document)}
        found = read(corpus, "prompts", split, Prompt)
        assert all(p.messages[-1].role == "user" for p in found)
        prompts[split] = {tuple((m.role, m.content) for m in p.messages) for p in found}
        assert len(prompts[split]) == len(found)
        if split == "train":
            prefixes = {
                tuple((m.role, m.content) for m in c.messages[: i + 1])
                for c in conversations for i in range(len(c.messages))
            }  # fmt: skip
    assert not topics["test"] & (topics["train"] | topics["validation"])
    for held_out in ("validation", "test"):
        assert prompts[held_out] and not prompts[held_out] & prefixes
        assert not texts[held_out] & texts["train"]
    # 'Hello, how do you do today?' opens every dialogue, so it is no held-out prompt.
    assert all(len(p) > 1 for p in prompts["test"] | prompts["validation"])
    assert not prompts["test"] & prompts["validation"]


def test_counts_report_and_quarantine(corpus):
    manifest = artifact.read_manifest(corpus)
    results = manifest["results"]
    assert sum(results["records"][f"documents-{s}"] for s in ("train", "validation", "test")) == 31
    assert results["dropped"]["documents: duplicate"] == 3
    assert results["dropped"]["documents: too short"] == 1
    assert results["quarantined"] == 2
    bad = [json.loads(line) for line in (corpus / "quarantine.jsonl").read_text().splitlines()]
    assert [(b["file"].rsplit("/", 1)[1], b["line"]) for b in bad] == [
        ("bad.txt", 1),
        ("rows.jsonl", 95),
    ]
    report = (corpus / "report.md").read_text()
    for expected in ("| duplicate | ", "too short", "`short`", "not UTF-8: 1", "rows.jsonl:95"):
        assert expected in report
    everything = [
        d for s in ("train", "validation", "test") for d in read(corpus, "documents", s, Document)
    ]
    assert any(d.text == "Tea\n\nTea is a drink made of leaves & water." for d in everything)
    assert manifest["digest"]


def test_run_again_does_nothing(corpus, capsys):
    before = (corpus / "manifest.json").stat().st_mtime_ns
    prepare.run(clean_config(corpus.parent / "input"), str(corpus))
    assert "is done" in capsys.readouterr().out
    assert (corpus / "manifest.json").stat().st_mtime_ns == before


def test_same_bytes_with_two_workers_and_in_another_order(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_ITEMS", 7)
    config = clean_config(corpus.parent / "input", **{"beam.num_workers": 2})
    prepare.run(config, str(tmp_path / "two"))
    names = sorted(p.name for p in (corpus / "records").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two" / "records").iterdir())
    for name in names:
        assert (corpus / "records" / name).read_bytes() == (
            tmp_path / "two" / "records" / name
        ).read_bytes()
    assert (corpus / "quarantine.jsonl").read_bytes() == (
        tmp_path / "two" / "quarantine.jsonl"
    ).read_bytes()


def test_shards_hold_the_same_records_beside_an_unreadable_file(
    corpus, tmp_path, monkeypatch, capsys
):
    shutil.copytree(corpus.parent / "input", tmp_path / "input")
    (tmp_path / "input" / "locked.txt").write_text("Nobody will read this.")

    def deny(path, *args, **kwargs):  # root may open a file of any permissions
        if str(path).endswith("locked.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    for module in (readers, files):
        monkeypatch.setattr(module, "open", deny, raising=False)
    prepare.run(clean_config(tmp_path / "input", num_shards=3), str(tmp_path / "three"))
    said = capsys.readouterr().err
    for part in ("reading: 4/4 sources", "cleaning: 4/4 blocks", "removing duplicates: ",
                 "choosing prompts: ", "writing: "):  # fmt: skip
        assert part in said
    assert "locked.txt" in (tmp_path / "three" / "quarantine.jsonl").read_text()
    assert artifact.read_manifest(tmp_path / "three")["results"]["quarantined"] == 3
    one, three = (read(w, "documents", "train", Document) for w in (corpus, tmp_path / "three"))
    assert sorted(d.id for d in one) == sorted(d.id for d in three)
    assert len(list((tmp_path / "three" / "records").glob("prompts-test-*"))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bad_fraction": 0.001}, "2 of 97 inputs could not be read: .*quarantine.jsonl"),
        ({"clean.min_letters": 2.0}, "no document is left for training"),
        ({"split.validation_fraction": 0.0}, "fell into validation; raise config.split"),
        ({"mode": "polish"}, "use 'clean' or 'tokenize'"),
        ({"data.documents": "/nowhere/at/all"}, "no file at all"),
    ],
)
def test_errors_are_one_line(corpus, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare.run(clean_config(corpus.parent / "input", **changes), str(tmp_path / "w"))


OWN = """
import functools
import pathlib
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from gptlab.data import tasks

def lines(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": [f"{split} line {i}" for i in range(4)]})

seqio.TaskRegistry.add(
    "prepare_lines",
    source=seqio.FunctionDataSource(lines, splits=("train", "validation")),
    preprocessors=[
        seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, tasks.learn_everything,
    ],
    output_features=tasks.output_features(),
)

seqio.TaskRegistry.add(
    "prepare_verses",
    source=seqio.TfdsDataSource(
        "prepare_poems:1.0.0", str(pathlib.Path(__file__).parent / "tfds"), splits=("train",)
    ),
    preprocessors=[
        functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
        seqio.preprocessors.tokenize, seqio.preprocessors.append_eos, tasks.learn_everything,
    ],
    output_features=tasks.output_features(),
)

class PreparePoems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(30):
            yield i, {"text": f"Poem {i} says that roses are red and that violets are not."}
"""


@pytest.fixture(scope="module")
def vocabulary(corpus, tmp_path_factory):
    config = tokenizer_config.get_config()
    config.inputs.corpus = str(corpus)
    config.vocab_size = 320
    workdir = tmp_path_factory.mktemp("vocabulary") / "run"
    train_tokenizer.run(config, str(workdir))
    return workdir


def tokenize_config(corpus, vocabulary, **changes):
    config = prepare_config.get_config("tokenize")
    config.inputs.update(corpus=str(corpus), vocabulary=str(vocabulary))
    config.slices = 2  # each takes Beam its time
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def plain(corpus, vocabulary, tmp_path_factory):
    """The corpus as tokens of our own Tasks."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    prepare.run(tokenize_config(corpus, vocabulary), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def own(corpus, vocabulary, tmp_path_factory):
    """The same beside a TFDS data set of one's own, with a Task and a mixture of one's own."""
    root = tmp_path_factory.mktemp("own")
    (root / "prepare_own_module.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        from gptlab.data import tasks

        tasks.load_module("prepare_own_module")
        builder = sys.modules["prepare_own_module"].PreparePoems(data_dir=str(root / "tfds"))
        builder.download_and_prepare()
        for name, config in own_configs(root, corpus, vocabulary).items():
            prepare.run(config, str(root / name))
    return root


def own_configs(root, corpus, vocabulary):
    clean = clean_config(corpus.parent / "input", module="prepare_own_module")
    clean.data.update(beside=("tfds:prepare_poems",), tfds_dir=str(root / "tfds"))
    tokens = tokenize_config(root / "clean", vocabulary, module="prepare_own_module", slices=1)
    tokens.mixtures.mine = ConfigDict({"prepare_lines": 0.5, "pretrain": 0.5})
    tokens.mixtures.verses = ConfigDict({"prepare_verses": 1.0})
    return {"clean": clean, "tokens": tokens}


def test_tokenize(corpus, vocabulary, plain, own, tmp_path):
    results = artifact.read_manifest(vocabulary)["results"]
    documents = read(corpus, "documents", "train", Document)
    messages = [m for c in read(corpus, "conversations", "train", Conversation) for m in c.messages]
    assert results["train/round_tripped_texts"] == len(documents) + len(messages)
    assert records.record_sets(plain / "records") == [
        f"{task}-{split}"
        for task in ("dialogues", "pretrain")
        for split in ("test", "train", "validation")
    ]
    assert len(read(plain, "pretrain", "train", TokenExample)) == len(documents)
    assert artifact.read_manifest(plain)["results"]["mixtures"] == {}

    mine = read(own / "tokens", "prepare_lines", "train", TokenExample)
    tokenizer = train_tokenizer.Tokenizer.load(vocabulary)
    assert sorted(tokenizer.decode(e.tokens) for e in mine) == [f"train line {i}" for i in range(4)]
    assert {e.tokens[-1] for e in mine} == {tokenizer.eos_id}
    manifest = artifact.read_manifest(own / "tokens")["results"]
    assert manifest["mixtures"] == {
        "mine": {"prepare_lines": 0.5, "pretrain": 0.5},
        "verses": {"prepare_verses": 1.0},
    }
    assert manifest["token_sets"]["prepare_verses-train"]["examples"] == 30
    assert manifest["token_sets"]["prepare_lines-train"]["examples"] == 4
    # Other slices, the same records.
    name = "records/dialogues-train-00000-of-00001.array_record"
    assert (own / "tokens" / name).read_bytes() == (plain / name).read_bytes()

    with pytest.raises(UserError, match="config.inputs.vocabulary is not set"):
        prepare.run(prepare_config_without_vocabulary(corpus), str(tmp_path / "none"))


def test_an_imported_vocabulary_tokenizes_and_what_its_template_refuses_is_counted(
    corpus, tmp_path
):
    with artifact.open_run(ConfigDict({"seed": 0}), tmp_path / "imported", "convert") as run:
        run.complete("0" * 16)
    imported = hf.write(tmp_path / "imported", hf.files("llama2"))
    conversations = read(corpus, "conversations", "train", Conversation)
    odd = Conversation("odd", conversations[0].messages[:1] * 2, "test")
    shutil.copytree(corpus, tmp_path / "clean")
    for path in (tmp_path / "clean" / "records").glob("conversations-train-*"):
        path.unlink()
    records.write_shards(
        tmp_path / "clean" / "records", "conversations", "train", [*conversations, odd]
    )
    tokenizer, expected = hf.tokenizer("llama2"), {}
    for conversation in conversations:
        with contextlib.suppress(UserError):
            expected[conversation.id] = chat.encode_conversation(tokenizer, conversation.messages)
    prepare.run(tokenize_config(tmp_path / "clean", imported), str(tmp_path / "tokens"))
    found = read(tmp_path / "tokens", "dialogues", "train", TokenExample)
    assert {e.id for e in found} == expected.keys() and expected
    for e in found:
        assert e.tokens.tolist() == expected[e.id][0].tolist()
        assert e.loss_mask.tolist() == expected[e.id][1].tolist()
    counts = artifact.read_manifest(tmp_path / "tokens")["results"]["token_sets"]
    refused = 1 + len(conversations) - len(expected)
    assert counts["dialogues-train"]["refused"] == refused
    report = (tmp_path / "tokens" / "report.md").read_text()
    assert f"dialogues-train: {refused:,} conversations that the chat template refuses" in report


@pytest.mark.slow  # half a minute, most of it TensorFlow's and the lease's
def test_a_chain_of_stages_in_a_bucket_is_the_one_on_a_disk(
    corpus, plain, vocabulary, bucket, tmp_path
):
    place = {name: f"gs://lab/chain/{name}" for name in ("clean", "vocabulary", "tokens", "model")}
    with pytest.raises(UserError, match="raw files are read from a disk"):
        prepare.run(clean_config("gs://lab/texts"), place["clean"])
    prepare.run(clean_config(corpus.parent / "input"), place["clean"])
    learn = tokenizer_config.get_config()
    learn.inputs.corpus, learn.vocab_size = place["clean"], 320
    train_tokenizer.run(learn, place["vocabulary"])
    prepare.run(tokenize_config(place["clean"], place["vocabulary"]), place["tokens"])
    on_disk = {"clean": corpus, "vocabulary": vocabulary, "tokens": plain}
    for name, workdir in on_disk.items():
        got, want = artifact.read_manifest(place[name]), artifact.read_manifest(workdir)
        assert (got["digest"], got["identity"]) == (want["digest"], want["identity"])
    digests = []
    for inputs, workdir in ((place, place["model"]), (on_disk, str(tmp_path / "model"))):
        config = pretrain_config.get_config("tiny")
        config.inputs.update({k: str(inputs[k]) for k in ("tokens", "vocabulary")})
        config.model.vocab_size = 320
        config.compute, config.optimizer = common.compute(), common.adamw(1e-2)
        config.data.seq_len, config.batch_size = 64, 8
        config.update(total_steps=2, eval_every_steps=2, eval_batches=1, sample_every_steps=0)
        config.profile.update(start_step=1, num_steps=1)
        pretrain.run(config, workdir)
        digests.append(artifact.read_manifest(workdir)["digest"])
    assert digests[0] == digests[1]
    names = bucket.names("lab/chain/")
    assert any("/model/profile/" in name for name in names)
    assert not any(name.rsplit("/", 1)[1].startswith(".") for name in names)
    tree = artifact.lineage(place["model"])
    assert tree["inputs"]["tokens"]["inputs"]["corpus"]["path"] == place["clean"]


def trained_on(tokens, vocabulary, name):
    """The texts in an epoch of the training batches that pretrain makes of a task or mixture."""
    config = pretrain_config.get_config()
    config.inputs.update(tokens=str(tokens), vocabulary=str(vocabulary))
    config.data.update(name=name, seq_len=128)
    config.batch_size = 1
    data, _ = pretrain.make_batches(config, mesh_lib.make_mesh(config.mesh))
    tokenizer = train_tokenizer.Tokenizer.load(vocabulary)
    texts = set()
    for batch in map(data.at, range(2 * len(data))):  # members of a mixture take turns
        for segment in range(1, batch.segment_ids.max() + 1):
            at = batch.segment_ids == segment
            texts.add(tokenizer.decode([batch.tokens[at][0], *batch.targets[at]]))
    return texts


def test_tasks_and_tfds_builders_of_ones_own_change_the_training_batches(own, plain, vocabulary):
    poems = {
        d.text
        for d in read(own / "clean", "documents", "train", Document)
        if d.source == "tfds:prepare_poems"
    }
    lines = {f"train line {i}" for i in range(4)}
    without = trained_on(plain, vocabulary, "pretrain")
    assert len(poems) > 10 and len(without) > 10 and not without & (poems | lines)
    assert trained_on(own / "tokens", vocabulary, "pretrain") == without | poems
    assert trained_on(own / "tokens", vocabulary, "prepare_lines") == lines
    assert trained_on(own / "tokens", vocabulary, "mine") >= lines | poems
    with pytest.raises(UserError, match="no such task or mixture"):
        trained_on(plain, vocabulary, "mine")


@pytest.mark.parametrize(
    ("name", "inputs"), [("clean", {"sources", "module"}), ("tokens", {"tasks", "tasks_module"})]
)
def test_another_module_or_data_set_is_another_input(
    own, corpus, vocabulary, monkeypatch, name, inputs
):
    """What rounds expects of a run is what the run itself wrote down."""
    monkeypatch.chdir(own)
    config = own_configs(own, corpus, vocabulary)[name]

    found = rounds.raw_files(config)

    def digests():
        return {key: files.digest_files(paths) for key, paths in found.items()}

    before = digests()
    entries = artifact.read_manifest(own / name)["files"]
    assert before == {key: entry["digest"] for key, entry in entries.items()}
    assert set(before) == inputs
    (shard,) = (own / "tfds" / "prepare_poems" / "1.0.0").glob("*.tfrecord*")
    edited = {path: path.read_bytes() for path in (own / "prepare_own_module.py", shard)}
    for path, content in edited.items():
        path.write_bytes(content + b"\n")
    after = digests()
    for path, content in edited.items():
        path.write_bytes(content)
    assert all(after[key] != before[key] for key in inputs)


def test_a_module_counts_with_its_package_and_a_data_set_with_its_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw_package/__init__.py", "raw_package/sub/tasks.py", "raw_package/notes.txt",
                 "raw_alone.py", "poems/1.0.0/a", "poems/2.0.0/a",
                 "odes/short/1.0.0/a"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def inputs(module, *names):
        found = raw.of_sources(readers.plan(names, None), str(tmp_path), module)
        return {key: list(paths) for key, paths in found.items()}, found["sources"]

    package = ["raw_package/__init__.py", "raw_package/sub/tasks.py"]
    assert sorted(inputs("raw_package.sub.tasks", "tfds:poems")[0]["module"]) == package
    assert inputs("raw_alone", "tfds:poems")[0]["module"] == ["raw_alone.py"]
    for module in (None, "raw_nowhere", "a,b", ".x"):
        assert set(inputs(module, "tfds:poems")[0]) == {"sources"}
    for name, place in (("poems", "poems"), ("poems:2.0.0/train", "poems/2.0.0"),
                        ("poems:3.0.0", "poems"), ("odes:1.0.0", "odes/short/1.0.0")):  # fmt: skip
        assert inputs(None, f"tfds:{name}")[1] == {f"tfds:{name}": str(tmp_path / place)}
    for name in ("nothing", "nothing:1.0.0", ""):
        with pytest.raises(UserError, match=f"tfds:{name} is not prepared under .*tfds_dir="):
            inputs(None, f"tfds:{name}")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(corpus, tmp_path):
    config = clean_config(corpus.parent / "input")
    with disk_full_after(3):
        with pytest.raises(
            UserError, match="^the disk is full while writing .*/records/.*free some"
        ):
            prepare.run(config, str(tmp_path / "run"))
    manifest = artifact.read_manifest(tmp_path / "run", allow_unfinished=True)
    assert manifest["status"] == "failed" and "the disk is full" in manifest["error"]
    prepare.run(config, str(tmp_path / "run"))
    digests = [artifact.read_manifest(w)["digest"] for w in (tmp_path / "run", corpus)]
    assert digests[0] == digests[1]
    assert not list((tmp_path / "run" / "records").glob(".*"))


def asked_to_stop_at_once(items):
    """SIGTERM, then half a minute of items."""
    os.kill(os.getpid(), signal.SIGTERM)
    for item in itertools.islice(itertools.cycle(items), 3000):
        time.sleep(0.01)
        yield item


def test_sigterm_stops_cleaning_between_blocks_and_it_starts_anew(corpus, tmp_path, monkeypatch):
    config = clean_config(corpus.parent / "input")
    item = readers.Item(Document("d", "A text that is long enough to be kept.", "s"), unit="d")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "BLOCK_ITEMS", 1)
        patch.setattr(prepare.readers, "read", lambda *_: asked_to_stop_at_once([item]))
        with pytest.raises(Interrupted, match="stopped while cleaning, which will start anew"):
            prepare.run(config, str(tmp_path / "run"))
    manifest = artifact.read_manifest(tmp_path / "run", allow_unfinished=True)
    assert manifest["status"] == "interrupted"
    prepare.run(config, str(tmp_path / "run"))
    digests = [artifact.read_manifest(w)["digest"] for w in (tmp_path / "run", corpus)]
    assert digests[0] == digests[1]
    assert not {pipeline.STOP, pipeline.TICKS} & {p.name for p in (tmp_path / "run").iterdir()}


def test_sigterm_stops_tokenizing(corpus, vocabulary, tmp_path, monkeypatch):
    from gptlab.data import tasks

    example = TokenExample("e", np.arange(3), np.ones(3))
    monkeypatch.setattr(prepare, "BLOCK_ITEMS", 1)
    monkeypatch.setattr(tasks, "examples", lambda _: asked_to_stop_at_once([example]))
    with pytest.raises(Interrupted, match="stopped while tokenizing"):
        config = tokenize_config(corpus, vocabulary, tasks=("pretrain",), slices=1)
        prepare.run(config, str(tmp_path / "run"))


def prepare_config_without_vocabulary(corpus):
    config = prepare_config.get_config("tokenize")
    config.inputs.corpus = str(corpus)
    return config
