"""Loop 2, supervised fine-tuning: next-token loss on the assistant's tokens of dialogues.

    python -m gptlab.sft --config=configs/sft.py --workdir=runs/sft \
        --config.inputs.init=runs/pretrain --config.inputs.tokens=runs/tokens \
        --config.inputs.vocabulary=runs/vocabulary

Starts from the best checkpoint of a pretraining run and learns what the assistant says and where
it stops: loss on its content and its end-of-turn token, nothing else. How long it takes and what to
expect stand in each config.

Its results are the best checkpoint's, which later stages load: `validation/*` on the whole held-out
split, `best/validation/*` on the config.eval_batches that chose it. `sft/reply_perplexity` and, of
the model it started from, `pretrained/reply_perplexity` are on those same batches.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptlab.data import batches, chat, mixtures
from gptlab.data.batches import TokenBatch
from gptlab.data.records import Message
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import lora, transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, profile, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import durations, losses
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train import step as step_lib
from gptlab.train.checkpoint import Checkpoints, best_metrics, load_model_config, load_params
from gptlab.train.checks import check_fits
from gptlab.train.held_out import make_held_out
from gptlab.train.log import StepLog
from gptlab.train.optimizer import make_optimizer
from gptlab.train.samples import make_sampler
from gptlab.train.state import TrainState


def make_loss_fn(model: LanguageModel, loss_on: str) -> step_lib.LossFn:
    """The loss of a microbatch, as sums and their weight.

    Args:
      model: the policy; its residual dropout is on.
      loss_on: 'assistant', the assistant's content and end-of-turn tokens (InstructGPT), without
        the messages that a record leaves out (Conversation.learnt); or 'all', every token that is
        not padding (arXiv 2403.17031).
    """
    if loss_on not in ("assistant", "all"):
        raise UserError(f"config.loss_on={loss_on!r} is unknown: use 'assistant' or 'all'")

    def loss_fn(params: Any, batch: Any, rng: jax.Array) -> Any:
        stats = transformer.score_batch(model, params, batch, rng)  # of [B, T]
        mask = batch.loss_mask  # [B, T]
        if loss_on == "all":
            mask = (batch.segment_ids > 0).astype(jnp.float32)
        loss, weight, sums = losses.cross_entropy_sums(stats, mask, 0.0)
        return loss, (weight, sums)

    return loss_fn


def make_train_step(
    loss_fn: step_lib.LossFn,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    config: ConfigDict,
) -> Callable[[TrainState, TokenBatch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step: (state, batch, key of the run) -> (state, metrics)."""

    def train_step(state: TrainState, batch: TokenBatch, key: jax.Array) -> Any:
        rng = jax.random.fold_in(key, state.step)
        grads, loss, sums = step_lib.accumulate(
            loss_fn, state.params, batch, config.accumulation_steps, rng
        )
        lr = schedule(step_lib.applied_updates(state.opt_state))
        state, norms = step_lib.apply_updates(state, grads, tx, config.on_nonfinite)
        figures = {f"train/{name}": value for name, value in sums.items()}
        return state, {"train/loss": loss, **figures, **norms, "train/lr": lr}

    return train_step


def jit_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    config: ConfigDict,
    shardings: TrainState,
    mesh: Mesh,
) -> Any:
    """The step as the loop runs it, and as gptlab.plan compiles it for hardware that isn't here."""
    step = make_train_step(make_loss_fn(model, config.loss_on), tx, schedule, config)
    return step_lib.jit_step(step, shardings, mesh)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains until the configured duration is over, or goes on where `workdir` stands.

    Raises:
      UserError: an input or a config value is wrong, or the loss is not finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    # (1) The run.
    durations.check_not_passed(config, workdir, config.batch_size * config.data.seq_len)
    with artifact.open_run(config, workdir, "sft") as run:
        if run.finished:
            print(f"{workdir}: fine-tuning is already done")
            return
        train(config, run)


def train(config: ConfigDict, run: artifact.Run) -> None:
    """Everything between opening the run and completing it."""
    # (2) Inputs, checked before anything is compiled. The architecture is the pretrained model's.
    artifact.check_inputs(config)
    if config.loss_on == "all" and config.data.max_reply_tokens:
        raise UserError(
            f"config.data.max_reply_tokens={config.data.max_reply_tokens} leaves replies out of "
            "the loss, which config.loss_on='all' puts back: set it to 0, or loss_on='assistant'"
        )
    tokenizer = Tokenizer.load(config.inputs.vocabulary)
    architecture = load_model_config(config.inputs.init)
    model_config = ModelConfig.build(architecture, config.compute.to_dict())
    check_fits(model_config, tokenizer, config.data.seq_len)
    lora.check(config.lora, model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation_steps)
    mesh_lib.check_length("data.seq_len", config.data.seq_len, mesh)

    # (3) Data: this process's block of rows of each batch. config.data.name is a task or a mixture;
    # an overlong dialogue is left out or split, as config.data.overlong says. Replies of more than
    # config.data.max_reply_tokens (0: any length) are not learnt from; held out, they count.
    source, held_out_source = (
        mixtures.packed(
            config.inputs.tokens,
            config.data.name,
            split,
            config.data.seq_len,
            overlong=config.data.overlong,
            max_reply_tokens=longest,
        )
        for split, longest in (("train", config.data.max_reply_tokens), ("validation", 0))
    )
    block = mesh_lib.process_block(mesh)
    data = batches.TrainBatches(source, config.batch_size, config.seed, *block)
    batch_tokens = config.batch_size * config.data.seq_len
    total = durations.total_steps(config, batch_tokens, len(source) / config.batch_size)

    def validation() -> Any:
        return batches.eval_batches(held_out_source, config.batch_size, config.eval_batches, *block)

    # (4) Model and state: the pretrained parameters, adapters if asked for, a fresh optimiser.
    model = LanguageModel(model_config)
    tx, schedule = make_optimizer(config.optimizer, total)
    step_key, sample_key, lora_key = jax.random.split(jax.random.key(config.seed), 3)
    flops_per_token = lora.flops_per_token(config.lora, model_config, config.data.seq_len)
    log = StepLog(run, config, batch_tokens, flops_per_token)
    held_out = make_held_out(model, mesh, tokenizer.token_bytes, "validation")
    prompts = [
        chat.encode_prompt(tokenizer, [Message("user", text)], config.data.seq_len)
        for text in config.sample.prompts
    ]
    sampler = None
    if config.sample_every_steps:
        stops = chat.stop_tokens(tokenizer)
        sampler = make_sampler(model, mesh, tokenizer, prompts, config.sample, stops)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.workdir, config.checkpoint, run.metrics))
        params = load_params(
            config.inputs.init, mesh, lambda key: transformer.init_params(model, key)
        )
        params = lora.add(params, config.lora, lora_key)
        state, shardings = state_lib.state_from_params(params, tx, mesh)
        train_step = jit_step(model, tx, schedule, config, shardings, mesh)

        # (5) The newest checkpoint, if there is one; else first of all, what pretraining reached.
        state, meta = checkpoints.restore_state(state, shardings)
        start = int(state.step)
        run.metrics.rewind(-1 if meta is None else start)  # step 0 has a line of its own
        if meta is None:
            with run.goodput.measure("eval"):
                meta = {"pretrained": held_out(state.params, validation())}
            run.metrics.write(0, meta["pretrained"])

        # (6) The loop.
        stream = stack.enter_context(contextlib.closing(data.iterate(start)))
        profiler = profile.step_profiler(config.profile, run.workdir)
        stack.callback(profiler.close)
        progress = stack.enter_context(run.progress(total, "sft", initial=start))
        figures: dict[str, float] = {}
        for done in range(start + 1, total + 1):
            profiler.step(done)
            with run.goodput.measure("data"):
                batch = mesh_lib.put_batch(next(stream), mesh)
            with run.goodput.measure("step" if done > start + 1 else "compile"):
                state, metrics = train_step(state, batch, step_key)
                log.push(done, metrics)
            progress.update(loss=log.loss)
            stop, last = run.stop_requested() and done < total, done == total
            save = checkpoints.due(done) or stop or last
            # Every checkpoint carries its held-out loss, but for one that only a stop asked for: it
            # must not evaluate where an uninterrupted run doesn't.
            evaluate = done % config.eval_every_steps == 0 or checkpoints.due(done) or last
            sample = sampler is not None and done % config.sample_every_steps == 0
            if not (save or evaluate or sample):
                continue
            with run.goodput.measure("step"):
                log.flush()
            if evaluate:
                with run.goodput.measure("eval"):
                    figures = held_out(state.params, validation())
                run.metrics.write(done, figures)
            if sampler is not None and sample:
                with run.goodput.measure("sample"):
                    found = sampler(state.params, jax.random.fold_in(sample_key, done))
                for entry in found:
                    run.metrics.write_sample({"step": done, **entry})
            if save:
                with run.goodput.measure("save"):
                    kept = {"pretrained": meta["pretrained"]}
                    checkpoints.save_state(state, kept, figures if evaluate else None)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"saved at step {done} of {total}")
            log.resume()

        # (7) Results: of the checkpoint that later stages load, beside the pretrained model.
        checkpoints.wait()
        steps = int(state.step)
        del state  # the best may need the room
        params = checkpoints.load_best(mesh, lambda key: transformer.init_params(model, key))
        with run.goodput.measure("eval"):
            figures = held_out(
                params, batches.eval_batches(held_out_source, config.batch_size, None, *block)
            )
        best = best_metrics(run.workdir)
        run.results(
            steps=steps,
            tokens=steps * batch_tokens,
            tokens_per_sec=log.mean_tokens_per_sec(),
            **{name.removeprefix("eval/"): value for name, value in figures.items()},
            **best,
            **{
                "sft/reply_perplexity": best["best/validation/perplexity"],
                "pretrained/reply_perplexity": meta["pretrained"]["eval/validation/perplexity"],
            },
        )
        run.complete(state_lib.digest(params))


if __name__ == "__main__":
    program.main(run, "sft")
