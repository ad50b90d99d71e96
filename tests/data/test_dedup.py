"""Exact duplicates: what counts as the same, and which copy stays."""

import random

from gptlab.data import dedup
from gptlab.data.records import Candidate, Comparison, Conversation, Document, Message, Prompt


def test_normal_form():
    same = ["Hello  World", "hello world\n", "ＨＥＬＬＯ\tworld", "hello\u00a0world"]
    assert len({dedup.text_hash([text]) for text in same}) == 1
    assert dedup.text_hash(["hello worlds"]) != dedup.text_hash(["hello world"])
    assert dedup.text_hash(["ab", "c"]) != dedup.text_hash(["a", "bc"])


def test_records_are_the_same_by_their_text_not_their_id():
    turns = (Message("user", "Hi there"), Message("assistant", "Hello"))
    assert dedup.record_hash(Document("a", "x", "s")) == dedup.record_hash(Document("b", "X", "t"))
    one, two = Conversation("a", turns, "s"), Conversation("b", turns, "t", "topic")
    assert dedup.record_hash(one) == dedup.record_hash(two)
    swapped = tuple(
        Message(r, m.content) for r, m in zip(("assistant", "user"), turns, strict=True)
    )
    assert dedup.record_hash(one) != dedup.record_hash(Conversation("a", swapped, "s"))
    with_context = (Message("user", "Hi there", "page"), turns[1])
    assert dedup.record_hash(one) != dedup.record_hash(Conversation("a", with_context, "s"))
    prompt = Prompt("p", turns[:1], "s")
    replies = tuple(Candidate(t, t, "human", True) for t in ("good", "bad"))
    ranked = Comparison("c", prompt, replies, (1, 2), "people", False)
    other = Comparison("d", prompt, replies[::-1], (1, 2), "people", False)
    assert dedup.record_hash(ranked) != dedup.record_hash(other)


def test_prefix_hashes_are_the_hashes_of_prefixes():
    messages = [Message("user", "Hi", "page"), Message("assistant", "Ho"), Message("user", "He")]
    expected = [dedup.messages_hash(messages[: i + 1]) for i in range(3)]
    assert list(dedup.prefix_hashes(messages)) == expected and len(set(expected)) == 3


def test_the_held_out_copy_stays_whatever_the_order():
    entries = [
        (b"x", "train", "1", "x1"), (b"x", "test", "9", "x9"), (b"x", "validation", "0", "x0"),
        (b"y", "train", "5", "y5"), (b"y", "train", "4", "y4"), (b"z", "train", "7", "z7"),
    ]  # fmt: skip
    for seed in range(10):
        random.Random(seed).shuffle(entries)
        kept, dropped = dedup.unique(entries)
        assert kept == ["x9", "y4", "z7"]
        assert dropped == [("x0", "9"), ("x1", "9"), ("y5", "4")]
