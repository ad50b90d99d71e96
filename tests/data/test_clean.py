"""Cleaning: repairs, structure kept, every filter."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data import clean
from gptlab.data.records import Conversation, Document, Message

RULES = clean.Rules(
    min_chars=20, max_chars=10_000, min_letters=0.4, max_repeated_lines=0.3, min_compressed=0.12,
    straight_quotes=True,
)  # fmt: skip
PAGE = """<html><head><title>Loops</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<main><h1>Loops</h1>
<p>A &amp; B: use <code>for</code> loops whenever the number of
rounds is known before the first of them begins.</p>
<pre><code>for i in range(3):
    print(i)

    if i &lt; 2:
        pass
</code></pre>
<p>The second paragraph follows with enough words to be one.</p>
</main><footer>Copyright 2020, all rights reserved</footer><script>evil()</script></body></html>"""


def test_html_keeps_text_and_code_and_drops_the_rest():
    text = clean.clean_text(clean.html_text(PAGE))
    assert "A & B: use for loops whenever the number of rounds is known" in text
    assert "for i in range(3):\n    print(i)\n\n    if i < 2:\n        pass\n" in text
    assert "\n\nThe second paragraph follows" in text
    for gone in ("evil", "color", "<", "Copyright", "About us"):
        assert gone not in text.replace("i < 2", "")


def test_documentation_page_keeps_paragraphs_and_code():
    folder = importlib.util.find_spec("idlelib").submodule_search_locations[0]
    page = (Path(folder) / "help.html").read_text(encoding="utf-8")
    text = clean.clean_text(clean.html_text(page))
    assert "IDLE is Python" in text and len(text) > 25_000
    assert text.count("\n\n") > 100
    assert "idle.py [-c command] [-d] [-e] [-h] [-i] [-r file] [-s] [-t title] [-] [arg]" in text
    assert "<p>" not in text and "javascript" not in text.lower()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("schÃ¶n and dâ€™accord", "schön and d'accord"),  # mojibake
        ("Tom &amp; Jerry &lt;3 &#233;t&eacute;", "Tom & Jerry <3 été"),
        ("bell\x07 \x00and\x1b[31m red", "bell and red"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("blank\u00a0blank\u2003wide", "blank blank wide"),
        ("\ufeffmark \u200bhere soft\u00adhyphen", "mark here softhyphen"),
        ("e\u0301", "é"),
        ("trailing   \nblanks \t\n\n\n\n\nend\n\n", "trailing\nblanks\n\nend"),
        (" indented\n    more\n\tand more ", "indented\n    more\n\tand more"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("👩\u200d👩\u200d👧 joined", "👩\u200d👩\u200d👧 joined"),
    ],
)
def test_repairs(raw, expected):
    assert clean.clean_text(raw) == expected


def test_quotes_stay_when_asked():
    assert clean.clean_text("\u201cquoted\u201d", straight_quotes=False) == "\u201cquoted\u201d"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_result_is_utf8_and_has_no_control_characters(text):
    cleaned = clean.clean_text(text)
    cleaned.encode()
    assert not any(ord(c) < 32 and c not in "\n\t" for c in cleaned)
    assert cleaned == cleaned.strip()


GOOD = "The quick brown fox jumps over the lazy dog, and nobody minds."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        ("Too short.", "too short"),
        ("Long words. " * 1000, "too long"),
        ("1234567890 +-*/ 0987654321 a few", "few letters"),
        ("\n".join(["Click here to subscribe."] * 5 + [GOOD]), "repeated lines"),
        ("spam and eggs " * 200, "repetitive"),
        ("\n".join(f"{i}: {GOOD[i:]}{GOOD[:i]}" for i in range(5)), None),
    ],
)
def test_filters(text, reason):
    assert clean.reject(text, RULES) == reason
    document, found = clean.clean_document(Document("d", text + "  \n", "file"), False, RULES)
    assert (document.id, document.text, found) == ("d", text.strip(), reason)


def test_conversations():
    def conversation(*texts):
        turns = [Message(r, t) for r, t in zip(["user", "assistant"] * 3, texts, strict=False)]
        return Conversation("c", tuple(turns), "file")

    record, reason = clean.clean_conversation(conversation("Hi &amp; hello ", "Hi."), RULES)
    assert reason is None and [m.content for m in record.messages] == ["Hi & hello", "Hi."]
    assert clean.clean_conversation(conversation("Hi", " \x07 "), RULES)[1] == "empty message"
    assert clean.clean_conversation(conversation("?!", "..."), RULES)[1] == "few letters"
    with_context = Conversation(
        "c", (Message("user", "Sum it up", "a &lt; b"), Message("assistant", "a < b")), "file"
    )
    assert clean.clean_conversation(with_context, RULES)[0].messages[0].context == "a < b"
