"""The tokenizer's two promises (exact round trip, unforgeable controls), determinism and errors."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptlab.data import tokenizer as tokenizer_lib
from gptlab.data.tokenizer import CONTROLS, SentencePieceTokenizer, Tokenizer
from gptlab.run.errors import UserError

TEXTS = [
    "Hello there, how are you today?\nI am fine, thank you.\nAnd you?\n\nOh, 12345 reasons.",
    "def f(x):\n    return x + 1  # a comment\n\n\nclass A:\n    pass\n",
    "Die Straße ist naß. Ça va très bien, merci. Тихий вечер.",
] * 60
SPECIAL = [*CONTROLS, "<|pad|>", "<|eos|>", "<|unk|>", "<|bos|>", "<unk>", "<s>", "</s>",
           "<0x41>", "\u2581",
           "\u2585", "\0", "\r", "\r\n", "\t", "\n", "  ", "\u2047",
           "\ufffd", "\ufeff", "\u200d", "😀", "👩‍👩‍👧", "é", "e\u0301",
           "\u2028", "\x85", "\U0010ffff", "\ufffe"]  # fmt: skip
valid_unicode = st.text(st.characters(exclude_categories=["Cs"]))
tricky = st.lists(st.one_of(st.sampled_from(SPECIAL), valid_unicode), max_size=8).map("".join)


def train(path, model_type="bpe", **overrides):
    args = dict(vocab_size=340, character_coverage=0.9995, max_sentences=0, num_threads=1, seed=0)
    return tokenizer_lib.train(TEXTS, path, model_type=model_type, **(args | overrides))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tok(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp(request.param) / "vocabulary.model", request.param)


@settings(max_examples=300, deadline=None)
@given(text=tricky)
@example("".join(SPECIAL))
@example("<|end|>")
@example("\u2581a \u2581\u2581 b\u2581")
@example(" leading and trailing \n")
def test_every_string_round_trips_without_control_tokens(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()
    assert min(ids, default=9) >= 9
    assert tok.token_bytes[np.asarray(ids, np.int32)].sum() == len(text.encode())


@pytest.mark.parametrize("text", [*TEXTS[:3], "two  blanks   three\n  and\n\n\nbreaks. \n x"])
def test_word_by_word_is_what_sentencepiece_does(tmp_path_factory, text):
    # With unigram sums of scores differ in their last bits, so ties may fall otherwise.
    tok = train(tmp_path_factory.mktemp("bpe") / "m.model", "bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tok.model)
    for sample in (text, " " + text * 3, text[::-1]):
        assert tok.encode(sample) == processor.encode(sample)


def test_cache_stays_small_and_right(tok, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "_CACHED_WORDS", 4)
    fresh = SentencePieceTokenizer(tok.model)
    text = "one two three four five six seven one two " + "x" * 100
    assert fresh.encode(text) == tok.encode(text) == fresh.encode(text)
    assert len(fresh._words.cache) <= 4


def test_fixed_ids(tok):
    assert (tok.pad_id, tok.eos_id, tok.unk_id, tok.bos_id) == (0, 1, 2, 3)
    control = [tok.system_id, tok.user_id, tok.assistant_id, tok.context_id, tok.end_id]
    assert control == [4, 5, 6, 7, 8]
    assert [tok.piece(i) for i in control] == list(CONTROLS)
    assert tok.vocab_size == 340
    assert tok.token_bytes.shape == (340,) and tok.token_bytes.dtype == np.int32
    assert (tok.token_bytes[:9] == 0).all() and (tok.token_bytes[9:] > 0).all()
    assert tok.decode([tok.user_id, *tok.encode("hi"), tok.end_id, tok.pad_id]) == "hi"


def test_control_literals_in_training_text_make_no_difference(tmp_path):
    texts = [" ".join(CONTROLS) + " and text with <|end|> in it"] * 50
    tok = tokenizer_lib.train(
        texts, tmp_path / "m.model", model_type="bpe", vocab_size=290,
        character_coverage=1.0, max_sentences=0, num_threads=1, seed=0,
    )  # fmt: skip
    ids = tok.encode(texts[0])
    assert min(ids) >= 9 and tok.decode(ids) == texts[0]


def test_lone_surrogates_become_replacement_characters(tok):
    assert tok.decode(tok.encode("a\ud800b\u2581\udfff")) == "a\ufffdb\u2581\ufffd"


def test_digits_are_single_tokens(tok):
    assert len(tok.encode("12345")) == 5


def test_learns_line_breaks_and_uses_its_vocabulary(tok):
    pieces = [tok.piece(i) for i in range(tok.vocab_size)]
    assert any("\n" in piece for piece in pieces)
    text = "Hello there, how are you"
    assert len(tok.encode(text)) < 0.75 * len(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_across_processes(tmp_path, model_type):
    here = train(tmp_path / "here.model", model_type, num_threads=2, max_sentences=120, seed=3)
    program = (
        "import sys; from tests.data import test_tokenizer as t;"
        f"t.train(sys.argv[1], {model_type!r}, num_threads=2, max_sentences=120, seed=3)"
    )
    there = tmp_path / "there.model"
    subprocess.run([sys.executable, "-c", program, str(there)], check=True, timeout=60)
    assert there.read_bytes() == here.model


def test_sentences_lose_nothing_the_trainer_would_take():
    text = "word " * 300 + "\n" + "x" * 2500 + "\nend \u2581 of\0it\n"
    cut = list(tokenizer_lib.sentences([text]))
    assert "".join(cut) == text.replace("\u2581", "").replace("\0", "")
    assert max(len(sentence) for sentence in cut) <= 500


def test_load_from_workdir_file_and_pickle(tok, tmp_path):
    (tmp_path / "vocabulary.model").write_bytes(tok.model)
    loaded = [
        Tokenizer.load(tmp_path),
        Tokenizer.load(str(tmp_path / "vocabulary.model")),
        pickle.loads(pickle.dumps(tok)),
    ]
    for other in loaded:
        assert other.encode("Hello \u2581 there") == tok.encode("Hello \u2581 there")


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="train_tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="bad.model"):
        Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(UserError, match="config.vocab_size"):
        train(tmp_path / "m", vocab_size=50_000)
    with pytest.raises(UserError, match="config.vocab_size"):
        train(tmp_path / "m", vocab_size=100)
    with pytest.raises(UserError, match="config.model_type"):
        train(tmp_path / "m", model_type="wordpiece")


def test_imports_no_tensorflow():
    program = "import sys, gptlab.data.chat; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
