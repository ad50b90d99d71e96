"""Hugging Face vocabularies: the interface's two promises, known ids, special ids, errors."""

import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptlab.data.gguf_tokenizer import gguf_tokenizer_files
from gptlab.data.hf_tokenizer import HFTokenizer
from gptlab.data.tokenizer import Tokenizer
from gptlab.run.errors import UserError
from tests.data import hf_vocabularies as hf

CONTROLS = [*hf.SPECIAL, "<s>", "</s>", "<unk>", "[INST]", "<<SYS>>", "<0x41>", "<|im_", "</s"]
pieces = st.one_of(
    st.sampled_from([*CONTROLS, *hf.THOUGHTS, *hf.WORDS, " ", "  ", "\n", "\n\n", "\u2581",
                     "e\u0301", "\ufffd", "\0", "\u00a0", "😀", "\u2028"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)  # fmt: skip
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(scope="module", params=sorted(hf.FIELDS))
def tok(request):
    return hf.tokenizer(request.param)


@settings(max_examples=50)
@given(text=texts)
@example("".join(CONTROLS))
@example(" leading and trailing \n")
@example("\u2581a \u2581\u2581 b\u2581")
def test_every_string_round_trips_without_special_tokens(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not set(tok.special.values()) & set(ids)
    assert tok.token_bytes[np.asarray(ids, np.int32)].sum() == len(text.encode())
    cut = random.Random(text).randint(0, len(ids))
    assert text.encode().startswith(tok.decode_bytes(ids[:cut]))
    document = tok.encode_document(text)
    assert document[0] == tok.bos_id and tok.decode(document).removeprefix(" ") in (
        text, text.removeprefix(" ")
    )  # fmt: skip


@settings(max_examples=50)
@given(text=st.text("a\u00e91,. \n\t\u00a0'-", max_size=40).map("a film {} was".format))
@example("1  2 3   4\n 5 \n\n  6.\n7 . \n8 's it's \u00a0 9 ")
def test_word_by_word_is_what_the_package_does(tok, text):
    assert tok.encode(text) == tok._encode(text)
    tok.encode("a film")
    assert "a" in tok._words.cache and " film" in tok._words.cache  # it is cut, and remembered


def test_known_ids_of_bytes():
    tok = hf.tokenizer("chatml")
    fields = hf.FIELDS["chatml"]()["tokenizer.ggml.tokens"]
    expected = ["Hello", "Ġthere", ",", "Ġyou", "Ġ", "1", "2", "!", "Ċ", "Ġ", "Ġthe", "Ã", "©"]
    ids = tok.encode("Hello there, you 12!\n  theé")
    assert [fields[i] for i in ids] == expected
    assert tok.vocab_size == len(fields) and tok.token_bytes.shape == (len(fields),)
    assert tok.encode("<think> the") == [fields.index("<think>"), fields.index("Ġthe")]


def test_digits_are_cut_as_the_family_does():
    cuts = {
        name: [tok.piece(i) for i in tok.encode("1234 11")]
        for name, tok in ((name, hf.tokenizer(name)) for name in ("chatml", "qwen3", "llama3"))
    }
    # No merge joins digits here, so what is seen is the same; the rule shows in a merge of two.
    assert set(map(tuple, cuts.values())) == {("1", "2", "3", "4", " ", "1", "1")}
    for pre, expected in (("smollm", ["1", "1"]), ("qwen2", ["1", "1"]), ("gpt-2", ["11"]),
                          ("llama-bpe", ["11"])):  # fmt: skip
        fields = hf.bpe_fields(pre)
        fields["tokenizer.ggml.merges"].append("1 1")
        fields["tokenizer.ggml.tokens"].append("11")
        fields["tokenizer.ggml.token_type"].append(hf.NORMAL)
        tok = HFTokenizer(gguf_tokenizer_files(fields))
        assert [tok.piece(i) for i in tok.encode("11")] == expected, pre


def test_sentencepiece_ids_are_those_of_sentencepiece(tmp_path):
    """The scores of a real SentencePiece model become merges that give its own ids."""
    sentences = ["the film was good , how are you there ? Hello 12345", "éàü the there  you"] * 50
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "m"), vocab_size=340,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = range(processor.get_piece_size())
    kinds = [
        hf.UNKNOWN if processor.is_unknown(i) else hf.CONTROL if processor.is_control(i)
        else hf.BYTE if processor.is_byte(i) else hf.NORMAL for i in count
    ]  # fmt: skip
    tok = HFTokenizer(
        gguf_tokenizer_files(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in count],
                "tokenizer.ggml.scores": [processor.get_score(i) for i in count],
                "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.bos_token_id": processor.bos_id(),
                "tokenizer.ggml.eos_token_id": processor.eos_id(),
            }
        )
    )
    for text in (sentences[0], sentences[1], "  two  blanks ", "the\nfilm 😀 theréthere", "x" * 50):
        assert tok.encode_document(text) == [processor.bos_id(), *processor.encode(text)]
        assert tok.decode(tok.encode(text)) == text


def test_text_that_merges_into_a_special_token_is_spelled():
    """In the fixture, merges lead from '</s' and '>' to '</s>', which is special."""
    fields = hf.llama_fields()
    made = gguf_tokenizer_files(fields)
    spec = json.loads(made["tokenizer.json"])
    spec["model"]["merges"].append(["</s", ">"])
    tok = HFTokenizer({**made, "tokenizer.json": json.dumps(spec).encode()})
    assert 2 in tok._tokenizer.encode("</s>").ids  # so the package alone would give it
    ids = tok.encode("the</s>")
    assert 2 not in ids and tok.decode(ids) == "the</s>"


def test_texts_are_not_normalised():
    spec = json.loads(hf.files("qwen3")["tokenizer.json"])
    assert spec["normalizer"] == {"type": "NFC"}  # the export keeps what transformers expects
    assert hf.tokenizer("qwen3").decode(hf.tokenizer("qwen3").encode("e\u0301")) == "e\u0301"


def test_special_ids():
    chatml, llama3, llama2 = (hf.tokenizer(name) for name in ("chatml", "llama3", "llama2"))
    # A document ends where a document ends, not where a turn does; SmolLM2 puts nothing before it.
    assert (chatml.bos_id, chatml.eos_id, chatml.pad_id, chatml.end_ids) == (0, 0, 2, (2,))
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (3, 0, 0)
    assert llama3.end_ids == (6,)
    assert (llama2.bos_id, llama2.eos_id, llama2.pad_id, llama2.unk_id) == (1, 2, 2, 0)
    assert llama2.encode_document("you") == [1, *llama2.encode(" you")]
    several = {**hf.files("llama3"), "generation_config.json": b'{"eos_token_id": [0, 6, 2]}'}
    assert HFTokenizer(several).end_ids == (6, 0, 2)


def test_special_tokens_have_no_bytes_and_unused_rows_no_text(tok):
    special = list(tok.special.values())
    assert (tok.token_bytes[special] == 0).all() and (tok.token_bytes == 0).sum() == len(special)
    assert tok.decode([*special, tok.vocab_size, tok.vocab_size + 7]) == ""
    assert tok.piece(special[0]) in tok.special and "unused" in tok.piece(tok.vocab_size)


def test_unused_tokens_of_gguf_are_never_text():
    fields = hf.bpe_fields("llama-bpe")
    fields["tokenizer.ggml.tokens"].append("PAD")
    fields["tokenizer.ggml.token_type"].append(hf.UNUSED)
    tok = HFTokenizer(gguf_tokenizer_files(fields))
    assert tok.token_bytes[-1] == 0 and tok.vocab_size - 1 not in tok.encode("PAD")


def test_lone_surrogates_become_replacement_characters(tok):
    assert tok.decode(tok.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_load_picks_the_kind_by_the_file(tmp_path, tiny_vocabulary):
    made = hf.files("chatml")
    directory = hf.write(tmp_path / "model", made)
    for path in (directory, directory / "tokenizer", directory / "tokenizer" / "tokenizer.json"):
        loaded = Tokenizer.load(str(path))
        assert isinstance(loaded, HFTokenizer) and loaded.chat_template
    assert not isinstance(Tokenizer.load(tiny_vocabulary), HFTokenizer)
    other = pickle.loads(pickle.dumps(loaded))
    assert other.encode("Hello <|im_end|>") == loaded.encode("Hello <|im_end|>")
    (directory / "tokenizer" / "chat_template.jinja").write_text("the file")
    assert HFTokenizer.read(directory / "tokenizer").chat_template == "the file"


def test_a_config_may_hold_several_templates():
    config = {"eos_token": {"content": "<|im_end|>"}}
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    made = {**hf.files("chatml"), "tokenizer_config.json": json.dumps(
        {**config, "chat_template": several}).encode()}  # fmt: skip
    assert HFTokenizer(made).chat_template == "b"
    made["tokenizer_config.json"] = json.dumps({**config, "chat_template": several[:1]}).encode()
    with pytest.raises(UserError, match="tool_use.*'default'"):
        HFTokenizer(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece model"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace"),
        ({"decoder": None}, "gptlab reads BPE over bytes"),
        ({"decoder": {"steps": []}}, "not in the form of the tokenizers package"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "Missing vocab"),
    ],
)
def test_what_could_not_write_every_text_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        HFTokenizer(hf.changed(hf.files("chatml"), **changes), "here")
    assert "\n" not in str(error.value) and str(error.value).startswith("here/tokenizer.json")


def test_the_oldest_files_do_not_name_their_model():
    made = hf.files("chatml")
    spec = json.loads(made["tokenizer.json"])
    del spec["model"]["type"], spec["model"]["byte_fallback"], spec["model"]["ignore_merges"]
    old = HFTokenizer({**made, "tokenizer.json": json.dumps(spec).encode()})
    assert old.encode("Hello there") == hf.tokenizer("chatml").encode("Hello there")


def test_errors_say_what_is_wrong(tmp_path):
    made = hf.files("chatml")
    with pytest.raises(UserError, match="no readable JSON"):
        HFTokenizer({**made, "tokenizer.json": b"{"})
    with pytest.raises(UserError, match="names no eos_token"):
        fields = {**hf.llama_fields(), "tokenizer.ggml.eos_token_id": None}
        HFTokenizer(gguf_tokenizer_files(fields))
    spec = json.loads(made["tokenizer.json"])
    del spec["model"]["vocab"]["!"]
    with pytest.raises(UserError, match="tokens for 255 single bytes only"):
        HFTokenizer({**made, "tokenizer.json": json.dumps(spec).encode()})
    with pytest.raises(UserError, match="gptlab.convert"):
        Tokenizer.load(tmp_path)


def test_characters_that_the_vocabulary_lacks_are_replaced():
    spec = json.loads(hf.files("chatml")["tokenizer.json"])
    for byte in (0x04, 0xC4, 0xF1):  # as in SmolLM2: their characters can't be written
        del spec["model"]["vocab"][hf.ALPHABET[byte]]
    tok = HFTokenizer({**hf.files("chatml"), "tokenizer.json": json.dumps(spec).encode()})
    text = "a\x03\x04\x05 \u00ff\u0100\u013f\u0140 \U0003ffff\U00040000\U0007ffff\U00080000"
    expected = "a\x03\ufffd\x05 \u00ff\ufffd\ufffd\u0140 \U0003ffff\ufffd\ufffd\U00080000"
    assert tok.decode(tok.encode(text)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "bert"}, "model is 'bert'"), ({"pre": "tekken"}, "pre is 'tekken'.*llama-bpe")],
)
def test_gguf_of_an_unknown_kind_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        gguf_tokenizer_files(hf.bpe_fields(**change))


def test_imports_no_tensorflow():
    program = "import sys, gptlab.data.gguf_tokenizer; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
