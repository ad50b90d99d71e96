"""prepare end to end: splits, files, workers, bad input; the user's own Tasks in records."""

import json

import pytest
from ml_collections import ConfigDict

from configs import prepare as prepare_config
from configs import train_tokenizer as tokenizer_config
from gptlab import prepare, train_tokenizer
from gptlab.data import records
from gptlab.data.records import Conversation, Document, Prompt, RecordReader, TokenExample
from gptlab.run import artifact
from gptlab.run.errors import UserError

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


def test_shards_hold_the_same_records(corpus, tmp_path):
    config = clean_config(corpus.parent / "input", num_shards=3)
    prepare.run(config, str(tmp_path / "three"))
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
import seqio
import tensorflow as tf
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
"""


def test_tokenize_with_a_task_of_ones_own(corpus, tmp_path, monkeypatch):
    config = tokenizer_config.get_config()
    config.inputs.corpus = str(corpus)
    config.vocab_size = 320
    train_tokenizer.run(config, str(tmp_path / "vocabulary"))
    results = artifact.read_manifest(tmp_path / "vocabulary")["results"]
    documents = read(corpus, "documents", "train", Document)
    messages = [m for c in read(corpus, "conversations", "train", Conversation) for m in c.messages]
    assert results["train/round_tripped_texts"] == len(documents) + len(messages)

    (tmp_path / "prepare_lines_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def tokenize(name, **changes):
        config = prepare_config.get_config("tokenize")
        config.inputs.update(corpus=str(corpus), vocabulary=str(tmp_path / "vocabulary"))
        config.slices = 2  # each takes Beam its time
        config.update_from_flattened_dict(changes)
        prepare.run(config, str(tmp_path / name))
        return tmp_path / name

    plain = tokenize("plain")
    assert records.record_sets(plain / "records") == [
        f"{task}-{split}"
        for task in ("dialogues", "pretrain")
        for split in ("test", "train", "validation")
    ]
    assert len(read(plain, "pretrain", "train", TokenExample)) == len(documents)

    config = prepare_config.get_config("tokenize")
    config.inputs.update(corpus=str(corpus), vocabulary=str(tmp_path / "vocabulary"))
    config.module, config.slices = "prepare_lines_module", 3  # other slices, the same records
    config.tasks = ("pretrain", "mine")
    config.mixtures.mine = ConfigDict({"prepare_lines": 0.5, "dialogues": 0.5})
    prepare.run(config, str(tmp_path / "own"))
    own = tmp_path / "own"
    mine = read(own, "prepare_lines", "train", TokenExample)
    vocabulary = train_tokenizer.Tokenizer.load(tmp_path / "vocabulary")
    assert sorted(vocabulary.decode(e.tokens) for e in mine) == [
        f"train line {i}" for i in range(4)
    ]
    assert {e.tokens[-1] for e in mine} == {vocabulary.eos_id}
    manifest = artifact.read_manifest(own)["results"]
    assert manifest["mixtures"] == {"mine": {"prepare_lines": 0.5, "dialogues": 0.5}}
    assert manifest["token_sets"]["prepare_lines-train"]["examples"] == 4
    same = (plain / "records" / "pretrain-train-00000-of-00001.array_record").read_bytes()
    assert (own / "records" / "pretrain-train-00000-of-00001.array_record").read_bytes() == same

    with pytest.raises(UserError, match="config.inputs.vocabulary is not set"):
        prepare.run(prepare_config_without_vocabulary(corpus), str(tmp_path / "none"))


def prepare_config_without_vocabulary(corpus):
    config = prepare_config.get_config("tokenize")
    config.inputs.corpus = str(corpus)
    return config
