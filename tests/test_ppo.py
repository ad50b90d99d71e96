"""Loop 4 on tiny artifacts: the canary, the first step, the update's parts, resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ppo as ppo_config
from configs import reward as reward_config
from gptlab import ppo, reward
from gptlab.run import artifact, metrics
from gptlab.run.errors import Interrupted, UserError
from tests.rl import artifacts


def copy_of(config, **changes):
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(changes)
    return changed


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny_model):
    return artifacts.write_policy(tmp_path_factory.mktemp("ppo") / "sft", tiny_model, contrast=3.0)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, policy, tiny_vocabulary, tiny_comparisons):
    config = reward_config.get_config()
    config.inputs.init, config.inputs.vocabulary = str(policy), str(tiny_vocabulary)
    config.inputs.comparisons = str(tiny_comparisons)
    config.compute = artifacts.COMPUTE
    config.data.seq_len, config.batch_size = 64, 16
    workdir = tmp_path_factory.mktemp("ppo") / "reward"
    reward.run(config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def config(policy, reward_model, tiny_clean, tiny_vocabulary, tiny_corpus):
    config = ppo_config.get_config()
    config.inputs.update(
        init=str(policy), reward=str(reward_model), prompts=str(tiny_clean),
        vocabulary=str(tiny_vocabulary), tokens=str(tiny_corpus),
    )  # fmt: skip
    config.compute = artifacts.COMPUTE
    config.data.prompt_len = 24
    config.sampling.max_new_tokens = 8
    config.sampling.temperature = 0.8
    config.update(prompts_per_step=16, minibatches=2, epochs=2, total_episodes=16 * 4)
    config.update(eval_every_steps=4, sample_every_steps=2, eval_batches=1)
    config.optimizer.update(lr=1e-3, warmup_steps=0)
    config.value_optimizer.update(lr=1e-3, warmup_steps=0)
    config.checkpoint.every_steps = 100
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ppo") / "run"
    ppo.run(config, str(workdir))
    return workdir


def lines_of(workdir):
    return [m for m in metrics.read_metrics(workdir) if "train/loss" in m]


def test_it_runs_and_says_what_happened(trained):
    lines = lines_of(trained)
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    names = (
        "score kl kl_coef entropy clip_frac value_loss value_explained_var response_len eos_rate "
        "rollout_logprob_diff ratio_max_dev"
    )
    for name in names.split():
        assert np.isfinite(lines[-1][f"ppo/{name}"]), name
    for name in ("train/loss", "train/grad_norm", "train/param_norm", "train/lr"):
        assert np.isfinite(lines[-1][name]), name
    assert "perf/tokens_per_sec" in lines[-1]
    samples = (trained / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 8
    results = artifact.read_manifest(trained)["results"]
    assert results["episodes"] == 64 and results["validation/kl"] > 0


def test_first_step_of_an_untouched_policy(trained):
    """RLHF.md 7, rows 1, 5 and 10: KL and non-score reward exactly 0, ratio 1, decoder agrees."""
    first = lines_of(trained)[0]
    assert first["ppo/kl"] == 0 and first["ppo/non_score_reward"] == 0
    assert first["ppo/ratio_max_dev"] < 1e-4
    assert first["ppo/rollout_logprob_diff"] < 1e-4
    assert lines_of(trained)[-1]["ppo/kl"] != 0
