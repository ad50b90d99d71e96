"""What an older gptlab has written, this one reads: runs with checkpoints, in golden/checkpoints.

A failure here means that people's finished runs can't be used any more. Never write those
directories anew: see golden/write_checkpoint.py for how to add one.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from gptlab.model import transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run import artifact
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from tests.golden import write_checkpoint

GOLDEN = sorted((Path(__file__).parent / "golden" / "checkpoints").iterdir())


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def old(request, tmp_path):
    """A copy of a golden run: nothing may be written into the original."""
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def config_of(workdir):
    return ConfigDict(json.loads((workdir / "config.json").read_text()))


def test_the_parameters_come_back_bit_for_bit(old):
    manifest, config = artifact.read_manifest(old), config_of(old)
    model = LanguageModel(
        ModelConfig.build(checkpoint.load_model_config(old), config.compute.to_dict())
    )
    init = functools.partial(transformer.init_params, model)
    mesh = mesh_lib.make_mesh(config.mesh)
    for which in ("best", "latest"):
        params = checkpoint.load_params(old, mesh, init, which)
        assert state_lib.digest(params) == manifest["digest"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jax.numpy.dtype("float32")}


def test_the_whole_state_comes_back_and_training_could_go_on(old):
    manifest, config = artifact.read_manifest(old), config_of(old)
    config.optimizer.mu_dtype = "float32"  # a key of later configs; this is what was before
    with jax.set_mesh(mesh_lib.make_mesh(config.mesh)):
        fresh, shardings = write_checkpoint.fresh_state(config)
        with checkpoint.Checkpoints(old, config.checkpoint) as checkpoints:
            restored, meta = checkpoints.restore_state(fresh, shardings)
    assert int(restored.step) == write_checkpoint.STEP
    assert state_lib.digest(restored.params) == manifest["digest"]
    assert state_lib.digest(restored.opt_state) == manifest["results"]["opt_state"]
    assert {name: meta[name] for name in write_checkpoint.META} == write_checkpoint.META
    assert checkpoint.best_metrics(old)["best/validation/loss"] == 1.25


def test_the_run_is_recognised_as_done(old):
    with artifact.open_run(config_of(old), old, "pretrain") as run:
        assert run.finished and run.identity == artifact.read_manifest(old)["identity"]


def test_keys_that_came_later_and_are_off_make_it_no_other_run(old):
    identity, config = artifact.read_manifest(old)["identity"], config_of(old)
    config.lora = common.lora()
    config.inputs = common.inputs("init")
    with artifact.open_run(config, old, "pretrain") as run:
        assert run.finished and run.identity == identity


def test_what_is_written_today_is_read_alike(tmp_path):
    """The form of today's runs is among the golden ones, or a golden one is missing."""
    write_checkpoint.write(tmp_path / "run")

    def form(workdir):
        manifest = artifact.read_manifest(workdir)
        return (
            manifest["schema"],
            checkpoint.read_meta(workdir, write_checkpoint.STEP)["schema"],
            manifest["digest"],
            manifest["results"]["opt_state"],
        )

    assert form(tmp_path / "run") in [form(path) for path in GOLDEN]
