"""train_tokenizer: result, proof of the round trip, determinism, errors."""

import pytest

from configs import train_tokenizer as tokenizer_config
from gptlab import train_tokenizer
from gptlab.data.tokenizer import Tokenizer
from gptlab.run import artifact
from gptlab.run.errors import UserError


def config_for(corpus, **changes):
    config = tokenizer_config.get_config()
    config.inputs.corpus = str(corpus)
    config.update({"vocab_size": 320} | changes)
    return config


def test_vocabulary_report_and_results(tiny_clean, tmp_path):
    train_tokenizer.run(config_for(tiny_clean), str(tmp_path / "a"))
    vocabulary = Tokenizer.load(tmp_path / "a")
    assert vocabulary.vocab_size == 320
    manifest = artifact.read_manifest(tmp_path / "a")
    results = manifest["results"]
    texts = list(train_tokenizer.texts(tiny_clean / "records", "validation"))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(vocabulary.encode(text)) for text in texts)
    assert results["validation/round_tripped_texts"] == len(texts) > 0
    assert results["validation/bytes_per_token"] == pytest.approx(size / tokens)
    assert 0 < results["validation/vocabulary_used"] <= 320
    assert "came back byte for byte" in (tmp_path / "a" / "report.md").read_text()

    train_tokenizer.run(config_for(tiny_clean), str(tmp_path / "b"))
    same = [(tmp_path / name / "vocabulary.model").read_bytes() for name in "ab"]
    assert same[0] == same[1]
    assert artifact.read_manifest(tmp_path / "b")["digest"] == manifest["digest"]


def test_a_text_that_does_not_come_back_stops_the_run(tiny_clean, tmp_path, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text)[:-1])
    with pytest.raises(UserError, match="does not round-trip"):
        train_tokenizer.run(config_for(tiny_clean), str(tmp_path))
    with pytest.raises(UserError):
        artifact.read_manifest(tmp_path)


def test_a_control_token_in_an_encoding_stops_the_run(tiny_clean, tmp_path, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [*encode(self, text), self.end_id])
    with pytest.raises(UserError, match="does not round-trip"):
        train_tokenizer.run(config_for(tiny_clean), str(tmp_path))


def test_errors(tiny_clean, tmp_path):
    with pytest.raises(UserError, match="config.vocab_size"):
        train_tokenizer.run(config_for(tiny_clean, vocab_size=50_000), str(tmp_path / "large"))
    with pytest.raises(UserError, match="config.inputs.corpus is not set"):
        train_tokenizer.run(tokenizer_config.get_config(), str(tmp_path / "none"))
    with pytest.raises(UserError, match="neither documents nor conversations of train"):
        list(train_tokenizer.texts(tmp_path / "nowhere", "train"))
