"""Parameters tensor by tensor: from the named tensors of a file into sharded arrays, and back.

Neither way holds a second copy of the model. A layer's tensor is read in blocks of rows, turned
into ours, placed on the mesh and written into its slot of the stacked [L, ...] parameter, before
the next one is read: beside the shards, a host holds about two tensors at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptlab.run.errors import UserError

_BLOCK_BYTES = 4 << 20  # of float32, read at a time
_SHOWN = 3  # names in an error message
Index = tuple[slice, ...]


class Tensor(Protocol):
    """A tensor in a file, of which rows (of the first axis) can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored, the first axis varying slowest."""
        ...

    def check(self) -> None:
        """UserError if it is stored in a form that can't be read."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 as float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter is found in a checkpoint."""

    name: str  # with {layer} for the layer's number
    transposed: bool = False  # stored [O, I], ours is [I, O]
    part: int = 0  # the stored tensor holds `parts` of ours side by side, along its output axis,
    parts: int = 1  # and this is number `part`: GPT-2's query, key and value

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor, whose parameter (of one layer) has `shape`."""
        *front, last = shape
        if self.transposed:
            return (last * self.parts, *front)
        return (*front, last * self.parts)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that stands beside the tensors, as a tensor."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.value.shape

    def check(self) -> None:
        """It can always be read."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its rows."""
        return self.value[start:stop].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint that is about to be read; made by hf.open_folder and gguf.open_file."""

    architecture: Mapping[str, Any]  # `config.model`
    is_reward: bool  # a ScalarModel: a classifier with one label
    weights: Mapping[str, Weight]
    tensors: Mapping[str, Tensor]
    files: Sequence[str]  # everything that was read
    tokenizer: Callable[[], Mapping[str, bytes]]  # its tokenizer's files by name


def path_name(path: Any) -> str:
    """`backbone/layers/attention/query/kernel` of a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def slots(abstract: Any, weights: Mapping[str, Weight]) -> Iterator[tuple[Any, Weight, int | None]]:
    """(path, weight, layer) of every tensor that a model's parameters are kept in.

    Args:
        abstract: the parameters' shapes, layers stacked.
        weights: where each of them is; layer is None for what is no part of a layer.
    """
    for path, x in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        name = path_name(path)
        for layer in range(x.shape[0]) if _is_stacked(name) else (None,):
            yield path, weights[name], layer


def _is_stacked(name: str) -> bool:
    return "/layers/" in name


def check(
    abstract: Any, weights: Mapping[str, Weight], tensors: Mapping[str, Tensor], source: str
) -> None:
    """UserError unless the tensors are exactly those of the model, in shapes and readable."""
    shapes = {path_name(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    expected = {}
    for path, weight, layer in slots(abstract, weights):
        shape = shapes[path_name(path)][0 if layer is None else 1 :]
        expected[weight.name.format(layer=layer)] = weight.stored_shape(shape)
    for what, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("also holds", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise UserError(
                f"{source} {what} {', '.join(names[:_SHOWN])}{more}: it is not the model that its "
                "configuration describes, or one with parts that gptlab does not have"
            )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, not {shape}")
        tensors[name].check()


def load(
    abstract: Any,
    shardings: Any,
    weights: Mapping[str, Weight],
    tensors: Mapping[str, Tensor],
    each: Callable[[], None],
) -> Any:
    """Float32 parameters on the mesh. `check` comes first.

    Args:
        abstract: the parameters' shapes, layers stacked.
        shardings: of each.
        weights: where each of them is.
        tensors: by name.
        each: called after every tensor.
    """

    def one(path: Any, x: Any, sharding: NamedSharding) -> jax.Array:
        weight = weights[path_name(path)]
        if not _is_stacked(path_name(path)):
            done = _place(tensors[weight.name], weight, x.shape, sharding)
            each()
            return done
        stack = _zeros(sharding)(x.shape)
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        for layer in range(x.shape[0]):
            tensor = tensors[weight.name.format(layer=layer)]
            placed = _place(tensor, weight, x.shape[1:], of_layer)
            stack = _put(sharding)(stack, placed, layer)
            del placed
            stack.block_until_ready()  # or the tensors of many layers would wait in memory
            each()
        return stack

    return jax.tree_util.tree_map_with_path(one, abstract, shardings)


@functools.cache
def _zeros(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Compiled once for each shape of one layout."""
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return jax.jit(zeros, static_argnums=0, out_shardings=sharding)


@functools.cache
def _put(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Writes a layer into its slot, in the memory of what is given."""
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _place(
    tensor: Tensor, weight: Weight, shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """One parameter of `shape`, each device's shard read for itself, equal ones once."""
    read: dict[str, np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        if str(index) not in read:
            read[str(index)] = _read(tensor, weight, shape, index)
        return read[str(index)]

    return jax.make_array_from_callback(shape, sharding, block).block_until_ready()


def _read(tensor: Tensor, weight: Weight, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """The block `index` of a parameter of `shape`, float32, whatever its form in the file."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], np.float32)
    offset = weight.part * shape[-1]
    if len(shape) == 1:
        ((start, stop),) = bounds
        out[:] = tensor.read(offset + start, offset + stop)
        return out
    if weight.transposed:
        columns, (start, stop) = slice(*bounds[0]), bounds[1]
        start, stop, target = start + offset, stop + offset, out.T
    else:
        (start, stop), columns, target = bounds[0], slice(*bounds[1]), out
        columns = slice(columns.start + offset, columns.stop + offset)
    rows = max(1, _BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
    for at in range(start, stop, rows):
        end = min(at + rows, stop)
        target[at - start : end - start] = tensor.read(at, end)[:, columns]
    return out


def tensor_shapes(abstract: Any, weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `store` yields, in its order."""
    by_path = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    found = {}
    for path, weight, layer in slots(abstract, weights):
        shape = by_path[path_name(path)].shape[0 if layer is None else 1 :]
        found[weight.name.format(layer=layer)] = weight.stored_shape(shape)
    return found


def store(params: Any, weights: Mapping[str, Weight], names: Sequence[str]) -> Iterator[np.ndarray]:
    """The float32 tensors of `names` (tensor_shapes), one at a time; what `load` reads back.

    Every process must take all of them.
    """
    by_path = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    sources: dict[str, list[tuple[int, jax.Array, Weight, int | None]]] = {}
    for path, weight, layer in slots(params, weights):
        entry = (weight.part, by_path[path_name(path)], weight, layer)
        sources.setdefault(weight.name.format(layer=layer), []).append(entry)
    for name in names:
        parts = []
        for _, x, weight, layer in sorted(sources[name], key=lambda entry: entry[0]):
            value = whole(x if layer is None else x[layer])
            parts.append(value.T if weight.transposed else value)
        transposed = sources[name][0][2].transposed
        joined = np.concatenate(parts, axis=0 if transposed else -1) if parts[1:] else parts[0]
        yield np.ascontiguousarray(joined, np.float32)


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
