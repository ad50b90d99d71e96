"""Loop 3 on tiny artifacts: it learns, resumes, normalises once, and its figures are right."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import reward as reward_config
from gptlab import reward
from gptlab.data.records import Candidate, Comparison, Message, Prompt
from gptlab.evals import reward_figures
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import ModelConfig, init_params
from gptlab.rl import rewards
from gptlab.run import artifact, metrics
from gptlab.run.errors import UserError
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from tests.rl import artifacts


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny_model):
    return artifacts.write_policy(tmp_path_factory.mktemp("reward") / "sft", tiny_model)


@pytest.fixture(scope="module")
def config(policy, tiny_vocabulary, tiny_comparisons):
    config = reward_config.get_config()
    config.inputs.init = str(policy)
    config.inputs.vocabulary = str(tiny_vocabulary)
    config.inputs.comparisons = str(tiny_comparisons)
    config.compute = artifacts.COMPUTE
    config.data.seq_len = 64
    config.batch_size = 16
    config.optimizer.lr = 3e-3
    config.update(total_epochs=2.0, eval_every_steps=10, log_every_steps=1)
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reward") / "run"
    reward.run(config, str(workdir))
    return workdir


def test_it_learns_the_labeller(trained):
    lines = [m for m in metrics.read_metrics(trained) if "train/loss" in m]
    first, last = (np.mean([m["train/loss"] for m in part]) for part in (lines[:3], lines[-3:]))
    assert last < first - 0.05
    results = artifact.read_manifest(trained)["results"]
    assert results["clean_accuracy"]["mean"] > 0.7
    assert results["on_policy_clean_accuracy"] == results["clean_accuracy"]  # of one round
    assert 0.5 < results["accuracy"]["mean"] <= 1 and results["ceiling_accuracy"] < 1
    for name in ("longer_wins_accuracy", "linear_accuracy", "calibration_error"):
        assert 0 <= results[name] <= 1
    assert results["reported_on"] == "test"
    text = (trained / "report.md").read_text()
    assert "| linear_accuracy |" in text and "comparisons of: test." in text
    assert (trained / "calibration.png").exists()


def test_samples_have_mean_zero_and_std_one_and_the_order_stays(trained, config, tiny_tokenizer):
    """Normalised once on the samples; a ranking cannot change."""
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params, gain, bias = rewards.load_reward_model(trained, mesh, config.compute)
        data = reward.make_batches(
            config, tiny_tokenizer, reward.read_comparisons(config, "train"), mesh
        )
        scorer = reward.Scorer(model, mesh)
        raw = scorer.candidates(params, data)
        folded = scorer.candidates(rewards.fold_normalisation(params, gain, bias), data)
    scores = gain * raw + bias
    assert gain > 0
    assert abs(np.nanmean(scores)) < 1e-4 and abs(np.nanstd(scores) - 1) < 1e-4
    np.testing.assert_allclose(folded, scores, atol=1e-5)


def test_normalisation_reads_comparisons_of_every_round(trained, config, tiny_tokenizer):
    """It costs the same however many rounds are pooled, and none of them is left out."""
    mesh = mesh_lib.make_mesh(config.mesh)
    comparisons = reward.read_comparisons(config, "train")
    data = reward.make_batches(config, tiny_tokenizer, comparisons, mesh)
    changed = ConfigDict(config.to_dict())
    changed.normalise_examples = len(data.comparisons) // 3

    class Read(Fixed):
        def candidates(self, params, data):
            self.read = [c.id for c in data.comparisons]
            return super().candidates(params, data)

    scorer = Read([[1.0, 3.0]])
    found = reward.normalise(changed, tiny_tokenizer, scorer, None, data, mesh)
    assert found == {"kind": "samples", "gain": 1.0, "bias": -2.0}
    every = [c.id for c in data.comparisons]
    places = [every.index(name) for name in scorer.read]
    assert len(places) <= changed.normalise_examples
    assert places[0] < len(every) / 10 and places[-1] > len(every) * 9 / 10


def test_demonstrations_average_zero(trained, config, tiny_tokenizer, tiny_clean):
    """InstructGPT's way: a shift alone."""
    changed = ConfigDict(config.to_dict())
    changed.normalise = "demonstrations"
    changed.inputs.demonstrations = str(tiny_clean)
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params, _, _ = rewards.load_reward_model(trained, mesh, config.compute)
        scorer = reward.Scorer(model, mesh)
        own = reward.normalise(changed, tiny_tokenizer, scorer, params, None, mesh)
        replies = reward.read_demonstrations(changed)
        data = reward.make_batches(changed, tiny_tokenizer, replies, mesh, True)
        raw = scorer.candidates(params, data)[:, 0]
    assert own["gain"] == 1.0 and len(replies) > 100
    assert abs(raw.mean()) > 1e-3 and abs((raw + own["bias"]).mean()) < 1e-5


def test_rounds_are_pooled(config, tiny_comparisons, tiny_clean):
    changed = ConfigDict(config.to_dict())
    one = len(reward.read_comparisons(changed, "train"))
    changed.inputs.comparisons_2 = str(tiny_clean)  # the human pairs
    pooled = reward.read_comparisons(changed, "train")
    assert len(pooled) == 2 * one and {c.simulated for c in pooled} == {True, False}


def test_folds_share_no_prompt_and_lose_none(config):
    """A judge on other folds has seen no label, and no prompt, of the reward model."""
    changed = ConfigDict(config.to_dict())
    changed.data.num_folds = 4
    parts = []
    for folds in ((0, 1, 2), (3,)):
        changed.data.folds = folds
        parts.append({c.prompt.id for c in reward.read_comparisons(changed, "train")})
        assert len(reward.read_comparisons(changed, "validation")) == 24
    everything = {c.prompt.id for c in reward.read_comparisons(config, "train")}
    assert all(parts) and not parts[0] & parts[1] and parts[0] | parts[1] == everything


@pytest.mark.slow
def test_human_pairs_of_a_clean_corpus_train_too(config, tiny_clean, tmp_path):
    changed = ConfigDict(config.to_dict())
    changed.inputs.comparisons = str(tiny_clean)
    changed.data.max_candidates = 2
    changed.update(total_epochs=1.0)
    reward.run(changed, str(tmp_path / "run"))
    results = artifact.read_manifest(tmp_path / "run")["results"]
    assert "clean_accuracy" not in results and "ceiling_accuracy" not in results
    assert results["accuracy_by_labeller"][0]["group"] == "human"
    assert results["linear_accuracy"] > 0.9  # the grammar's words give it away


ANN, BOB = (f"simulated:vader,noise=0.3,tie_margin=0.05,seed={seed}" for seed in (0, 1))


def comparison(ranks, scores, lengths, labeller, policy="newest"):
    candidates = tuple(Candidate(str(i), "x" * n, policy, True) for i, n in enumerate(lengths))
    prompt = Prompt("p", (Message("user", "hi"),), "test")
    return Comparison("c", prompt, candidates, ranks, labeller, True, scores)


class Fixed:
    """Stands for the compiled scorer."""

    def __init__(self, values):
        self._values = np.asarray(values, np.float64)

    def candidates(self, params, data):
        return self._values


class Held:
    """Stands for batches, of which only the comparisons are read."""

    def __init__(self, comparisons):
        self.comparisons = comparisons


def test_figures_by_hand(monkeypatch):
    """Two comparisons, one candidate absent, one label tie, one clean tie."""
    monkeypatch.setattr(reward_figures.classifiers, "fit_comparisons", lambda c, **_: linear)
    linear = lambda prompts, replies: np.asarray([-len(r) for r in replies])  # noqa: E731
    held = Held(
        [
            # labels: 0 > 1, 0 > 2; 1 = 2
            comparison((1, 2, 2), (3.0, 1.0, 2.0), (5, 9, 1), ANN, policy="older"),
            comparison((2, 1), (0.5, 0.5), (4, 6), BOB),  # label 1 > 0; equal scores
            comparison((2, 1), (0.5, 0.5), (7, 7), BOB),  # label 1 > 0, of the same text
            comparison((2, 1), (0.9, 0.1), (3, 2), BOB),  # label 1 > 0, by noise
        ]
    )
    nan = np.nan
    scores = [[2.0, 3.0, 1.0], [0.0, 1.0, nan], [0.0, 0.0, nan], [1.0, 2.0, nan]]
    figures, tables = reward.evaluate_model(
        Fixed(scores), None, {"gain": 1.0, "bias": 0.0}, held, held
    )
    assert figures["pairs"] == 4  # the pair of one text twice is no pair
    assert figures["identical_share"] == pytest.approx(1 / 6)
    assert figures["tie_rate"] == pytest.approx(1 / 6)
    assert figures["accuracy"].mean == pytest.approx(3 / 4)  # wrong on 0 > 1
    assert figures["longer_wins_accuracy"] == pytest.approx(2 / 4)
    assert figures["linear_accuracy"] == pytest.approx(2 / 4)
    # Clean order 0 > 2 > 1 and 0 > 1 of the last: ours is right on 0 > 2 only.
    assert figures["clean_accuracy"].mean == pytest.approx(1 / 4) and figures["clean_pairs"] == 4
    newest = figures["on_policy_clean_accuracy"], figures["on_policy_clean_pairs"]
    assert (newest[0].mean, newest[1]) == (0.0, 1)  # the last comparison, where ours is wrong
    assert figures["clean_longer_wins_accuracy"] == pytest.approx(2 / 4)  # wrong on 0 > 1, 2 > 1
    assert figures["clean_linear_accuracy"] == pytest.approx(2 / 4)
    # Of 4 labelled pairs 3 have unequal clean scores: ours is wrong on one, the clean order on
    # another. Over all 4 labels both would be judged by what was never more than a coin.
    assert figures["unequal_pairs"] == 3
    assert figures["unequal_accuracy"] == figures["ceiling_accuracy"] == pytest.approx(2 / 3)
    assert 0.5 < figures["labellers_agreement"] < 1
    assert {r["group"]: r["accuracy"] for r in tables["accuracy_by_labeller"]} == {
        ANN: 0.5,
        BOB: 1.0,
    }
    assert sum(r["count"] for r in tables["reliability"]) == 4
    # Differences of clean scores: 2 and 1 (0 > 1, 0 > 2), 0, and 0.8.
    assert tables["accuracy_by_score_difference"] == [
        {"group": "0", "pairs": 1, "accuracy": 1.0},
        {"group": "above 0.5", "pairs": 3, "accuracy": pytest.approx(2 / 3)},
    ]


def test_what_has_no_pairs_is_no_figure(monkeypatch):
    """None, which is JSON, and not NaN, which is not."""
    monkeypatch.setattr(reward_figures.classifiers, "fit_comparisons", lambda c, **_: linear)
    linear = lambda prompts, replies: np.zeros(len(replies))  # noqa: E731
    held = Held([comparison((1, 2), (0.5, 0.5), (4, 6), ANN)])
    figures, _ = reward.evaluate_model(
        Fixed([[1.0, 0.0]]), None, {"gain": 1.0, "bias": 0.0}, held, held
    )
    assert figures["accuracy"].mean == 1.0 and figures["unequal_pairs"] == 0
    assert figures["clean_accuracy"] is figures["ceiling_accuracy"] is None


def test_figures_are_of_comparisons_that_chose_no_checkpoint(
    config, tiny_comparisons, tmp_path, monkeypatch
):
    choosing, reporting, name = reward.held_out_comparisons(config)
    assert name == "test" and {c.prompt.id.split("-")[0] for c in reporting} == {"test"}
    assert {c.prompt.id.split("-")[0] for c in choosing} == {"validation"}
    # Without a test split, and with two rounds that asked the same prompts:
    changed = ConfigDict(config.to_dict())
    for round_name in ("comparisons", "comparisons_2"):
        shutil.copytree(tiny_comparisons, tmp_path / round_name)
        for path in (tmp_path / round_name / "records").glob("comparisons-test-*"):
            path.unlink()
        changed.inputs[round_name] = str(tmp_path / round_name)
    choosing, reporting, name = reward.held_out_comparisons(changed)
    halves = [{c.prompt.id for c in part} for part in (choosing, reporting)]
    assert all(halves) and not halves[0] & halves[1] and name == "half of the validation prompts"
    assert len(choosing) + len(reporting) == 48 and len(halves[0] | halves[1]) == 24
    monkeypatch.setattr(reward, "read_comparisons", lambda config, split: choosing[:1])
    with pytest.raises(UserError, match="collect more validation prompts"):
        reward.held_out_comparisons(changed)


def test_head_starts_with_std_of_stiennon(policy, config):
    """Std 1/sqrt(d + 1), bias 0, on the SFT model's own backbone."""
    wide = ScalarModel(
        ModelConfig.build(
            {**checkpoint.load_model_config(policy), "d_model": 512}, config.compute.to_dict()
        )
    )
    head = jax.jit(lambda k: nn.unbox(init_params(wide, k))["head"])(jax.random.key(0))
    assert abs(float(head["kernel"].std()) * 513**0.5 - 1) < 0.1
    assert not np.any(head["bias"])


def test_loss_is_a_mean_within_each_prompt_then_over_prompts():
    """On a ragged batch that differs from the mean over all pairs."""
    rewarded = jax.numpy.asarray([[2.0, 1.0, 0.0], [0.5, 1.5, 9.0]])
    ranks = jax.numpy.asarray([[1, 2, 3], [1, 2, 0]])
    loss, weight, _ = reward.losses.ranking_loss_sums(rewarded, ranks, jax.numpy.ones(2))
    pair = lambda margin: np.log1p(np.exp(-margin))  # noqa: E731
    first, second = (2 * pair(1.0) + pair(2.0)) / 3, pair(-1.0)
    assert abs(float(loss / weight) - (first + second) / 2) < 1e-6
    flat = (3 * first + second) / 4
    assert abs(flat - (first + second) / 2) > 0.1


@pytest.mark.parametrize(
    "change,words",
    [
        ({"normalise": "mean"}, "config.normalise"),
        ({"normalise": "demonstrations"}, "inputs.demonstrations"),
        ({"data": {"seq_len": 4096, "max_candidates": 4}}, "config.data.seq_len"),
        ({"data": {"num_folds": 2, "folds": (2,)}}, "config.data.folds"),
        ({"batch_size": 7}, "config.batch_size"),
        ({"compute": {"loss_chunk": 64}}, "config.compute.loss_chunk=64 .* leave it at 0"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, change, words):
    changed = ConfigDict(config.to_dict())
    changed.update(change)
    with pytest.raises(UserError, match=words):
        reward.run(changed, str(tmp_path / "run"))


def test_a_run_cannot_become_shorter_than_it_is(config, tmp_path):
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    changed = ConfigDict(config.to_dict())
    changed.update(total_epochs=None, total_steps=8)
    with pytest.raises(UserError, match="at step 9 already, beyond the 8 .*total_steps"):
        reward.run(changed, str(tmp_path))


def test_fewer_epochs_than_are_done_end_where_the_run_stands(trained, config, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    changed = ConfigDict(config.to_dict())
    changed.total_epochs = 1.0  # 10 steps
    reward.run(changed, str(tmp_path / "run"))
    results = artifact.read_manifest(tmp_path / "run")["results"]
    assert results["steps"] == artifact.read_manifest(trained)["results"]["steps"] == 20


def test_another_vocabulary_is_refused_before_anything_is_compiled(config, tiny_model, tmp_path):
    """Ids beyond the embedding would be read as its last row, without a word."""
    small = {**tiny_model, "vocab_size": 300}
    changed = ConfigDict(config.to_dict())
    changed.inputs.init = str(artifacts.write_policy(tmp_path / "sft", small))
    with pytest.raises(UserError, match="inputs.init has a vocabulary of 300 "):
        reward.run(changed, str(tmp_path / "run"))


def test_a_missing_input_is_named(config, tmp_path):
    changed = ConfigDict(config.to_dict())
    changed.inputs.comparisons = None
    with pytest.raises(UserError, match="inputs.comparisons"):
        reward.run(changed, str(tmp_path / "run"))


def test_an_artifact_of_another_stage_is_no_reward_model(policy, config):
    mesh = mesh_lib.make_mesh(config.mesh)
    with pytest.raises(UserError, match="not a reward model"):
        rewards.load_reward_model(policy, mesh, config.compute)


def test_results_are_json(trained):
    text = (trained / "manifest.json").read_text()
    assert json.loads(text)["results"]["normalisation"]["kind"] == "samples"
