"""A model with a Hugging Face vocabulary through sft, collect, reward, ppo and chat."""

import functools
import io
import json

import numpy as np
import pytest

from configs import collect as collect_config
from configs import common
from configs import evaluate as evaluate_config
from configs import ppo as ppo_config
from configs import reward as reward_config
from configs import sft as sft_config
from gptlab import chat as chat_program
from gptlab import collect, evaluate, ppo, reward, sft
from gptlab.data import batches, chat, records
from gptlab.data.records import CandidateSet, Comparison, Conversation, Document, TokenExample
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import decode
from gptlab.people import policy as policies
from gptlab.rl import rollout
from gptlab.run import artifact, metrics
from gptlab.run.errors import UserError
from gptlab.train import checks
from tests import fixtures
from tests.data import hf_vocabularies as hf
from tests.rl import artifacts

UNUSED_ROWS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return hf.tokenizer("chatml")


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer):
    return {**tiny_model, "vocab_size": tokenizer.vocab_size + UNUSED_ROWS}


@pytest.fixture(scope="module")
def imported(model, tmp_path_factory):
    """As an imported model's workdir: random parameters, and the vocabulary in tokenizer/."""
    workdir = artifacts.write_policy(tmp_path_factory.mktemp("hf") / "imported", model, 2.0)
    return hf.write(workdir, hf.files("chatml"))


@pytest.fixture(scope="module")
def tokens(tiny_clean, imported, tokenizer):
    read = functools.partial(fixtures.read_records, tiny_clean)
    sets = {}
    for split in fixtures.SPLITS:
        texts = [d.text for d in read("documents", split, Document)]
        encoded = [[*tokenizer.encode_document(text), tokenizer.eos_id] for text in texts]
        sets["pretrain", split] = [
            TokenExample(f"{split}-{i}", np.array(ids), np.ones(len(ids)))
            for i, ids in enumerate(encoded)
        ]
        sets["dialogues", split] = [
            TokenExample(c.id, *chat.encode_conversation(tokenizer, c.messages))
            for c in read("conversations", split, Conversation)
        ]
    inputs = {"corpus": tiny_clean, "vocabulary": imported}
    return fixtures.write_artifact(imported.parent / "tokens", "prepare", sets, inputs)


@pytest.fixture(scope="module")
def tuned(imported, tokens):
    config = sft_config.get_config()
    config.inputs.update(init=str(imported), tokens=str(tokens), vocabulary=str(imported))
    config.data.seq_len = 128
    config.compute = common.compute()
    config.optimizer = common.adamw(1e-2)
    config.update(batch_size=16, eval_every_steps=8, eval_batches=2, log_every_steps=1)
    config.update(total_epochs=None, total_steps=16, sample_every_steps=16)
    config.sample.max_new_tokens = 8
    config.checkpoint.update(every_steps=8, keep=1)
    sft.run(config, str(imported.parent / "sft"))
    return imported.parent / "sft"


def test_fine_tuning_learns_replies(tuned):
    results = artifact.read_manifest(tuned)["results"]
    assert results["sft/reply_perplexity"] < 0.7 * results["pretrained/reply_perplexity"]
    samples = [json.loads(line) for line in (tuned / "samples.jsonl").read_text().splitlines()]
    assert samples and all("<|im" not in sample["text"] for sample in samples)


def test_collect_and_the_reward_models_data(tuned, imported, tiny_clean, tokenizer, tmp_path):
    config = collect_config.get_config()
    config.inputs.policy, config.inputs.vocabulary = str(tuned), str(imported)
    config.inputs.prompts = str(tiny_clean)
    config.compute = artifacts.COMPUTE
    config.data.prompt_len = 96
    config.sampling.max_new_tokens = 16
    config.update(batch_size=8, num_replies=2)
    config.num_prompts.train, config.num_prompts.validation = 8, 8
    collect.run(config, str(tmp_path))
    sets = list(records.RecordReader(tmp_path / "records", "candidates", "train", CandidateSet))
    assert len(sets) == 8
    assert not any("<|im" in c.content for s in sets for c in s.candidates)
    comparisons = [Comparison(s.id, s.prompt, s.candidates, (1, 2), "x", True) for s in sets]
    data = batches.ComparisonBatches(comparisons, tokenizer, 8, 2, 128, 96, seed=0)
    (batch,) = data.eval()
    for row, comparison in enumerate(data.comparisons):
        prompt = chat.encode_prompt(tokenizer, comparison.prompt.messages, 96)
        for column, candidate in enumerate(comparison.candidates):
            ids = batch.tokens[row, column, : batch.last_index[row, column] + 1].tolist()
            reply = chat.encode_reply(tokenizer, candidate.content, candidate.finished)
            assert ids == prompt + reply and (ids[-1] == 2) == candidate.finished


@pytest.mark.slow
def test_reward_ppo_and_the_evaluation_run_on_it(
    tuned, imported, tiny_clean, tiny_comparisons, tokens, tmp_path
):
    config = reward_config.get_config()
    config.inputs.update(
        init=str(tuned), vocabulary=str(imported), comparisons=str(tiny_comparisons)
    )
    config.compute = artifacts.COMPUTE
    config.data.update(seq_len=128, prompt_len=96)
    config.optimizer.lr = 3e-3
    config.update(batch_size=16, total_epochs=0.5, eval_every_steps=10, log_every_steps=1)
    reward.run(config, str(tmp_path / "reward"))
    assert artifact.read_manifest(tmp_path / "reward")["results"]["clean_accuracy"]["mean"] > 0.4

    config = ppo_config.get_config()
    config.inputs.update(
        init=str(tuned), reward=str(tmp_path / "reward"), prompts=str(tiny_clean),
        vocabulary=str(imported), tokens=str(tokens),
    )  # fmt: skip
    config.compute = artifacts.COMPUTE
    config.data.prompt_len = 96
    config.sampling.max_new_tokens = 8
    config.update(batch_size=16, minibatches=1, epochs=1, total_episodes=16 * 2)
    config.update(eval_every_steps=2, sample_every_steps=1, eval_batches=1)
    config.optimizer.update(warmup_steps=0)
    config.value_optimizer.update(warmup_steps=0)
    config.checkpoint.every_steps = 100
    ppo.run(config, str(tmp_path / "ppo"))
    first, *_ = (m for m in metrics.read_metrics(tmp_path / "ppo") if "ppo/kl" in m)
    assert abs(first["ppo/kl"]) < 1e-4  # the untouched policy is the reference
    lines = (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert samples and all("<|im" not in sample["reply"] for sample in samples)

    config = evaluate_config.get_config()
    config.inputs.update(
        policy=str(tmp_path / "ppo"), baseline=str(tuned), base=str(imported),
        reward=str(tmp_path / "reward"), prompts=str(tiny_clean), vocabulary=str(imported),
        judge=str(tmp_path / "reward"), tokens=str(tokens),
    )  # fmt: skip
    config.data.update({"num_prompts": 8, "prompt_len": 96, "seq_len": 128})
    config.data.pretraining_batches = 1
    config.sampling.max_new_tokens, config.batch_size = 8, 8
    config.best_of_n.update(sizes=(2,), samples=2, num_prompts=8)
    config.bootstrap.resamples = 100
    evaluate.run(config, str(tmp_path / "evaluate"))
    figures = artifact.read_manifest(tmp_path / "evaluate")["results"]
    assert figures["baseline"]["kl"]["mean"] == 0.0 != figures["policy"]["kl"]["mean"]
    lines = (tmp_path / "evaluate" / "samples.jsonl").read_text().splitlines()
    assert lines and not any("<|im" in line for line in lines)


def test_chat_finds_the_vocabulary_and_answers(tuned, capsys):
    policy = policies.load(tuned, "float32")
    assert isinstance(policy.tokenizer, type(Tokenizer.load(hf_directory(tuned))))
    halts = rollout.halt_tokens(policy.tokenizer, policy.model.config.vocab_size)
    stops = chat.stop_tokens(policy.tokenizer)
    assert stops == (2,) and not set(stops) & set(halts)
    size = policy.tokenizer.vocab_size
    assert set(halts) == set(range(8)) - {2} | set(range(size, size + UNUSED_ROWS))
    talk = chat_program.Session(policy, decode.Sampling(0.0, 0, 1.0, 16, (*stops, *halts)), 0)
    chat_program.converse(talk, io.StringIO("how was the film?\n" * 4), interactive=False)
    out, err = capsys.readouterr()
    assert len(talk.messages) == 8 and "of 7 messages are no longer read" in err
    assert "<|im" not in out
    prompt = policy.tokenizer.decode(talk.prompt())
    assert prompt.startswith("system\nYou are a test of templates.")


def hf_directory(tuned):
    return artifact.input_workdir(tuned, "vocabulary")


def test_chat_streams_a_reply_without_the_templates_blank(tuned):
    policy = policies.load(tuned, "float32")
    policy.tokenizer = hf.tokenizer("llama2")
    said = chat.encode_reply(policy.tokenizer, "you are é good")
    policy.stream = lambda prompt, key, sampling: iter(said[:-1])
    talk = chat_program.Session(policy, decode.Sampling(0.0, 0, 1.0, 16, (2,)), 0)
    assert "".join(talk.reply("how?")).rstrip(" ") == "you are é good"
    whole, _ = chat.encode_conversation(policy.tokenizer, talk.messages)
    assert whole[-len(said) :].tolist() == said


def test_a_model_may_have_some_rows_more_than_tokens_but_not_fewer(model, tokenizer, tiny_model):
    build = functools.partial(sft.ModelConfig.build, compute=artifacts.COMPUTE)
    checks.check_vocabulary(build(model), tokenizer, "config.inputs.init")
    for rows in (tokenizer.vocab_size - 1, tokenizer.vocab_size + 5000):
        with pytest.raises(UserError, match="give the one it was trained with"):
            checks.check_vocabulary(
                build({**model, "vocab_size": rows}), tokenizer, "config.inputs.init"
            )
