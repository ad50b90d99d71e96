"""The evaluation program on a tiny chain of artifacts with untrained models."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from configs import evaluate as evaluate_config
from gptlab import evaluate
from gptlab.data.records import Message, Prompt, RecordReader, write_shards
from gptlab.evals import contamination, preference
from gptlab.model import transformer
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train.checkpoint import Checkpoints


def write_model(workdir, stage, architecture, kind, seed):
    """A finished stage whose parameters are the random ones of `seed`."""
    config = ConfigDict(
        {"seed": seed, "model": architecture, "checkpoint": common.checkpoint(1, best_metric=None)}
    )
    model = kind(ModelConfig.build(architecture, common.compute().to_dict()))
    mesh = mesh_lib.make_mesh(common.mesh())
    with artifact.open_run(config, workdir, stage) as run, jax.set_mesh(mesh):

        def init(key):
            return transformer.init_params(model, key)

        _, shardings = state_lib.param_shardings(init, mesh)
        # A sharper model than a fresh one, whose replies would never end.
        params = jax.jit(
            lambda key: jax.tree.map(lambda x: x * 3.0, nn.unbox(init(key))),
            out_shardings=shardings,
        )(jax.random.key(seed))
        with Checkpoints(run.workdir, config.checkpoint) as checkpoints:
            checkpoints.save(1, {"params": params}, {})
        run.results(normalisation={"gain": 2.0, "bias": -1.0})
        run.complete(state_lib.digest(params))
    return str(workdir)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_clean, tiny_vocabulary, tiny_corpus, tiny_model):
    directory = tmp_path_factory.mktemp("models")
    models = {"base": 0, "baseline": 1, "policy": 2}
    paths = {
        name: write_model(directory / name, name, tiny_model, LanguageModel, seed)
        for name, seed in models.items()
    }
    for name, seed in {"reward": 3, "judge": 4}.items():
        paths[name] = write_model(directory / name, "reward", tiny_model, ScalarModel, seed)
    clean = str(tiny_clean)
    return paths | {
        "vocabulary": str(tiny_vocabulary), "prompts": clean, "reviews": clean,
        "tokens": str(tiny_corpus),
    }  # fmt: skip


def tiny_config(inputs, **changed_inputs):
    config = evaluate_config.get_config()
    config.inputs.update({**inputs, **changed_inputs})
    config.data.update({"num_prompts": 24, "prompt_len": 40, "seq_len": 64})
    config.data.pretraining_batches = 1
    config.batch_size = 16
    config.sampling.max_new_tokens = 12
    config.best_of_n.update(sizes=(2, 3), samples=3, num_prompts=10)
    config.bootstrap.resamples = 100
    return config.lock()


@pytest.fixture(scope="module")
def report_dir(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluation") / "run"
    evaluate.run(tiny_config(inputs, previous=inputs["base"]), str(workdir))
    return workdir


def test_everything_is_reported(report_dir):
    plain = json.loads((report_dir / "report.json").read_text())
    assert plain["num_prompts"] == 24
    assert set(plain["policy"]) >= {
        "gold", "kl", "distinct_2", "most_common_share", "shuffled_drop", "judge_model",
        "review_classifier", "base_perplexity", "end_rate", "length", "pretraining_loss",
    }  # fmt: skip
    assert plain["baseline"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert plain["policy"]["kl"]["mean"] > 0.1
    assert "gold_difference_kl_matched" in plain["over_previous"]
    assert isinstance(plain["passed"], bool)
    manifest = artifact.read_manifest(report_dir)
    assert manifest["results"]["policy"] == plain["policy"]
    for name in ("gold.png", "gold_kl.png"):
        assert (report_dir / name).read_bytes()[:4] == b"\x89PNG"
    markdown = (report_dir / "report.md").read_text()
    assert "length-controlled" in markdown and "unseen reward model" in markdown
    assert "| best of 3 | at most 0.432 |" in markdown and "surely ahead" in markdown
    chosen = plain["best_of_n"]
    assert chosen["num_prompts"] == 10 and chosen["samples"] == 3
    # Chosen by the reward model: its own score rises with n, and the policy's is of 10 prompts.
    assert chosen["3"]["reward_model"]["mean"] > chosen["2"]["reward_model"]["mean"]
    lines = [json.loads(line) for line in (report_dir / "samples.jsonl").read_text().splitlines()]
    gold = np.mean([line["policy"]["gold"] for line in lines[:10]])
    assert chosen["policy"]["gold"]["mean"] == pytest.approx(gold)


def test_samples_are_side_by_side_and_from_the_test_split(report_dir, inputs):
    lines = [json.loads(line) for line in (report_dir / "samples.jsonl").read_text().splitlines()]
    held_out = RecordReader(f"{inputs['prompts']}/records", "prompts", "test", Prompt)
    assert {line["id"] for line in lines} == {prompt.id for prompt in held_out}
    assert set(lines[0]) == {"id", "prompt", "policy", "previous", "baseline"}
    gold = np.mean([line["policy"]["gold"] for line in lines])
    plain = json.loads((report_dir / "report.json").read_text())
    assert plain["policy"]["gold"]["mean"] == pytest.approx(gold)


def test_a_policy_against_itself_is_a_draw_by_every_judge(inputs, tmp_path):
    """Two independent samples of one model: within 4 standard deviations of a draw."""
    config = tiny_config(inputs, policy=inputs["baseline"])
    evaluate.run(config, str(tmp_path / "run"))
    plain = json.loads((tmp_path / "run" / "report.json").read_text())
    for name, value in plain["over_baseline"].items():
        if name.startswith("win_rate"):
            assert abs(value["mean"] - 0.5) <= 4 * 0.5 / 24**0.5, name
    for block in ("policy", "baseline"):
        assert plain[block]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert plain["policy"]["pretraining_loss"] == plain["baseline"]["pretraining_loss"]
    lines = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    same = [line["policy"]["reply"] == line["baseline"]["reply"] for line in lines]
    assert np.mean(same) < 0.5  # coupled draws would make all of them alike


def test_every_system_draws_with_keys_of_its_own_whoever_takes_part():
    names = ["policy", "previous", "baseline"]
    keys = evaluate.system_keys(0, names)
    data = {name: jax.random.key_data(key).tobytes() for name, key in keys.items()}
    assert len(set(data.values())) == 3
    # Neither is the run's key, nor that of another seed's system.
    others = [jax.random.key_data(k).tobytes() for k in evaluate.system_keys(1, names).values()]
    assert not set(others) & set(data.values())


def test_shared_keys_would_measure_the_coupling():
    """Why not: with shared noise, two close policies tie, or differ in the tilted direction."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=8)  # of 8 replies
    logits = np.stack([0.1 * gold, np.zeros(8)])[:, None]  # policy, tilted a little; baseline
    noise = rng.gumbel(size=(2, 20_000, 8))
    replies = {
        "shared": (logits + noise[:1]).argmax(-1),
        "own": (logits + noise).argmax(-1),
    }
    bootstrap = preference.Bootstrap(100, 0)
    decided, ties, width = {}, {}, {}
    for name, (policy, baseline) in replies.items():
        outcomes = preference.wins(gold[policy], gold[baseline])
        decided[name] = (outcomes == 1).sum() / (outcomes != 0.5).sum()
        ties[name] = (outcomes == 0.5).mean()
        rate = preference.mean_interval(outcomes, bootstrap)
        width[name] = rate.high - rate.low
        gain = preference.paired_difference(gold[policy], gold[baseline], bootstrap).mean
        assert gain == pytest.approx(0.1 * gold.var(), abs=0.03)  # the same either way
    assert decided["own"] < 0.6 and decided["shared"] == 1.0
    assert ties["own"] < 0.2 and ties["shared"] > 0.9
    assert width["own"] > 4 * width["shared"]


def test_best_of_n_can_be_left_out_and_changes_no_reply(inputs, report_dir, tmp_path):
    config = tiny_config(inputs, previous=inputs["base"])
    with config.unlocked():
        config.best_of_n.sizes = ()
    evaluate.run(config, str(tmp_path / "run"))
    plain = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "best_of_n" not in plain
    samples = [(path / "samples.jsonl").read_text() for path in (tmp_path / "run", report_dir)]
    assert samples[0] == samples[1]


def train_on(directory, stage, **own):
    """A model's artifact of `stage` with these inputs."""
    config = ConfigDict({"seed": 0, "inputs": {k: str(v) for k, v in own.items()}})
    with artifact.open_run(config, directory, stage) as run:
        run.complete("0")
    return str(directory)


def test_prompts_that_an_ancestor_was_trained_on_are_refused(
    tmp_path, tiny_clean, tiny_comparisons
):
    held_out, seen = (
        list(RecordReader(tiny_clean / "records", "prompts", split, Prompt))
        for split in ("test", "train")
    )
    reward = train_on(tmp_path / "reward", "reward", comparisons=tiny_comparisons)
    policy = train_on(tmp_path / "ppo", "ppo", prompts=tiny_clean, reward=reward)
    later = train_on(tmp_path / "later", "ppo", init=policy)
    assert contamination.check_disjoint(held_out, [later, reward]) == []
    with pytest.raises(UserError, match="160 of 184 prompts .*/prompts-train, "):
        contamination.check_disjoint([*held_out, *seen], [later])
    with pytest.raises(UserError, match="seen in training.*comparisons-train"):
        contamination.check_disjoint(seen, [reward])
    validation = RecordReader(tiny_clean / "records", "prompts", "validation", Prompt)
    with pytest.raises(UserError, match="comparisons-validation"):
        contamination.check_disjoint(validation, [later])


def test_what_is_gone_is_said_to_be_unchecked(tmp_path, tiny_clean):
    old = train_on(tmp_path / "old", "reward")
    policy = train_on(tmp_path / "ppo", "ppo", reward=old)
    shutil.rmtree(old)
    prompts = list(RecordReader(tiny_clean / "records", "prompts", "test", Prompt))
    (line,) = contamination.check_disjoint(prompts, [policy])
    assert "is gone" in line


def test_an_evaluation_of_seen_prompts_is_refused(inputs, tmp_path, tiny_comparisons):
    judge = train_on(tmp_path / "judge", "reward", comparisons=tiny_comparisons)
    config = tiny_config(inputs, judge=judge)
    with config.unlocked():
        config.data.split = "validation"
    with pytest.raises(UserError, match="seen in training"):
        evaluate.run(config, str(tmp_path / "run"))


def test_same_seed_same_report_and_a_finished_run_is_left_alone(inputs, report_dir, tmp_path):
    config = tiny_config(inputs, previous=inputs["base"])
    evaluate.run(config, str(tmp_path / "again"))
    for name in ("report.json", "samples.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (report_dir / name).read_text()
    before = (report_dir / "manifest.json").stat().st_mtime_ns
    evaluate.run(config, str(report_dir))
    assert (report_dir / "manifest.json").stat().st_mtime_ns == before


def test_kl_is_the_mean_log_ratio_of_the_policys_own_samples(report_dir):
    lines = [json.loads(line) for line in (report_dir / "samples.jsonl").read_text().splitlines()]
    plain = json.loads((report_dir / "report.json").read_text())
    ratios = np.array([line["policy"]["log_ratio"] for line in lines])
    expected = preference.mean_interval(ratios, preference.Bootstrap(100, 0))
    assert plain["policy"]["kl"] == pytest.approx(expected.to_json())


def test_another_vocabulary_is_refused(inputs, other_vocabulary, tmp_path):
    config = tiny_config(inputs, vocabulary=str(other_vocabulary))
    with pytest.raises(UserError, match="inputs.policy has a vocabulary of 320 .* of 330"):
        evaluate.run(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampling.max_new_tokens": 4000}, "window"),
        ({"batch_size": 12}, "batch_size=12"),
        ({"gold.name": "vaderr"}, "did you mean 'vader'"),
        ({"inputs.judge": None}, "config.inputs.judge is not set"),
        ({"data.split": "train"}, "config.data.split='train'"),
        ({"best_of_n.sizes": (2, 4)}, "best_of_n.sizes=.2, 4. must be from 2 to"),
        ({"best_of_n.num_prompts": 0}, "best_of_n.num_prompts=0"),
    ],
)
def test_mistakes_are_named(inputs, tmp_path, change, message):
    config = tiny_config(inputs)
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        evaluate.run(config, str(tmp_path / "run"))


def test_one_prompt_of_each_conversation_is_asked(inputs, tmp_path):
    """Prompts that share a beginning are not independent, as the intervals take them to be."""
    question = (Message("user", "who are you?"),)
    ids = ["a:000", "a:004", "b:002", "c:000", "c:002", "c:004", "whole"]
    write_shards(
        tmp_path / "records", "prompts", "test", [Prompt(i, question, "test") for i in ids]
    )
    config = tiny_config(inputs, prompts=str(tmp_path))
    prompts = evaluate.load_prompts(config)
    assert sorted(p.conversation_id for p in prompts) == ["a", "b", "c", "whole"]
    with config.unlocked():
        config.data.num_prompts = 3
    assert evaluate.load_prompts(config) == prompts[:3]
