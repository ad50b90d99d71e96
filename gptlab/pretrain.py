"""Loop 1, pretraining: next-token loss on packed documents.

    python -m gptlab.pretrain --config=configs/pretrain_small.py --workdir=runs/pretrain \
        --config.inputs.tokens=runs/tokens --config.inputs.vocabulary=runs/vocabulary

Reads a task of a tokenised corpus, or a mixture of its tasks (config.data.name); writes checkpoints
of the parameters and the optimiser. The same command goes on where a killed run was, bit for bit.
How long it takes and which loss to expect stand in each config.

A model that is there already, imported by `convert` say, is trained on other documents where
config.inputs.init names its workdir and the config declares none (configs/pretrain.py:init): all of
it, or adapters alone (config.lora).

Its results are the best checkpoint's, which later stages load: `validation/*` on the whole held-out
split, `best/validation/*` on the config.eval_batches that chose it; and on these same batches
`init/validation/*`, of the model of config.inputs.init.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptlab.data import batches, mixtures, records
from gptlab.data.batches import TokenBatch
from gptlab.data.tokenizer import Tokenizer
from gptlab.evals import ngram
from gptlab.model import lora, transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, profile, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import durations, losses
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train import step as step_lib
from gptlab.train.checkpoint import Checkpoints, best_metrics, load_model_config, load_params
from gptlab.train.checks import check_declared_model, check_fits
from gptlab.train.held_out import make_held_out
from gptlab.train.log import StepLog
from gptlab.train.optimizer import make_optimizer
from gptlab.train.samples import make_sampler
from gptlab.train.state import TrainState


def make_loss_fn(model: LanguageModel, z_loss: float) -> step_lib.LossFn:
    """The loss of a microbatch: sums and their weight, so that accumulation stays exact."""

    def loss_fn(params: Any, batch: Any, rng: jax.Array) -> Any:
        stats = transformer.score_batch(model, params, batch, rng)  # of [B, T]
        loss, weight, sums = losses.cross_entropy_sums(stats, batch.loss_mask, z_loss)
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
    step = make_train_step(make_loss_fn(model, config.z_loss), tx, schedule, config)
    return step_lib.jit_step(step, shardings, mesh)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains until the configured duration is over, or goes on where `workdir` stands.

    Raises:
      UserError: an input or a config value is wrong, or the loss is not finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    # (1) The run.
    durations.check_not_passed(config, workdir, config.batch_size * config.data.seq_len)
    with artifact.open_run(config, workdir, "pretrain") as run:
        if run.finished:
            print(f"{workdir}: pretraining is already done")
            return
        train(config, run)


def train(config: ConfigDict, run: artifact.Run) -> None:
    """Everything between opening the run and completing it."""
    # (2) Inputs, checked before anything is compiled.
    check_start(config)
    tokenizer = Tokenizer.load(config.inputs.vocabulary)
    if config.inputs.init:
        architecture = load_model_config(config.inputs.init)
        model_config = ModelConfig.build(architecture, config.compute.to_dict())
        check_fits(model_config, tokenizer, config.data.seq_len)
    else:
        model_config = ModelConfig.build(config.model.to_dict(), config.compute.to_dict())
        check_declared_model(model_config, tokenizer, config.data.seq_len)
    lora.check(config.lora, model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation_steps)
    mesh_lib.check_length("data.seq_len", config.data.seq_len, mesh)

    # (3) Data: this process's block of rows of each batch.
    data, held_out_source = make_batches(config, mesh)
    block = mesh_lib.process_block(mesh)
    batch_tokens = config.batch_size * config.data.seq_len
    total = durations.total_steps(config, batch_tokens, len(data) / config.batch_size)

    def validation() -> Any:
        return batches.eval_batches(held_out_source, config.batch_size, config.eval_batches, *block)

    # (4) Model and state, sharded from birth.
    model = LanguageModel(model_config)
    tx, schedule = make_optimizer(config.optimizer, total)
    init_key, step_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    flops_per_token = lora.flops_per_token(config.lora, model_config, config.data.seq_len)
    log = StepLog(run, config, batch_tokens, flops_per_token)
    held_out = make_held_out(model, mesh, tokenizer.token_bytes, "validation")
    prompts = [tokenizer.encode_document(text) for text in config.sample.prompts]
    sampler = None
    if config.sample_every_steps:
        sampler = make_sampler(model, mesh, tokenizer, prompts, config.sample, (tokenizer.eos_id,))
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.workdir, config.checkpoint, run.metrics))
        state, shardings = first_state(config, model, tx, mesh, init_key)
        train_step = jit_step(model, tx, schedule, config, shardings, mesh)

        # (5) The newest checkpoint, if there is one; else first of all, what config.inputs.init
        # reached. Batches, keys and metrics follow the checkpoint's step.
        state, meta = checkpoints.restore_state(state, shardings)
        start = int(state.step)
        run.metrics.rewind(-1 if meta is None else start)  # step 0 may have a line of its own
        kept: dict[str, Any] = {}  # in every checkpoint
        if config.inputs.init:
            if meta is None:
                with run.goodput.measure("eval"):
                    meta = {"init": held_out(state.params, validation())}
                run.metrics.write(0, meta["init"])
            kept["init"] = meta["init"]

        # (6) The loop.
        stream = stack.enter_context(contextlib.closing(data.iterate(start)))
        profiler = profile.step_profiler(config.profile, run.workdir)
        stack.callback(profiler.close)
        progress = stack.enter_context(run.progress(total, "pretrain", initial=start))
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
                    checkpoints.save_state(state, kept, figures if evaluate else None)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"saved at step {done} of {total}")
            log.resume()

        # (7) Results: of the checkpoint that later stages load, on the whole validation split.
        checkpoints.wait()
        steps = int(state.step)
        del state  # the best may need the room
        best = checkpoints.load_best(mesh, lambda key: transformer.init_params(model, key))
        with run.goodput.measure("eval"):
            figures = held_out(
                best, batches.eval_batches(held_out_source, config.batch_size, None, *block)
            )
        run.results(
            steps=steps,
            tokens=steps * batch_tokens,
            num_params=model_config.num_params(),
            tokens_per_sec=log.mean_tokens_per_sec(),
            **{name.removeprefix("eval/"): value for name, value in figures.items()},
            **best_metrics(run.workdir),
            **{
                f"init/{name.removeprefix('eval/')}": value
                for name, value in kept.get("init", {}).items()
            },
            **(ngram_baselines(config, run, tokenizer) if config.ngram_baselines else {}),
        )
        run.complete(state_lib.digest(best))


def check_start(config: ConfigDict) -> None:
    """UserError unless there is one model to start from: a declared one, or that of inputs.init."""
    check_declared(config)
    needed = ("tokens", "vocabulary") if "model" in config else ("init", "tokens", "vocabulary")
    artifact.check_inputs(config, needed)


def check_declared(config: ConfigDict) -> None:
    """UserError if config.model, which begins with random weights, stands beside other weights."""
    if "model" not in config:
        return
    without = "a config that declares no model, --config=configs/pretrain.py:init say"
    if config.inputs.init:
        raise UserError(
            "config.inputs.init brings its own model and config.model declares another: give "
            f"{without}, or leave out config.inputs.init"
        )
    if config.lora.rank:
        raise UserError(
            f"config.lora.rank={config.lora.rank} adapts a trained model, and config.model begins "
            f"with random weights: give config.inputs.init and {without}, or rank 0"
        )


def first_state(
    config: ConfigDict,
    model: LanguageModel,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
) -> tuple[TrainState, TrainState]:
    """(state, its shardings): random weights; or those of inputs.init, with adapters if asked for.

    `key` is of whatever is random: the weights, or the adapters.
    """

    def init_fn(key: jax.Array) -> Any:
        return transformer.init_params(model, key)

    if not config.inputs.init:
        return state_lib.init_state(init_fn, tx, mesh, key)
    params = load_params(config.inputs.init, mesh, init_fn)
    params = lora.add(params, config.lora, key)
    return state_lib.state_from_params(params, tx, mesh)


def make_batches(
    config: ConfigDict, mesh: Mesh
) -> tuple[batches.TrainBatches, mixtures.PackedMixture]:
    """What is trained on, this process's part of it, and the held-out rows.

    Held-out figures of a mixture are of its members' rows at their rates (batches.eval_batches).
    """
    if config.ngram_baselines and len(mixtures.members(config.inputs.tokens, config.data.name)) > 1:
        raise UserError(
            f"config.data.name={config.data.name!r} is a mixture, and n-gram models are fitted to "
            "one task only: set config.ngram_baselines=False"
        )
    source, held_out_source = (
        mixtures.packed(config.inputs.tokens, config.data.name, split, config.data.seq_len)
        for split in ("train", "validation")
    )
    block = mesh_lib.process_block(mesh)
    return batches.TrainBatches(source, config.batch_size, config.seed, *block), held_out_source


def ngram_baselines(config: ConfigDict, run: artifact.Run, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out bits a byte of n-gram models fitted on all training tokens, as `ngram/<name>`."""
    (task,) = mixtures.members(config.inputs.tokens, config.data.name)
    directory = epath.Path(config.inputs.tokens) / "records"
    train, held_out = (
        records.RecordReader(directory, task, split, records.TokenExample)
        for split in ("train", "validation")
    )
    with run.progress(len(train) + len(held_out), "n-gram baselines", unit="example") as bar:

        def read(examples: Iterable[records.TokenExample]) -> Iterator[records.TokenExample]:
            for example in examples:
                if run.stop_requested():  # everything that was trained is saved already
                    raise Interrupted("stopped in the n-gram baselines, all steps are saved")
                yield example
                bar.update()

        figures = ngram.baselines(read(train), read(held_out), tokenizer.token_bytes)
    return {f"ngram/{name}": value for name, value in figures.items()}


if __name__ == "__main__":
    program.main(run, "pretrain")
