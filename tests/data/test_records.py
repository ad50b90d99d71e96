"""Records survive storage, old ones stay readable, and whatever is damaged is named."""

import dataclasses
import json
import re
from pathlib import Path

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from gptlab.data import records
from gptlab.data.records import (
    Candidate,
    CandidateSet,
    Comparison,
    Conversation,
    Document,
    Message,
    Prompt,
    RecordReader,
    TokenExample,
)
from gptlab.run.errors import UserError

GOLDEN = Path(__file__).parent / "golden"

PROMPT = Prompt("p", (Message("system", "Be kind."), Message("user", "Hi?", "a note")), "s")
CANDIDATES = (Candidate("a", "Hello!", "0123456789ab", True), Candidate("b", "", "human", False))
# One of every kind. Also what the golden files were written from: never change one of these, add.
EXAMPLES = [
    Document("d", "Zwölf Boxkämpfer\n\t<|end|> 🙂", "file.txt"),
    Conversation("c", (Message("user", "Hi"), Message("assistant", "Yo")), "chat", "weather"),
    PROMPT,
    CandidateSet("cs", PROMPT, CANDIDATES),
    Comparison("cmp", PROMPT, CANDIDATES, (1, 1), "simulated:x", True, (0.5, -0.25)),
    TokenExample("t", np.array([3, 70000, 5, 1], np.int32), np.array([0, 1, 0, 1], np.uint8)),
]
IDS = [type(example).__name__ for example in EXAMPLES]


def documents(count):
    return [Document(f"doc-{i}", f"text {i}", "here") for i in range(count)]


def read(directory, name="documents", split="train", cls=Document):
    return list(RecordReader(directory, name, split, cls))


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_round_trip(example, tmp_path):
    records.write_shards(tmp_path, "things", "train", [example])
    assert read(tmp_path, "things", cls=type(example)) == [example]


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_golden_files_of_schema_1_still_load(example):
    """A schema may grow a version; what was written before must load for ever."""
    assert read(GOLDEN, type(example).__name__, "schema1", type(example)) == [example]


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_the_bytes_of_a_record_are_those_of_the_golden_files(example):
    """Digests and deduplication rest on them."""
    path = GOLDEN / f"{type(example).__name__}-schema1-00000-of-00001.array_record"
    reader = array_record_module.ArrayRecordReader(str(path))
    assert reader.read_all() == [example.to_bytes()]
    reader.close()


WEIGHED = Comparison("cmp2", PROMPT, CANDIDATES, (1, 2), "person:x", False, None, 0.25)
TALK = tuple(Message(role, "Hm.") for role in ("user", "assistant", "user", "assistant"))
PARTLY = Conversation("c2", TALK, "people:better", "weather", (3,))


@pytest.mark.parametrize(
    ("record", "field", "absent"),
    [(WEIGHED, "weight", 1.0), (PARTLY, "learnt", None)],
    ids=["weight", "learnt"],
)
def test_a_field_that_came_with_schema_2(record, field, absent):
    """Its golden file loads and is still written so; without it, a record is of schema 1."""
    cls = type(record)
    assert read(GOLDEN, cls.__name__, "schema2", cls) == [record]
    path = GOLDEN / f"{cls.__name__}-schema2-00000-of-00001.array_record"
    reader = array_record_module.ArrayRecordReader(str(path))
    assert reader.read_all() == [record.to_bytes()]
    reader.close()
    plain = dataclasses.replace(record, **{field: absent})
    assert json.loads(plain.to_json())["schema"] == 1 and field not in plain.to_json()
    assert getattr(cls.from_json(plain.to_json()), field) == absent
    old = record.to_json().replace('"schema":2', '"schema":1')
    with pytest.raises(ValueError, match=f"schema 1 with a {field}"):
        cls.from_json(old)


def test_what_is_learnt_are_messages_of_the_assistant():
    for wrong in ((), (0,), (3, 1), (1, 1), (4,), (-1,), (1, 2)):
        with pytest.raises(ValueError, match="no numbers, in order, of the assistant's messages"):
            dataclasses.replace(PARTLY, learnt=wrong)
    everything = dataclasses.replace(PARTLY, learnt=(1, 3))
    assert everything.learnt is None and everything == dataclasses.replace(PARTLY, learnt=None)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_above_zero(weight):
    with pytest.raises(ValueError, match="weight is above 0"):
        dataclasses.replace(WEIGHED, weight=weight)


@given(st.text(), st.text(), st.one_of(st.none(), st.text()))
def test_any_text_survives(key, content, topic):
    message = Message("user", content, context=topic)
    conversation = Conversation(key, (message,), content, topic)
    assert Conversation.from_bytes(conversation.to_bytes()) == conversation


def test_a_lone_surrogate_from_json_survives():
    document = Document("d", json.loads('"\\ud800"'), "s")
    assert Document.from_bytes(document.to_bytes()) == document
    assert 0 <= records.shard_of("\ud800", 7) < 7


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1))))
def test_any_tokens_survive(pairs):
    example = TokenExample("x", np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]))
    again = TokenExample.from_bytes(example.to_bytes())
    np.testing.assert_array_equal(again.tokens, example.tokens)
    np.testing.assert_array_equal(again.loss_mask, example.loss_mask)
    assert again.tokens.dtype == np.int32 and again.loss_mask.dtype == np.uint8


def test_small_ids_take_two_bytes():
    tokens = np.arange(1000)
    assert len(TokenExample("x", tokens, tokens % 2).to_bytes()) < 2200


def test_bytes_depend_on_the_records_alone(tmp_path):
    items = documents(50)
    for place, order in (("a", items), ("b", items[::-1])):
        records.write_shards(tmp_path / place, "documents", "train", order, num_shards=3)
    paths = records.shard_paths(tmp_path / "a", "documents", "train")
    assert len(paths) == 3
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        ids = [record.id for record in RecordReader(tmp_path / "a", "documents", "train", Document)]
    assert sorted(ids) == sorted(item.id for item in items)


def test_random_access_equals_iteration(tmp_path):
    records.write_shards(tmp_path, "documents", "train", documents(30), num_shards=4)
    reader = RecordReader(tmp_path, "documents", "train", Document)
    assert [reader[i] for i in range(len(reader))] == list(reader)
    with pytest.raises(IndexError):
        reader[30]


def test_rewriting_with_fewer_shards_leaves_no_stale_shard(tmp_path):
    records.write_shards(tmp_path, "documents", "train", documents(30), num_shards=4)
    records.write_shards(tmp_path, "documents", "train", documents(5), num_shards=2)
    assert len(read(tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_set_is_a_set(tmp_path):
    records.write_shards(tmp_path, "documents", "train", [])
    assert read(tmp_path) == []


def test_names_that_begin_alike_are_kept_apart(tmp_path):
    records.write_shards(tmp_path, "documents", "train", documents(1))
    records.write_shards(tmp_path, "documents-long", "train", documents(2))
    assert len(read(tmp_path)) == 1
    assert records.record_sets(tmp_path) == ["documents-long-train", "documents-train"]


def test_digest_ignores_layout_and_sees_every_change(tmp_path):
    def digest(place, items, num_shards, split="train"):
        records.write_shards(tmp_path / place, "documents", split, items, num_shards)
        return records.digest(tmp_path / place)

    base = digest("base", documents(20), 1)
    assert digest("reshaped", documents(20)[::-1], 5) == base
    assert digest("fewer", documents(19), 1) != base
    assert digest("twice", documents(20) + documents(1), 1) != base
    assert digest("split", documents(20), 1, "test") != base
    changed = documents(20)
    changed[7] = dataclasses.replace(changed[7], text="text 8")
    assert digest("changed", changed, 1) != base


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no records documents-train in {tmp_path}/none"):
        read(tmp_path / "none")


def test_what_there_is_is_listed_when_a_split_is_missing(tmp_path):
    records.write_shards(tmp_path, "documents", "train", documents(1))
    with pytest.raises(UserError, match="it has documents-train"):
        read(tmp_path, split="validation")


def test_a_missing_shard_is_named(tmp_path):
    paths = records.write_shards(tmp_path, "documents", "train", documents(9), num_shards=3)
    paths[1].unlink()
    with pytest.raises(UserError, match=paths[1].name):
        read(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 65536, -10], ids=["empty", "head", "block", "tail"])
def test_a_truncated_shard_is_named(tmp_path, keep):
    (path,) = records.write_shards(tmp_path, "documents", "train", documents(500))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path} is truncated"):
        read(tmp_path)


def test_flipped_bytes_are_named(tmp_path):
    # Noise does not compress, so that the flipped bytes are sure to lie in a record.
    text = "".join(chr(c) for c in np.random.default_rng(0).integers(33, 1000, 200_000))
    (path,) = records.write_shards(tmp_path, "documents", "train", [Document("a", text, "s")])
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 3, len(data) // 3 + 64):
        data[i] ^= 0xFF
    path.write_bytes(bytes(data))
    for action in (lambda: read(tmp_path), lambda: records.digest(tmp_path)):
        with pytest.raises(UserError, match=f"{path} is corrupt near record 0"):
            action()


def write_raw(directory, *payloads):
    path = records.shard_path(directory, "documents", "train", 0, 1)
    return records.write_ordered(path, payloads)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"not json", "Expecting value"),
        (b"[1]", "expected a Document object"),
        (b'{"id":"\xff"}', "codec can't decode"),
        (CandidateSet("x", PROMPT, ()).to_bytes(), "expected a Document record, got 'Cand"),
        (b'{"kind":"Document","schema":1,"id":"a"}', "fields"),
        (b'{"kind":"Document","schema":"new","id":"a"}', "schema 'new'"),
    ],
)
def test_a_corrupt_record_is_named(tmp_path, payload, reason):
    path = write_raw(tmp_path, Document("a", "", "").to_bytes(), payload)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, record 1: .*{reason}"):
        read(tmp_path)


def test_a_corrupt_token_example_is_named(tmp_path):
    path = write_raw(tmp_path, b"\xc1")
    with pytest.raises(UserError, match=f"{path}, record 0"):
        read(tmp_path, cls=TokenExample)


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_a_newer_schema_asks_for_an_update(tmp_path, example):
    if isinstance(example, TokenExample):
        fields = msgpack.unpackb(example.to_bytes())
        fields[1] += 1
        payload = msgpack.packb([*fields, "a field of the future"])
    else:
        fields = json.loads(example.to_json())
        fields["schema"] = example.SCHEMA + 1
        payload = json.dumps(fields | {"a field": "of the future"}).encode()
    path = write_raw(tmp_path, payload)
    newer = f"{path}, record 0: .* schema {example.SCHEMA + 1}.*update gptlab"
    with pytest.raises(UserError, match=newer):
        read(tmp_path, cls=type(example))


@pytest.mark.parametrize("num_shards", [1, 3, 20])
def test_an_id_is_found_without_reading_everything(num_shards, tmp_path, monkeypatch):
    records.write_shards(tmp_path, "documents", "train", documents(40), num_shards)
    reader = RecordReader(tmp_path, "documents", "train", Document)
    assert all(reader.has(document.id) for document in documents(40))
    assert not any(reader.has(name) for name in ("", "doc-40", "doc-", "zzz", *map(str, range(20))))
    looked_at, read = [], RecordReader._read
    monkeypatch.setattr(RecordReader, "_read", lambda *at: looked_at.append(at) or read(*at))
    reader.has("doc-17")
    assert len(looked_at) <= 8


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def broken():
        yield b"one"
        raise OSError(28, "No space left on device")

    records.write_shards(tmp_path, "documents", "train", documents(3))
    path = records.shard_path(tmp_path, "documents", "train", 0, 1)
    with pytest.raises(UserError, match="No space left|disk is full"):
        records.write_ordered(path, broken())
    assert len(read(tmp_path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_impossible_records_are_refused():
    with pytest.raises(ValueError, match="'bot'"):
        Message("bot", "")
    with pytest.raises(ValueError, match="only a user's turn"):
        Message("assistant", "", context="x")
    with pytest.raises(ValueError, match="does not end with a user"):
        Prompt("p", (Message("assistant", ""),), "s")
    with pytest.raises(ValueError, match="no ranks"):
        Comparison("c", PROMPT, CANDIDATES, (1,), "l", False)
    with pytest.raises(ValueError, match="no ranks"):
        Comparison("c", PROMPT, CANDIDATES, (0, 1), "l", False)
    with pytest.raises(ValueError, match="carries no scores"):
        Comparison("c", PROMPT, CANDIDATES, (1, 2), "l", False, (0.1, 0.2))
    with pytest.raises(ValueError, match="differ"):
        TokenExample("t", np.zeros(3), np.zeros(2))
