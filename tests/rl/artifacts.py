"""Finished artifacts with random parameters: a policy to start from, and a reward model."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import common
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run import artifact
from gptlab.train.checkpoint import Checkpoints

COMPUTE = common.compute(unroll=2).to_dict()


def mesh(devices: int = 1) -> ConfigDict:
    """A mesh of all devices there are; tests have 8."""
    return common.mesh(fsdp=devices, data=-1)


def write_policy(workdir: Path, model: dict, contrast: float = 1.0, seed: int = 0) -> Path:
    """Writes random parameters as a finished sft run and returns its workdir.

    Matrices are `contrast` times their initial size: logits of a fresh model are nearly flat.
    """
    language = LanguageModel(ModelConfig.build(model, COMPUTE))
    return _write(workdir, "sft", model, language, contrast, seed, {})


def write_reward(
    workdir: Path, model: dict, gain: float, bias: float, contrast: float = 1.0, seed: int = 1
) -> Path:
    """The same of a reward model, whose scores are gain * reward + bias."""
    scalar = ScalarModel(ModelConfig.build(model, COMPUTE))
    normalisation = {"kind": "samples", "gain": gain, "bias": bias}
    return _write(
        workdir, "reward", model, scalar, contrast, seed, {"normalisation": normalisation}
    )


def _write(workdir, stage, model, module, contrast, seed, results) -> Path:
    checkpoint = common.checkpoint(1, best_metric=None)
    config = ConfigDict({"seed": seed, "inputs": {}, "model": model, "checkpoint": checkpoint})
    with artifact.open_run(config, workdir, stage) as run:
        params = jax.jit(lambda key: nn.unbox(init_params(module, key)))(jax.random.key(seed))
        params = jax.tree.map(lambda x: x * contrast if x.ndim > 1 else x, params)
        with Checkpoints(run.workdir, checkpoint) as checkpoints:
            state = {"params": params, "opt_state": {"count": jnp.zeros((), jnp.int32)}}
            checkpoints.save(1, state, {})
            checkpoints.wait()
        run.results(**results)
        run.complete("0" * 16)
    return workdir
