"""Collecting on tiny artifacts: keys, splits, interruptions, records."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import collect as collect_config
from gptlab import collect
from gptlab.data.records import Candidate, CandidateSet, Message, Prompt, RecordReader
from gptlab.run import artifact
from gptlab.run.errors import Interrupted, UserError
from tests.rl import artifacts


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, tiny_clean, tiny_vocabulary):
    policy = tmp_path_factory.mktemp("collect") / "sft"
    config = collect_config.get_config()
    config.inputs.policy = str(artifacts.write_policy(policy, tiny_model, contrast=4.0))
    config.inputs.prompts, config.inputs.vocabulary = str(tiny_clean), str(tiny_vocabulary)
    config.compute = artifacts.COMPUTE
    config.data.prompt_len = 32
    config.sampling.max_new_tokens = 8
    config.batch_size = 8
    config.num_replies = 3
    config.num_prompts.train, config.num_prompts.validation = 20, None
    return config


@pytest.fixture(scope="module")
def collected(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("collect") / "run"
    collect.run(config, str(workdir))
    return workdir


def sets_of(workdir, split):
    return list(RecordReader(workdir / "records", "candidates", split, CandidateSet))


def contents(workdir, split):
    """{prompt id: what was said, in order}, whatever the identity of the run."""
    return {
        s.prompt.id: [(c.content, c.finished) for c in s.candidates]
        for s in sets_of(workdir, split)
    }


def test_every_prompt_has_k_replies_and_keeps_its_split(collected, config, tiny_clean):
    for split, count in (("train", 20), ("validation", 24)):
        prompts = {p.id: p for p in RecordReader(tiny_clean / "records", "prompts", split, Prompt)}
        sets = sets_of(collected, split)
        assert len(sets) == count and all(len(s.candidates) == 3 for s in sets)
        assert all(prompts[s.prompt.id] == s.prompt for s in sets)
    policy = artifact.read_manifest(config.inputs.policy)["identity"]
    assert {c.policy for c in sets[0].candidates} == {policy}
    ids = [c.id for s in sets for c in s.candidates]
    assert len(set(ids)) == len(ids)


def test_replies_differ_and_figures_say_how(collected):
    results = artifact.read_manifest(collected)["results"]
    assert results["train/replies"] == 60 and 0 < results["train/mean_tokens"] <= 8
    assert 0 <= results["train/finished_rate"] < 1 and results["train/distinct_2"] > 0.5
    assert results["train/duplicate_rate"] < 0.2
    assert not (collected / "parts").exists()


def test_a_stopped_run_goes_on_and_ends_the_same(collected, config, tmp_path, monkeypatch):
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(artifact.Run, "stop_requested", lambda self: next(asked) >= 2)
        with pytest.raises(Interrupted):
            collect.run(config, str(tmp_path / "run"))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/parts").iterdir()}
    assert len(done) == 2
    generated = []
    original = collect.write_part
    with monkeypatch.context() as patch:
        patch.setattr(
            collect,
            "write_part",
            lambda path, *a: (generated.append(path.name), original(path, *a)),
        )
        collect.run(config, str(tmp_path / "run"))
    assert len(generated) == 4 and not set(generated) & set(done)  # 3 batches a split, 2 were there
    ours, theirs = (artifact.read_manifest(p) for p in (tmp_path / "run", collected))
    assert ours["digest"] == theirs["digest"]


def test_a_stopped_run_goes_on_with_batches_of_another_size(
    collected, config, tmp_path, monkeypatch
):
    """As on another mesh, which may change: the prompts of a batch may not be its number's."""
    changed = ConfigDict(config.to_dict())
    with monkeypatch.context() as patch:
        patch.setattr(artifact.Run, "stop_requested", lambda self: True)
        with pytest.raises(Interrupted):
            collect.run(changed, str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        # 20 prompts in batches of 16 now; the first 8 are there.
        patch.setattr(collect.mesh_lib, "shrunk", lambda *_: 16)
        collect.run(changed, str(tmp_path / "run"))
    assert contents(tmp_path / "run", "train") == contents(collected, "train")


def test_a_run_that_broke_off_at_its_end_writes_its_samples_once(collected, config, tmp_path):
    def broken(self, digest):
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact.Run, "complete", broken)
        with pytest.raises(RuntimeError):
            collect.run(config, str(tmp_path / "run"))
    collect.run(config, str(tmp_path / "run"))
    ours, theirs = ((p / "samples.jsonl").read_text() for p in (tmp_path / "run", collected))
    assert ours == theirs


def test_a_vocabulary_of_another_size_is_refused_before_anything_is_sampled(
    config, other_vocabulary, tmp_path, monkeypatch
):
    changed = ConfigDict(config.to_dict())
    changed.inputs.vocabulary = str(other_vocabulary)
    monkeypatch.setattr(collect, "make_generate", None)
    with pytest.raises(UserError, match="inputs.policy has a vocabulary of 320 .* of 330"):
        collect.run(changed, str(tmp_path / "run"))


def test_replies_do_not_depend_on_the_batch(collected, config, tmp_path):
    """The key is that of the prompt; fewer prompts or another batch size change no reply."""
    changed = ConfigDict(config.to_dict())
    changed.batch_size = 16
    changed.num_prompts.validation = 16
    collect.run(changed, str(tmp_path / "run"))
    assert contents(tmp_path / "run", "train") == contents(collected, "train")
    subset, whole = contents(tmp_path / "run", "validation"), contents(collected, "validation")
    assert len(subset) == 16 and all(whole[key] == value for key, value in subset.items())


def test_another_seed_says_something_else(collected, config, tmp_path):
    changed = ConfigDict(config.to_dict())
    changed.seed = 1
    collect.run(changed, str(tmp_path / "run"))
    assert set(contents(tmp_path / "run", "train")) != set(contents(collected, "train"))
    assert contents(tmp_path / "run", "validation") != contents(collected, "validation")


def test_replies_hold_no_control_token_but_their_end(config, tmp_path, tiny_tokenizer, monkeypatch):
    """Not even of a model that likes them: what it draws after one is never seen."""
    seen = []
    original = collect.write_part
    monkeypatch.setattr(
        collect, "write_part", lambda path, *a: (seen.append(a), original(path, *a))
    )
    often = (*range(9), *range(100, 320))  # broken off by ordinary tokens as well, to see it often
    halts = tuple(i for i in often if i != tiny_tokenizer.end_id)
    monkeypatch.setattr(collect.rollout, "halt_tokens", lambda tokenizer, rows: halts)
    collect.run(config, str(tmp_path / "run"))
    broken = 0
    for rows, tokens, lengths, finished in seen:
        for ids, count, ended in zip(
            tokens[: len(rows)].reshape(-1, 8),
            lengths[: len(rows)].ravel(),
            finished[: len(rows)].ravel(),
            strict=True,
        ):
            text = ids[: count - ended]
            assert not np.isin(text, often).any()
            assert not ended or ids[count - 1] == tiny_tokenizer.end_id
            broken += not ended and count < 8
    assert broken > 50


def test_reencoding_is_compared_with_what_was_drawn(config, tmp_path, tiny_tokenizer, monkeypatch):
    hello = tiny_tokenizer.encode("hello there")
    letters = [i for c in "hello there" for i in tiny_tokenizer.encode(c)]
    assert tiny_tokenizer.decode(letters) == "hello there" and letters != hello
    end = tiny_tokenizer.end_id
    rows = [{"row": 0, "tokens": [[*hello, end], [*letters, end]], "finished": [True, True]}]
    rows += [{"row": 1, "tokens": [hello, []], "finished": [False, False]}]
    prompts = collect.choose_prompts(config, "train")
    with artifact.open_run(config, tmp_path / "run", "collect") as run:
        collect.write_split(run, "train", prompts, tiny_tokenizer, "p", rows)
    results = artifact.read_manifest(tmp_path / "run", allow_unfinished=True)["results"]
    assert results["train/reencoding_mismatch"] == 0.25


def test_duplicates_are_counted_by_hand():
    prompt = Prompt("p", (Message("user", "hi"),), "test")
    candidates = tuple(Candidate(str(i), text, "p", True) for i, text in enumerate("aaba"))
    assert collect.duplicates(CandidateSet("s", prompt, candidates)) == 0.5


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("num_replies", 1, "config.num_replies"),
        ("batch_size", 3, "config.batch_size"),
        ("sampling.max_new_tokens", 1000, "context window"),
        ("inputs.prompts", None, "inputs.prompts"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, key, value, words):
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words):
        collect.run(changed, str(tmp_path / "run"))


def test_tokens_after_the_end_are_not_kept(tmp_path):
    path = tmp_path / "parts" / "train-000000.jsonl"
    tokens = np.asarray([[[5, 6, 0], [7, 0, 0]], [[1, 2, 3], [0, 0, 0]]])
    collect.write_part(path, range(4, 6), tokens, np.asarray([[2, 1], [3, 0]]), tokens[..., 0] > 5)
    rows = collect.read_parts(tmp_path, "train")
    assert rows[0] == {"row": 4, "tokens": [[5, 6], [7]], "finished": [False, True]}
    assert rows[1]["tokens"] == [[1, 2, 3], []]
