"""How fast one pretraining step is, and what the loop around it costs.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --shakespeare=PATH/TO/input.txt   # nanoGPT's CPU recipe too

Prints one JSON object. Everything is measured in the same process on the same machine:

* sgemm peak: the best of several float32 products of 2,048 x 2,048 matrices in JAX;
* tokens/s of the bare jitted step, dispatched one ahead as the loop does it, its share of that peak
  (model FLOPs: 6 N + 12 L D T a token), compile time, peak memory of the process;
* loop overhead: time of a step inside gptlab.pretrain's loop (batches, logging, progress) against
  the bare step, on synthetic documents;
* with --shakespeare, nanoGPT's published CPU recipe: characters, 4 layers, d 128, T 64, B 12,
  2,000 steps, lr 1e-3 to 1e-4, dropout 0. PyTorch there: held-out loss 1.886, 60 ms a step.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from configs import pretrain as pretrain_config
from gptlab import pretrain
from gptlab.data import records
from gptlab.data import tokenizer as tokenizer_lib
from gptlab.data.batches import TokenBatch
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact, program
from gptlab.train import losses, optimizer
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib


def main() -> None:
    """Runs what the flags ask for and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--unroll", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each kind")
    parser.add_argument("--shakespeare", help="a text file; also runs nanoGPT's CPU recipe on it")
    parser.add_argument("--recipe_steps", type=int, default=2000)
    args = parser.parse_args()
    peak = sgemm_peak()
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "sgemm_peak_gflops": round(peak / 1e9, 1),
    }
    config = step_config(args)
    figures["step"] = bare_step(config, peak, args.steps)
    program.enable_compilation_cache()  # only now: the compile time is that of an empty cache
    figures["loop"] = loop_step(config, args.steps)
    figures["loop"]["overhead"] = round(figures["loop"]["ms"] / figures["step"]["ms"] - 1, 4)
    if args.shakespeare:
        figures["recipe"] = recipe(Path(args.shakespeare).read_text(), args.recipe_steps)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["peak_memory_mib"] = round(peak_bytes / 2**20)
    print(json.dumps(figures, indent=2))


def sgemm_peak(size: int = 2048, repeats: int = 12) -> float:
    """FLOP/s of the fastest of several float32 matrix products."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = min(seconds(lambda: product(x).block_until_ready()) for _ in range(repeats))
    return 2 * size**3 / best


def seconds(fn: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def step_config(args: argparse.Namespace) -> ConfigDict:
    """A pretraining run of the preset with nothing but steps in it."""
    config = pretrain_config.get_config()
    config.model = common.model(args.preset)
    config.compute = common.compute(unroll=args.unroll)
    config.data.seq_len = args.seq_len
    config.batch_size = args.batch_size
    config.optimizer = common.adamw(1e-3, warmup_steps=10)
    never = 10**9
    config.update(eval_every_steps=never, sample_every_steps=0, eval_batches=1, log_every_steps=10)
    config.checkpoint.every_steps = never
    return config


def make_step(config: ConfigDict) -> tuple[Any, Any, jax.sharding.Mesh, ModelConfig]:
    """(jitted step, state, mesh, model config), made as the program makes them."""
    model_config = ModelConfig.build(config.model.to_dict(), config.compute.to_dict())
    model = LanguageModel(model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    tx, schedule = optimizer.make_optimizer(config.optimizer, config.total_steps)
    state, _ = state_lib.init_state(
        lambda key: transformer.init_params(model, key), tx, mesh, jax.random.key(0)
    )
    loss_fn = pretrain.make_loss_fn(model, config.z_loss)
    step = jax.jit(pretrain.make_train_step(loss_fn, tx, schedule, config), donate_argnums=0)
    return step, state, mesh, model_config


def bare_step(config: ConfigDict, peak: float, steps: int) -> dict[str, float]:
    """The jitted step on one batch over and over: median milliseconds and what they mean.

    A step's metrics are read after the next step was dispatched, as in the loop: waiting for each
    would make the bare step the slower of the two.
    """
    step, state, mesh, model_config = make_step(config)
    shape = (config.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(9, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = TokenBatch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones, positions)
    batch = mesh_lib.put_batch(batch, mesh)
    key = jax.random.key(1)
    start = time.perf_counter()
    compiled = step.lower(state, batch, key).compile()
    compile_seconds = time.perf_counter() - start
    times, previous = [], None
    for _ in range(steps + 3):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready(previous)
        previous = metrics
        times.append(time.perf_counter() - start)
    median = float(np.median(times[3:]))
    rate = shape[0] * shape[1] / median
    return {
        "num_params": model_config.num_params(),
        "ms": round(1e3 * median, 2),
        "tokens_per_sec": round(rate),
        "share_of_sgemm_peak": round(rate * model_config.flops_per_token(shape[1]) / peak, 3),
        "compile_seconds": round(compile_seconds, 2),
    }


def loop_step(config: ConfigDict, steps: int) -> dict[str, float]:
    """The same step inside gptlab.pretrain: median of its tokens_per_sec lines."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        config = ConfigDict(config.to_dict())
        config.total_steps = steps + 20
        write_inputs(root, config)
        pretrain.run(config, str(root / "run"))
        lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["perf/tokens_per_sec"] for line in lines if "perf/tokens_per_sec" in line]
    rate = float(np.median(rates[1:]))
    tokens = config.batch_size * config.data.seq_len
    return {"ms": round(1e3 * tokens / rate, 2), "tokens_per_sec": round(rate)}


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


def recipe(text: str, steps: int) -> dict[str, float]:
    """NanoGPT's CPU recipe: milliseconds a step and held-out loss, on characters."""
    config = pretrain_config.get_config()
    config.model = common.model("nano_shakespeare")
    config.compute = common.compute(unroll=4)
    config.batch_size, config.data.seq_len, config.total_steps = 12, 64, steps
    config.optimizer = common.adamw(
        1e-3, betas=(0.9, 0.99), warmup_steps=min(100, steps), weight_decay=0.1
    )
    characters = sorted(set(text))
    ids = np.searchsorted(np.array(characters), np.array(list(text))).astype(np.int32)
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]
    config.model.vocab_size = len(characters)
    step, state, mesh, model_config = make_step(config)
    model, key, rng = LanguageModel(model_config), jax.random.key(1), np.random.default_rng(0)
    times, previous = [], None
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, mesh_lib.put_batch(windows(train, rng, 12, 64), mesh), key)
        jax.block_until_ready(previous)  # as the loop does: one step is always under way
        previous = metrics
        times.append(time.perf_counter() - start)

    @jax.jit
    def held_out_sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply({"params": params}, batch.tokens, batch.positions)
        return losses.cross_entropy_sums(logits, batch.targets, batch.loss_mask, 0.0)[:2]

    total = np.zeros(2)
    for _ in range(100):
        batch = windows(held_out, rng, 64, 64)
        total += np.array(held_out_sums(state.params, batch), np.float64)
    return {
        "steps": steps,
        "ms": round(1e3 * float(np.median(times[5:])), 2),
        "seconds": round(sum(times), 1),
        "held_out_loss": round(total[0] / total[1], 4),
    }


def windows(ids: np.ndarray, rng: np.random.Generator, batch_size: int, length: int) -> TokenBatch:
    """Random windows of `length` characters, as nanoGPT draws them."""
    starts = rng.integers(0, len(ids) - length, batch_size)
    rows = ids[starts[:, None] + np.arange(length + 1)[None]]
    ones = np.ones((batch_size, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    return TokenBatch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, positions)


if __name__ == "__main__":
    main()
