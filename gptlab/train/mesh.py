"""The device mesh, and batches laid out on it.

One path serves a laptop's single CPU and a pod: five named axes, each 1 unless the config says
otherwise, `tensor` innermost so that it lands on the fastest links. Batches are split over the
three data axes; the parameters' layout is model/sharding.py's business.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptlab.model.sharding import MESH_AXES as AXES
from gptlab.model.sharding import RULES, batch_spec
from gptlab.run.errors import UserError

DATA_AXES = tuple(RULES["batch"] or ())


def make_mesh(config: Mapping[str, int], chosen: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      config: size of each of the five axes; one of them may be -1, to be inferred.
      chosen: other devices than all of this run: those of a TPU that is only planned, say.

    Raises:
      UserError: an axis is no positive number, the sizes do not multiply to the device count, or
        `replica` does not match the slices of a multi-slice job.
    """
    sizes = [int(config[axis]) for axis in AXES]
    devices = list(jax.devices() if chosen is None else chosen)
    shape = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh ({shape}): sizes are positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh ({shape}) asks for {known} devices or a multiple of them, but "
            f"there are {len(devices)}: set one axis to -1 or change a size"
        )
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices, each at its place in a mesh of these sizes.

    Within a slice the axes follow the wires of the chips; where no set of wires has the size of an
    axis (tensor 2 on v6e:4x8), they are split. Of several slices, `replica` alone crosses the slow
    network between them.

    Raises:
      UserError: `replica` is no multiple of the slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    replicas = sizes[AXES.index("replica")]
    if replicas % slices:
        raise UserError(
            f"config.mesh.replica={replicas}, but the devices are {slices} slices, which a slow "
            f"network joins: set config.mesh.replica={slices} or a multiple of it"
        )
    inner = [replicas // slices, *sizes[1:]]
    outer = [slices] + [1] * len(sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def data_size(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def check_batch_size(name: str, batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises UserError unless every microbatch divides evenly over the data axes."""
    parts = data_size(mesh) * accumulation_steps
    if batch_size < 1 or accumulation_steps < 1 or batch_size % parts:
        raise UserError(
            f"config.{name}={batch_size} does not divide into {accumulation_steps} "
            f"microbatches over {data_size(mesh)} data-parallel parts of the mesh: "
            f"use a multiple of {parts}"
        )


def check_length(name: str, length: int, mesh: Mesh) -> None:
    """Raises UserError unless sequences divide over the `context` axis, in two chunks a device."""
    ways = mesh.shape["context"]
    if ways > 1 and length % (2 * ways):
        raise UserError(
            f"config.{name} makes sequences of {length} tokens, which config.mesh.context={ways} "
            f"does not split into two equal chunks a device: use a multiple of {2 * ways}"
        )


def shrunk(batch_size: int, rows: int, mesh: Mesh) -> int:
    """A batch size for so few rows that they may not fill a batch, to be read in order.

    `batch_size`, or else the largest that the rows fill and the mesh divides, at least one row on
    each of its data-parallel parts.
    """
    parts = data_size(mesh)
    return min(batch_size, max(parts, rows // parts * parts))


def process_block(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of the block of batch rows that this process has to read.

    Processes that the `context` or `tensor` axis joins read the same rows, so there may be fewer
    blocks than processes.
    """
    parts = data_size(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXES))
    owned: dict[int, set[int]] = {}
    device: Any  # jax.Device, whose stub lacks process_index
    for device, (rows,) in sharding.devices_indices_map((parts,)).items():
        owned.setdefault(device.process_index, set()).add(rows.indices(parts)[0])
    blocks = sorted({tuple(sorted(rows)) for rows in owned.values()})
    return blocks.index(tuple(sorted(owned[jax.process_index()]))), len(blocks)


def batch_shardings(batch: Any, mesh: Mesh, blocks: int = 1) -> Any:
    """Where each array of a batch (any pytree) lies: a tree of NamedShardings.

    A dataclass says in its fields' metadata which logical `axes` an array has (data/batches.py); of
    any other only the rows are split. `blocks` are the processes' parts that make the whole.
    """

    def place(x: Any, axes: tuple[str | None, ...]) -> NamedSharding:
        shape = np.shape(x)
        shape = (shape[0] * blocks, *shape[1:]) if shape else ()
        return NamedSharding(mesh, batch_spec(shape, axes, mesh))

    def node(x: Any) -> Any:
        if not dataclasses.is_dataclass(x):
            return place(x, ("batch",))
        fields = {
            f.name: (getattr(x, f.name), f.metadata.get("axes")) for f in dataclasses.fields(x)
        }
        placed = {
            name: place(value, axes) if axes else batch_shardings(value, mesh, blocks)
            for name, (value, axes) in fields.items()
        }
        return dataclasses.replace(x, **placed)  # type: ignore[type-var]

    return jax.tree.map(node, batch, is_leaf=dataclasses.is_dataclass)


def abstract_batch(batch: Any, mesh: Mesh) -> Any:
    """Global shapes and dtypes, with the shardings that `put_batch` gives such arrays."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        batch,
        batch_shardings(batch, mesh),
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (numpy, any pytree) as global arrays on the mesh."""
    _, blocks = process_block(mesh)

    def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        shape = (x.shape[0] * blocks, *x.shape[1:]) if x.ndim else ()
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch, batch_shardings(batch, mesh, blocks))
