"""How fast one pretraining step is, and what the loop around it costs.

    python -m benchmarks.train_step

About a minute and a half on two idle cores. Prints a table, then the same figures as one line of
JSON. What is compared runs in turns in one process; medians with quartiles. For float32 and
bfloat16:

* the bare jitted step on one resident batch: milliseconds, tokens/s, the share of the peak of
  products of square matrices in the same dtype, measured between the steps (model FLOPs:
  6 N + 12 L D T a token); forward and backward passes and optimiser; compile time; XLA's memory.

For float32, the loop of gptlab.pretrain as it is shipped (batches, metrics, logging, progress) on
synthetic documents, in turns with the bare step: its overhead, which is to stay below 5%, and that
nothing is compiled after the first steps.
"""

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import measure
from configs import common
from configs import pretrain as pretrain_config
from gptlab import pretrain
from gptlab.data import batches, records
from gptlab.data import tokenizer as tokenizer_lib
from gptlab.data.batches import TokenBatch
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, program
from gptlab.train import mesh as mesh_lib
from gptlab.train import optimizer
from gptlab.train import state as state_lib

WARM_UP = 2  # steps at the start of each stretch that are not measured


def main() -> None:
    """Runs what the flags ask for and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--unroll", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15, help="turns that everything gets")
    parser.add_argument("--stretch", type=int, default=8, help="steps of the loop a turn")
    args = parser.parse_args()
    program.keep_freed_memory()
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "shape": {key: getattr(args, key) for key in ("preset", "batch_size", "seq_len")},
    }
    steps = {dtype: Step(step_config(args, dtype)) for dtype in ("float32", "bfloat16")}
    figures |= bare_steps(steps, args.rounds)
    program.enable_compilation_cache()  # only now: compile times are those of an empty cache
    figures["loop"] = loop(steps["float32"], args.rounds, args.stretch)
    figures["peak_rss_mib"] = measure.peak_rss_mib()
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


def step_config(args: argparse.Namespace, dtype: str) -> ConfigDict:
    """A pretraining run of the preset with nothing but steps in it."""
    config = pretrain_config.get_config()
    config.model = common.model(args.preset)
    config.compute = common.compute(dtype=dtype, unroll=args.unroll)
    config.data.seq_len = args.seq_len
    config.batch_size = args.batch_size
    optimizers = {
        "muon": common.muon(0.02, adam_lr=0.01, warmup_steps=1),
        "adamw": common.adamw(1e-3, warmup_steps=1),
    }
    config.optimizer = optimizers[args.optimizer]
    never = 10**9
    config.update(eval_every_steps=never, sample_every_steps=0, eval_batches=1, log_every_steps=10)
    config.checkpoint.every_steps = never
    return config


class Step:
    """The jitted training step, made as gptlab.pretrain makes it, with a resident batch."""

    def __init__(self, config: ConfigDict):
        """Compiles it."""
        self.config = config
        self.model_config = ModelConfig.build(config.model.to_dict(), config.compute.to_dict())
        model = LanguageModel(self.model_config)
        self.mesh = mesh_lib.make_mesh(config.mesh)
        tx, schedule = optimizer.make_optimizer(config.optimizer, config.total_steps)
        init = functools.partial(transformer.init_params, model)
        self.state, _ = state_lib.init_state(init, tx, self.mesh, jax.random.key(0))
        loss_fn = pretrain.make_loss_fn(model, config.z_loss)
        self.batch = mesh_lib.put_batch(random_batch(config), self.mesh)
        self.key = jax.random.key(1)
        self.compiled, self.compile_figures = measure.compile_timed(
            jax.jit(pretrain.make_train_step(loss_fn, tx, schedule, config), donate_argnums=0),
            self.state,
            self.batch,
            self.key,
        )

        def loss(params: Any, batch: TokenBatch) -> jax.Array:
            return loss_fn(params, batch, self.key)[0]

        params = jax.jit(lambda key: nn.unbox(init(key)))(jax.random.key(0))  # never donated
        self.parts: dict[str, Callable[[], Any]] = {
            "forward": functools.partial(jax.jit(loss), params, self.batch),
            "forward and backward": functools.partial(
                jax.jit(jax.value_and_grad(loss)), params, self.batch
            ),
        }

    def __call__(self) -> Any:
        """One step; the state is kept."""
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        return metrics


def random_batch(config: ConfigDict) -> TokenBatch:
    """Rows full of random tokens."""
    shape = (config.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(9, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    return TokenBatch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones, positions)


def bare_steps(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Each dtype's step and its parts, in turns with products of square matrices."""
    runs: dict[str, Callable[[], Any]] = {}
    flops = 0
    for dtype, step in steps.items():
        runs[f"{dtype} product"], flops = measure.square_product(dtype)
        runs[f"{dtype} step"] = step
        runs |= {f"{dtype} {name}": part for name, part in step.parts.items()}
    times = measure.in_turns(runs, rounds)
    figures = {}
    for dtype, step in steps.items():
        shape = step.batch.tokens.shape
        rate = shape[0] * shape[1] / np.median(times[f"{dtype} step"])
        peak = flops / times[f"{dtype} product"].min()
        share = rate * step.model_config.flops_per_token(shape[1]) / peak
        figures[dtype] = {
            "num_params": step.model_config.num_params(),
            "step_ms": measure.spread(1e3 * times[f"{dtype} step"]),
            "forward_ms": measure.spread(1e3 * times[f"{dtype} forward"]),
            "forward_backward_ms": measure.spread(1e3 * times[f"{dtype} forward and backward"]),
            "tokens_per_sec": round(rate),
            "product_peak_gflops": round(peak / 1e9, 1),
            "share_of_peak": round(share, 3),
            **step.compile_figures,
        }
    return figures


def loop(step: Step, rounds: int, stretch: int) -> dict[str, Any]:
    """Stretches of gptlab.pretrain's own loop, in turns with stretches of the bare step.

    The loop is watched through the batches that it asks for: a step of it is the time from one
    batch to the next. Between two of its stretches, in the same thread, the bare step runs, whose
    metrics are awaited one step late as the loop does it (waiting for each at once is slower).

    Raises:
      AssertionError: something was compiled after the first steps.
    """
    turns = Turns(step, rounds, stretch)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        config = ConfigDict(step.config.to_dict())
        config.total_steps = rounds * (WARM_UP + stretch) + 1
        write_inputs(root, config)
        iterate = batches.TrainBatches.iterate
        watched = lambda self, start=0: turns.watch(iterate(self, start))  # noqa: E731
        with mock.patch.object(batches.TrainBatches, "iterate", watched):
            pretrain.run(config, str(root / "run"))
    assert turns.compiled_late == 0, f"{turns.compiled_late} compiles after the first steps"
    loop_seconds, bare = np.array(turns.loop_seconds[1:]), np.array(turns.bare[1:])
    return {
        "loop_ms": measure.spread(1e3 * loop_seconds),
        "bare_ms": measure.spread(1e3 * bare),
        "overhead": measure.spread(loop_seconds / bare - 1, 4),
        "compiles_after_first_steps": turns.compiled_late,
    }


class Turns:
    """Seconds a step, of each stretch of the loop and of the stretch of bare steps after it."""

    def __init__(self, step: Step, rounds: int, stretch: int):
        """Nothing is measured yet."""
        self._step, self._rounds, self._stretch = step, rounds, stretch
        self.loop_seconds: list[float] = []
        self.bare: list[float] = []
        self.compiled_late = 0

    def watch(self, stream: Any) -> Iterator[TokenBatch]:
        """Hands on the loop's batches, and takes the time from one request to another."""
        counter = measure.CompileCounter()
        with contextlib.closing(stream):
            for turn in range(self._rounds):
                if turn == 1:
                    counter.count = 0
                for i in range(WARM_UP + self._stretch):
                    if i == WARM_UP:
                        start = time.perf_counter()
                    yield next(stream)
                self.loop_seconds.append((time.perf_counter() - start) / self._stretch)
                self.bare.append(self._bare())
            self.compiled_late = counter.count
            yield from stream  # what is left of the run

    def _bare(self) -> float:
        previous = None
        for i in range(WARM_UP + self._stretch):
            if i == WARM_UP:
                start = time.perf_counter()
            metrics = self._step()
            jax.block_until_ready(previous)
            previous = metrics
        taken = (time.perf_counter() - start) / self._stretch
        jax.block_until_ready(previous)
        return taken


def write_inputs(root: Path, config: ConfigDict) -> None:
    """A vocabulary and a corpus of random token sequences, as finished artifacts."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + i) for i in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 5000)]
    texts = [" ".join(rng.choice(words, 60)) for _ in range(2000)]
    vocabulary, corpus = root / "vocabulary", root / "corpus"
    with artifact.open_run(ConfigDict({"seed": 0}), vocabulary, "train_tokenizer") as run:
        tokenizer_lib.train(
            texts,
            run.workdir / "vocabulary.model",
            vocab_size=config.model.vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            max_sentences=0,
            num_threads=1,
            seed=0,
        )
        run.complete()
    with artifact.open_run(ConfigDict({"seed": 0}), corpus, "prepare") as run:
        for split, count in (("train", 800), ("validation", 40)):
            examples = []
            for i in range(count):
                tokens = rng.integers(9, config.model.vocab_size, config.data.seq_len + 1)
                examples.append(
                    records.TokenExample(str(i), tokens, np.ones(len(tokens), np.uint8))
                )
            records.write_shards(run.workdir / "records", "pretrain", split, examples)
        run.complete()
    config.inputs.tokens, config.inputs.vocabulary = str(corpus), str(vocabulary)


if __name__ == "__main__":
    main()
