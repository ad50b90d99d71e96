"""Meshes from a config, and batches laid out on them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import common
from gptlab.data.batches import ComparisonBatch, PromptBatch, TokenBatch
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib


def test_one_axis_is_inferred_and_axes_are_auto():
    mesh = mesh_lib.make_mesh(common.mesh(data=2, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh_lib.data_size(mesh) == 4


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 1}, {"data": -1}, {"data": 0}, {"fsdp": 16}, {"tensor": -2}]
)
def test_sizes_that_do_not_make_the_device_count_are_refused(sizes):
    with pytest.raises(UserError, match="config.mesh"):
        mesh_lib.make_mesh(common.mesh(**sizes))


def test_batch_size_must_divide_into_microbatches_on_every_part():
    mesh = mesh_lib.make_mesh(common.mesh(data=2, tensor=2))
    mesh_lib.check_batch_size("batch_size", 24, mesh, 3)
    with pytest.raises(UserError, match="batch_size=24.*multiple of 16"):
        mesh_lib.check_batch_size("batch_size", 24, mesh, 4)


def test_a_batch_shrinks_to_what_few_rows_fill():
    mesh = mesh_lib.make_mesh(common.mesh(data=2, tensor=2))  # 4 data-parallel parts
    sizes = [mesh_lib.shrunk(16, rows, mesh) for rows in (0, 3, 4, 11, 16, 100)]
    assert sizes == [4, 4, 4, 8, 16, 16]


def test_rows_are_split_over_the_data_axes_and_tokens_over_context():
    """By what an array is: ranks of as many candidates as tokens would divide lie whole."""
    mesh = mesh_lib.make_mesh(common.mesh(data=2, fsdp=2, context=2))
    ranks, per_token = np.ones((8, 4), np.int32), np.arange(8 * 6).reshape(8, 6)
    batch = (
        TokenBatch(*[per_token] * 5),
        ComparisonBatch(np.ones((8, 4, 6), np.int32), ranks, ranks, np.ones(8)),
        PromptBatch(per_token, np.ones(8), np.ones(8)),
        {"scale": np.float32(2.0), "rows": (per_token, None)},
    )
    placed = mesh_lib.put_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    tokens, comparisons, prompts, others = jax.tree.map(
        lambda x: x.addressable_shards[0].data.shape, placed
    )
    assert tokens == TokenBatch(*[(2, 3)] * 5)
    assert comparisons == ComparisonBatch((2, 4, 6), (2, 4), (2, 4), (2,))
    assert prompts == PromptBatch((2, 6), (2,), (2,))
    assert others == {"scale": (), "rows": ((2, 6), None)}
    assert placed[1].ranks.sharding.spec == PartitionSpec(mesh_lib.DATA_AXES, None)
    abstract = mesh_lib.abstract_batch(batch, mesh)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.sharding, y.sharding), abstract, placed)


def test_a_single_process_reads_every_row():
    assert mesh_lib.process_block(mesh_lib.make_mesh(common.mesh(tensor=2))) == (0, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from, of a device that is not there."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def chips(slices, each):
    """As JAX may list them: not slice by slice."""
    made = [Chip(i, i // each, i // each) for i in range(slices * each)]
    return made[::2] + made[1::2]


@pytest.mark.parametrize("replica", [2, 4])
def test_only_the_replica_axis_crosses_slices(replica):
    sizes = [replica, 8 // replica, 1, 1, 1]
    made = mesh_lib.arrange(sizes, chips(2, 4))
    assert made.shape == tuple(sizes) and len({chip.id for chip in made.flat}) == 8
    for number, one in enumerate(made):
        assert {chip.slice_index for chip in one.flat} == {number // (replica // 2)}


def test_a_replica_across_slices_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: chips(2, 4))
    with pytest.raises(UserError, match="config.mesh.replica=1.* 2 slices.*replica=2"):
        mesh_lib.make_mesh(common.mesh())
    with pytest.raises(UserError, match="config.mesh.replica=3"):
        mesh_lib.arrange([3, 1, 1, 1, 1], chips(2, 4))


def test_sequences_must_divide_into_two_chunks_a_device():
    mesh = mesh_lib.make_mesh(common.mesh(context=4))
    mesh_lib.check_length("data.seq_len", 64, mesh)
    with pytest.raises(UserError, match="config.data.seq_len makes .* 60 tokens.* multiple of 8"):
        mesh_lib.check_length("data.seq_len", 60, mesh)
    mesh_lib.check_length("data.seq_len", 61, mesh_lib.make_mesh(common.mesh()))


@dataclasses.dataclass(frozen=True)
class TorusChip(Chip):
    """A chip of a TPU slice, which knows where on the torus it stands."""

    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def test_an_axis_that_no_wires_have_the_size_of_splits_them():
    places = [(x, y, 0) for y in range(8) for x in range(4)]
    slice_ = [
        TorusChip(i, 0, i // 8, "tpu", "TPU v6 lite", coords) for i, coords in enumerate(places)
    ]
    made = mesh_lib.arrange([1, 1, 16, 1, 2], slice_)
    assert made.shape == (1, 1, 16, 1, 2) and len(set(made.flat)) == 32
    for pair in made.reshape(16, 2):  # `tensor` joins neighbours
        apart = [abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords, strict=True)]
        assert sum(apart) == 1
