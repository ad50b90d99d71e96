"""Exact duplicates: texts that are the same but for case, white space and width of characters.

Of several copies the one in test stays, then validation, then train, and among those the one with
the smallest id: held-out data are kept whole and nothing of them is trained on.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from gptlab.data.records import Comparison, Conversation, Document, Message

SPLITS = ("train", "validation", "test")
_PRIORITY = {"test": 0, "validation": 1, "train": 2}
T = TypeVar("T")


def normal_form(text: str) -> str:
    """NFKC, case folded, runs of white space as one blank."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def text_hash(parts: Iterable[str]) -> bytes:
    """16 bytes that two lists of texts share when their normal forms do."""
    state = hashlib.blake2b(digest_size=16)
    _update(state, parts)
    return state.digest()


def _update(state: hashlib.blake2b, parts: Iterable[str]) -> None:
    for part in parts:
        data = normal_form(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)


def prefix_hashes(messages: Sequence[Message]) -> Iterator[bytes]:
    """messages_hash of each prefix of a conversation, the shortest first, in one pass."""
    state = hashlib.blake2b(digest_size=16)
    for m in messages:
        _update(state, (m.role, m.content, m.context or ""))
        yield state.digest()


def messages_hash(messages: Sequence[Message]) -> bytes:
    """text_hash over roles, contents and contexts."""
    return text_hash(part for m in messages for part in (m.role, m.content, m.context or ""))


def record_hash(record: Document | Conversation | Comparison) -> bytes:
    """What makes two records of a kind duplicates of each other."""
    if isinstance(record, Document):
        return b"d" + text_hash([record.text])
    if isinstance(record, Conversation):
        return b"c" + messages_hash(record.messages)
    replies = [c.content for c in record.candidates]
    return b"r" + messages_hash(record.prompt.messages) + text_hash(replies)


def keep_order(split: str, record_id: str) -> tuple[int, str]:
    """Sort key: among duplicates the smallest is kept."""
    return _PRIORITY[split], record_id


def unique(entries: Iterable[tuple[bytes, str, str, T]]) -> tuple[list[T], list[tuple[T, str]]]:
    """Splits (hash, split, id, value) into values to keep and others, each with its keeper's id.

    Both in the order of the keys, whatever the order of the entries.
    """
    kept: list[T] = []
    dropped: list[tuple[T, str]] = []
    last, keeper = None, ""
    for key, _, record_id, value in sorted(entries, key=lambda e: (e[0], keep_order(e[1], e[2]))):
        if key == last:
            dropped.append((value, keeper))
        else:
            kept.append(value)
            last, keeper = key, record_id
    return kept, dropped
