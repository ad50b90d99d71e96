"""Text <-> token ids: the one interface, and gptlab's own vocabularies behind it.

A vocabulary is what config.inputs.vocabulary holds: a SentencePiece model of train_tokenizer
(below), or the Hugging Face files of an imported model (hf_tokenizer.py). Two properties hold for
any text and either kind, checked by property tests, and by train_tokenizer on the whole corpus:

1. decode(encode(text)) == text, byte for byte. Here: normalisation is off, unknown characters fall
   back to their UTF-8 bytes, and U+2581 (which SentencePiece uses for the blank, so that it would
   come back as a blank) is written as its three byte tokens.
2. encode never produces a control token. Here they are SentencePiece *control symbols*, which its
   matcher does not contain at all: a text that spells out a control token is ordinary text.

This file is free of TensorFlow; gptlab.data.tasks wraps the interface as a seqio Vocabulary.
"""

from __future__ import annotations

import abc
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import sentencepiece
from etils import epath

from gptlab.run import files
from gptlab.run.errors import UserError

MODEL_FILE = "vocabulary.model"
HF_DIRECTORY, HF_FILE = "tokenizer", "tokenizer.json"
PAD, EOS, UNK, BOS = "<|pad|>", "<|eos|>", "<|unk|>", "<|bos|>"
CONTROLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|context|>", "<|end|>")
BLANK = "\u2581"
_BLANK_BYTES = BLANK.encode()
# SentencePiece's trainer drops every sentence in which one of these occurs.
_RESERVED = re.compile("[\0\t\u2581\u2585]")
_WORDS = re.compile(" *[^ ]+| +")
_CACHED_CHARS, _CACHED_WORDS = 32, 1 << 18
_SENTENCE_CHARS = 500  # so at most 2 kB of UTF-8


class Tokenizer(abc.ABC):
    """A vocabulary. Ids are 0 .. vocab_size - 1; a model may have more rows than that."""

    vocab_size: int
    pad_id: int  # fills up rows; masks say what is real, never this id
    eos_id: int  # ends a document
    bos_id: int  # begins one
    unk_id: int  # never produced
    token_bytes: np.ndarray  # int32 [V], bytes of text of each token; 0 for control tokens
    rounds_up: bool  # models of this vocabulary may have unused rows after its last token

    @staticmethod
    def load(path: os.PathLike | str) -> Tokenizer:
        """Loads the vocabulary of an artifact, or a vocabulary's own file or directory.

        Raises UserError when there is none, or none that gptlab can use.
        """
        file = find_vocabulary(path)
        if file is None:
            raise UserError(
                f"{path}: no vocabulary here (neither {MODEL_FILE} nor {HF_DIRECTORY}/{HF_FILE}); "
                "run gptlab.train_tokenizer, or import a model with gptlab.convert, first"
            )
        if file.name.endswith(".json"):
            # It imports this module, and the tokenizers package that only its kind needs.
            from gptlab.data.hf_tokenizer import HFTokenizer

            return HFTokenizer.read(file.parent)
        return SentencePieceTokenizer(file.read_bytes(), str(file))

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of any text, never a control id. Lone surrogates (no text) become U+FFFD."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, control tokens dropped; a prefix of ids gives a prefix of bytes."""

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """A token as people read it: its text, a control token's name, or `<0x0A>` for a byte."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens dropped; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def encode_document(self, text: str) -> list[int]:
        """Ids of a document as models of this vocabulary read it: with bos, without eos."""
        return [self.bos_id, *self.encode(text)]


def find_vocabulary(path: os.PathLike | str) -> epath.Path | None:
    """The file of the vocabulary that an artifact, directory or file is; None if there is none."""
    file = epath.Path(path)
    if not file.is_dir():
        return file if file.exists() else None
    candidates = (file / MODEL_FILE, file / HF_DIRECTORY / HF_FILE, file / HF_FILE)
    return next((candidate for candidate in candidates if candidate.exists()), None)


class Words:
    """Encodes text word by word and remembers the short ones: running text repeats itself.

    `pattern` cuts any text into stretches that are encoded alike alone and together.
    """

    def __init__(self, pattern: re.Pattern[str], encode: Callable[[str], list[int]]):
        self._find, self._encode = pattern.findall, encode
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of the words of a text, one after another."""
        cache = self.cache
        ids: list[int] = []
        for word in self._find(text):
            found = cache.get(word)
            ids += self._encode_word(word) if found is None else found
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _CACHED_CHARS and len(self.cache) < _CACHED_WORDS:
            self.cache[word] = ids
        return ids


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary of train_tokenizer.

    Ids 0-3 are pad, eos, unk, bos; 4-8 the chat format's control tokens; 9-264 the 256 bytes.
    """

    rounds_up = False

    def __init__(self, model: bytes, name: str = "vocabulary"):
        """Takes a serialised model; UserError (which says `name`) when it is none of ours."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model: {error}") from None
        expected = (PAD, EOS, UNK, BOS, *CONTROLS)
        size = self._processor.get_piece_size()
        pieces = [self._processor.id_to_piece(i) for i in range(size)]
        if tuple(pieces[: len(expected)]) != expected:
            raise UserError(
                f"{name}: its first tokens are {pieces[: len(expected)]}, not {list(expected)}; "
                "train it with gptlab.train_tokenizer"
            )
        self.vocab_size: int = size
        self.pad_id, self.eos_id, self.unk_id, self.bos_id = 0, 1, 2, 3
        self.system_id, self.user_id, self.assistant_id, self.context_id, self.end_id = range(4, 9)
        self._bytes = [self._piece_bytes(i, piece) for i, piece in enumerate(pieces)]
        self._words = Words(_WORDS, self._encode_word)
        self._blank_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _BLANK_BYTES]
        self.token_bytes = np.array(
            [len(b) for b in self._bytes], np.int32
        )  # [V], 0 for control tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of any text, never a control id. Lone surrogates (no text) become U+FFFD.

        No token spans the border between a word and the blanks that follow it, so words (with the
        blanks before them) are encoded one by one and remembered: 3 to 4 times SentencePiece's own
        speed on running text with the same result (with unigram, but for the choice among equals).
        """
        return self._words.encode(text)

    def _encode_word(self, word: str) -> list[int]:
        text = valid_text(word)
        ids = []
        # The text between U+2581s is encoded by SentencePiece, each U+2581 by its byte tokens.
        for i, part in enumerate(text.split(BLANK)):
            ids += self._blank_ids if i else []
            ids += self._processor.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, control tokens dropped; a prefix of ids gives a prefix of bytes."""
        table = self._bytes
        return b"".join([table[i] for i in ids])

    def piece(self, token: int) -> str:
        """A token as people read it: its text, a control token's name, or `<0x0A>` for a byte."""
        return self._processor.id_to_piece(int(token)).replace(BLANK, " ")

    def __reduce__(self):
        return (SentencePieceTokenizer, (self.model,))

    def _piece_bytes(self, token: int, piece: str) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(BLANK, " ").encode()


def train(
    texts: Iterable[str],
    out_path: os.PathLike | str,
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
    max_sentences: int,
    num_threads: int,
    seed: int,
) -> SentencePieceTokenizer:
    """Trains a vocabulary on `texts` and writes it to `out_path`.

    model_type is 'bpe' or 'unigram'. With max_sentences > 0 that many stretches of text (about 2
    kB each) are drawn by reservoir sampling under `seed`; 0 takes everything. The model is a pure
    function of the arguments: num_threads is one of them, because unigram's expectations are
    summed thread by thread. UserError when the texts are too few for vocab_size. What reading
    `texts` raises is raised here.
    """
    if model_type not in ("bpe", "unigram"):
        raise UserError(f"config.model_type is {model_type!r}; use 'bpe' or 'unigram'")
    sentencepiece.SetRandomGeneratorSeed(seed)
    model = io.BytesIO()
    failures: list[BaseException] = []

    def feed() -> Iterator[str]:
        try:
            yield from sentences(texts)
        except Exception as error:  # the trainer would take it for the end of the texts
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=feed(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=3,
            pad_piece=PAD,
            eos_piece=EOS,
            unk_piece=UNK,
            bos_piece=BOS,
            control_symbols=list(CONTROLS),
            input_sentence_size=max_sentences,
            shuffle_input_sentence=max_sentences > 0,
            max_sentence_length=4 * _SENTENCE_CHARS,
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot train a vocabulary of {vocab_size} tokens on these texts ({reason}); "
            "change config.vocab_size or give more text"
        ) from None
    if failures:
        raise failures[0]
    files.atomic_write(out_path, model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), str(out_path))


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into the trainer's sentences: at most 2 kB, without the characters it refuses.

    A cut falls before a line break where there is one: the trainer strips them from the end of a
    sentence, and line breaks should be learnt.
    """
    for text in texts:
        for part in _RESERVED.split(valid_text(text)):
            start = 0
            while start < len(part):
                stop = start + _SENTENCE_CHARS
                if stop < len(part):
                    breaks = (part.rfind(mark, start + 1, stop) for mark in "\n ")
                    stop = next((b for b in breaks if b > 0), stop)
                yield part[start:stop]
                start = stop


def valid_text(text: str) -> str:
    """`text` itself if it is valid Unicode, else with its lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text
