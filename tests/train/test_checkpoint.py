"""Checkpoints: what is kept, what survives damage, and who may read them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import common
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.train import checkpoint as ckpt
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib


def params(value):
    return {"dense": {"kernel": jnp.full((8, 4), value, jnp.float32)}}


def init(key):
    return {"dense": {"kernel": jnp.zeros((8, 4), jnp.float32)}}


def abstract():
    return {"params": jax.eval_shape(lambda: params(0.0))}


def settings(**overrides):
    return common.checkpoint(1, best_metric="loss", **overrides)


def save_all(workdir, losses, **overrides):
    """Checkpoint i holds the value i; its loss is losses[i], or nothing for None."""
    config = settings(**overrides)
    Path(workdir, "config.json").write_text(json.dumps({"checkpoint": config.to_dict()}))
    with ckpt.Checkpoints(workdir, config) as checkpoints:
        for step, loss in enumerate(losses):
            metrics = None if loss is None else {"loss": loss}
            checkpoints.save(step, {"params": params(step)}, {"note": f"n{step}"}, metrics)


def restore(workdir):
    with ckpt.Checkpoints(workdir, settings()) as checkpoints:
        return checkpoints.restore_latest(abstract())


def value(items):
    return float(items["params"]["dense"]["kernel"][0, 0])


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, [3.0, 1.0, 2.0, float("nan"), 2.5, None], keep=2)
    assert ckpt.checkpoint_steps(tmp_path) == [1, 4, 5]
    assert ckpt.find_step(tmp_path, "best") == 1
    assert ckpt.find_step(tmp_path, "latest") == 5
    assert ckpt.best_metrics(tmp_path) == {"best/step": 1, "best/loss": 1.0}


def test_the_best_is_still_known_to_the_process_that_goes_on(tmp_path):
    save_all(tmp_path, [3.0, 1.0, 2.0], keep=1)
    with ckpt.Checkpoints(tmp_path, settings(keep=1)) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, {"params": params(step)}, {}, {"loss": 2.0})
    assert ckpt.checkpoint_steps(tmp_path) == [1, 4]


def test_best_by_maximum_and_without_a_metric(tmp_path):
    save_all(tmp_path, [3.0, 1.0, 2.0], keep=1, best_mode="max")
    assert ckpt.checkpoint_steps(tmp_path) == [0, 2]
    assert ckpt.find_step(tmp_path, "best") == 0
    other = tmp_path / "other"
    other.mkdir()
    save_all(other, [None, None], keep=1)
    assert ckpt.find_step(other, "best") == 1, "none has the metric: the latest"


def test_restore_gives_arrays_and_meta(tmp_path):
    save_all(tmp_path, [3.0, 1.0])
    step, items, meta = restore(tmp_path)
    assert (step, value(items), meta["note"], meta["metrics"]) == (1, 1.0, "n1", {"loss": 1.0})
    assert meta["schema"] == ckpt.SCHEMA_VERSION


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def truncate_largest(path):
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


DAMAGE = {
    "no metadata": lambda path: (path / "params" / "_METADATA").unlink(),
    "no meta": lambda path: shutil.rmtree(path / "meta"),
    "garbled meta": lambda path: (path / "meta" / "metadata").write_text("{"),
    "no arrays": lambda path: shutil.rmtree(path / "params" / "d"),
    "empty arrays": lambda path: [p.write_bytes(b"") for p in (path / "params" / "d").iterdir()],
    "garbled arrays": lambda path: [
        p.write_bytes(bytes(len(p.read_bytes()))) for p in (path / "params" / "d").iterdir()
    ],
    "no params": lambda path: shutil.rmtree(path / "params"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(kind, tmp_path, capsys):
    save_all(tmp_path, [3.0, 2.0, 1.0])
    DAMAGE[kind](tmp_path / "checkpoints" / "2")
    step, items, _ = restore(tmp_path)
    assert (step, value(items)) == (1, 1.0)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("checkpoint 2 of") and "cannot be read" in said[0]
    assert [p.name for p in (tmp_path / "checkpoints.corrupt").iterdir()] == ["2.0"]
    with ckpt.Checkpoints(tmp_path, settings()) as checkpoints:  # the step can be saved again
        checkpoints.save(2, {"params": params(7.0)}, {}, {"loss": 1.0})
    assert value(restore(tmp_path)[1]) == 7.0


def test_where_memory_matters_no_file_holds_a_large_array(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "_SMALLEST_FILE_BYTES", 1 << 12)
    drawn = np.random.default_rng(0).random((64, 1024), np.float32)
    config = settings()
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": config.to_dict()}))
    with ckpt.Checkpoints(tmp_path, config, write_bytes=drawn.nbytes) as checkpoints:
        checkpoints.save(0, {"params": {"large": jnp.asarray(drawn)}}, {})
    files = (tmp_path / "checkpoints").rglob("*")
    assert max(path.stat().st_size for path in files if path.is_file()) < drawn.nbytes / 16
    read = ckpt.load_params(tmp_path, mesh(), lambda key: {"large": jnp.zeros(drawn.shape)})
    np.testing.assert_array_equal(np.asarray(read["large"]), drawn)


def mesh():
    return mesh_lib.make_mesh(common.mesh())


def load_best(workdir):
    with ckpt.Checkpoints(workdir, settings()) as checkpoints:
        return value({"params": checkpoints.load_best(mesh(), init)})


@pytest.mark.parametrize("kind", DAMAGE)
def test_at_the_end_of_a_run_a_damaged_best_is_set_aside_for_the_next_best(kind, tmp_path, capsys):
    save_all(tmp_path, [3.0, 1.0, 2.0, 2.5])
    DAMAGE[kind](tmp_path / "checkpoints" / "1")
    assert load_best(tmp_path) == 2.0
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("checkpoint 1 of") and "cannot be read" in said[0]
    assert [p.name for p in (tmp_path / "checkpoints.corrupt").iterdir()] == ["1.0"]
    assert ckpt.best_metrics(tmp_path) == {"best/step": 2, "best/loss": 2.0}
    assert load_best(tmp_path) == 2.0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_later_stage_takes_no_other_than_the_best_and_says_what_to_do(kind, tmp_path):
    save_all(tmp_path, [3.0, 1.0, 2.0])
    DAMAGE[kind](tmp_path / "checkpoints" / "1")
    advice = rf"checkpoints/1: .* is damaged .*copy, or move {tmp_path} away and run the command in"
    with pytest.raises(UserError, match=advice):
        ckpt.load_params(tmp_path, mesh(), init)
    assert ckpt.checkpoint_steps(tmp_path) == [1, 2]


def test_at_the_end_of_a_run_without_a_good_checkpoint_all_stay_where_they_are(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    for step in ("0", "1"):
        DAMAGE["no arrays"](tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[0, 1\] can be read"):
        load_best(tmp_path)
    assert ckpt.checkpoint_steps(tmp_path) == [0, 1]


def test_a_best_that_a_failing_disk_hides_is_not_damaged(tmp_path, monkeypatch):
    save_all(tmp_path, [3.0, 1.0, 2.0])

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ckpt.ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(UserError, match="cannot be read .*Input/output error"):
        load_best(tmp_path)
    assert ckpt.checkpoint_steps(tmp_path) == [1, 2]


def test_if_every_checkpoint_is_damaged_all_stay_where_they_are(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    for step in ("0", "1"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "params" / "d")
    with pytest.raises(
        UserError, match=r"none of the checkpoints \[0, 1\] can be read \(.*NOT_FOUND"
    ):
        restore(tmp_path)
    assert ckpt.checkpoint_steps(tmp_path) == [0, 1]
    assert not (tmp_path / "checkpoints.corrupt").exists()


NOT_DAMAGE = [
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
    ValueError("RESOURCE_EXHAUSTED: Error reading local file: Cannot allocate memory"),
    ValueError("UNKNOWN: Error reading local file: Input/output error"),
    *(OSError(code, os.strerror(code)) for code in (errno.EIO, errno.EACCES, errno.ENOSPC)),
]


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=repr)
def test_an_error_that_is_not_the_checkpoints_is_raised_and_nothing_moved(
    error, tmp_path, monkeypatch
):
    save_all(tmp_path, [3.0, 2.0, 1.0])
    DAMAGE["no arrays"](tmp_path / "checkpoints" / "2")
    original = ckpt.ocp.CheckpointManager.restore

    def fail(self, step, args):
        if step == 1:
            raise error
        return original(self, step, args=args)

    monkeypatch.setattr(ckpt.ocp.CheckpointManager, "restore", fail)
    with pytest.raises(type(error)) as raised:
        restore(tmp_path)
    assert raised.value is error
    assert ckpt.checkpoint_steps(tmp_path) == [1, 2]
    monkeypatch.undo()
    assert restore(tmp_path)[0] == 1


def test_metrics_that_a_failing_disk_hides_are_not_taken_for_none(tmp_path, monkeypatch):
    """The best checkpoint would lose its rank, and be deleted with the next save."""
    save_all(tmp_path, [1.0, 2.0, 3.0])

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(ckpt.epath.Path(tmp_path)), "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        ckpt.Checkpoints(tmp_path, settings())


def test_checkpoints_of_another_model_are_not_damaged(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    wider = {"params": {"dense": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}}}
    with ckpt.Checkpoints(tmp_path, settings()) as checkpoints:
        with pytest.raises(ValueError, match="shape"):
            checkpoints.restore_latest(wider)
    assert ckpt.checkpoint_steps(tmp_path) == [0, 1]


def test_restore_over_frees_what_was_there_only_if_something_takes_its_place(tmp_path):
    shardings = {"params": jax.tree.map(lambda x: x.sharding, params(0.0))}
    given = {"params": params(9.0)}
    with ckpt.Checkpoints(tmp_path, settings()) as checkpoints:
        assert checkpoints.restore_over(given, shardings) is None
        assert value(given) == 9.0
        checkpoints.save(3, {"params": params(3.0)}, {})
        checkpoints.wait()
        step, items, _ = checkpoints.restore_over(given, shardings)
    assert (step, value(items)) == (3, 3.0)
    assert given["params"]["dense"]["kernel"].is_deleted()


def test_a_checkpoint_of_a_newer_gptlab_is_refused_and_left_alone(tmp_path):
    save_all(tmp_path, [3.0])
    meta = tmp_path / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match="schema 99"):
        restore(tmp_path)
    assert meta.exists()


def test_a_save_that_was_cut_off_is_invisible(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    good = tmp_path / "checkpoints" / "1"
    shutil.copytree(good, tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-5")
    assert ckpt.checkpoint_steps(tmp_path) == [0, 1]
    assert restore(tmp_path)[0] == 1


def test_restore_onto_another_mesh(tmp_path):
    save_all(tmp_path, [3.0])
    mesh = mesh_lib.make_mesh(common.mesh(fsdp=4, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    wanted = state_lib.abstract(abstract(), jax.tree.map(lambda _: sharding, abstract()))
    with ckpt.Checkpoints(tmp_path, settings()) as checkpoints:
        kernel = checkpoints.restore_latest(wanted)[1]["params"]["dense"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 2)


def test_load_params_reads_the_best_and_only_the_parameters(tmp_path):
    save_all(tmp_path, [3.0, 1.0, 2.0])
    with ckpt.Checkpoints(tmp_path, settings()) as checkpoints:
        extra = {"params": params(9.0), "opt_state": {"m": jnp.zeros((100,))}}
        checkpoints.save(3, extra, {}, {"loss": 0.5})
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "opt_state")
    mesh = mesh_lib.make_mesh(common.mesh())
    assert value({"params": ckpt.load_params(tmp_path, mesh, init)}) == 9.0
    with pytest.raises(UserError, match="holds no 'ema'; it holds meta, params"):
        ckpt.load_params(tmp_path, mesh, init, item="ema")


def test_parameters_of_another_model_are_refused_by_name(tmp_path):
    save_all(tmp_path, [3.0])
    mesh = mesh_lib.make_mesh(common.mesh())

    def wider(key):
        return {"dense": {"kernel": jnp.zeros((8, 16), jnp.float32)}}

    with pytest.raises(UserError, match=r"dense/kernel is \(8, 4\) there and \(8, 16\) here"):
        ckpt.load_params(tmp_path, mesh, wider)


def chain(root, *links):
    """Artifacts of (name, config keys, inputs by name), each in a directory of its name."""
    for name, keys, inputs in links:
        paths = {key: str(root / other) for key, other in inputs.items()}
        with artifact.open_run(ConfigDict({"inputs": paths, **keys}), root / name, name) as run:
            run.complete("0" * 16)


def test_a_model_is_found_along_its_parents_without_what_they_were_made_from(tmp_path):
    model = {"d_model": 32}
    chain(
        tmp_path,
        ("corpus", {}, {}),
        ("pretrain", {"model": model}, {"tokens": "corpus"}),
        ("sft", {}, {"init": "pretrain", "tokens": "corpus"}),
        ("collect", {}, {"policy": "sft"}),
    )
    shutil.rmtree(tmp_path / "corpus")
    assert ckpt.load_model_config(tmp_path / "collect") == model
    shutil.rmtree(tmp_path / "pretrain")
    with pytest.raises(UserError, match="as its input init, but .* is gone"):
        ckpt.load_model_config(tmp_path / "collect")


def test_a_workdir_without_a_model_is_named(tmp_path):
    chain(tmp_path, ("corpus", {}, {}), ("vocabulary", {}, {"corpus": "corpus"}))
    with pytest.raises(UserError, match="vocabulary holds no model"):
        ckpt.load_model_config(tmp_path / "vocabulary")


def test_a_workdir_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint here"):
        ckpt.find_step(tmp_path, "best")


FULL_DISK = """
import sys
import jax.numpy as jnp, numpy as np
from configs import common
from gptlab.run.errors import UserError
from gptlab.train import checkpoint as ckpt

checkpoints = ckpt.Checkpoints(sys.argv[1], common.checkpoint(1))
big = {"params": {"x": jnp.array(np.random.default_rng(0).normal(size=(2**20,)), jnp.float32)}}
try:
    for step in range(50):
        checkpoints.save(step, big, {})
    checkpoints.wait()
except UserError as error:
    print("UserError:", error)
"""


def test_a_full_disk_is_one_line_and_finished_checkpoints_stay(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        run = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(disk)],
            capture_output=True, text=True, timeout=120,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert "UserError: the disk is full" in run.stdout, run.stdout + run.stderr
        shape = {"params": {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}}
        with ckpt.Checkpoints(disk, common.checkpoint(1)) as checkpoints:
            assert checkpoints.restore_latest(shape) is not None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
