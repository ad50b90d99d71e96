"""Readers: every format, everything that can be wrong with a file, and the public packages."""

import gzip
import json
import os
import tracemalloc
from collections import Counter

import pytest

from gptlab.data import readers
from gptlab.data.readers import Bad, Item
from gptlab.data.records import Comparison, Conversation, Document
from gptlab.run.errors import UserError

LIMITS = readers.Limits(
    max_line_bytes=1000, max_html_bytes=2000, stretch_bytes=200, sides=1, pairs_per_review=2,
    review_documents=True, tfds_dir=None, tfds_feature="text", module=None,
)  # fmt: skip


def read_all(path, limits=LIMITS):
    return [x for source in readers.plan((), str(path)) for x in readers.read(source, limits)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_formats_ids_and_order(tmp_path):
    write(tmp_path / "b.md", "# Title\n\nText of b")
    write(tmp_path / "sub" / "a.txt", "\ufeffText of a")
    write(tmp_path / "page.HTML", "<p>caf\u00e9</p>")
    write(tmp_path / "old.htm", b'<meta charset="latin-1"><p>caf\xe9</p>')
    rows = [
        {"text": "first", "topic": "t"},
        {"messages": [{"role": "user", "content": "hi", "context": "page"},
                      {"role": "assistant", "content": "ho"}]},
    ]  # fmt: skip
    lines = "\n".join(map(json.dumps, rows))
    write(tmp_path / "rows.jsonl", lines)
    write(tmp_path / "rows2.jsonl.gz", gzip.compress(lines.encode()))
    write(tmp_path / "note.txt.gz", gzip.compress(b"note"))
    write(tmp_path / "picture.png", b"\x89PNG")
    items = read_all(tmp_path)
    assert all(isinstance(item, Item) for item in items)
    by_id = {item.record.id: item for item in items}
    assert list(by_id) == [
        "b.md:000000", "note.txt.gz:000000", "old.htm:000000", "page.HTML:000000",
        "rows.jsonl:000000001", "rows.jsonl:000000002",
        "rows2.jsonl.gz:000000001", "rows2.jsonl.gz:000000002", "sub/a.txt:000000",
    ]  # fmt: skip
    assert by_id["sub/a.txt:000000"].record == Document("sub/a.txt:000000", "Text of a", "file")
    assert by_id["page.HTML:000000"].html and "caf\u00e9" in by_id["page.HTML:000000"].record.text
    assert "caf\u00e9" in by_id["old.htm:000000"].record.text
    assert by_id["rows.jsonl:000000001"].topic == "t"
    dialogue = by_id["rows.jsonl:000000002"].record
    assert isinstance(dialogue, Conversation)
    assert [(m.role, m.content, m.context) for m in dialogue.messages] == [
        ("user", "hi", "page"), ("assistant", "ho", None),
    ]  # fmt: skip
    assert [i.record.id for i in read_all(tmp_path / "**" / "a*.txt")] == ["a.txt:000000"]


def test_long_text_becomes_stretches_of_whole_paragraphs(tmp_path):
    text = "".join(f"Paragraph {i}: " + "word " * 12 + "\n\n" for i in range(20))
    items = read_all(write(tmp_path / "book.txt", text))
    assert len(items) > 4 and "".join(i.record.text for i in items) == text
    assert all(i.record.text.startswith("Paragraph") for i in items)
    assert len({i.unit for i in items}) == len(items)
    wall = write(tmp_path / "wall.txt", "no blank line at all\n" * 100)
    pieces = read_all(wall)
    assert len(pieces) > 2 and "".join(i.record.text for i in pieces) == wall.read_text()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": 3}', '"text" is not a string'),
        (b'["text"]', "expected an object"),
        (b'{"txt": "x"}', "expected an object"),
        (b'{"text": "x", "messages": []}', "expected an object"),
        (b'{"text": "x", "topic": 1}', '"topic" is not a string'),
        (b'{"messages": "x"}', "is not a list with a message of the assistant"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "message of the assistant"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
        (b'{"messages": [{"role": "user"}]}', "not an object with"),
        (b'{"messages": [{"role": "assistant", "content": "x", "context": "y"}]}', "context"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "longer than 1000 bytes"),
    ],
)
def test_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = write(tmp_path / "rows.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}')
    first, bad, last = read_all(path)
    assert (first.record.text, last.record.text) == ("a", "b")
    assert isinstance(bad, Bad) and (bad.file, bad.line) == (str(path), 2)
    assert reason in bad.reason


def test_deeply_nested_json_is_a_bad_line(tmp_path):
    limits = readers.dataclasses.replace(LIMITS, max_line_bytes=200_000)
    (bad,) = read_all(write(tmp_path / "rows.jsonl", b"[" * 100_000), limits)
    assert isinstance(bad, Bad) and "recursion" in bad.reason


def test_bad_files_do_not_stop_the_others(tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b.txt", b"line one\nline \xff two")
    write(tmp_path / "c.txt", "")
    write(tmp_path / "d.txt", " \n\n ")
    write(tmp_path / "e.jsonl", "")
    whole = gzip.compress(b'{"text": "whole"}\n' * 2000)
    write(tmp_path / "f.jsonl.gz", whole[: len(whole) // 2])
    write(tmp_path / "g.jsonl.gz", b"this is not gzip")
    write(tmp_path / "h.html", "<p>" + "x" * 3000)
    (tmp_path / "i.txt").symlink_to(tmp_path / "a.txt")
    write(tmp_path / "j.html", b"<p>\xff\xfe")
    write(tmp_path / "k.jsonl", "\n  \n\n")
    found = read_all(tmp_path)
    bad = {x.file.rsplit("/", 1)[1]: x for x in found if isinstance(x, Bad)}
    assert set(bad) == {
        "b.txt",
        "c.txt",
        "d.txt",
        "e.jsonl",
        "f.jsonl.gz",
        "g.jsonl.gz",
        "h.html",
        "j.html",
        "k.jsonl",
    }
    assert bad["b.txt"] == Bad(str(tmp_path / "b.txt"), 2, "not UTF-8")
    assert {bad[f"{n}.txt"].reason for n in "cd"} | {bad[f"{n}.jsonl"].reason for n in "ek"} == {
        "empty"
    }
    assert "end-of-stream" in bad["f.jsonl.gz"].reason and bad["f.jsonl.gz"].line > 1
    assert "gzip" in bad["g.jsonl.gz"].reason.lower()
    assert "larger than 2000 bytes" in bad["h.html"].reason
    assert bad["j.html"].reason == "not UTF-8"
    texts = Counter(x.record.text for x in found if isinstance(x, Item))
    assert texts["fine"] == 2 and texts["whole"] == bad["f.jsonl.gz"].line - 1


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "hex", "no-such"])
def test_a_declared_charset_that_decodes_nothing_is_a_bad_page(tmp_path, charset):
    page = f'<meta charset="{charset}"><p>'.encode() + b"caf\xe9 " + b"x" * 100
    (bad,) = read_all(write(tmp_path / "page.html", page))
    assert bad == Bad(str(tmp_path / "page.html"), 1, "not UTF-8")


def test_a_file_that_cannot_be_read_is_quarantined(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b.txt", "secret")
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone.txt")

    def deny(path, *args, **kwargs):
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    monkeypatch.setattr(readers, "open", deny, raising=False)
    fine, denied, gone = read_all(tmp_path)
    assert fine.record.text == "fine"
    assert denied == Bad(str(tmp_path / "b.txt"), 1, "unreadable: Permission denied")
    assert gone == Bad(str(tmp_path / "c.txt"), 1, "unreadable: No such file or directory")


@pytest.mark.parametrize("pattern", ["", "*/*.txt", "**/*.txt", "*/deep/*.txt"])
def test_a_directory_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch, pattern):
    write(tmp_path / "a" / "deep" / "a.txt", "fine")
    write(tmp_path / "locked" / "deep" / "b.txt", "never seen")
    scandir = os.scandir

    def deny(path="."):
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    assert len(readers.plan((), str(tmp_path / "**" / "*.txt"))) == 2
    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UserError, match="cannot read the directory .*locked: Permission denied"):
        readers.plan((), str(tmp_path / pattern) if pattern else str(tmp_path))
    assert len(readers.plan((), str(tmp_path / "a" / "**"))) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz"])
def test_a_huge_line_is_skipped_in_little_memory(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    with gzip.open(path, "wb", 1) if suffix.endswith("gz") else open(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    found = read_all(path, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert sorted(type(x).__name__ for x in found) == ["Bad", "Item", "Item"]
    assert next(x for x in found if isinstance(x, Bad)).line == 2
    texts = [x.record.text for x in found if isinstance(x, Item)]
    assert "before" in texts[0] and "after" in texts[1]


def test_plan_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file at all"):
        readers.plan((), str(tmp_path))
    with pytest.raises(UserError, match="no file at all"):
        readers.plan((), str(tmp_path / "nowhere" / "*.txt"))
    write(tmp_path / "x.png", b"x")
    with pytest.raises(UserError, match="1 other files there, but none ending in .txt"):
        readers.plan((), str(tmp_path))
    monkeypatch.setattr(readers.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot read the directory"):
        readers.plan((), str(tmp_path))
    with pytest.raises(UserError, match="package:chitchat, .*config.data.documents"):
        readers.plan(("package:chitchatt",), None)
    with pytest.raises(UserError, match="nothing to read"):
        readers.plan((), None)
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install chitchat-dataset"):
        readers.plan(("package:chitchat",), None)


def package(name, **changes):
    (source,) = readers.plan((name,), None)
    return source, readers.dataclasses.replace(LIMITS, max_html_bytes=10**7, **changes)


def test_chitchat(tmp_path):
    content = {
        "b": {"messages": [[{"text": "Hi ", "sender": "1"}, {"text": "you", "sender": "1"}],
                           [{"text": "Ho", "sender": "2"}], [{"text": "Well", "sender": "1"}]],
              "prompt": "Topic?", "start": "s"},
        "a": {"messages": [[{"text": "Alone", "sender": "1"}]], "start": "s"},
    }  # fmt: skip
    path = write(tmp_path / "dataset.json", json.dumps(content))
    source = readers.Source("package:chitchat", str(path), "chitchat")
    items = list(readers.read(source, LIMITS))
    assert [i.record.id for i in items] == ["chitchat:a:text", "chitchat:b:text", "chitchat:b:0"]
    assert readers.text_id(items[2].record.id) == items[1].record.id
    assert items[1].record.text == "Hi you\nHo\nWell"
    assert [(m.role, m.content) for m in items[2].record.messages] == [
        ("user", "Hi you"), ("assistant", "Ho"),
    ]  # fmt: skip
    assert {i.unit for i in items[1:]} == {"chitchat:b"} and items[2].topic == "Topic?"
    both = list(readers.read(source, readers.dataclasses.replace(LIMITS, sides=2)))
    assert [(m.role, m.content) for m in both[-1].record.messages] == [
        ("user", "Ho"), ("assistant", "Well"),
    ]  # fmt: skip


def test_reviews_are_pairs_within_a_film():
    items = list(readers.read(*package("package:reviews")))
    pairs = [i for i in items if isinstance(i.record, Comparison)]
    assert 4_000 < len(pairs) < 7_000
    uses = Counter(c.content for i in pairs for c in i.record.candidates)
    assert max(uses.values()) == 2
    ids = Counter(i.record.id for i in items)
    assert max(ids.values()) == 1
    films = {}
    for i in pairs:
        assert i.record.ranks == (1, 2) and not i.record.simulated and i.record.scores is None
        fresh, rotten = i.record.candidates
        assert fresh.id.endswith("fresh") and rotten.id.endswith("rotten") and fresh.finished
        assert i.record.prompt.messages[0].role == "user" and i.topic == i.unit
        for c in i.record.candidates:
            assert films.setdefault(c.content, i.unit) == i.unit  # no text crosses films
    once = readers.dataclasses.replace(package("package:reviews")[1], pairs_per_review=1)
    single = [i for i in readers.read(package("package:reviews")[0], once)]
    assert sum(isinstance(i.record, Comparison) for i in single) < len(pairs)
    without = readers.dataclasses.replace(once, review_documents=False)
    assert all(
        isinstance(i.record, Comparison)
        for i in readers.read(package("package:reviews")[0], without)
    )


def test_packages_are_not_imported_and_documentation_is_read():
    import sys

    topics = list(readers.read(*package("package:pydoc_topics")))
    assert len(topics) > 50 and any("assert_stmt" in t.record.text for t in topics)
    (page,) = readers.read(*package("package:idlelib_help"))
    assert page.html and "<h1>" in page.record.text
    assert "scattertext" not in sys.modules and "chitchat_dataset" not in sys.modules
