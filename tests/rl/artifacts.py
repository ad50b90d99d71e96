"""A finished 'sft' artifact with random parameters: a policy to start from, untrained."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import common
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run import artifact
from gptlab.train.checkpoint import Checkpoints

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 2, "dropout": 0.0, "attention": "xla"}


def mesh(devices: int = 1) -> ConfigDict:
    """A mesh of all devices there are; tests have 8."""
    return common.mesh(fsdp=devices, data=-1)


def write_policy(workdir: Path, model: dict, contrast: float = 1.0, seed: int = 0) -> Path:
    """Writes random parameters as a finished sft run and returns its workdir.

    Matrices are `contrast` times their initial size: logits of a fresh model are nearly flat.
    """
    checkpoint = common.checkpoint(1, best_metric=None)
    config = ConfigDict({"seed": seed, "inputs": {}, "model": model, "checkpoint": checkpoint})
    with artifact.open_run(config, workdir, "sft") as run:
        language = LanguageModel(ModelConfig.build(model, COMPUTE))
        params = jax.jit(lambda key: nn.unbox(init_params(language, key)))(jax.random.key(seed))
        params = jax.tree.map(lambda x: x * contrast if x.ndim > 1 else x, params)
        with Checkpoints(run.workdir, checkpoint) as checkpoints:
            state = {"params": params, "opt_state": {"count": jnp.zeros((), jnp.int32)}}
            checkpoints.save(1, state, {})
            checkpoints.wait()
        run.complete("0" * 16)
    return workdir
