"""Loop 3, the reward model: a K-wise ranking loss on comparisons.

    python -m gptlab.reward --config=configs/reward.py --workdir=runs/reward \
        --config.inputs.init=runs/sft --config.inputs.comparisons=runs/rank \
        --config.inputs.vocabulary=runs/vocabulary

Starts from the backbone of `inputs.init`, the SFT model as a rule, with a fresh scalar head, and
always reads *all* comparisons: every input whose name starts with `comparisons` is pooled, one a
round. Trains for as long as the config says (one epoch is usual: more overfits soon), keeps the
checkpoint of the smallest validation loss, then normalises the reward once and freezes that in the
results (`normalisation`), which rl.rewards.load_reward_model applies. report.md and the manifest
hold the accuracy on held-out labels beside its ceiling, 'longer wins' and a linear model, and the
calibration: on comparisons that chose no checkpoint, which are the test split where there is one,
and otherwise half of the validation prompts, kept back for that.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data import records
from gptlab.data.batches import ComparisonBatch, ComparisonBatches
from gptlab.data.records import Comparison
from gptlab.data.tokenizer import Tokenizer
from gptlab.evals import preference, reward_figures
from gptlab.model import lora
from gptlab.model.heads import ScalarModel, scalar_from_language
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.people import labellers
from gptlab.rl import rewards
from gptlab.run import artifact, profile, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import checkpoint, durations, losses
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train import step as step_lib
from gptlab.train.checkpoint import Checkpoints
from gptlab.train.checks import check_fits
from gptlab.train.log import StepLog
from gptlab.train.optimizer import make_optimizer
from gptlab.train.state import TrainState

NORMALISATIONS = ("samples", "demonstrations", "none")


def make_loss_fn(model: ScalarModel) -> step_lib.LossFn:
    """The loss of a microbatch of prompts, as sums and their weight: accumulation stays exact."""

    def loss_fn(params: Any, batch: Any, rng: jax.Array) -> Any:
        dropout_key = rng if model.config.dropout > 0 else None
        scores = rewards.candidate_rewards(model, params, batch, dropout_key)  # [B, N]
        loss, weight, sums = losses.ranking_loss_sums(scores, batch.ranks, batch.weight)
        return loss, (weight, sums)

    return loss_fn


def make_train_step(
    loss_fn: step_lib.LossFn,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    config: ConfigDict,
) -> Callable[[TrainState, ComparisonBatch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step: (state, batch, key of the run) -> (state, metrics)."""

    def train_step(state: TrainState, batch: ComparisonBatch, key: jax.Array) -> Any:
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
    model: ScalarModel,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    config: ConfigDict,
    shardings: TrainState,
    mesh: Mesh,
) -> Any:
    """The step as the loop runs it, and as gptlab.plan compiles it for hardware that isn't here."""
    step = make_train_step(make_loss_fn(model), tx, schedule, config)
    return step_lib.jit_step(step, shardings, mesh)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains until the configured duration is over, or goes on where `workdir` stands.

    Raises:
      UserError: an input or a config value is wrong, or the loss is not finite.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    # (1) The run.
    durations.check_not_passed(config, workdir, tokens_per_step(config))
    with artifact.open_run(config, workdir, "reward") as run:
        if run.finished:
            print(f"{workdir}: the reward model is already done")
            return
        train(config, run)


def train(config: ConfigDict, run: artifact.Run) -> None:
    """Everything between opening the run and completing it."""
    # (2) Inputs, checked before anything is compiled.
    check(config)
    tokenizer = Tokenizer.load(config.inputs.vocabulary)
    architecture = checkpoint.load_model_config(config.inputs.init)
    model_config = ModelConfig.build(architecture, config.compute.to_dict())
    check_fits(model_config, tokenizer, config.data.seq_len)
    lora.check(config.lora, model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation_steps)
    mesh_lib.check_length("data.seq_len", config.data.seq_len, mesh)

    # (3) Data: the comparisons of all rounds, split by prompt long before they came here.
    data = make_batches(config, tokenizer, read_comparisons(config, "train"), mesh)
    choosing, reporting, reported_on = held_out_comparisons(config)
    held_out = make_batches(config, tokenizer, choosing, mesh, shrink=True)
    reported = make_batches(config, tokenizer, reporting, mesh, shrink=True)
    batch_tokens = tokens_per_step(config)
    total = durations.total_steps(config, batch_tokens, len(data) / config.batch_size)

    # (4) Model and state: the SFT model's backbone, a fresh head.
    model = ScalarModel(model_config)
    tx, schedule = make_optimizer(config.optimizer, total)
    init_key, step_key, lora_key = jax.random.split(jax.random.key(config.seed), 3)
    flops_per_token = lora.flops_per_token(config.lora, model_config, config.data.seq_len)
    log = StepLog(run, config, batch_tokens, flops_per_token)
    scorer = Scorer(model, mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        params = params_from_language(model, config.inputs.init, mesh, init_key)
        params = lora.add(params, config.lora, lora_key)
        state, shardings = state_lib.state_from_params(params, tx, mesh)
        train_step = jit_step(model, tx, schedule, config, shardings, mesh)

        # (5) The newest checkpoint, if there is one; batches, keys and metrics follow its step.
        checkpoints = stack.enter_context(Checkpoints(run.workdir, config.checkpoint, run.metrics))
        state, _ = checkpoints.restore_state(state, shardings)
        start = int(state.step)
        run.metrics.rewind(start)

        # (6) The loop.
        stream = stack.enter_context(contextlib.closing(data.iterate(start)))
        profiler = stack.enter_context(
            contextlib.closing(profile.step_profiler(config.profile, run.workdir))
        )
        progress = stack.enter_context(run.progress(total, "reward", initial=start))
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
            evaluate = done % config.eval_every_steps == 0 or checkpoints.due(done) or last
            if not (save or evaluate):
                continue
            with run.goodput.measure("step"):
                log.flush()
            if evaluate:
                with run.goodput.measure("eval"):
                    chosen_by = scorer.loss(state.params, held_out.eval(config.eval_batches))
                run.metrics.write(done, chosen_by)
            if save:
                with run.goodput.measure("save"):
                    checkpoints.save_state(state, {}, chosen_by if evaluate else None)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"saved at step {done} of {total}")
            log.resume()

        # (7) The best checkpoint, normalised once; results.
        checkpoints.wait()
        steps = int(state.step)
        del state  # the best may need the room
        best = checkpoints.load_best(mesh, functools.partial(init_params, model))
        with run.goodput.measure("eval"):
            normalisation = normalise(config, tokenizer, scorer, best, data, mesh)
            figures, tables = evaluate_model(scorer, best, normalisation, data, reported)
        run.results(
            steps=steps,
            normalisation=normalisation,
            train_comparisons=len(data),
            dropped_comparisons=data.dropped + held_out.dropped + reported.dropped,
            reported_on=reported_on,
            tokens_per_sec=log.mean_tokens_per_sec(),
            **checkpoint.best_metrics(run.workdir),
            **preference.to_json(figures),
            **tables,
        )
        reward_figures.write_report(run.workdir, figures, tables, reported_on)
        run.complete(state_lib.digest(best))


def tokens_per_step(config: ConfigDict) -> int:
    """Token positions of one global batch."""
    return config.batch_size * config.data.max_candidates * config.data.seq_len


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    check_loss_chunk(config)
    artifact.check_inputs(config, ("init", "vocabulary", "comparisons"))
    folds, count = config.data.folds, config.data.num_folds
    if not folds or min(folds) < 0 or max(folds) >= count:
        raise UserError(f"config.data.folds={folds} must be some of the {count} from 0 on")
    if config.normalise not in NORMALISATIONS:
        raise UserError(f"config.normalise={config.normalise!r} is not one of {NORMALISATIONS}")
    if (config.normalise == "demonstrations") != bool(config.inputs.demonstrations):
        raise UserError(
            "config.normalise='demonstrations' and config.inputs.demonstrations (a clean corpus "
            "whose conversations are the demonstrations) go together: set both or neither"
        )


def check_loss_chunk(config: ConfigDict) -> None:
    """UserError for a setting of losses over the vocabulary."""
    if config.compute.loss_chunk:
        raise UserError(
            f"config.compute.loss_chunk={config.compute.loss_chunk} has no meaning for a reward "
            "model, which has no logits to take in chunks; leave it at 0"
        )


def read_comparisons(config: ConfigDict, split: str) -> list[Comparison]:
    """The comparisons of one split, pooled over every input named comparisons*.

    Of train, those whose prompt is in one of config.data.folds: models of other folds, a judge say,
    are trained on no label of this one's. The held-out splits stay whole, so both choose their
    checkpoint on the same labels.
    """
    pooled: list[Comparison] = []
    for directory in comparison_directories(config):
        pooled += records.RecordReader(directory, "comparisons", split, Comparison)
    if split == "train":
        folds, count = set(config.data.folds), config.data.num_folds
        pooled = [c for c in pooled if records.shard_of(c.prompt.id, count) in folds]
    return pooled


def comparison_directories(config: ConfigDict) -> list[epath.Path]:
    """Where the comparisons of all rounds are."""
    names = sorted(name for name in config.inputs if name.startswith("comparisons"))
    return [epath.Path(config.inputs[name]) / "records" for name in names if config.inputs[name]]


def held_out_comparisons(config: ConfigDict) -> tuple[list[Comparison], list[Comparison], str]:
    """What chooses the checkpoint, what is reported on, and the latter's name.

    Figures of the comparisons that chose the best checkpoint are those of a winner, and too good.
    A test split is reported on if every input has one. Otherwise the validation prompts are
    divided by a hash of their ids, so that a prompt is on one side in all rounds.
    """
    validation = read_comparisons(config, "validation")
    has_test = [
        "comparisons-test" in records.record_sets(directory)
        for directory in comparison_directories(config)
    ]
    if all(has_test):
        return validation, read_comparisons(config, "test"), "test"
    halves: tuple[list[Comparison], list[Comparison]] = ([], [])
    for comparison in validation:
        halves[records.shard_of(comparison.prompt.id, 2)].append(comparison)
    if not all(halves):
        raise UserError(
            f"{len(validation)} held-out comparisons are too few to choose a checkpoint by half of "
            "their prompts and to report on the other half: collect more validation prompts"
        )
    return *halves, "half of the validation prompts"


def make_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    comparisons: Sequence[Comparison],
    mesh: Mesh,
    shrink: bool = False,
) -> ComparisonBatches:
    """Batches of comparisons; with `shrink`, of fewer rows if there is less than one batch of data.

    What is only read in order need not fill a training batch.
    """
    size = config.batch_size
    if shrink:
        size = mesh_lib.shrunk(size, len(comparisons), mesh)
    return ComparisonBatches(
        comparisons,
        tokenizer,
        size,
        config.data.max_candidates,
        config.data.seq_len,
        config.data.prompt_len,
        config.seed,
        *mesh_lib.process_block(mesh),
    )


def params_from_language(model: ScalarModel, init: str, mesh: Mesh, key: jax.Array) -> Any:
    """The SFT model's backbone and a fresh head, on the mesh."""
    language = LanguageModel(model.config)
    lm_params = checkpoint.load_params(init, mesh, functools.partial(init_params, language))
    _, shardings = state_lib.param_shardings(functools.partial(init_params, model), mesh)
    make_head = jax.jit(
        lambda key: nn.unbox(init_params(model, key))["head"], out_shardings=shardings["head"]
    )
    return scalar_from_language(lm_params, make_head(key))


class Scorer:
    """Compiled scoring of candidates; figures are the same whatever the mesh and the processes."""

    def __init__(self, model: ScalarModel, mesh: Mesh):
        self._mesh = mesh
        replicated = NamedSharding(mesh, PartitionSpec())

        def score(params: Any, batch: Any) -> Any:
            scores = rewards.candidate_rewards(model, params, batch)
            loss, weight, sums = losses.ranking_loss_sums(scores, batch.ranks, batch.weight)
            return scores, batch.ranks > 0, batch.weight > 0, {**sums, "loss": loss, "n": weight}

        self._score = jax.jit(score, out_shardings=replicated)

    def loss(self, params: Any, batches: Iterable[ComparisonBatch]) -> dict[str, float]:
        """Held-out eval/validation/{loss, accuracy, margin}, each a mean over prompts."""
        total: dict[str, float] = {}
        for batch in batches:
            _, _, _, sums = self._score(params, mesh_lib.put_batch(batch, self._mesh))
            for name, value in jax.device_get(sums).items():
                total[name] = total.get(name, 0.0) + float(value)
        if not total.get("n"):
            raise UserError("no held-out comparison ranks one reply above another")
        names = ("loss", "accuracy", "margin")
        return {f"eval/validation/{name}": total[name] / total["n"] for name in names}

    def candidates(self, params: Any, data: ComparisonBatches) -> np.ndarray:
        """Raw rewards of data.comparisons, float64 [n, N]; NaN where a candidate is absent."""
        rows = []
        for batch in data.eval():
            scores, present, real, _ = jax.device_get(
                self._score(params, mesh_lib.put_batch(batch, self._mesh))
            )
            rows.append(np.where(present, scores.astype(np.float64), np.nan)[real])
        return np.concatenate(rows)


def normalise(
    config: ConfigDict,
    tokenizer: Tokenizer,
    scorer: Scorer,
    params: Any,
    data: ComparisonBatches,
    mesh: Mesh,
) -> dict[str, Any]:
    """The gain and bias that are frozen from here on: score = gain * reward + bias.

    'samples' (Ziegler 2019): the training candidates have mean 0 and standard deviation 1, measured
    on config.normalise_examples comparisons, evenly spread over all rounds. 'demonstrations'
    (InstructGPT): human replies, as many, average 0; the scale stays. 'none': as trained.
    """
    kind = config.normalise
    gain, bias = 1.0, 0.0
    if kind == "samples":
        stride = math.ceil(len(data.comparisons) / config.normalise_examples)
        some = make_batches(config, tokenizer, data.comparisons[::stride], mesh, shrink=True)
        values = scorer.candidates(params, some)
        gain = 1.0 / max(float(np.nanstd(values)), 1e-8)
        bias = -gain * float(np.nanmean(values))
    elif kind == "demonstrations":
        demonstrations = make_batches(config, tokenizer, read_demonstrations(config), mesh, True)
        bias = -float(np.nanmean(scorer.candidates(params, demonstrations)[:, 0]))
    return {"kind": kind, "gain": gain, "bias": bias}


def read_demonstrations(config: ConfigDict) -> list[Comparison]:
    """Last replies of training conversations, each beside itself: a comparison takes two."""
    directory = epath.Path(config.inputs.demonstrations) / "records"
    reader = records.RecordReader(directory, "conversations", "train", records.Conversation)
    replies = []
    for conversation in itertools.islice(reader, config.normalise_examples):
        *context, last = conversation.messages
        if last.role != "assistant" or not context or context[-1].role != "user":
            continue
        prompt = records.Prompt(conversation.id, tuple(context), conversation.source)
        reply = records.Candidate(conversation.id, last.content, "human", True)
        replies.append(Comparison(conversation.id, prompt, (reply, reply), (1, 1), "human", False))
    return replies


def evaluate_model(
    scorer: Scorer,
    params: Any,
    normalisation: dict[str, Any],
    data: ComparisonBatches,
    held_out: ComparisonBatches,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and tables on the held-out comparisons: evals/reward_figures.py."""
    gain = normalisation["gain"]
    scores = gain * scorer.candidates(params, held_out) + normalisation["bias"]
    return reward_figures.measure(
        scores, gain, held_out.comparisons, data.comparisons, labellers.expected_agreement
    )


if __name__ == "__main__":
    program.main(run, "reward")
