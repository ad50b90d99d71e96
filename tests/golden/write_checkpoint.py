"""Writes a finished run with one checkpoint, as this version of gptlab does.

    python -m tests.golden.write_checkpoint tests/golden/checkpoints/schema_2

Run it when checkpoints or manifests are to have another form (or Orbax another major version): one
directory more, named after what is new. Those that are there are never written again, and
tests/test_golden.py reads every one of them.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train.checkpoint import Checkpoints
from gptlab.train.optimizer import make_optimizer
from gptlab.train.state import TrainState

STEP = 7
META = {"pretrained": {"eval/validation/perplexity": 3.5}}
METRICS = {"eval/validation/loss": 1.25}


def make_config() -> ConfigDict:
    """As small as a model with grouped queries, biases and QK-norm can be."""
    model = common.model(
        "tiny_qwen3", vocab_size=16, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1,
        head_dim=4, d_ff=8, max_len=16, qkv_bias=True,
    )  # fmt: skip
    return ConfigDict(
        {
            "seed": 0,
            "inputs": {},
            "model": model,
            "compute": common.compute(),
            "optimizer": common.adamw(1e-2),
            "mesh": common.mesh(),
            "checkpoint": common.checkpoint(STEP),
        }
    )


def fresh_state(config: ConfigDict) -> tuple[TrainState, TrainState]:
    """A state as training begins with, and its shardings."""
    model = LanguageModel(ModelConfig.build(config.model.to_dict(), config.compute.to_dict()))
    tx, _ = make_optimizer(config.optimizer, total_steps=STEP)
    return state_lib.init_state(
        lambda key: transformer.init_params(model, key),
        tx,
        mesh_lib.make_mesh(config.mesh),
        jax.random.key(config.seed),
    )


def trained_state(config: ConfigDict) -> TrainState:
    """The same with other numbers everywhere, the same ones on every machine."""
    rng = np.random.default_rng(0)

    def changed(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        if jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), sharding)
        return jax.device_put(np.full(x.shape, STEP, x.dtype), sharding)

    return jax.tree.map(changed, *fresh_state(config))


def write(workdir: Path) -> None:
    """The run; its results hold what a reader must find."""
    config = make_config()
    with artifact.open_run(config, workdir, "pretrain") as run:
        with jax.set_mesh(mesh_lib.make_mesh(config.mesh)):
            state = trained_state(config)
            with Checkpoints(run.workdir, config.checkpoint) as checkpoints:
                checkpoints.save_state(state, META, METRICS)
                checkpoints.wait()
        run.results(opt_state=state_lib.digest(state.opt_state))
        run.complete(state_lib.digest(state.params))
    (workdir / ".lock").unlink()
    for note in workdir.rglob("commit_success.txt"):
        note.write_text("Checkpoint commit was successful\n")  # and not on which machine, where


if __name__ == "__main__":
    write(Path(sys.argv[1]))
