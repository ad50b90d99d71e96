"""Loop 4, PPO: rollout -> score -> advantages -> update, against a frozen reference.

    python -m gptlab.ppo --config=configs/ppo.py --workdir=runs/ppo \
        --config.inputs.init=runs/sft --config.inputs.reward=runs/reward \
        --config.inputs.prompts=runs/clean --config.inputs.vocabulary=runs/vocabulary

A step samples `batch_size` replies (`samples_per_prompt` to each prompt), pays them the reward's
score and a KL penalty per token, and makes epochs * minibatches optimiser steps on policy and
critic (InstructGPT, arXiv 2203.02155; lm-human-preferences, 1909.08593; the details that decide
whether it works: Huang et al. 2024, 2403.17031). The critic starts as the reward model. `ptx.coef`
mixes in the pretraining gradient; `reward.kind='scorer'` pays by a program instead of a model. How
long it takes and what to expect stand in the config.

Dimensions: B episodes, P prompt, R response, T = P + R, U optimiser steps (epochs * minibatches).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data import batches, mixtures
from gptlab.data.batches import PromptBatches, TokenBatch
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import lora
from gptlab.model.heads import ScalarModel
from gptlab.model.sharding import split_rows
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params, score_batch
from gptlab.rl import advantages as adv
from gptlab.rl import episodes as episodes_lib
from gptlab.rl import kl as kl_lib
from gptlab.rl import prompts as prompts_lib
from gptlab.rl import rewards, rollout
from gptlab.rl.actor import Actor, fetch, put_away
from gptlab.rl.episodes import Episodes
from gptlab.rl.rollout import Rollout
from gptlab.run import artifact, profile, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import checkpoint, durations, losses
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train import step as step_lib
from gptlab.train.checkpoint import Checkpoints
from gptlab.train.checks import check_vocabulary
from gptlab.train.log import StepLog
from gptlab.train.optimizer import make_optimizer
from gptlab.train.state import TrainState

WHITENINGS = ("minibatch", "rollout", "none")
AT_END = ("param_norm", "skipped_steps")  # of a step's U values the last; of others, the mean
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class PPOState:
    """All that a step changes; `policy.step` and `critic.step` count optimiser steps."""

    policy: TrainState
    critic: TrainState
    kl_coef: jax.Array  # float32 []


def make_policy_loss(model: LanguageModel, config: ConfigDict) -> step_lib.LossFn:
    """Clipped surrogate over response tokens, as sums and their weight: accumulation is exact."""

    def loss_fn(params: Any, batch: Episodes, rng: jax.Array) -> Any:
        del rng  # no dropout in RL: the ratio compares two values of one function
        samples, temperature = batch.samples, config.sampling.temperature
        logprobs, _ = rollout.response_logprobs(model, params, samples, temperature)  # [B, R]
        mask = samples.response_mask
        loss, metrics = losses.ppo_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, mask, config.policy_clip
        )
        weight = jnp.sum(mask)
        largest = {"ratio_dev_max": metrics.pop("ratio_dev_max")}  # no mean, so it has no weight
        return loss * weight, (weight, {k: v * weight for k, v in metrics.items()} | largest)

    return loss_fn


def make_value_loss(model: ScalarModel, config: ConfigDict) -> step_lib.LossFn:
    """Clipped value loss over the value mask, times vf_coef."""

    def loss_fn(params: Any, batch: Episodes, rng: jax.Array) -> Any:
        del rng
        samples = batch.samples
        values = rollout.token_scalars(model, params, samples.tokens, samples.lengths)  # [B, T]
        values = rollout.at_response(values, samples.prompt_lengths, samples.response.shape[1])
        loss, metrics = losses.ppo_value_loss(
            values, batch.old_values, batch.returns, batch.value_mask, config.value_clip
        )
        weight = jnp.sum(batch.value_mask)
        metrics = {**metrics, "value_loss": loss}
        return config.vf_coef * loss * weight, (weight, {k: v * weight for k, v in metrics.items()})

    return loss_fn


def make_ptx_loss(model: LanguageModel) -> step_lib.LossFn:
    """Next-token loss on pretraining rows (PPO-ptx, InstructGPT eq. 2), a mean over tokens."""

    def loss_fn(params: Any, batch: Any, rng: jax.Array) -> Any:
        del rng
        stats = score_batch(model, params, batch)
        loss, weight, _ = losses.cross_entropy_sums(stats, batch.loss_mask, 0.0)
        return loss, (weight, {"ptx_loss": loss})

    return loss_fn


def make_policy_grads(model: LanguageModel, config: ConfigDict) -> Callable[..., Any]:
    """(params, minibatch, ptx rows or None) -> (g_ppo + c g_ptx, loss, metrics)."""
    policy_loss, ptx_loss = make_policy_loss(model, config), make_ptx_loss(model)

    def policy_grads(params: Any, batch: Episodes, ptx: TokenBatch | None) -> Any:
        key = jax.random.key(0)  # nothing is drawn
        grads, loss, metrics = step_lib.accumulate(
            policy_loss, params, batch, config.accumulation_steps, key
        )
        if ptx is not None:
            extra, ptx_value, ptx_metrics = step_lib.accumulate(
                ptx_loss, params, ptx, config.accumulation_steps, key
            )
            coef = config.ptx.coef
            grads = jax.tree.map(lambda g, e: g + coef * e, grads, extra)
            loss, metrics = loss + coef * ptx_value, {**metrics, **ptx_metrics}
        return grads, loss, metrics

    return policy_grads


def make_update(
    policy_grads: Callable[..., Any],
    value_loss: step_lib.LossFn,
    transforms: tuple[optax.GradientTransformation, optax.GradientTransformation],
    schedule: Callable[[Any], Any],
    controller: kl_lib.FixedKL | kl_lib.AdaptiveKL,
    config: ConfigDict,
) -> Callable[..., tuple[PPOState, Metrics]]:
    """A step's whole update, compiled as one: (state, rollout, ptx rows, key) -> state, metrics."""
    policy_tx, critic_tx = transforms
    updates = config.epochs * config.minibatches  # U

    def one(state: tuple[TrainState, TrainState], inputs: Any, episodes: Episodes) -> Any:
        """One optimiser step of policy and critic on one minibatch."""
        policy, critic = state
        rows, ptx = inputs  # rows int32 [B / minibatches]
        # A gather by permuted indices leaves rows on every device.
        batch = jax.tree.map(lambda x: split_rows(x[rows]), episodes)
        if config.whiten_advantages == "minibatch":
            mask = batch.samples.response_mask
            white = adv.whiten(batch.advantages, mask, keep_mean=False)
            batch = batch.replace(advantages=white)
        grads, loss, metrics = policy_grads(policy.params, batch, ptx)
        policy, norms = step_lib.apply_updates(policy, grads, policy_tx, config.on_nonfinite)
        grads, critic_loss, value_metrics = step_lib.accumulate(
            value_loss, critic.params, batch, config.accumulation_steps, jax.random.key(0)
        )
        critic, critic_norms = step_lib.apply_updates(critic, grads, critic_tx, config.on_nonfinite)
        metrics = {**metrics, **value_metrics, "policy_loss": loss}
        critic_norms = {k.replace("train/", "train/critic_"): v for k, v in critic_norms.items()}
        train = {"train/loss": loss + critic_loss, **norms, **critic_norms}
        return (policy, critic), (metrics, train)

    def update(state: PPOState, data: Rollout, ptx: TokenBatch | None, key: jax.Array) -> Any:
        # (1, 2) Rewards, advantages, returns, with the coefficient of before.
        episodes, figures = episodes_lib.prepare(data, state.kl_coef, config)
        lr = schedule(step_lib.applied_updates(state.policy.opt_state))
        # (3) Epochs x minibatches, reshuffled every epoch.
        count = data.scores.shape[0]
        keys = jax.random.split(key, config.epochs)
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)  # [epochs, B]
        order = order.reshape(updates, count // config.minibatches)  # [U, B / minibatches]
        ptx = jax.tree.map(lambda x: _stack(x, updates), ptx)  # [U, b, T]
        (policy, critic), (metrics, train) = jax.lax.scan(
            functools.partial(one, episodes=episodes), (state.policy, state.critic), (order, ptx)
        )
        # (4) The KL coefficient, after the batch that was paid with the old one.
        kl_coef = controller.update(state.kl_coef, figures["kl"], count)
        first = metrics.pop("ratio_dev_max")[0]  # before any step: 0 but for rounding
        means = {name: jnp.mean(x) for name, x in {**metrics, **figures}.items()}
        train = {name: x[-1] if name.endswith(AT_END) else jnp.mean(x) for name, x in train.items()}
        train = {**train, "train/lr": lr, "ppo/ratio_max_dev": first}
        return PPOState(policy, critic, kl_coef), train | {f"ppo/{k}": v for k, v in means.items()}

    return update


def jit_update(
    model: LanguageModel,
    scalar_model: ScalarModel,
    transforms: tuple[optax.GradientTransformation, optax.GradientTransformation],
    schedule: Callable[[Any], Any],
    controller: kl_lib.FixedKL | kl_lib.AdaptiveKL,
    config: ConfigDict,
    shardings: PPOState,
    mesh: Mesh,
) -> Any:
    """The update as the loop runs it, and as gptlab.plan compiles it for other hardware."""
    grads, value_loss = make_policy_grads(model, config), make_value_loss(scalar_model, config)
    update = make_update(grads, value_loss, transforms, schedule, controller, config)
    return step_lib.jit_step(update, shardings, mesh)


def _stack(x: jax.Array, parts: int) -> jax.Array:
    """[parts * b, ...] -> [parts, b, ...], each part with a share of every device's rows."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains for total_steps or total_episodes, or goes on where `workdir` stands.

    Raises:
      UserError: an input or a config value is wrong, or a loss is not finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    asked = total_steps(config)
    setting = "total_steps" if config.total_steps is not None else "total_episodes"
    durations.check_steps_not_passed(workdir, asked, f"config.{setting}={config[setting]}")
    with artifact.open_run(config, workdir, "ppo") as run:
        if run.finished:
            print(f"{workdir}: this policy is already trained")
            return
        train(config, run)


def train(config: ConfigDict, run: artifact.Run) -> None:
    """Everything between opening the run and completing it."""
    # (1) Inputs, checked before anything is compiled.
    check(config)
    tokenizer = Tokenizer.load(config.inputs.vocabulary)
    compute = config.compute.to_dict()
    model_config = ModelConfig.build(checkpoint.load_model_config(config.inputs.init), compute)
    check_vocabulary(model_config, tokenizer, "config.inputs.init")
    lora.check(config.lora, model_config)
    if config.reward.kind == "model":
        paid_by = rewards.reward_model_config(config.inputs.reward, model_config, compute)
        lora.check(config.lora, paid_by)  # of the critic, too
    model = LanguageModel(model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    episodes = config.batch_size  # B
    num_prompts = episodes // config.samples_per_prompt
    check_batches(config, mesh)
    total = total_steps(config)
    updates = config.epochs * config.minibatches
    length = config.data.prompt_len + config.sampling.max_new_tokens  # T
    mesh_lib.check_length("data.prompt_len + sampling.max_new_tokens", length, mesh)
    controller = kl_lib.make_controller(config.kl)

    # (2) Data: prompts of the training and the held-out split, pretraining rows for ptx.
    data = prompts_lib.read_prompts(config, tokenizer, "train", num_prompts, mesh)
    held_out = prompts_lib.read_prompts(config, tokenizer, "validation", episodes, mesh)
    ptx_rows = read_ptx(config, updates, mesh)

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # (3) Policy and reference from SFT, critic from the reward model. Adapters leave their
        # bases as they are: with them, no reference and no reward model's trunk is held apart. What
        # `offload` puts away goes before the optimisers' states come: there is no room for both.
        sample_key, update_key, eval_key, lora_key = jax.random.split(
            jax.random.key(config.seed), 4
        )
        init_fn = functools.partial(init_params, model)
        load_policy = functools.partial(checkpoint.load_params, mesh=mesh, init_fn=init_fn)
        policy = load_policy(config.inputs.init)
        reference = None
        if stands_apart(config):
            reference = load_policy(config.inputs.reference or config.inputs.init)
            reference = put_away(reference) if config.offload else reference
        scalar_model, critic = rewards.load_critic(
            config.inputs.reward if config.reward.kind == "model" else None,
            config.inputs.init,
            model_config,
            mesh,
            compute,
        )
        policy_tx, schedule = make_optimizer(config.optimizer, total * updates)
        critic_tx, _ = make_optimizer(config.value_optimizer, total * updates)
        reward_params = None
        if config.reward.kind == "model":  # the critic starts as a copy of what pays
            apart = {"head": critic["head"]} if config.lora.rank else critic
            reward_params = put_away(apart) if config.offload else jax.tree.map(jnp.copy, apart)
            del apart
        policy = lora.add(policy, config.lora, lora_key)
        critic = lora.add(critic, config.lora, jax.random.fold_in(lora_key, 1))
        policy, policy_sh = state_lib.state_from_params(policy, policy_tx, mesh)
        critic, critic_sh = state_lib.state_from_params(critic, critic_tx, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        shardings: Any = PPOState(policy_sh, critic_sh, whole)  # type: ignore[arg-type]
        state = PPOState(policy, critic, jax.device_put(controller.initial(), whole))
        del policy, critic  # what is put away must not stay on the device under another name
        actor = Actor(config, model, scalar_model, reference, reward_params, tokenizer, mesh)
        transforms = (policy_tx, critic_tx)
        update = jit_update(
            model, scalar_model, transforms, schedule, controller, config, shardings, mesh
        )

        # (4) The newest checkpoint, if there is one; prompts, keys and metrics follow its step.
        checkpoints = stack.enter_context(Checkpoints(run.workdir, config.checkpoint, run.metrics))
        start, state = restore(checkpoints, state, shardings, updates)
        run.metrics.rewind(start)
        log = StepLog(run, config, episodes * length, flops_per_token=None)

        # (5) The loop.
        stream = stack.enter_context(contextlib.closing(data.iterate(start)))
        profiler = stack.enter_context(
            contextlib.closing(profile.step_profiler(config.profile, run.workdir))
        )
        progress = stack.enter_context(run.progress(total, "ppo", initial=start))
        figures: dict[str, float] = {}
        for done in range(start + 1, total + 1):
            profiler.step(done)
            warm = done > start + 1
            with run.goodput.measure("data"):
                prompts = prompts_lib.repeat_rows(next(stream), config.samples_per_prompt)
                asked = [data.prompts[i] for i in prompts.index]
                prompts = mesh_lib.put_batch(prompts, mesh)
                ptx = None if ptx_rows is None else mesh_lib.put_batch(ptx_rows.at(done - 1), mesh)
            # Each phase is waited for: they depend on each other anyway, and goodput can tell them
            # apart.
            with run.goodput.measure("rollout" if warm else "compile"):
                state = without_critic(state, config)
                samples = actor.sample(
                    state.policy.params, prompts, jax.random.fold_in(sample_key, done)
                )
                jax.block_until_ready(samples)
            with run.goodput.measure("score" if warm else "compile"):
                state = with_critic(state, config)
                scored = actor.score(state.policy.params, state.critic.params, samples, asked)
                jax.block_until_ready(scored)
            with run.goodput.measure("step" if warm else "compile"):
                key = jax.random.fold_in(update_key, done)
                state, metrics = update(state, scored, ptx, key)
                log.push(done, metrics)
                log.flush()  # the next rollout waits for this update anyway
            progress.update(score=float(metrics["ppo/score"]), kl=float(metrics["ppo/kl"]))
            stop, last = run.stop_requested() and done < total, done == total
            save = checkpoints.due(done) or stop or last
            evaluate = done % config.eval_every_steps == 0 or last
            if config.sample_every_steps and done % config.sample_every_steps == 0:
                for example in actor.examples(scored, asked):
                    run.metrics.write_sample({"step": done, **example})
            if not (save or evaluate):
                continue
            if evaluate:
                state = without_critic(state, config)
                figures = evaluate_policy(run, actor, state, held_out, eval_key)
                run.metrics.write(done, figures)
                state = with_critic(state, config)
            if save:
                with run.goodput.measure("save"):
                    checkpoints.save(done, items_of(state), {}, figures if evaluate else None)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"saved at step {done} of {total}")
            log.resume()

        # (6) Results.
        checkpoints.wait()
        if not figures:  # there was no step left to run
            state = without_critic(state, config)
            figures = evaluate_policy(run, actor, state, held_out, eval_key)
        run.results(
            steps=total,
            episodes=total * episodes,
            kl_coef=float(state.kl_coef),
            tokens_per_sec=log.mean_tokens_per_sec(),
            **{name.removeprefix("eval/"): value for name, value in figures.items()},
        )
        run.complete(state_lib.digest(lora.merge(state.policy.params)))


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    choices = {
        "advantage": ("gae",),
        "whiten_advantages": WHITENINGS,
        "score_position": rewards.SCORE_POSITIONS,
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise UserError(f"config.{name}={config[name]!r} is not one of {allowed}")
    if config.reward.kind not in ("model", "scorer"):
        raise UserError(f"config.reward.kind={config.reward.kind!r}: 'model' or 'scorer'")
    for name in ("batch_size", "epochs", "minibatches", "samples_per_prompt"):
        if config[name] < 1:
            raise UserError(f"config.{name}={config[name]} must be at least 1")
    for name in ("minibatches", "samples_per_prompt"):
        if config.batch_size % config[name]:
            raise UserError(
                f"config.{name}={config[name]} does not divide batch_size={config.batch_size}"
            )
    check_offload(config)
    needed = ["init", "vocabulary", "prompts"]
    needed += ["reward"] if config.reward.kind == "model" else []
    needed += ["tokens"] if config.ptx.coef else []
    artifact.check_inputs(config, needed)
    if config.compute.dropout:
        raise UserError(
            f"config.compute.dropout={config.compute.dropout}: RL runs without dropout, or the "
            "probability ratio would compare two different functions; set it to 0.0"
        )


def stands_apart(config: ConfigDict) -> bool:
    """Whether the reference is a model of its own, and not the policy with its adapters off."""
    same = config.inputs.reference in (None, config.inputs.init)
    return not (config.lora.rank and same)


def check_offload(config: ConfigDict) -> None:
    """UserError for `offload` where nothing frozen stands beside policy and critic."""
    if config.offload and not stands_apart(config):
        raise UserError(
            f"config.offload=True and config.lora.rank={config.lora.rank}: with adapters no frozen "
            "model stands beside policy and critic that could be put away; set one of the two"
        )


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """UserError unless the mesh divides every batch of a step."""
    num_prompts = config.batch_size // config.samples_per_prompt
    mesh_lib.check_batch_size("batch_size / samples_per_prompt", num_prompts, mesh)
    for name, size in (
        ("batch_size / minibatches", config.batch_size // config.minibatches),
        *([("ptx.batch_size", config.ptx.batch_size)] if config.ptx.coef else []),
    ):
        mesh_lib.check_batch_size(name, size, mesh, config.accumulation_steps)
    if config.ptx.coef:
        mesh_lib.check_length("ptx.seq_len", config.ptx.seq_len, mesh)


def total_steps(config: ConfigDict) -> int:
    """Steps of batch_size episodes; exactly one of total_steps and total_episodes is set."""
    steps, episodes = config.total_steps, config.total_episodes
    if (steps is None) == (episodes is None) or (steps or episodes) < 1:
        raise UserError(
            f"set exactly one of config.total_steps ({steps}) and config.total_episodes "
            f"({episodes}), to at least 1"
        )
    return steps if steps is not None else math.ceil(episodes / config.batch_size)


def read_ptx(config: ConfigDict, updates: int, mesh: Mesh) -> batches.TrainBatches | None:
    """Pretraining rows, ptx.batch_size for each optimiser step; None when the coefficient is 0."""
    if not config.ptx.coef:
        return None
    source = mixtures.packed(
        config.inputs.tokens, config.ptx.name, "train", config.ptx.seq_len, key="config.ptx.name"
    )
    rows = config.ptx.batch_size * updates
    return batches.TrainBatches(source, rows, config.seed, *mesh_lib.process_block(mesh))


def without_critic(state: PPOState, config: ConfigDict) -> PPOState:
    """With `offload`, critic and its moments in the host's memory: while replies are drawn."""
    return state.replace(critic=put_away(state.critic)) if config.offload else state  # type: ignore[attr-defined]


def with_critic(state: PPOState, config: ConfigDict) -> PPOState:
    """With `offload`, critic and its moments on the device again: to score and to learn."""
    return state.replace(critic=fetch(state.critic)) if config.offload else state  # type: ignore[attr-defined]


def items_of(state: PPOState) -> dict[str, Any]:
    """The state as checkpoint items; `params` is the policy, as in every stage with one."""
    return {
        "params": state.policy.params,
        "opt_state": state.policy.opt_state,
        "critic": state.critic.params,
        "critic_opt_state": state.critic.opt_state,
        "rl": {"kl_coef": state.kl_coef},
    }


def restore(
    checkpoints: Checkpoints, state: PPOState, shardings: PPOState, updates: int
) -> tuple[int, PPOState]:
    """(finished steps, state): the newest checkpoint, in the memory of what was given, or that."""
    restored = checkpoints.restore_over(items_of(state), items_of(shardings))
    if restored is None:
        return 0, state
    done, items, _ = restored
    count = jax.device_put(np.asarray(done * updates, np.int32), shardings.kl_coef)
    return done, PPOState(
        TrainState(count, items["params"], items["opt_state"]),
        TrainState(jnp.copy(count), items["critic"], items["critic_opt_state"]),
        items["rl"]["kl_coef"],
    )


def evaluate_policy(
    run: artifact.Run, actor: Actor, state: PPOState, held_out: PromptBatches, key: jax.Array
) -> dict[str, float]:
    """The held-out figures, named eval/validation/..."""
    with run.goodput.measure("eval"):
        figures = actor.held_out(
            state.policy.params, state.critic.params, held_out, run.config.eval_batches, key
        )
    return {f"eval/validation/{name}": value for name, value in figures.items()}


if __name__ == "__main__":
    program.main(run, "ppo")
