"""Cleaning: main text of HTML, Unicode repair, white space; and the filters that drop documents.

HTML goes through resiliparse. Beside trafilatura it is maintained as actively, took the same 45 ms
for idlelib/help.html (79 kB), and kept 36.7 kB of its text where trafilatura kept 16.3 kB, with
paragraphs apart and the blank lines inside code blocks in place.
"""

from __future__ import annotations

import dataclasses
import re
import zlib

import ftfy

from gptlab.data.records import Conversation, Document, Message
from gptlab.run.errors import UserError

# What ftfy leaves: invisible characters that only confuse a vocabulary (joiners belong to emoji
# and scripts: kept).
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\ufff9-\ufffc]")
_BREAKS = re.compile("[\x0b\x0c]")  # vertical tab, form feed
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_ODD_BLANKS = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_PLAIN = re.compile(r"[ -%'-~\n]*")  # printable ASCII without &: ftfy would change nothing
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")
_MANY_BREAKS = re.compile(r"\n{3,}")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The filters of config.clean; a text that breaks one is dropped and counted under its reason.

    max_repeated_lines: share of a text's characters in lines that occur before (Gopher, arXiv
    2112.11446, table A1). min_compressed: compressed size / size, by zlib; below it a text repeats
    itself within its lines.
    """

    min_chars: int
    max_chars: int
    min_letters: float
    max_repeated_lines: float
    min_compressed: float
    straight_quotes: bool


def html_text(page: str) -> str:
    """Main text of a page: headings, paragraphs, lists, tables, code; no navigation."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise UserError("reading HTML needs resiliparse: pip install resiliparse") from None
    return extract_plain_text(
        page,
        main_content=True,
        list_bullets=True,
        alt_texts=False,
        links=False,
        form_fields=False,
        noscript=False,
    )


def clean_text(text: str, straight_quotes: bool = True) -> str:
    """Repaired Unicode (mojibake, entities, control characters; NFC), even white space.

    Indentation and single blank lines stay: they carry the structure of code and paragraphs.
    """
    if not _PLAIN.fullmatch(text):
        text = ftfy.fix_text(text, uncurl_quotes=straight_quotes, unescape_html="auto")
        text = _CONTROL.sub("", _INVISIBLE.sub("", _BREAKS.sub("\n", text)))
        text = _ODD_BLANKS.sub(" ", text)
    return _MANY_BREAKS.sub("\n\n", _TRAILING.sub("", text)).strip()


def clean_document(document: Document, html: bool, rules: Rules) -> tuple[Document, str | None]:
    """The document with clean text, and the reason to drop it, or None."""
    text = html_text(document.text) if html else document.text
    text = clean_text(text, rules.straight_quotes)
    return dataclasses.replace(document, text=text), reject(text, rules)


def clean_conversation(record: Conversation, rules: Rules) -> tuple[Conversation, str | None]:
    """The conversation with clean messages, and the reason to drop it, or None.

    min_chars is not asked of a conversation; an empty message is a reason of its own, as dropping
    just that one would join two turns of the same speaker.
    """
    messages = tuple(_clean_message(m, rules) for m in record.messages)
    record = dataclasses.replace(record, messages=messages)
    if any(not m.content for m in messages if m.role != "system"):
        return record, "empty message"
    text = "\n".join(m.content for m in messages)
    return record, reject(text, dataclasses.replace(rules, min_chars=1))


def _clean_message(message: Message, rules: Rules) -> Message:
    context = message.context
    if context is not None:
        context = clean_text(context, rules.straight_quotes)
    return Message(message.role, clean_text(message.content, rules.straight_quotes), context)


def reject(text: str, rules: Rules) -> str | None:
    """Why a clean text should be dropped, or None."""
    if not text:
        return "empty"
    if len(text) < rules.min_chars:
        return "too short"
    if len(text) > rules.max_chars:
        return "too long"
    if sum(map(str.isalpha, text)) < rules.min_letters * len(text):
        return "few letters"
    lines = [line for line in text.split("\n") if line.strip()]
    repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
    if len(lines) > 3 and repeated > rules.max_repeated_lines * len(text):
        return "repeated lines"
    data = text.encode("utf-8", "replace")
    if len(data) > 500 and len(zlib.compress(data, 1)) < rules.min_compressed * len(data):
        return "repetitive"
    return None
