"""Fixtures every loop's tests share: a tiny but real chain of artifacts, made without TensorFlow.

    tiny_clean -> tiny_vocabulary -> tiny_corpus          (documents, dialogues, prompts; tokens)
    tiny_clean -> tiny_candidates -> tiny_comparisons     (replies, simulated rankings)

Each is the workdir of a finished run, written through the shipped functions and shared by the whole
session: never write into one. The texts come from a small grammar, so that a two-layer model's loss
falls within a few steps and replies differ in sentiment; turns take about 10 to 20 tokens.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import hypothesis
import numpy as np
import pytest
from ml_collections import ConfigDict

from gptlab.data import chat, records
from gptlab.data import tokenizer as tokenizer_lib
from gptlab.data.records import (
    Candidate,
    CandidateSet,
    Comparison,
    Conversation,
    Document,
    Message,
    Prompt,
    TokenExample,
)
from gptlab.people import labellers
from gptlab.run import artifact
from gptlab.scorers import registry
from tests import bucket_server, compiling

# A busy machine is no defect: property tests have no deadline for a single example.
hypothesis.settings.register_profile("gptlab", deadline=None)
hypothesis.settings.load_profile("gptlab")

TINY_VOCAB_SIZE = 320  # 9 control tokens, 256 bytes and the commonest pieces
SPLITS = {"train": 160, "validation": 24, "test": 24}
CANDIDATES = 4

_THINGS = ("film", "tea", "song", "trip", "book", "game", "dog", "house", "meal", "day")
_TIMES = ("today", "now", "last week", "at home", "in town", "by the sea", "at work", "again")
_FEELINGS = ("great", "good", "nice", "fine", "odd", "dull", "bad", "awful", "lovely", "sad")
_QUESTIONS = ("how was the {}?", "did you like the {}?", "tell me about the {}.")
_ANSWERS = ("the {} was {} {}.", "my {} is {} {}!", "yes, a {} is {} {}.")


def write_artifact(
    workdir: Path,
    stage: str,
    record_sets: Mapping[tuple[str, str], list],
    inputs: Mapping[str, Path] | None = None,
    results: Mapping[str, object] | None = None,
    **settings: object,
) -> Path:
    """Writes a finished artifact with record sets {(name, split): records}; returns workdir."""
    paths = {name: str(path) for name, path in (inputs or {}).items()}
    config = ConfigDict({"seed": 0, "inputs": paths, **settings})
    with artifact.open_run(config, workdir, stage) as run:
        for (name, split), items in record_sets.items():
            records.write_shards(run.workdir / "records", name, split, items)
        run.results(**(results or {}))
        run.complete(records.digest(run.workdir / "records"))
    return workdir


@contextlib.contextmanager
def disk_full_after(shards: int) -> Iterator[None]:
    """A disk that has room for so many shards of records."""
    writer, opened = records.array_record_module.ArrayRecordWriter, []

    def limited(path: str, options: str) -> object:
        opened.append(path)
        if len(opened) > shards:
            raise RuntimeError(f"INTERNAL: {path}: {os.strerror(errno.ENOSPC)}")
        return writer(path, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.array_record_module, "ArrayRecordWriter", limited)
        yield


def read_records(workdir: Path, name: str, split: str, cls: type) -> list:
    """All records of a set, as a list."""
    return list(records.RecordReader(workdir / "records", name, split, cls))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bucket_server.BucketServer]:
    """A stand-in for Cloud Storage; the real clients of this process and its children use it."""
    if importlib.util.find_spec("gcsfs") is None:  # not yet imported: it reads its environment then
        pytest.skip("buckets need gcsfs: the extra 'cloud'")
    with pytest.MonkeyPatch.context() as patch:
        server = bucket_server.BucketServer()
        for name, value in server.environment(tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        for name in ("gcs", "gs"):  # read from the environment when fsspec is imported
            patch.setitem(fsspec.config.conf[name], "token", "anon")
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def tiny_clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prepare, mode 'clean': documents, conversations, prompts and human comparisons by split."""
    rng = np.random.default_rng(0)
    sets: dict[tuple[str, str], list] = {}
    # No question is asked in two splits: the things and times asked about are divided among them.
    subjects = list(itertools.product(_THINGS, _TIMES))
    rng.shuffle(subjects)
    parts = {"train": subjects[:56], "validation": subjects[56:68], "test": subjects[68:]}
    for split, count in SPLITS.items():
        ids = [f"{split}-{i:03d}" for i in range(count)]
        sets["documents", split] = [
            Document(key, " ".join(_answer(rng, parts[split]) for _ in range(4)), "grammar")
            for key in ids
        ]
        sets["conversations", split] = [_conversation(rng, key, parts[split]) for key in ids]
        sets["prompts", split] = [
            Prompt(f"{c.id}-p", c.messages[:-1], c.source) for c in sets["conversations", split]
        ]
        sets["comparisons", split] = [_human(rng, p) for p in sets["prompts", split]]
    return write_artifact(tmp_path_factory.mktemp("tiny") / "clean", "prepare", sets, mode="clean")


@pytest.fixture(scope="session")
def tiny_vocabulary(tiny_clean: Path) -> Path:
    """train_tokenizer: a vocabulary of TINY_VOCAB_SIZE tokens with byte fallback."""
    return _vocabulary(tiny_clean, tiny_clean.parent / "vocabulary", TINY_VOCAB_SIZE)


@pytest.fixture(scope="session")
def other_vocabulary(tiny_clean: Path) -> Path:
    """A vocabulary of ten tokens more, which fits no tiny model."""
    return _vocabulary(tiny_clean, tiny_clean.parent / "other_vocabulary", TINY_VOCAB_SIZE + 10)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_vocabulary: Path) -> tokenizer_lib.Tokenizer:
    """The tokenizer of tiny_vocabulary."""
    return tokenizer_lib.Tokenizer.load(tiny_vocabulary)


@pytest.fixture(scope="session")
def tiny_corpus(
    tiny_clean: Path, tiny_vocabulary: Path, tiny_tokenizer: tokenizer_lib.Tokenizer
) -> Path:
    """prepare, mode 'tokenize': pretrain-* (bos text eos) and dialogues-* (chat format, masked)."""
    sets: dict[tuple[str, str], list] = {}
    for split in SPLITS:
        sets["pretrain", split] = [
            _pretrain_example(tiny_tokenizer, document)
            for document in read_records(tiny_clean, "documents", split, Document)
        ]
        sets["dialogues", split] = [
            TokenExample(c.id, *chat.encode_conversation(tiny_tokenizer, c.messages))
            for c in read_records(tiny_clean, "conversations", split, Conversation)
        ]
    inputs = {"corpus": tiny_clean, "vocabulary": tiny_vocabulary}
    return write_artifact(tiny_clean.parent / "corpus", "prepare", sets, inputs, mode="tokenize")


@pytest.fixture(scope="session")
def tiny_candidates(tiny_clean: Path) -> Path:
    """collect: CANDIDATES replies to every prompt, by split."""
    rng = np.random.default_rng(1)
    sets = {}
    for split in SPLITS:
        prompts = read_records(tiny_clean, "prompts", split, Prompt)
        sets["candidates", split] = [_candidate_set(rng, prompt) for prompt in prompts]
    return write_artifact(
        tiny_clean.parent / "candidates", "collect", sets, {"prompts": tiny_clean}
    )


@pytest.fixture(scope="session")
def tiny_comparisons(tiny_candidates: Path) -> Path:
    """rank: simulated comparisons of tiny_candidates, VADER's score with noise 0.3."""
    labeller = labellers.SimulatedLabeller(
        registry.make(ConfigDict({"name": "vader"})), noise=0.3, tie_margin=0.05, seed=0
    )
    sets = {}
    for split in SPLITS:
        candidates = read_records(tiny_candidates, "candidates", split, CandidateSet)
        sets["comparisons", split] = labeller.compare(candidates)
    return write_artifact(
        tiny_candidates.parent / "comparisons", "rank", sets, {"candidates": tiny_candidates}
    )


@pytest.fixture(scope="session")
def tiny_model() -> dict:
    """The architecture of preset 'tiny' with TINY_VOCAB_SIZE tokens, for `config.model`."""
    from gptlab.model import presets

    return {**presets.PRESETS["tiny"], "vocab_size": TINY_VOCAB_SIZE}


def _vocabulary(clean: Path, workdir: Path, vocab_size: int) -> Path:
    config = ConfigDict({"seed": 0, "vocab_size": vocab_size, "inputs": {"corpus": str(clean)}})
    texts = [d.text for d in read_records(clean, "documents", "train", Document)]
    for conversation in read_records(clean, "conversations", "train", Conversation):
        texts += [message.content for message in conversation.messages]
    with artifact.open_run(config, workdir, "train_tokenizer") as run:
        tokenizer_lib.train(
            texts,
            run.workdir / "vocabulary.model",
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            max_sentences=0,
            num_threads=1,
            seed=0,
        )
        run.complete()
    return workdir


def _answer(rng: np.random.Generator, subjects: list) -> str:
    thing, time = subjects[rng.integers(len(subjects))]
    return str(rng.choice(_ANSWERS)).format(thing, rng.choice(_FEELINGS), time)


def _turns(rng: np.random.Generator, subjects: list) -> Iterator[Message]:
    """Question and answer about one subject after another."""
    while True:
        thing, time = subjects[rng.integers(len(subjects))]
        question = str(rng.choice(_QUESTIONS)).format(f"{thing} {time}")
        yield Message("user", question)
        yield Message("assistant", _answer(rng, [(thing, time)]))


def _conversation(rng: np.random.Generator, key: str, subjects: list) -> Conversation:
    messages = tuple(itertools.islice(_turns(rng, subjects), 2 * int(rng.integers(1, 3))))
    return Conversation(key, messages, "grammar", topic=key)


def _candidate_set(rng: np.random.Generator, prompt: Prompt) -> CandidateSet:
    candidates = tuple(
        Candidate(f"{prompt.id}-{i}", _answer(rng, [(_THINGS[i], "today")]), "human", True)
        for i in range(CANDIDATES)
    )
    return CandidateSet(f"{prompt.id}-set", prompt, candidates)


def _human(rng: np.random.Generator, prompt: Prompt) -> Comparison:
    """A pair of replies, of which the more cheerful one was preferred."""
    better, worse = rng.choice(["great", "good", "nice"]), rng.choice(["bad", "awful", "sad"])
    candidates = tuple(
        Candidate(f"{prompt.id}-{word}", f"it was {word}.", "human", True)
        for word in (str(better), str(worse))
    )
    order = rng.permutation(2)
    return Comparison(
        id=f"{prompt.id}-pair",
        prompt=prompt,
        candidates=tuple(candidates[i] for i in order),
        ranks=tuple(int(i) + 1 for i in order),
        labeller="human",
        simulated=False,
    )


def _pretrain_example(tokenizer: tokenizer_lib.Tokenizer, document: Document) -> TokenExample:
    ids = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    return TokenExample(document.id, np.array(ids), np.array([0] + [1] * (len(ids) - 1)))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's smoke, run by its own command on one device. It takes minutes."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    run_smoke(workdir)
    return workdir


def run_smoke(workdir: Path, *flags: str) -> str:
    """Runs the smoke command in `workdir`, perhaps with more flags; returns what it printed."""
    command = [sys.executable, "-m", "gptlab.rounds", "--config=configs/quickstart.py:smoke"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *flags],
        cwd=Path(__file__).parent.parent,
        env=compiling.environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0
    return done.stdout
