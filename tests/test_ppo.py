"""Loop 4 on tiny artifacts: the canary, the first step, the update's parts, resuming."""

import functools
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from configs import ppo as ppo_config
from configs import reward as reward_config
from gptlab import ppo, reward
from gptlab.model.presets import PRESETS
from gptlab.run import artifact, metrics
from gptlab.run.errors import UserError
from gptlab.train import checkpoint
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
    config.update(batch_size=16, minibatches=2, epochs=2, total_episodes=16 * 4)
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
    """KL and non-score reward exactly 0, ratio 1, decoder agrees."""
    first = lines_of(trained)[0]
    assert first["ppo/kl"] == 0 and first["ppo/non_score_reward"] == 0
    assert first["ppo/ratio_max_dev"] < 1e-4
    assert first["ppo/rollout_logprob_diff"] < 1e-4
    assert lines_of(trained)[-1]["ppo/kl"] != 0


def rerun(config, workdir, **changes):
    changed = copy_of(config, **changes)
    ppo.run(changed, str(workdir))
    return lines_of(workdir)


class Vowels:
    """A programmatic reward: the share of characters that are vowels."""

    name = "vowels"

    def __call__(self, prompts, replies):
        share = [sum(c in "aeiou" for c in r) / max(len(r), 1) for r in replies]
        return np.asarray(share, np.float32)


@pytest.fixture
def vowels(monkeypatch):
    monkeypatch.setattr("gptlab.rl.actor.registry.make", lambda spec, inputs: Vowels())


@pytest.mark.slow
def test_scores_paid_after_the_last_token_and_whitened_run_in_the_loop(
    config, trained, tmp_path, monkeypatch
):
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr("gptlab.train.log.PEAK_FLOPS", {kind: 1e9})
    changes = {"score_position": "after_last", "whiten_rewards": True}
    lines = rerun(config, tmp_path / "run", total_episodes=32, **changes)
    usual = lines_of(trained)
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("score", "response_len", "kl", "non_score_reward"):
        assert lines[0][f"ppo/{name}"] == usual[0][f"ppo/{name}"], name  # the same rollout
    for name in ("ppo/value_loss", "train/loss", "train/critic_grad_norm"):
        assert lines[0][name] != usual[0][name] and np.isfinite(lines[1][name]), name
    # What PPO computes beside one forward and backward is nowhere counted.
    assert "perf/tokens_per_sec" in lines[1] and "perf/mfu" not in lines[1]


CANARY = {
    "reward.kind": "scorer", "no_eos_score": None, "batch_size": 64, "minibatches": 2,
    "epochs": 4, "total_episodes": 64 * 10, "optimizer.lr": 1e-2, "optimizer.final_fraction": 0.5,
    "sampling.temperature": 1.0, "sample_every_steps": 0, "eval_every_steps": 100,
}  # fmt: skip


def test_sign_canary(config, vowels, tmp_path):
    """Ten steps on a programmatic reward raise it."""
    free = rerun(config, tmp_path / "free", **CANARY, **{"kl.coef": 0.0})
    first, last = free[0]["ppo/score"], np.mean([m["ppo/score"] for m in free[-2:]])
    assert last > first + 0.1


@pytest.mark.slow
def test_a_larger_beta_lowers_the_kl(config, vowels, tmp_path):
    free, held = (
        rerun(config, tmp_path / str(beta), **CANARY, **{"kl.coef": beta})[-1]["ppo/kl"]
        for beta in (0.0, 1.0)
    )
    assert held < 0.5 * free


def networks(config):
    """(actor, policy, critic) as a run starts with, on the mesh of the config."""
    tokenizer = ppo.Tokenizer.load(config.inputs.vocabulary)
    mesh = ppo.mesh_lib.make_mesh(config.mesh)
    architecture = ppo.checkpoint.load_model_config(config.inputs.init)
    model_config = ppo.ModelConfig.build(architecture, config.compute.to_dict())
    model = ppo.LanguageModel(model_config)
    policy = ppo.checkpoint.load_params(
        config.inputs.init, mesh, functools.partial(ppo.init_params, model)
    )
    scalar, critic = ppo.rewards.load_critic(
        config.inputs.reward if config.reward.kind == "model" else None,
        config.inputs.init, model_config, mesh, config.compute.to_dict(),
    )  # fmt: skip
    paid = critic if config.reward.kind == "model" else None
    frozen = (policy, paid)
    frozen = ppo.put_away(frozen) if config.offload else frozen
    actor = ppo.Actor(config, model, scalar, *frozen, tokenizer, mesh)
    data = ppo.prompts_lib.read_prompts(config, tokenizer, "train", config.batch_size, mesh)
    return actor, model, scalar, policy, critic, data, mesh


def test_frozen_models_in_the_hosts_memory_score_the_same(config, scored):
    actor, *_, policy, critic, data, mesh = networks(copy_of(config, offload=True))
    frozen = jax.tree.leaves((actor._reference, actor._reward_params))
    assert {x.sharding.memory_kind for x in frozen} == {"pinned_host"}
    before = scored[0]
    with jax.set_mesh(mesh):
        samples = ppo.mesh_lib.put_batch(before.samples, mesh)
        asked = [data.prompts[i] for i in data.at(0).index]
        after = jax.device_get(actor.score(policy, critic, samples, asked))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_one_frozen_model_at_a_time_is_on_the_device(config, scored, monkeypatch):
    """In the loop and in held-out figures: the reference is done before the next is fetched."""
    actor, *_, policy, critic, data, mesh = networks(copy_of(config, offload=True))
    seen, fetched, wait = [], actor._fetched, jax.block_until_ready
    monkeypatch.setattr(actor, "_fetched", lambda x: seen.append("fetched") or fetched(x))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: seen.append(x.shape) or wait(x))
    with jax.set_mesh(mesh):
        samples = ppo.mesh_lib.put_batch(scored[0].samples, mesh)
        asked = [data.prompts[i] for i in data.at(0).index]
        actor.score(policy, critic, samples, asked)
        actor.held_out(policy, critic, data, 1, jax.random.key(0))
    assert seen == 2 * ["fetched", samples.response.shape, "fetched"]


@pytest.fixture(scope="module")
def scored(config):
    """One rollout at step 0: (rollout, model, scalar model, policy, critic)."""
    actor, model, scalar, policy, critic, data, mesh = networks(config)
    with jax.set_mesh(mesh):
        batch = data.at(0)
        asked = [data.prompts[i] for i in batch.index]
        batch = ppo.mesh_lib.put_batch(batch, mesh)
        samples = actor.sample(policy, batch, jax.random.key(0))
        out = actor.score(policy, critic, samples, asked)
        last = actor._at_last(actor.scalars(critic, samples), samples)
    return jax.device_get(out), model, scalar, *jax.device_get((policy, critic, last))


def test_critic_starts_as_the_reward_model(scored):
    """critic(last) = score at step 0, normalisation included, exactly."""
    data, *_, last = scored
    np.testing.assert_array_equal(last, data.scores)
    assert np.std(data.scores) > 0


def test_critic_of_a_program_starts_at_zero(config, vowels):
    """A trunk that never predicted values has a zero head, so V = 0."""
    actor, _, scalar, _, critic, data, mesh = networks(copy_of(config, **{"reward.kind": "scorer"}))
    with jax.set_mesh(mesh):
        batch = ppo.mesh_lib.put_batch(data.at(0), mesh)
        values = ppo.rollout.token_scalars(scalar, critic, batch.tokens, batch.lengths)
    np.testing.assert_array_equal(values, np.zeros(batch.tokens.shape))


@pytest.fixture(scope="module")
def episodes(request, config, scored):
    """Episodes in which responses have different lengths and advantages are no zeros.

    Paid at score_position 'last', unless a test is parametrised over it.
    """
    position = getattr(request, "param", "last")
    data = scored[0]
    lengths = np.arange(1, 17) % 8 + 1
    mask = (np.arange(8)[None] < lengths[:, None]).astype(np.float32)
    samples = data.samples.replace(
        response_mask=mask, lengths=np.asarray(data.samples.prompt_lengths + lengths, np.int32)
    )
    changed = data.replace(
        samples=samples, ref_logprobs=np.asarray(data.old_logprobs + 0.1, np.float32)
    )
    out, _ = ppo.episodes_lib.prepare(
        jax.tree.map(jnp.asarray, changed), jnp.float32(0.05),
        copy_of(config, whiten_advantages="rollout", score_position=position),
    )  # fmt: skip
    return out


def loss_and_grads(loss_fn, params, batch):
    def mean(params):
        loss, (weight, _) = loss_fn(params, batch, jax.random.key(0))
        return loss / weight

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.parametrize(
    "episodes, longer", [("last", False), ("after_last", True)], indirect=["episodes"]
)
def test_padding_cannot_change_a_loss_or_its_gradient(config, scored, episodes, longer):
    """Policy and value loss, with rubbish wherever a mask is 0."""
    _, model, scalar, policy, critic, _ = scored
    mask, values = episodes.samples.response_mask, episodes.value_mask
    assert bool(jnp.any(mask != values)) == longer
    slots = jnp.arange(episodes.samples.tokens.shape[1])[None, :]
    real = slots < episodes.samples.lengths[:, None]
    dirty = episodes.replace(
        samples=episodes.samples.replace(
            tokens=jnp.where(real, episodes.samples.tokens, 7),
            response=jnp.where(mask > 0, episodes.samples.response, 9),
        ),
        old_logprobs=jnp.where(mask > 0, episodes.old_logprobs, -80.0),
        advantages=jnp.where(mask > 0, episodes.advantages, 1e3),
        old_values=jnp.where(values > 0, episodes.old_values, 1e3),
        returns=jnp.where(values > 0, episodes.returns, -1e3),
    )
    for loss_fn, params in (
        (ppo.make_policy_loss(model, config), policy),
        (ppo.make_value_loss(scalar, config), critic),
    ):
        clean, rubbish = (loss_and_grads(loss_fn, params, b) for b in (episodes, dirty))
        assert abs(float(clean[0] - rubbish[0])) < 1e-5
        for a, b in zip(*map(jax.tree.leaves, (clean[1], rubbish[1])), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_ptx_gradient_is_added_in_the_same_step(config, scored, episodes):
    """The gradient is g_ppo + c g_ptx, by accumulation, whatever the microbatches."""
    _, model, _, policy, _, _ = scored
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(9, 300, (8, 17)), jnp.int32)
    ones = jnp.ones((8, 16), jnp.int32)
    ptx = ppo.TokenBatch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=ones.astype(jnp.float32),
        segment_ids=ones, positions=jnp.arange(16)[None] * ones,
    )  # fmt: skip
    changed = copy_of(config, **{"ptx.coef": 0.7})
    whole = jax.jit(ppo.make_policy_grads(model, changed))
    both = whole(policy, episodes, ptx)
    alone = jax.jit(ppo.make_policy_grads(model, changed))(policy, episodes, None)
    _, extra = loss_and_grads(ppo.make_ptx_loss(model), policy, ptx)
    for total, own, other in zip(*map(jax.tree.leaves, (both[0], alone[0], extra)), strict=True):
        np.testing.assert_allclose(total, own + 0.7 * other, atol=1e-5)
    assert abs(float(both[1] - alone[1] - 0.7 * both[2]["ptx_loss"])) < 1e-5
    halves = jax.jit(ppo.make_policy_grads(model, copy_of(changed, accumulation_steps=2)))
    for a, b in zip(
        *map(jax.tree.leaves, (halves(policy, episodes, ptx)[0], both[0])), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The largest ratio is that of all tokens, and no mean over the microbatches.
    noise = rng.normal(size=episodes.old_logprobs.shape, scale=0.1)
    moved = episodes.replace(old_logprobs=episodes.old_logprobs + noise.astype(np.float32))
    one, two = (grads(policy, moved, ptx)[2]["ratio_dev_max"] for grads in (whole, halves))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    assert one > 0.1


@pytest.mark.slow
def test_ptx_runs_in_the_loop(config, trained, tmp_path):
    lines = rerun(
        config, tmp_path / "run", total_episodes=32,
        **{"ptx.coef": 1.0, "ptx.batch_size": 8, "ptx.seq_len": 32},
    )  # fmt: skip
    assert 0 < lines[-1]["ppo/ptx_loss"] < 20
    assert lines[0]["train/grad_norm"] != lines_of(trained)[0]["train/grad_norm"]


def test_value_clip_is_a_max_with_factor_one_half():
    """Value and gradient on both sides of the clip, by hand."""
    loss = lambda v: ppo.losses.ppo_value_loss(  # noqa: E731
        v, jnp.zeros((1, 2)), jnp.asarray([[1.0, -1.0]]), jnp.ones((1, 2)), 0.2
    )[0]
    values = jnp.asarray([[0.5, 0.5]])
    # (0.5 - 1)^2 = .25 < (0.2 - 1)^2 = .64: clipped, no gradient. (1.5)^2 > (1.2)^2: not.
    assert abs(float(loss(values)) - 0.5 * (0.64 + 2.25) / 2) < 1e-6
    np.testing.assert_allclose(jax.grad(loss)(values), [[0.0, 1.5 / 2]], atol=1e-6)


def test_advantage_whitening_scopes(config, scored):
    """'rollout' whitens before the cut into minibatches, the others do not."""
    data = jax.tree.map(jnp.asarray, scored[0])
    prepared = {
        kind: ppo.episodes_lib.prepare(
            data, jnp.float32(0.1), copy_of(config, whiten_advantages=kind)
        )[0]
        for kind in ppo.WHITENINGS
    }
    raw, white = prepared["none"].advantages, prepared["rollout"].advantages
    np.testing.assert_array_equal(raw, prepared["minibatch"].advantages)
    real = np.asarray(data.samples.response_mask) > 0
    assert abs(np.asarray(white)[real].mean()) < 1e-5
    assert abs(np.asarray(white)[real].std(ddof=0) - 1) < 1e-3
    # Row 18: returns are the same whatever happens to the advantages.
    np.testing.assert_array_equal(prepared["none"].returns, prepared["rollout"].returns)
    values = np.asarray(prepared["none"].old_values)
    np.testing.assert_allclose(prepared["none"].returns, np.asarray(raw) + values, atol=1e-6)


ADAPTIVE = {"kl.kind": "adaptive", "kl.coef": 0.2, "kl.target": 0.05, "kl.horizon": 100}


@pytest.fixture(scope="module")
def adaptive(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ppo") / "adaptive"
    rerun(config, workdir, **ADAPTIVE)
    return workdir


def test_adaptive_kl_moves_after_the_batch(adaptive):
    """Step k is paid with the coefficient that step k - 1 left, n = episodes."""
    coef = np.float32(0.2)
    for line in lines_of(adaptive):
        assert abs(line["ppo/kl_coef"] - coef) < 1e-6
        coef *= 1 + np.clip(line["ppo/kl"] / 0.05 - 1, -0.2, 0.2) * 16 / 100
    results = artifact.read_manifest(adaptive)["results"]
    assert abs(results["kl_coef"] - coef) < 1e-6 and abs(coef - 0.2) > 1e-3


@pytest.mark.slow
def test_a_run_that_broke_off_at_its_end_writes_every_line_once(config, adaptive, tmp_path):
    def broken(self, digest):
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact.Run, "complete", broken)
        with pytest.raises(RuntimeError):
            rerun(config, tmp_path / "run", **ADAPTIVE)
    rerun(config, tmp_path / "run", **ADAPTIVE)
    ours, theirs = (metrics.read_metrics(path) for path in (tmp_path / "run", adaptive))
    assert [(m["step"], "train/loss" in m) for m in ours] == [
        (m["step"], "train/loss" in m) for m in theirs
    ]


def test_a_restore_frees_the_initial_state_before_it_reads(tmp_path, monkeypatch):
    """Both would have to fit otherwise: policy, critic and the moments of both, twice."""

    def state(value):
        one = lambda: ppo.TrainState(jnp.int32(0), {"w": jnp.full(4, value)}, {"m": jnp.zeros(4)})  # noqa: E731
        return ppo.PPOState(one(), one(), jnp.float32(value))

    config = common.checkpoint(1, best_metric=None)
    shardings = jax.tree.map(lambda x: x.sharding, state(0.0))
    given = state(1.0)
    seen = []
    read = ppo.Checkpoints.restore_latest

    def watched(self, wanted):
        seen.extend(x.is_deleted() for x in jax.tree.leaves(ppo.items_of(given)))
        return read(self, wanted)

    monkeypatch.setattr(ppo.Checkpoints, "restore_latest", watched)
    with ppo.Checkpoints(tmp_path, config) as checkpoints:
        assert ppo.restore(checkpoints, given, shardings, 4) == (0, given)
        checkpoints.save(3, ppo.items_of(state(2.0)), {})
        checkpoints.wait()
        done, restored = ppo.restore(checkpoints, given, shardings, 4)
    assert seen and all(seen)
    assert (done, int(restored.policy.step), int(restored.critic.step)) == (3, 12, 12)
    assert float(restored.kl_coef) == 2.0 and float(restored.critic.params["w"][0]) == 2.0


def test_skipped_steps_are_all_so_far(config, tmp_path, monkeypatch):
    """Of policy and critic, at the end of a step's four updates: not the mean over these."""
    for name in ("ppo_policy_loss", "ppo_value_loss"):
        loss = getattr(ppo.losses, name)
        broken = lambda *args, loss=loss: (loss(*args)[0] * jnp.nan, loss(*args)[1])  # noqa: E731
        monkeypatch.setattr(ppo.losses, name, broken)
    lines = rerun(config, tmp_path / "run", total_episodes=32, on_nonfinite="skip")
    for name in ("train/skipped_steps", "train/critic_skipped_steps"):
        assert [line[name] for line in lines] == [4, 8]


def test_a_critic_that_is_not_finite_is_not_saved(config, tmp_path):
    """Nor when every loss is finite: the last update of a step may break it."""
    changes = {"value_optimizer.lr": 1e39, "checkpoint.every_steps": 1}  # infinite as a float32
    with pytest.raises(UserError, match="critic_param_norm is (nan|inf) at step 1; .*value_opt"):
        rerun(config, tmp_path / "run", epochs=1, minibatches=1, **changes)
    assert checkpoint.checkpoint_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_several_samples_a_prompt(config, tmp_path):
    lines = rerun(
        config, tmp_path / "run", samples_per_prompt=2, total_episodes=16, sample_every_steps=1
    )
    assert len(lines) == 1
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    prompts = [tuple(json.loads(line)["prompt"]) for line in samples]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_critic_is_away_while_replies_are_drawn(config, tmp_path, monkeypatch):
    """In the loop and in held-out figures; it scores, learns and is saved on the device."""
    kinds = {"sample": [], "score": [], "save": []}

    def spy(owner, name, state_of):
        whole = getattr(owner, name)

        def called(*arguments):
            critic = jax.tree.leaves(state_of(*arguments))
            kinds[name].append({x.sharding.memory_kind for x in critic})
            return whole(*arguments)

        monkeypatch.setattr(owner, name, called)

    away = ppo.without_critic
    critics = []
    monkeypatch.setattr(
        ppo, "without_critic", lambda *x: critics.append(away(*x).critic) or away(*x)
    )
    build = ppo.Actor.__init__

    def built(self, *arguments):
        build(self, *arguments)
        spy(self, "sample", lambda *_: critics[-1])

    monkeypatch.setattr(ppo.Actor, "__init__", built)
    spy(ppo.Actor, "score", lambda self, policy, critic, *_: critic)
    spy(ppo.Checkpoints, "save", lambda self, done, items, *_: items)
    rerun(config, tmp_path / "run", offload=True, total_episodes=16)
    assert kinds["sample"] == [{"pinned_host"}] * len(kinds["sample"]) and len(critics) == 2
    assert kinds["score"] == [{"device"}] and kinds["save"] == [{"device"}]


@pytest.mark.slow
def test_offload_leaves_no_frozen_model_on_the_device(config, tmp_path, monkeypatch):
    """When a step's update has been dispatched, neither reference nor reward model is there."""
    held = {}
    push = ppo.StepLog.push

    def pushed(self, step, values):
        here = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device"]
        held[self._run.config.offload] = sum(x.nbytes for x in here)
        push(self, step, values)

    monkeypatch.setattr(ppo.StepLog, "push", pushed)
    for offload in (False, True):
        gc.collect()
        rerun(config, tmp_path / str(offload), offload=offload, total_episodes=16)
    *_, policy, critic, _, _ = networks(config)
    frozen = sum(x.nbytes for x in jax.tree.leaves((policy, critic)))
    assert held[False] - held[True] > 0.9 * frozen


class Started(Exception):
    """Ends a run where its optimisers' states would be made."""


def test_frozen_models_are_away_before_the_optimisers_states_are_made(
    config, tmp_path, monkeypatch
):
    """Or a run could need the most memory before its first step, where no plan looks."""
    held = {}

    def start(params, tx, mesh):
        here = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device"]
        held[offload] = sum(x.nbytes for x in here)
        raise Started

    monkeypatch.setattr(ppo.state_lib, "state_from_params", start)
    for offload in (False, True):
        gc.collect()
        with pytest.raises(Started):
            rerun(config, tmp_path / str(offload), offload=offload)
    *_, policy, critic, _, _ = networks(config)
    assert held[False] - held[True] > 0.9 * sum(x.nbytes for x in jax.tree.leaves((policy, critic)))


def test_with_adapters_there_is_nothing_to_put_away(config, tmp_path):
    with pytest.raises(UserError, match="offload=True and config.lora.rank=4"):
        rerun(config, tmp_path / "run", **{"offload": True, "lora.rank": 4})


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("sampling.top_p", 0.9, "top_p"),
        ("sampling.top_k", 3, "top_k"),
        ("advantage", "group", "config.advantage"),
        ("whiten_advantages", "batch", "config.whiten_advantages"),
        ("score_position", "first", "config.score_position"),
        ("reward.kind", "human", "config.reward.kind"),
        ("compute.dropout", 0.1, "config.compute.dropout"),
        ("minibatches", 3, "config.minibatches"),
        ("samples_per_prompt", 3, "samples_per_prompt"),
        ("total_steps", 3, "total_episodes"),
        ("inputs.reward", None, "inputs.reward"),
        ("kl.kind", "adapt", "config.kl.kind"),
        ("sampling.max_new_tokens", 500, "context window"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, key, value, words):
    with pytest.raises(UserError, match=words):
        rerun(config, tmp_path / "run", **{key: value})


def test_a_vocabulary_of_another_size_is_refused_before_anything_is_sampled(
    config, other_vocabulary, tmp_path, monkeypatch
):
    monkeypatch.setattr(ppo, "Actor", None)
    with pytest.raises(UserError, match="inputs.init has a vocabulary of 320 .* of 330"):
        rerun(config, tmp_path / "run", **{"inputs.vocabulary": str(other_vocabulary)})


@pytest.mark.parametrize(
    "other, changes, words",
    [
        (
            {"vocab_size": 330},
            {},
            "inputs.reward has a vocabulary of 330, config.inputs.init of 320",
        ),
        (
            {**PRESETS["tiny_gpt2"], "vocab_size": 320},
            {"lora.rank": 2, "lora.targets": ("gate",)},
            "has no 'gate'",
        ),
    ],
    ids=["vocabulary", "adapters"],
)
def test_a_reward_model_that_cannot_pay_is_refused_before_anything_is_loaded(
    config, tiny_model, tmp_path, monkeypatch, other, changes, words
):
    model = {**tiny_model, **other}
    pays = artifacts.write_reward(tmp_path / "reward", model, gain=1.0, bias=0.0)
    monkeypatch.setattr(ppo.checkpoint, "load_params", None)
    with pytest.raises(UserError, match=words):
        rerun(config, tmp_path / "run", **{"inputs.reward": str(pays), **changes})


def test_ptx_needs_its_corpus(config, tmp_path):
    with pytest.raises(UserError, match="inputs.tokens"):
        rerun(config, tmp_path / "run", **{"ptx.coef": 1.0, "inputs.tokens": None})


def test_a_run_cannot_become_shorter_than_it_is(config, tmp_path):
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    fewer = {"total_steps": None, "total_episodes": 8 * config.batch_size}
    with pytest.raises(UserError, match="at step 9 already, beyond the 8 .*total_episodes"):
        rerun(config, tmp_path, **fewer)
