"""train_tokenizer: result, proof of the round trip, determinism, errors."""

import os
import shutil
import signal

import pytest

from configs import train_tokenizer as tokenizer_config
from gptlab import train_tokenizer
from gptlab.data import tokenizer
from gptlab.data.tokenizer import SentencePieceTokenizer, Tokenizer
from gptlab.run import artifact
from gptlab.run.errors import Interrupted, UserError


def config_for(corpus, **changes):
    config = tokenizer_config.get_config()
    config.inputs.corpus = str(corpus)
    config.update({"vocab_size": 320} | changes)
    return config


def all_texts(corpus, split):
    sets = train_tokenizer.readers(corpus / "records", split)
    return [text for s in sets for record in s for text in train_tokenizer.texts(record)]


def test_vocabulary_report_and_results(tiny_clean, tmp_path, capsys):
    train_tokenizer.run(config_for(tiny_clean), str(tmp_path / "a"))
    vocabulary = Tokenizer.load(tmp_path / "a")
    assert vocabulary.vocab_size == 320
    manifest = artifact.read_manifest(tmp_path / "a")
    results = manifest["results"]
    for split in ("train", "validation", "test"):
        texts = all_texts(tiny_clean, split)
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(vocabulary.encode(text)) for text in texts)
        assert results[f"{split}/round_tripped_texts"] == len(texts) > 0
        assert results[f"{split}/bytes_per_token"] == pytest.approx(size / tokens)
        assert 0 < results[f"{split}/vocabulary_used"] <= 320
    report = (tmp_path / "a" / "report.md").read_text()
    assert "came back byte for byte" in report and "| train | validation | test |" in report
    said = capsys.readouterr()
    assert "SentencePiece learns 320 tokens from 0.0 million" in said.out
    sets = train_tokenizer.readers(tiny_clean / "records", "train")
    count = sum(map(len, sets))
    for part in ("reading", "checking train"):
        assert f"{part}: {count}/{count} records (100%)" in said.err

    train_tokenizer.run(config_for(tiny_clean), str(tmp_path / "b"))
    same = [(tmp_path / name / "vocabulary.model").read_bytes() for name in "ab"]
    assert same[0] == same[1]
    assert artifact.read_manifest(tmp_path / "b")["digest"] == manifest["digest"]


def test_a_text_that_does_not_come_back_stops_the_run(tiny_clean, tmp_path, monkeypatch):
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text: encode(self, text)[:-1]
    )
    with pytest.raises(UserError, match="does not round-trip"):
        train_tokenizer.run(config_for(tiny_clean), str(tmp_path))
    with pytest.raises(UserError):
        artifact.read_manifest(tmp_path)


def test_a_control_token_in_an_encoding_stops_the_run(tiny_clean, tmp_path, monkeypatch):
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text: [*encode(self, text), self.end_id]
    )
    with pytest.raises(UserError, match="does not round-trip"):
        train_tokenizer.run(config_for(tiny_clean), str(tmp_path))


def test_a_corpus_without_a_test_split_is_enough(tiny_clean, tmp_path):
    shutil.copytree(tiny_clean, tmp_path / "clean")
    for path in (tmp_path / "clean" / "records").glob("*-test-*"):
        path.unlink()
    assert train_tokenizer.splits(tmp_path / "clean" / "records") == ["train", "validation"]
    assert train_tokenizer.splits(tiny_clean / "records") == ["train", "validation", "test"]


@pytest.mark.parametrize("at", [101, 700])  # while it reads for training, and while it checks
def test_sigterm_stops_between_texts_and_it_starts_anew(tiny_clean, tmp_path, monkeypatch, at):
    texts, seen = train_tokenizer.texts, []

    def signalled(record):
        for text in texts(record):
            seen.append(text)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield text

    total = sum(len(all_texts(tiny_clean, s)) for s in ("train", "train", "test"))
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "texts", signalled)
        with pytest.raises(Interrupted, match="stopped while .*, which will start anew"):
            train_tokenizer.run(config_for(tiny_clean), str(tmp_path))
    assert at <= len(seen) < at + 200 < total
    manifest = artifact.read_manifest(tmp_path, allow_unfinished=True)
    assert manifest["status"] == "interrupted"
    train_tokenizer.run(config_for(tiny_clean), str(tmp_path))
    assert artifact.read_manifest(tmp_path)["status"] == "done"


def test_what_goes_wrong_with_reading_is_said_not_taken_for_the_end(tiny_clean, tmp_path):
    """SentencePiece ends its input at any exception, and would train on what came before."""

    def broken():
        yield from all_texts(tiny_clean, "train")
        raise UserError("record 7 is corrupt")

    settings = dict(model_type="bpe", character_coverage=1.0, max_sentences=0, num_threads=1)
    for size in (320, 50_000):  # a vocabulary that can be trained on what was read, or not
        with pytest.raises(UserError, match="record 7 is corrupt"):
            tokenizer.train(broken(), tmp_path / "m", vocab_size=size, seed=0, **settings)
    assert not list(tmp_path.iterdir())


def test_errors(tiny_clean, tmp_path):
    with pytest.raises(UserError, match="config.vocab_size"):
        train_tokenizer.run(config_for(tiny_clean, vocab_size=50_000), str(tmp_path / "large"))
    with pytest.raises(UserError, match="config.inputs.corpus is not set"):
        train_tokenizer.run(tokenizer_config.get_config(), str(tmp_path / "none"))
    with pytest.raises(UserError, match="neither documents nor conversations of train"):
        train_tokenizer.readers(tmp_path / "nowhere", "train")
