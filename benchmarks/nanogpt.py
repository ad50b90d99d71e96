"""nanoGPT's CPU recipe: characters of tinyshakespeare, in gptlab and, beside it, in PyTorch.

    python -m benchmarks.nanogpt --text=PATH/TO/input.txt [--torch --torch_python=PYTHON]

4 layers, 4 heads, d 128, T 64, B 12, 2,000 steps of AdamW (betas 0.9, 0.99; lr 1e-3 to 1e-4,
warm-up 100, decay 0.1, clip 1), dropout 0, float32. nanoGPT's README gives a held-out loss of 1.88.
Beside the steps stand the products of activations and weights alone, forward and backward, which is
the least that a step of XLA's products takes. Two minutes on two idle cores, with --torch four.

--torch trains a plain PyTorch implementation (nanogpt_torch.py) on the same batches, in turns with
ours, in the Python that --torch_python names: PyTorch is no dependency of gptlab. Both processes
keep the memory that they free. Prints a table, then the same figures as one line of JSON.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import measure
from benchmarks.torch_process import TorchProcess
from configs import common
from configs import pretrain as pretrain_config
from gptlab import pretrain
from gptlab.data.batches import TokenBatch
from gptlab.model import transformer
from gptlab.model.product import product
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import program
from gptlab.train import losses, optimizer
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib

LENGTH, BATCH = 64, 12


def main() -> None:
    """Trains, in turns where there are two, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stretch", type=int, default=50, help="steps a turn")
    parser.add_argument("--torch", action="store_true", help="also run the recipe in PyTorch")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python with PyTorch")
    args = parser.parse_args()
    program.keep_freed_memory()
    ours = Trainer(Path(args.text).read_text(encoding="utf-8"), args.steps)
    figures: dict[str, Any] = {"jax": jax.__version__, "steps": args.steps}
    train: dict[str, Callable[[int], float]] = {"gptlab": ours.train, "products": ours.products}
    evaluate: dict[str, Callable[[], float]] = {"gptlab": ours.held_out_loss}
    if args.torch:
        told = f"--text={args.text}", f"--steps={args.steps}"
        other = TorchProcess(args.torch_python, "nanogpt_torch.py", *told)
        figures |= other.about
        train["torch"] = lambda steps: other.ask(train=steps)["seconds"]
        evaluate["torch"] = lambda: other.ask(evaluate=True)["held_out_loss"]
    taken: dict[str, list[float]] = {name: [] for name in train}
    for start in range(0, args.steps, args.stretch):
        steps = min(args.stretch, args.steps - start)
        for name, run in train.items():
            taken[name].append(run(steps) / steps)
    # The first stretch is left out: both sides allocate and warm up in it.
    times = {name: np.array(values[1:] or values) for name, values in taken.items()}
    for name in train:
        figures[name] = {"ms": measure.spread(1e3 * times[name])}
        if name in evaluate:
            figures[name]["held_out_loss"] = round(evaluate[name](), 4)
    figures["gptlab"] |= ours.compile_figures
    if args.torch:
        for name in ("gptlab", "products"):
            figures[f"{name}_time_to_torch"] = measure.spread(times[name] / times["torch"], 3)
    figures["peak_rss_mib"] = measure.peak_rss_mib()
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


def recipe_config(steps: int, characters: int) -> ConfigDict:
    """The recipe as a pretraining config."""
    config = pretrain_config.get_config()
    config.model = common.model("nano_shakespeare", vocab_size=characters)
    config.compute = common.compute(unroll=4)
    config.batch_size, config.data.seq_len, config.total_steps = BATCH, LENGTH, steps
    config.optimizer = common.adamw(
        1e-3, betas=(0.9, 0.99), warmup_steps=min(100, steps), weight_decay=0.1
    )
    return config


class Trainer:
    """gptlab's training step over random windows of the text."""

    def __init__(self, text: str, steps: int):
        """Compiles the step."""
        characters = sorted(set(text))
        ids = np.searchsorted(np.array(characters), np.array(list(text))).astype(np.int32)
        cut = int(0.9 * len(ids))
        self._train, self._held_out = ids[:cut], ids[cut:]
        self._rng = np.random.default_rng(0)
        config = recipe_config(steps, len(characters))
        model = LanguageModel(ModelConfig.build(config.model.to_dict(), config.compute.to_dict()))
        self._mesh = mesh_lib.make_mesh(config.mesh)
        tx, schedule = optimizer.make_optimizer(config.optimizer, steps)
        self._state, _ = state_lib.init_state(
            functools.partial(transformer.init_params, model), tx, self._mesh, jax.random.key(0)
        )
        loss_fn = pretrain.make_loss_fn(model, config.z_loss)
        self._key = jax.random.key(1)
        batch = mesh_lib.put_batch(windows(ids, np.zeros(BATCH, int)), self._mesh)
        self._step, self.compile_figures = measure.compile_timed(
            jax.jit(pretrain.make_train_step(loss_fn, tx, schedule, config), donate_argnums=0),
            self._state,
            batch,
            self._key,
        )

        def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            stats: Any = model.apply(
                {"params": params},
                batch.tokens,
                batch.targets,
                batch.positions,
                method=model.score,
            )
            return losses.cross_entropy_sums(stats, batch.loss_mask, 0.0)[:2]

        self._sums = jax.jit(sums)
        self._products = jax.jit(jax.grad(linear_network, (0, 1)))
        self._weights = random_weights(config.model, jax.random.key(2))
        width = config.model.d_model
        self._activations = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, width))
        self.products(1)

    def train(self, steps: int) -> float:
        """Makes some steps, one always under way as in the loops; returns the seconds taken."""
        start, previous = time.perf_counter(), None
        for _ in range(steps):
            starts = self._rng.integers(0, len(self._train) - LENGTH, BATCH)
            batch = mesh_lib.put_batch(windows(self._train, starts), self._mesh)
            self._state, metrics = self._step(self._state, batch, self._key)
            jax.block_until_ready(previous)
            previous = metrics
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def products(self, steps: int) -> float:
        """Makes the products of weights of some steps; returns the seconds taken."""
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(self._products(self._weights, self._activations))
        return time.perf_counter() - start

    def held_out_loss(self) -> float:
        """Mean nats a character over all held-out windows, side by side."""
        starts = np.arange(0, len(self._held_out) - LENGTH, LENGTH)
        total = np.zeros(2)
        for i in range(0, len(starts), 64):
            batch = windows(self._held_out, starts[i : i + 64])
            total += np.array(self._sums(self._state.params, batch), np.float64)
        return total[0] / total[1]


def random_weights(model: ConfigDict, key: jax.Array) -> list[jax.Array]:
    """Matrices of the recipe's shapes in their order; they keep the size of what they multiply."""
    d, f = model.d_model, model.d_ff
    shapes = [*[(d, d)] * 4, (d, f), (f, d)] * model.num_layers + [(d, model.vocab_size)]
    keys = jax.random.split(key, len(shapes))
    return [
        jax.random.normal(own, shape) * shape[0] ** -0.5
        for own, shape in zip(keys, shapes, strict=True)
    ]


def linear_network(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    """[B, T, D] -> [] through all weights; its gradient is the products of a step, and no more."""
    for kernel in weights:
        x = product(x, kernel, x.dtype.name)
    return jnp.sum(jnp.square(x))


def windows(ids: np.ndarray, starts: np.ndarray) -> TokenBatch:
    """The windows of LENGTH characters that begin at `starts`."""
    rows = ids[starts[:, None] + np.arange(LENGTH + 1)[None]]
    ones = np.ones((len(starts), LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    return TokenBatch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, positions)


if __name__ == "__main__":
    main()
