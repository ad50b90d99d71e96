"""What fine-tuning learns from, and what it reports; see also test_loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from configs import sft as sft_config
from gptlab import sft
from gptlab.data import batches, packing, records
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, metrics
from gptlab.run.errors import UserError
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from tests.rl import artifacts


@pytest.fixture(scope="module")
def policy(tiny_model, tmp_path_factory):
    return artifacts.write_policy(tmp_path_factory.mktemp("sft") / "policy", tiny_model)


@pytest.fixture(scope="module")
def config(policy, tiny_corpus, tiny_vocabulary):
    config = sft_config.get_config()
    config.inputs.update(init=str(policy), tokens=str(tiny_corpus), vocabulary=str(tiny_vocabulary))
    config.data.seq_len = 64
    config.compute = common.compute()
    config.optimizer = common.adamw(3e-2)
    config.update(batch_size=16, eval_every_steps=4, eval_batches=2, log_every_steps=1)
    config.update(total_epochs=None, total_steps=24, sample_every_steps=0)
    config.checkpoint.update(every_steps=4, keep=1)
    return config


@pytest.fixture(scope="module")
def batch(tiny_corpus):
    source = packing.packed(tiny_corpus, "dialogues", "train", 64, overlong="drop")
    return batches.TrainBatches(source, 8, seed=0).at(0)


def test_the_loss_of_a_real_batch_is_on_the_assistants_words_and_its_end(
    batch, tiny_clean, tiny_tokenizer, tiny_model
):
    conversations = records.RecordReader(
        tiny_clean / "records", "conversations", "train", records.Conversation
    )
    said = {tuple(m.content for m in c.messages if m.role == "assistant") for c in conversations}
    seen = 0
    for row in range(8):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            at = (batch.segment_ids[row] == segment) & (batch.loss_mask[row] > 0)
            learnt = batch.targets[row][at]
            ends = np.flatnonzero(learnt == tiny_tokenizer.end_id)
            replies = np.split(learnt, ends + 1)
            assert len(replies[-1]) == 0, "the last learnt token of a dialogue is an end of turn"
            texts = tuple(tiny_tokenizer.decode(reply[:-1].tolist()) for reply in replies[:-1])
            assert texts in said
            seen += len(texts)
    assert seen > 8
    # And the program's loss counts exactly those tokens.
    model = LanguageModel(ModelConfig.build(tiny_model, common.compute().to_dict()))
    params = transformer.nn.unbox(transformer.init_params(model, jax.random.key(0)))
    weights = {
        name: sft.make_loss_fn(model, name)(params, batch, jax.random.key(0))[1][0]
        for name in ("assistant", "all")
    }
    assert weights["assistant"] == batch.loss_mask.sum() < weights["all"]
    assert weights["all"] == (batch.segment_ids > 0).sum()


def test_tokens_outside_the_mask_cannot_change_the_loss_as_targets(batch, tiny_model):
    model = LanguageModel(ModelConfig.build(tiny_model, common.compute().to_dict()))
    params = transformer.nn.unbox(transformer.init_params(model, jax.random.key(0)))
    loss_fn = sft.make_loss_fn(model, "assistant")
    wild = batch.replace(targets=np.where(batch.loss_mask > 0, batch.targets, 5))
    assert (wild.targets != batch.targets).any()
    key = jax.random.key(0)
    assert loss_fn(params, batch, key)[0] == loss_fn(params, wild, key)[0]


def test_dropout_is_on_in_training(batch, tiny_model):
    model = LanguageModel(ModelConfig.build(tiny_model, common.compute(dropout=0.5).to_dict()))
    params = transformer.nn.unbox(transformer.init_params(model, jax.random.key(0)))
    loss_fn = sft.make_loss_fn(model, "assistant")
    one, two = (loss_fn(params, batch, jax.random.key(i))[0] for i in range(2))
    assert one != two and jnp.isfinite(one)


def digest_of(workdir, which, config):
    architecture = checkpoint.load_model_config(workdir)
    model = LanguageModel(ModelConfig.build(architecture, config.compute.to_dict()))
    init = functools.partial(transformer.init_params, model)
    mesh = mesh_lib.make_mesh(config.mesh)
    return state_lib.digest(checkpoint.load_params(workdir, mesh, init, which))


def test_the_best_checkpoint_is_kept_and_reported_beside_the_pretrained_model(config, tmp_path):
    # Faster and faster, far too fast in the end: the held-out loss rises again, and the best is not
    # the last.
    config = config.copy_and_resolve_references()
    config.optimizer = common.adamw(2.0, schedule="constant", warmup_steps=24)
    config.data.overlong = "drop"  # little is left to learn from
    sft.run(config, str(tmp_path))
    manifest = artifact.read_manifest(tmp_path)
    results = manifest["results"]
    lines = {
        m["step"]: m["eval/validation/perplexity"]
        for m in metrics.read_metrics(tmp_path)
        if "eval/validation/perplexity" in m
    }
    trained = {step: value for step, value in lines.items() if step > 0}
    best = min(trained, key=trained.__getitem__)
    assert results["pretrained/reply_perplexity"] == lines[0]
    assert results["sft/reply_perplexity"] == trained[best] < 0.5 * lines[0]
    assert results["best/step"] == best == checkpoint.find_step(tmp_path, "best")
    assert checkpoint.checkpoint_steps(tmp_path) == sorted({best, 24})
    assert results["best/validation/loss"] == pytest.approx(np.log(trained[best]))
    # On the whole validation split, the same checkpoint says nearly the same, never the last's.
    assert results["validation/perplexity"] == pytest.approx(trained[best], rel=0.1)
    assert results["validation/perplexity"] != pytest.approx(trained[24], rel=0.1)
    assert best < 24 and manifest["digest"] == digest_of(tmp_path, "best", config)
    assert manifest["digest"] != digest_of(tmp_path, "latest", config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.inputs.update(init=None), "config.inputs.init is not set"),
        (lambda c: c.update(loss_on="user"), "loss_on='user'"),
        (lambda c: c.data.update(overlong="cut"), "overlong"),
        (lambda c: c.data.update(max_reply_tokens=-1), "max_reply_tokens=-1"),
        (lambda c: (c.data.update(max_reply_tokens=9), c.update(loss_on="all")), "puts back"),
        (lambda c: c.data.update(seq_len=500), "seq_len=500 does not fit"),
        (lambda c: c.data.update(name="dialogs"), "did you mean 'dialogues'"),
    ],
)
def test_mistakes_are_named(config, change, message, tmp_path):
    config = config.copy_and_resolve_references()
    change(config)
    with pytest.raises(UserError, match=message):
        sft.run(config, str(tmp_path))


def test_advice_is_for_this_stage_which_declares_no_model(config, other_vocabulary, tmp_path):
    config = config.copy_and_resolve_references()
    config.inputs.vocabulary = str(other_vocabulary)
    with pytest.raises(UserError, match="inputs.init has a vocabulary of 320.*trained") as error:
        sft.run(config, str(tmp_path))
    assert "config.model" not in str(error.value)
