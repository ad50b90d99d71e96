"""What pretraining refuses, and what it does when the loss is not finite; see also test_loops."""

import functools

import jax
import numpy as np
import pytest

from configs import common, pretrain_small
from configs import pretrain as pretrain_config
from gptlab import pretrain
from gptlab.data import batches as batches_lib
from gptlab.data import records
from gptlab.data.records import TokenExample
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, metrics
from gptlab.run.errors import UserError
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from tests.fixtures import read_records, write_artifact
from tests.rl import artifacts


@pytest.fixture
def config(tiny_corpus, tiny_vocabulary, tiny_model):
    config = pretrain_config.get_config()
    config.inputs.update(tokens=str(tiny_corpus), vocabulary=str(tiny_vocabulary))
    config.model = tiny_model
    config.compute = common.compute()
    config.data.seq_len = 64
    config.optimizer = common.adamw(1e-2)
    config.update(total_steps=6, batch_size=8, eval_batches=1, sample_every_steps=100)
    config.sample.max_new_tokens = 4
    config.checkpoint.every_steps = 2
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.inputs.update(tokens=None), "config.inputs.tokens is not set"),
        (lambda c: c.model.update(vocab_size=512), "set config.model.vocab_size=320"),
        (lambda c: c.data.update(seq_len=129), "seq_len=129 does not fit .*config.model.max_len"),
        (lambda c: c.update(batch_size=12), "batch_size=12 does not divide"),
        (lambda c: c.update(accumulation_steps=3), "multiple of 24"),
        (lambda c: c.update(batch_size=8000), "too little data for one batch"),
        (lambda c: c.mesh.update(fsdp=3), "config.mesh"),
        (lambda c: c.update(total_tokens=5), "exactly one of config.total_steps"),
        (lambda c: c.update(on_nonfinite="ignore"), "on_nonfinite='ignore'"),
        (
            lambda c: c.data.update(name="pretraining"),
            "config.data.name='pretraining': .* did you mean 'pretrain'.* are: dialogues, pretrain",
        ),
        (lambda c: c.checkpoint.update(keep=0), "checkpoint.keep=0"),
        (lambda c: c.sample.update(prompts=()), "sample.prompts is empty"),
        (lambda c: c.sample.update(max_new_tokens=128), "context window"),
        (lambda c: c.inputs.update(init=c.inputs.tokens), "config.model declares another: .*:init"),
        (lambda c: c.lora.update(rank=4), "random weights: give config.inputs.init and .*:init"),
        (lambda c: c.lora.update(rank=-1), "lora.rank=-1"),
        (lambda c: c.__delattr__("model"), "config.inputs.init is not set"),
    ],
)
def test_mistakes_are_named_before_a_step_is_taken(config, change, message, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a step was made ready")

    monkeypatch.setattr(pretrain, "make_train_step", refuse)
    change(config)
    with pytest.raises(UserError, match=message):
        pretrain.run(config, str(tmp_path))
    assert artifact.read_manifest(tmp_path, allow_unfinished=True)["status"] == "failed"


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """An artifact whose model is far from a fresh one."""
    return artifacts.write_policy(tmp_path_factory.mktemp("trained") / "run", tiny_model, 3.0)


@pytest.fixture
def going_on(config, trained):
    """Training that goes on from there."""
    del config.model
    config.inputs.init = str(trained)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.data.update(seq_len=129), "seq_len=129 .*, which its pretraining fixed"),
        (lambda c: c.lora.update(rank=4, targets=("values",)), "lora.targets: .*'values'"),
    ],
)
def test_mistakes_in_going_on_are_named(going_on, change, message, tmp_path):
    change(going_on)
    with pytest.raises(UserError, match=message):
        pretrain.run(going_on, str(tmp_path))


def test_it_goes_on_with_its_own_vocabulary_only(going_on, other_vocabulary, tmp_path):
    going_on.inputs.vocabulary = str(other_vocabulary)
    with pytest.raises(UserError, match="inputs.init has a vocabulary of 320.*trained with"):
        pretrain.run(going_on, str(tmp_path))


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_it_goes_on_from_another_artifacts_model(going_on, rank, tiny_model, trained, tmp_path):
    going_on.lora = common.lora(rank, targets=("query",))
    going_on.update(total_steps=2, log_every_steps=1, sample_every_steps=0)
    pretrain.run(going_on, str(tmp_path))

    mesh = mesh_lib.make_mesh(going_on.mesh)
    model = LanguageModel(ModelConfig.build(tiny_model, going_on.compute.to_dict()))
    before, after = (
        checkpoint.load_params(path, mesh, functools.partial(transformer.init_params, model))
        for path in (trained, tmp_path)
    )

    apply = jax.jit(model.apply)

    def loss(batch):
        logits = apply({"params": before}, batch.tokens, batch.positions, batch.segment_ids)
        logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        picked = np.take_along_axis(logprobs, batch.targets[..., None], axis=2)[..., 0]
        return -np.average(picked, weights=batch.loss_mask)

    # What was reached before is known, and the first step sees the same model.
    data, held_out = pretrain.make_batches(going_on, mesh)
    lines = {line["step"]: line for line in metrics.read_metrics(tmp_path)}
    (watched,) = batches_lib.eval_batches(held_out, going_on.batch_size, going_on.eval_batches)
    assert lines[0]["eval/validation/loss"] == pytest.approx(loss(watched), rel=1e-4)
    assert lines[1]["train/loss"] == pytest.approx(loss(data.at(0)), rel=1e-4)
    results = artifact.read_manifest(tmp_path)["results"]
    assert results["init/validation/loss"] == lines[0]["eval/validation/loss"]
    assert results["best/validation/loss"] < results["init/validation/loss"]

    # Later stages get a whole model; with adapters, only what they adapt is another one.
    moved = {
        jax.tree_util.keystr(path)
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
        )
        if not same
    }
    queries = {name for name in moved if "query" in name}
    assert queries and (moved == queries) == bool(rank)


# Norms hide the first; the second is infinite.
@pytest.mark.parametrize("lr", [1e25, pytest.param(1e39, marks=pytest.mark.slow)])
def test_what_is_not_finite_stops_the_run_at_its_step_and_is_not_saved(config, lr, tmp_path):
    config.optimizer = common.adamw(lr, clip_norm=None, schedule="constant")
    config.checkpoint.every_steps = 1
    config.log_every_steps = 1
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d; nothing of it is saved"):
        pretrain.run(config, str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert checkpoint.checkpoint_steps(tmp_path) == []


@pytest.mark.slow
def test_more_steps_go_on_where_the_run_ended(config, tmp_path):
    config.optimizer = common.adamw(1e-2, schedule="constant")
    config.update(total_steps=4, log_every_steps=1)
    pretrain.run(config, str(tmp_path / "a"))
    config.total_steps = 6
    pretrain.run(config, str(tmp_path / "a"))
    pretrain.run(config, str(tmp_path / "b"))
    digests = [artifact.read_manifest(tmp_path / x)["digest"] for x in "ab"]
    assert digests[0] == digests[1]


def test_a_run_cannot_become_shorter_than_it_is(config, tmp_path):
    config.total_steps = 4
    pretrain.run(config, str(tmp_path))
    before = (tmp_path / "manifest.json").read_bytes()
    for fewer in ({"total_steps": 2}, {"total_steps": None, "total_tokens": 512}):
        config.update(fewer)
        with pytest.raises(UserError, match="at step 4 already, beyond the [12] that"):
            pretrain.run(config, str(tmp_path))
    assert (tmp_path / "manifest.json").read_bytes() == before
    # How many steps an epoch has only the data tell: it ends where it stands, and says so.
    config.update(total_tokens=None, total_epochs=0.01)
    pretrain.run(config, str(tmp_path))
    results = artifact.read_manifest(tmp_path)["results"]
    assert (results["steps"], results["tokens"]) == (4, 4 * 8 * 64)


def test_results_are_of_the_whole_validation_split_and_stand_beside_ngrams(
    config, tiny_corpus, tmp_path
):
    config.data.seq_len = 128  # no document is split
    config.checkpoint.best_mode = "max"  # so the best, which the results are of, is not the last
    config.update(total_steps=4, ngram_baselines=True)
    pretrain.run(config, str(tmp_path))
    results = artifact.read_manifest(tmp_path)["results"]
    assert results["best/step"] == 2 < results["steps"] == 4
    assert results["ngram/unigram"] > 1.5 * results["ngram/bigram"] > 0  # the grammar is simple

    # Each document in a row of its own, unlike the packed rows of the loop.
    documents = list(
        records.RecordReader(tiny_corpus / "records", "pretrain", "validation", TokenExample)
    )
    tokens, mask = np.zeros((2, len(documents), 129), np.int32)
    for row, document in enumerate(documents):
        tokens[row, : len(document.tokens)] = document.tokens
        mask[row, : len(document.tokens)] = document.loss_mask
    model = LanguageModel(ModelConfig.build(config.model.to_dict(), config.compute.to_dict()))
    init = functools.partial(transformer.init_params, model)
    params = checkpoint.load_params(tmp_path, mesh_lib.make_mesh(config.mesh), init, "best")
    ones = np.ones((len(documents), 128), np.int32)
    logits = jax.jit(model.apply)({"params": params}, tokens[:, :-1], ones.cumsum(1) - 1, ones)
    logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    picked = np.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[..., 0]
    loss = -picked[mask[:, 1:] == 1].mean()
    assert results["validation/loss"] == pytest.approx(loss, rel=1e-5)
    # The loop had looked at one batch only.
    seen = {m["step"]: m.get("eval/validation/loss") for m in metrics.read_metrics(tmp_path)}
    assert seen[results["best/step"]] == results["best/validation/loss"]
    assert results["best/validation/loss"] != pytest.approx(loss, rel=1e-4)


@pytest.fixture(scope="module")
def mixed_corpus(tiny_corpus, tiny_clean, tiny_vocabulary, tmp_path_factory):
    """The tiny corpus with two mixtures of its tasks in its manifest."""
    tasks = ("pretrain", "dialogues")
    sets = {
        (task, split): read_records(tiny_corpus, task, split, TokenExample)
        for task in tasks
        for split in ("train", "validation")
    }
    inputs = {"corpus": tiny_clean, "vocabulary": tiny_vocabulary}
    workdir = tmp_path_factory.mktemp("mixed") / "corpus"
    # As `prepare` does it, whose own test has the mixture from end to end.
    mixtures = {"mostly_text": dict(zip(tasks, (3.0, 1.0), strict=True)),
                "mostly_talk": dict(zip(tasks, (1.0, 3.0), strict=True))}  # fmt: skip
    return write_artifact(workdir, "prepare", sets, inputs, {"mixtures": mixtures}, mode="tokenize")


def share_of_dialogues(batches, tokenizer):
    """Share of the rows that hold dialogues: only they have control tokens of the chat format."""
    rows = np.concatenate([batch.tokens for batch in batches])
    return float((rows == tokenizer.user_id).any(axis=1).mean())


def test_it_trains_on_a_mixture_at_its_rates(config, mixed_corpus, tiny_tokenizer, tmp_path):
    config.inputs.tokens = str(mixed_corpus)
    mesh = mesh_lib.make_mesh(config.mesh)
    for name, share in (("mostly_text", 0.25), ("mostly_talk", 0.75), ("pretrain", 0.0)):
        config.data.name = name
        data, held_out = pretrain.make_batches(config, mesh)
        found = [data.at(step) for step in range(25)]
        assert share_of_dialogues(found, tiny_tokenizer) == pytest.approx(share, abs=0.01)
        watched = list(batches_lib.eval_batches(held_out, 4))
        assert share_of_dialogues(watched, tiny_tokenizer) == pytest.approx(share, abs=0.15)

        # Going on in the middle, another process gets what this one would have got.
        resumed = pretrain.make_batches(config, mesh)[0].iterate(10)
        for step in (10, 11):
            np.testing.assert_array_equal(next(resumed).tokens, found[step].tokens)
        resumed.close()

    config.data.name = "mostly_text"
    config.total_steps = 2
    pretrain.run(config, str(tmp_path))
    assert artifact.read_manifest(tmp_path)["results"]["validation/loss"] > 0


def test_what_is_wrong_with_a_mixture_is_named(config, mixed_corpus, tmp_path):
    config.inputs.tokens = str(mixed_corpus)
    config.data.name = "mostly_tex"
    with pytest.raises(UserError, match="did you mean 'mostly_text'.*: dialogues, mostly_talk, mo"):
        pretrain.run(config, str(tmp_path / "a"))
    config.data.name = "mostly_text"
    config.ngram_baselines = True
    with pytest.raises(UserError, match="is a mixture.*set config.ngram_baselines=False"):
        pretrain.run(config, str(tmp_path / "b"))


def test_configs_describe_the_models_they_promise():
    def size(config):
        return ModelConfig.build(config.model.to_dict(), config.compute.to_dict()).num_params()

    assert size(pretrain_config.get_config()) == 124_439_808 + (50304 - 50257) * 768
    assert size(pretrain_config.get_config("gpt2_350m")) > 3e8
    assert 2e6 < size(pretrain_small.get_config()) < 5e6
