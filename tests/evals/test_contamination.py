"""Prompts out of conversations that a language model was trained on are found by its lineage."""

import shutil

import numpy as np
import pytest

from gptlab.data.records import Conversation, Document, Message, Prompt, TokenExample
from gptlab.evals import contamination
from gptlab.run.errors import UserError
from tests.fixtures import write_artifact

TURNS = (Message("user", "how are you?"), Message("assistant", "fine."))
SEEN, UNSEEN = "talk:7:0", "talk:8:0"


def prompt(conversation):
    return Prompt(f"{conversation}:002", TURNS[:1], "test")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A corpus with one conversation to train on, and one to test with; some as texts, too."""
    texts = [Document(name, "how are you?", "test") for name in ("talk:6:text", "a.txt:000000")]
    sets = {
        ("documents", "train"): texts,
        ("documents", "test"): [Document("talk:8:text", "how are you?", "test")],
        ("conversations", "train"): [Conversation(SEEN, TURNS, "test", topic=None)],
        ("conversations", "test"): [Conversation(UNSEEN, TURNS, "test", topic=None)],
    }
    return write_artifact(tmp_path_factory.mktemp("seen") / "clean", "prepare", sets)


@pytest.fixture(scope="module")
def tokens(clean):
    """Tokens of it: the tasks 'pretrain' and 'dialogues', one of the user's own, and a mixture."""
    tasks = ("pretrain", "dialogues", "poems")
    sets = {
        (task, "train"): [TokenExample("x", np.array([3, 9]), np.array([0, 1]))] for task in tasks
    }
    mixtures = {"both": {"pretrain": 0.9, "dialogues": 0.1}}
    return write_artifact(
        clean.parent / "tokens", "prepare", sets, {"corpus": clean}, {"mixtures": mixtures}
    )


def trained(stage, tokens, workdir, **settings):
    return str(write_artifact(workdir, stage, {}, {"tokens": tokens}, **settings))


SAW = [
    ("sft", {"data": {"name": "dialogues"}}),
    ("pretrain", {"data": {"name": "both"}}),
    ("ppo", {"ptx": {"coef": 1.0, "name": "dialogues"}}),
]


@pytest.mark.parametrize("stage, settings", SAW, ids=[stage for stage, _ in SAW])
def test_a_conversation_that_was_trained_on_is_no_prompt(stage, settings, tokens, tmp_path):
    model = trained(stage, tokens, tmp_path / "model", **settings)
    later = str(write_artifact(tmp_path / "later", "ppo", {}, {"init": model}))
    assert contamination.check_disjoint([prompt(UNSEEN)], [later]) == []
    with pytest.raises(
        UserError, match="1 of 2 prompts .*'talk:7:0:002' is in .*conversations-train"
    ):
        contamination.check_disjoint([prompt(UNSEEN), prompt(SEEN)], [later])


@pytest.mark.parametrize(
    "stage, settings",
    [
        ("pretrain", {"data": {"name": "pretrain"}}),
        ("ppo", {"ptx": {"coef": 0.0, "name": "dialogues"}}),
    ],
)
def test_who_read_no_conversation_has_seen_none(stage, settings, tokens, tmp_path):
    model = trained(stage, tokens, tmp_path / "model", **settings)
    assert contamination.check_disjoint([prompt(SEEN)], [model]) == []


@pytest.mark.parametrize("name", ["pretrain", "both"])
def test_the_text_of_a_conversation_in_a_base_models_documents_is_seen(name, tokens, tmp_path):
    """As in a corpus that was split with another seed: its turns were read as plain text."""
    base = trained("pretrain", tokens, tmp_path / "base", data={"name": name})
    later = str(write_artifact(tmp_path / "later", "sft", {}, {"init": base}))
    others = [prompt(UNSEEN), prompt("a.txt:000000"), prompt("walk:6:0")]
    assert contamination.check_disjoint(others, [later]) == []
    with pytest.raises(UserError, match="1 of 4 prompts .*'talk:6:1:002' is in .*documents-train"):
        contamination.check_disjoint([*others, prompt("talk:6:1")], [later])


def test_what_cannot_be_told_is_said(clean, tokens, tmp_path):
    own = trained("sft", tokens, tmp_path / "own", data={"name": "poems"})
    (line,) = contamination.check_disjoint([prompt(SEEN)], [own])
    assert "'poems'" in line
    for workdir in (clean, tokens):
        shutil.copytree(workdir, tmp_path / workdir.name)
    moved = trained("sft", tmp_path / "tokens", tmp_path / "sft", data={"name": "dialogues"})
    shutil.rmtree(tmp_path / "tokens" / "records")
    (line,) = contamination.check_disjoint([prompt(SEEN)], [moved])
    assert "no such task or mixture" in line


def test_records_that_many_have_read_are_read_once(tokens, tmp_path, monkeypatch):
    models = [
        trained("sft", tokens, tmp_path / name, data={"name": "dialogues"}) for name in ("a", "b")
    ]
    read = []
    ids = contamination._ids
    monkeypatch.setattr(contamination, "_ids", lambda *args: read.append(args) or ids(*args))
    assert contamination.check_disjoint([prompt(UNSEEN)], models) == []
    assert [args[1:] for args in read] == [("conversations", "train")]
