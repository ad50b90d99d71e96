"""Stage 2: corpus -> a SentencePiece vocabulary with byte fallback and the chat's control tokens.

    python -m gptlab.train_tokenizer --config=configs/train_tokenizer.py \
        --config.inputs.corpus=runs/clean --workdir=runs/vocabulary

Trains on the documents and conversations of train, then encodes and decodes *every* document and
message of train, validation and test and stops if one does not come back byte for byte. report.md
has the bytes a token on each and how much of the vocabulary is in use. The quickstart's 25 MB take
15 seconds.

Asked to stop (SIGTERM, Ctrl-C), it stops within a few records and starts anew next time;
SentencePiece itself can't be interrupted, so during its part the stop comes right after that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from gptlab.data import records, tokenizer
from gptlab.data.records import Conversation, Document, RecordReader
from gptlab.data.tokenizer import Tokenizer
from gptlab.run import artifact, files, program
from gptlab.run.errors import Interrupted, UserError

_POLLED_RECORDS = 20  # a stop is seen between so many
FIRST_BYTE, FIRST_LEARNT = 9, 265  # ids: controls, the 256 bytes, learnt pieces


def run(config: ConfigDict, workdir: str) -> None:
    """Trains, checks and describes one vocabulary."""
    artifact.check_inputs(config)
    with artifact.open_run(config, workdir, "train_tokenizer") as opened:
        if opened.finished:
            print(f"train_tokenizer: {workdir} is done")
            return
        directory = epath.Path(config.inputs.corpus) / "records"
        path = opened.workdir / tokenizer.MODEL_FILE
        vocabulary = tokenizer.train(
            to_learn(opened, directory),
            path,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            max_sentences=config.max_sentences,
            num_threads=config.num_threads,
            seed=config.seed,
        )
        figures = {
            split: check(vocabulary, _watched(opened, directory, split, f"checking {split}"))
            for split in splits(directory)
        }
        files.atomic_write(
            opened.workdir / "report.md", report(vocabulary, figures, opened.identity)
        )
        opened.results(
            **{f"{split}/{k}": v for split, f in figures.items() for k, v in f.summary().items()}
        )
        opened.complete(hashlib.sha256(vocabulary.model).hexdigest()[:16])


def splits(directory: epath.Path) -> list[str]:
    """The splits to be checked; a corpus may have been prepared without a test split."""
    there = records.record_sets(directory)
    has_test = "documents-test" in there or "conversations-test" in there
    return ["train", "validation", *(["test"] if has_test else [])]


def to_learn(opened: artifact.Run, directory: epath.Path) -> Iterator[str]:
    """The texts, and at their end a line that says what will happen without any progress bar."""
    size = 0
    for text in _watched(opened, directory, "train", "reading"):
        size += len(text)
        yield text
    print(
        f"train_tokenizer: SentencePiece learns {opened.config.vocab_size:,} tokens from "
        f"{size / 1e6:.1f} million characters, which shows no progress",
        flush=True,
    )


def readers(directory: epath.Path, split: str) -> list[RecordReader]:
    """Documents and conversations of a split, whichever there are."""
    there = records.record_sets(directory)
    found: list[RecordReader] = []
    if f"documents-{split}" in there:
        found.append(RecordReader(directory, "documents", split, Document))
    if f"conversations-{split}" in there:
        found.append(RecordReader(directory, "conversations", split, Conversation))
    if not found:
        raise UserError(f"{directory}: neither documents nor conversations of {split}; run prepare")
    return found


def texts(record: Document | Conversation) -> Iterator[str]:
    """A document's text, or the messages of a conversation with their contexts."""
    if isinstance(record, Document):
        yield record.text
        return
    for message in record.messages:
        yield message.content
        if message.context is not None:
            yield message.context


@dataclasses.dataclass
class Figures:
    """What encoding and decoding a set of texts showed."""

    vocab_size: int
    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    counts: np.ndarray = dataclasses.field(init=False)  # int64 [V]

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.vocab_size, np.int64)

    def summary(self) -> dict[str, float]:
        """Figures for the manifest."""
        return {
            "round_tripped_texts": self.texts,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "byte_fallback_fraction": self.byte_tokens / max(self.tokens, 1),
            "vocabulary_used": int((self.counts > 0).sum()),
        }


def check(vocabulary: Tokenizer, lines: Iterator[str]) -> Figures:
    """Encodes and decodes every text; UserError for one that does not come back as it was."""
    figures = Figures(vocabulary.vocab_size)
    for text in lines:
        data = text.encode("utf-8", "surrogatepass")
        ids = np.array(vocabulary.encode(text), np.int64)
        if vocabulary.decode_bytes(ids) != data or ids.min(initial=FIRST_BYTE) < FIRST_BYTE:
            raise UserError(
                f"the vocabulary does not round-trip {text[:80]!r}; please report this text"
            )
        figures.texts += 1
        figures.bytes += len(data)
        figures.tokens += len(ids)
        np.add.at(figures.counts, ids, 1)
    figures.byte_tokens = int(figures.counts[FIRST_BYTE:FIRST_LEARNT].sum())
    return figures


def _watched(opened: artifact.Run, directory: epath.Path, split: str, desc: str) -> Iterator[str]:
    """All texts of a split, under a progress bar; Interrupted if a stop was asked for."""
    sets = readers(directory, split)
    with opened.progress(sum(map(len, sets)), desc, unit="record") as bar:
        for record in itertools.chain.from_iterable(sets):
            if bar.count % _POLLED_RECORDS == 0 and opened.stop_requested():
                raise Interrupted(f"stopped while {desc}, which will start anew")
            yield from texts(record)
            bar.update()


def report(vocabulary: Tokenizer, figures: dict[str, Figures], identity: str) -> str:
    """report.md: figures per split, and the most and least used tokens of training."""
    names = list(figures["train"].summary())
    out = [f"# Vocabulary {identity}: {vocabulary.vocab_size:,} tokens", ""]
    out += ["Every text below was encoded and decoded, and came back byte for byte.", ""]
    out += [f"| | {' | '.join(figures)} |", "|---|" + "---:|" * len(figures)]
    for name in names:
        cells = (f.summary()[name] for f in figures.values())
        out.append(
            f"| {name.replace('_', ' ')} | "
            + " | ".join(f"{c:,}" if isinstance(c, int) else f"{c:.4f}" for c in cells)
            + " |"
        )
    counts = figures["train"].counts
    order = np.argsort(-counts, kind="stable")
    learnt = [i for i in order if i >= FIRST_LEARNT and counts[i]]
    out += ["", f"Most used: {_pieces(vocabulary, order[:30])}"]
    out += ["", f"Least used of the learnt: {_pieces(vocabulary, learnt[-30:])}"]
    return "\n".join(out) + "\n"


def _pieces(vocabulary: Tokenizer, ids: np.ndarray | list[int]) -> str:
    return " ".join("`" + repr(vocabulary.piece(i))[1:-1].replace("`", "'") + "`" for i in ids)


if __name__ == "__main__":
    program.main(run, "train_tokenizer")
