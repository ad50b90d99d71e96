"""Hugging Face tokenizer files made from a GGUF file's metadata.

GGUF keeps tokens, their types, merges or scores, and names the rule by which text is cut before
BPE (`tokenizer.ggml.pre`), but not the rule itself: those of the families that gptlab imports stand
below. Field names: the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptlab.data.hf_tokenizer import CONFIG_FILE, GENERATION_FILE
from gptlab.data.tokenizer import BLANK, HF_FILE
from gptlab.run.errors import UserError

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends a reply

# English contractions; a word with the mark before it; numbers; marks; line breaks; blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_step(use_regex: bool) -> dict[str, Any]:
    """To GPT-2's alphabet of bytes; `use_regex` first cuts as GPT-2 does."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {**step, "use_regex": use_regex}


def _words_step(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS.format(digits=digits)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = [_words_step("{1,3}"), _bytes_step(False)]
_QWEN_2 = [_words_step(""), _bytes_step(False)]
# tokenizer.ggml.pre -> the pre-tokenizer's steps
_PRE: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_bytes_step(True)],
    "smollm": [_DIGITS, _bytes_step(True)],
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
}


def gguf_tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """{file name: content} of the tokenizer that a GGUF file's metadata describes.

    Args:
      fields: the file's metadata by key ('tokenizer.ggml.model', ...), as str, int, bool, and lists
        of these.

    Returns:
      tokenizer.json, tokenizer_config.json and generation_config.json: what HFTokenizer reads and
      transformers loads.

    Raises:
      UserError: a kind of vocabulary, or a rule for cutting text, that gptlab doesn't know.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"GGUF: tokenizer.ggml.model is {kind!r}; gptlab reads 'gpt2' (BPE over bytes) and "
            "'llama' (SentencePiece)"
        )
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    types: Sequence[int] = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    names = {}
    for name, key in _KEYS.items():
        if (token := fields.get(f"tokenizer.ggml.{key}")) is not None:
            names[name] = tokens[token]
    bos_added = bool(fields.get("tokenizer.ggml.add_bos_token", _adds_bos(kind, fields)))
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, set(names.values())),
        **(_byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, types)),
        "post_processor": None,
    }
    if bos_added and "bos_token" in names:
        spec["post_processor"] = _bos_first(names["bos_token"], tokens.index(names["bos_token"]))
    config = {
        **names,
        "add_bos_token": bos_added,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    ends = [fields.get(f"tokenizer.ggml.{key}") for key in _ENDS]
    generation = {"eos_token_id": [i for i in dict.fromkeys(ends) if i is not None]}
    return {
        HF_FILE: json.dumps(spec, ensure_ascii=False).encode(),
        CONFIG_FILE: (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
        GENERATION_FILE: (json.dumps(generation, indent=2) + "\n").encode(),
    }


def _adds_bos(kind: str, fields: Mapping[str, Any]) -> bool:
    """Whether the family puts bos before a text, where the file doesn't say."""
    return kind == "llama" or fields.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3")


def _added(tokens: Sequence[str], types: Sequence[int], named: set[str]) -> list[dict[str, Any]]:
    """What isn't made by merges. Unused rows are special: no text is one of them."""
    special = (_UNKNOWN, _CONTROL, _UNUSED)
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in special or token in named,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (*special, _USER_DEFINED) or token in named
    ]


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """BPE over bytes, by its merges."""
    rule = str(fields.get("tokenizer.ggml.pre"))
    if rule not in _PRE:
        raise UserError(
            f"GGUF: tokenizer.ggml.pre is {rule!r}, a rule for cutting text that gptlab doesn't "
            f"know; it knows {', '.join(_PRE)}"
        )
    merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    return {
        "normalizer": {"type": "NFC"} if rule == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[rule]},
        "decoder": _bytes_step(True),
        # Llama 3's file has words that its merges don't lead to.
        "model": _bpe(tokens, merges, ignore_merges=_PRE[rule] is _LLAMA_3),
    }


def _sentencepiece(fields: Mapping[str, Any], types: Sequence[int]) -> dict[str, Any]:
    """SentencePiece's BPE: two pieces are merged if their sum is one, the best score first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    learnt = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }
    merges = []
    for token, i in learnt.items():
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        merges += [
            (-scores[i], learnt[left], learnt[right], left, right)
            for left, right in cuts
            if left in learnt and right in learnt
        ]
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": BLANK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, [[left, right] for *_, left, right in sorted(merges)], **options),
    }


def _bos_first(text: str, token: int) -> dict[str, Any]:
    """The post-processor that puts bos before a text."""
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, two],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }
