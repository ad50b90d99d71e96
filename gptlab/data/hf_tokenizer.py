"""The vocabulary of an imported model: its Hugging Face files behind the Tokenizer interface.

BPE over bytes (GPT-2, Llama 3, Qwen, SmolLM2), and SentencePiece's BPE with byte fallback (Llama 2,
Mistral). Ids are those of the `tokenizers` package but where that would break a promise of
tokenizer.py:

- Texts that are not in Unicode's form C stay as they are (Qwen's files would normalise them).
- Text that spells a *special* token is ordinary text. Special is what tokenizer.json marks so, and
  whatever tokenizer_config.json names. The other added tokens (Qwen3's <think>) are text to the
  vocabulary's makers and here: any text may contain them, and they decode to what they spell.
- Characters with bytes that the vocabulary lacks (SmolLM2 has eight too few: of control characters
  and empty planes) become U+FFFD; the package would drop these bytes.
- The blank that SentencePiece puts before a text is no part of `encode`. Where models expect it,
  `encode_document` and chat templates add it, as text.
"""

from __future__ import annotations

import functools
import json
import os
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from gptlab.data.tokenizer import BLANK, HF_FILE, Tokenizer, Words, valid_text
from gptlab.run.errors import UserError

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
# All that is read of an imported model's directory; older models keep names in the third.
FILES = (HF_FILE, CONFIG_FILE, "special_tokens_map.json", TEMPLATE_FILE, GENERATION_FILE)
# A document's end where a chat model's eos_token is the end of a turn.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Cut before a single blank between words. No family's rule for cutting text, nor any token (else
# the second is used), goes past that place.
_CHUNKS = re.compile(r"\s*\S+(?:(?! \S)\s+\S+)*(?:\s+\Z)?|\s+")
_WHOLE = re.compile(r"(?s:.+)")
# The blank in all its spellings, after anything but white space (Ċ, say, is a line break).
_CROSSES = re.compile("[^\\s\u2581\u0109-\u010d\u0120][ \u2581\u0120]")
_UTF8_BYTES = frozenset((*range(0xC0), *range(0xC2, 0xF5)))


class HFTokenizer(Tokenizer):
    """Text <-> token ids by a tokenizer.json.

    Attributes:
      names: the texts of bos_token, eos_token, ... as far as the files give them.
      special: {text: id} of the special tokens; no text is encoded as one of them.
      chat_template: Jinja source, or None.
      end_ids: the ids that end a reply by the files' word (eos_token, generation_config.json).
    """

    rounds_up = True

    def __init__(self, files: Mapping[str, bytes], where: str = "tokenizer"):
        """Takes files by name (see FILES); UserError, which says `where`, for what we can't use."""
        self.files = {name: data for name, data in files.items() if name in FILES}
        self._where = where
        settings = self._json(CONFIG_FILE)
        self.names = _names({**self._json("special_tokens_map.json"), **settings})
        spec = self._json(HF_FILE)
        try:
            self._prefix, self._byte_level, names_bos = _make_exact(spec, self.names, where)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}/{HF_FILE}: not in the form of the tokenizers package ({error!r})"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the package raises Exception itself
            raise UserError(f"{where}/{HF_FILE}: {str(error).splitlines()[0]}") from None
        self._tokenizer.encode_special_tokens = True
        added = {token["content"]: token for token in spec["added_tokens"]}
        ids = {text: self._tokenizer.token_to_id(text) for text in added}
        self.special = {
            text: i for text, i in ids.items() if i is not None and added[text]["special"]
        }
        self._special_ids = frozenset(self.special.values())
        crosses = any(map(_CROSSES.search, (*spec["model"]["vocab"], *added)))
        self._words = Words(_WHOLE if crosses else _CHUNKS, self._encode)
        self._make_tables(spec["model"]["vocab"], added)
        self._choose_ids(names_bos or bool(settings.get("add_bos_token")))
        self.chat_template = self._template(settings)

    @classmethod
    def read(cls, directory: os.PathLike | str) -> HFTokenizer:
        """Reads a directory of Hugging Face files."""
        path = epath.Path(directory)
        present = {name: path / name for name in FILES if (path / name).exists()}
        return cls({name: file.read_bytes() for name, file in present.items()}, str(path))

    def encode(self, text: str) -> list[int]:
        text = self._unwritable.sub("\ufffd", valid_text(text))
        if self._byte_level:
            return self._words.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(BLANK)):  # it would come back as a blank
            ids += [self._byte_ids[b] for b in BLANK.encode()] if i else []
            ids += self._words.encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        # The matcher leaves special tokens alone, but merges may make one of its letters.
        spelled: list[int] = []
        for i in ids:
            spelled += self._spelling[i] if i in self._special_ids else [i]
        return spelled

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table, size = self._bytes, self.vocab_size
        return b"".join([table[i] for i in ids if i < size])

    def piece(self, token: int) -> str:
        token = int(token)
        data = self._bytes[token] if token < self.vocab_size else b""
        if not data:
            return self._tokenizer.id_to_token(token) or f"<unused {token}>"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{b:02X}>" for b in data)

    def encode_document(self, text: str) -> list[int]:
        return [self.bos_id, *self.encode(self.blank_before(text, first=True) + text)]

    def blank_before(self, text: str, first: bool) -> str:
        """The blank that the model's own files put before a stretch of text, or nothing.

        `text` begins a whole text (`first`), or follows a special token.
        """
        wanted = self._prefix in ("prepend", "always") or (self._prefix == "first" and first)
        if not text or not wanted or (self._prefix != "prepend" and text.startswith(" ")):
            return ""
        return " "

    def __reduce__(self):
        return (HFTokenizer, (self.files, self._where))

    def _json(self, name: str) -> dict[str, Any]:
        """A file's object; {} for one that is not there, unless it is the vocabulary itself."""
        if name not in self.files and name != HF_FILE:
            return {}
        try:
            content = json.loads(self.files[name])
        except (KeyError, ValueError) as error:
            raise UserError(f"{self._where}/{name}: no readable JSON ({error})") from None
        if not isinstance(content, dict):
            raise UserError(f"{self._where}/{name}: not a JSON object")
        return content

    def _make_tables(self, vocab: Mapping[str, int], added: Mapping[str, Any]) -> None:
        """What every id decodes to, and the ids of single bytes."""
        texts = {i: token for token, i in vocab.items()}
        texts |= {
            i: token for token in added if (i := self._tokenizer.token_to_id(token)) is not None
        }
        self.vocab_size = 1 + max(texts)
        self._bytes = [b""] * self.vocab_size
        self._byte_ids: dict[int, int] = {}
        for i, token in texts.items():
            if token in added:
                self._bytes[i] = b"" if i in self._special_ids else token.encode()
            elif self._byte_level:
                self._bytes[i] = _from_alphabet(token)
                if len(token) == 1:
                    self._byte_ids[self._bytes[i][0]] = i
            elif _BYTE_TOKEN.fullmatch(token):
                self._bytes[i] = bytes([int(token[3:5], 16)])
                self._byte_ids[self._bytes[i][0]] = i
            else:
                self._bytes[i] = token.replace(BLANK, " ").encode()
        self._unwritable = _characters_with(_UTF8_BYTES - self._byte_ids.keys())
        complete = self._byte_level or len(self._byte_ids) == 256
        if not complete or self._unwritable.search("\ufffd\n" + string.printable[:95]):
            raise UserError(
                f"{self._where}/{HF_FILE}: it has tokens for {len(self._byte_ids)} single bytes "
                "only, so it can't write ordinary text"
            )
        self.token_bytes = np.array([len(b) for b in self._bytes], np.int32)
        self._spelling = {
            i: [self._byte_ids[b] for b in text.encode() if b in self._byte_ids]
            for text, i in self.special.items()
        }

    def _choose_ids(self, adds_bos: bool) -> None:
        """eos is the document's end; bos is the file's if it uses one, else that end, as GPT-2's
        documents begin; pad is never looked at, so any id will do.
        """
        declared = {name: self._tokenizer.token_to_id(text) for name, text in self.names.items()}
        ends = [self.special[text] for text in _DOCUMENT_ENDS if text in self.special]
        end = ends[0] if ends else declared.get("eos_token")
        if end is None:
            raise UserError(f"{self._where}/{CONFIG_FILE}: it names no eos_token")
        self.eos_id = end
        bos = declared.get("bos_token") if adds_bos else None
        self.bos_id = end if bos is None else bos
        pad, unknown = declared.get("pad_token"), declared.get("unk_token")
        self.pad_id = end if pad is None else pad
        self.unk_id = end if unknown is None else unknown
        ends = self._json(GENERATION_FILE).get("eos_token_id", [])
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        first = declared.get("eos_token")
        first = end if first is None else first
        self.end_ids = (first, *(i for i in dict.fromkeys(ends) if i != first))

    def _template(self, settings: Mapping[str, Any]) -> str | None:
        """The chat template: its own file, else the one in the config, which may hold several."""
        if TEMPLATE_FILE in self.files:
            return self.files[TEMPLATE_FILE].decode()
        found = settings.get("chat_template")
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            if "default" not in named:
                raise UserError(
                    f"{self._where}/{CONFIG_FILE}: none of its chat templates "
                    f"({', '.join(sorted(named))}) is called 'default'"
                )
            return named["default"]
        return found


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """{'eos_token': text, ...}; a token is given as its text or as an object that holds it."""
    found = {name: settings.get(name) for name in _NAMES}
    texts = {name: t["content"] if isinstance(t, dict) else t for name, t in found.items()}
    return {name: text for name, text in texts.items() if text}


def _make_exact(
    spec: dict[str, Any], names: Mapping[str, str], where: str
) -> tuple[str, bool, bool]:
    """Changes a tokenizer.json so that it encodes any text as it is.

    Returns where it had put a blank before text ('never'; 'first', of a whole text; 'always' but
    before another blank, after special tokens too; 'prepend', before blanks as well), whether it is
    BPE over bytes, and whether it puts bos before a text.
    """
    where = f"{where}/{HF_FILE}"
    model = spec.get("model", {})
    decoders = {step["type"] for step in _steps(spec.get("decoder"), "decoders")}
    byte_level = "ByteLevel" in decoders
    kind = model.get("type", "BPE" if "merges" in model else "no")  # GPT-2's own doesn't say
    if kind != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise UserError(
            f"{where}: {kind} model with decoders {sorted(decoders)}; gptlab "
            "reads BPE over bytes and BPE with byte fallback, which can write every text"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{where}: marks inside words (continuing_subword_prefix) are not read")
    prefix, normalizers, pre = "never", [], []
    for step in _steps(spec.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == BLANK:
            prefix = "prepend"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            normalizers.append(step)
        elif step["type"] != "NFC":
            raise UserError(f"{where}: its normalizer {step['type']} changes texts for good")
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            old = "always" if step.pop("add_prefix_space", True) else "never"
            prefix = step.get("prepend_scheme", old)
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            prefix = "always" if step["add_prefix_space"] else prefix
            step["add_prefix_space"] = False
        elif step["type"] not in ("Split", "Digits") or step.get("behavior") == "Removed":
            raise UserError(f"{where}: its pre_tokenizer {step['type']} leaves out parts of a text")
        pre.append(step)
    names_bos = names.get("bos_token") in _first_special(spec.get("post_processor"))
    spec["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if pre else None
    spec.update(post_processor=None, truncation=None, padding=None)
    model["dropout"] = None
    _mark_special(spec, names)
    return prefix, byte_level, names_bos


def _mark_special(spec: dict[str, Any], names: Mapping[str, str]) -> None:
    """Named tokens are special, listed or not. None takes blanks beside it: they are text."""
    added = spec.setdefault("added_tokens", [])
    listed = {token["content"]: token for token in added}
    for text in sorted(set(names.values())):
        if text not in listed and text in spec["model"]["vocab"]:
            listed[text] = {"id": spec["model"]["vocab"][text], "content": text}
            listed[text] |= dict.fromkeys(("single_word", "normalized"), False)
            added.append(listed[text])
        if text in listed:
            listed[text]["special"] = True
    for token in added:
        token.update(lstrip=False, rstrip=False)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be a sequence of them."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _first_special(post_processor: dict[str, Any] | None) -> set[str]:
    """The special tokens that a post-processor puts before a text."""
    steps = _steps(post_processor, "processors")
    starts = [s["single"][0] for s in steps if s["type"] == "TemplateProcessing" and s["single"]]
    return {start["SpecialToken"]["id"] for start in starts if "SpecialToken" in start}


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as characters: itself if it can be seen, else from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + i): b for i, b in enumerate(unseen)}


def _characters_with(missing: frozenset[int] | set[int]) -> re.Pattern[str]:
    """Matches the characters whose UTF-8 needs one of these bytes; of the bytes inside characters,
    every one that is not ASCII.
    """
    ranges = []
    for b in sorted(missing):
        if b < 0x80:
            first, count = b, 1
        elif b < 0xC0:
            first, count = 0x80, 0x110000 - 0x80
        else:
            shift = 6 if b < 0xE0 else 12 if b < 0xF0 else 18
            first, count = (b & (0x1F, 0x0F, 0x07)[shift // 6 - 1]) << shift, 1 << shift
        last = min(first + count, 0x110000) - 1
        ranges.append(f"\\U{first:08x}-\\U{last:08x}")
    return re.compile(f"[{''.join(ranges)}]" if ranges else "(?!)")


def _from_alphabet(token: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in token)
