"""The training state, sharded from birth: no device ever holds a full copy of a large model."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.model import lora, sharding, weights

_GATHERED_BYTES = 8 << 20


@flax.struct.dataclass
class TrainState:
    """Everything that an optimiser step changes."""

    step: Any  # int32 [], finished optimiser steps
    params: Any  # all of the model's, with those that stand (model/lora.py)
    opt_state: Any  # of those that are trained


def param_shardings(init_fn: Callable[[jax.Array], Any], mesh: Mesh) -> tuple[Any, Any]:
    """(abstract parameters, their shardings) of `init_fn(key)`, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shardings = sharding.logical_to_sharding(mesh, jax.eval_shape(init_fn, key))
    abstract = jax.eval_shape(lambda key: nn.unbox(init_fn(key)), key)
    return abstract, shardings


def init_opt(tx: optax.GradientTransformation, params: Any) -> Any:
    """The optimiser's state at first: of what is trained of the parameters."""
    return tx.init(lora.split(params)[0])


def opt_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Moments lie as their parameters do; counters are replicated.

    A moment is known by its path, which ends in its parameter's, and by its shape. (optax's own
    `tree.map_params` does not know optimisers that treat only a part of the parameters.)
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = {path: x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    placed = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])

    def lie(path: tuple[Any, ...], x: Any) -> NamedSharding:
        for start in range(len(path)):
            if shapes.get(path[start:]) == x.shape:
                return placed[path[start:]]
        return replicated

    abstract = jax.eval_shape(functools.partial(init_opt, tx), params)
    return jax.tree_util.tree_map_with_path(lie, abstract)


def init_state(
    init_fn: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
) -> tuple[TrainState, TrainState]:
    """A fresh state.

    Args:
      init_fn: key -> parameters, boxed with their logical axes.
      tx: the optimiser.
      mesh: where the state lives.
      key: of the initialisation.

    Returns:
      (state, its shardings as a TrainState of NamedShardings).
    """
    params, shardings = param_shardings(init_fn, mesh)
    shardings = TrainState(
        NamedSharding(mesh, PartitionSpec()), shardings, opt_shardings(tx, params, shardings, mesh)
    )

    def create(key: jax.Array) -> TrainState:
        params = nn.unbox(init_fn(key))
        return TrainState(jnp.zeros((), jnp.int32), params, init_opt(tx, params))

    return jax.jit(create, out_shardings=shardings)(key), shardings


def state_from_params(
    params: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """A fresh state around parameters that already lie on the mesh; returned as by init_state."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    shardings = TrainState(
        NamedSharding(mesh, PartitionSpec()), shardings, opt_shardings(tx, params, shardings, mesh)
    )
    start = functools.partial(init_opt, tx)
    opt_state = jax.jit(start, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, opt_state), shardings


def abstract_state(
    params: Any, shardings: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(shapes of a state, its shardings), from what `param_shardings` gives; computes nothing."""
    placed = TrainState(
        NamedSharding(mesh, PartitionSpec()), shardings, opt_shardings(tx, params, shardings, mesh)
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, jax.eval_shape(functools.partial(init_opt, tx), params))
    return abstract(state, placed), placed


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a state or a part of it: what a restore has to produce."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def digest(tree: Any) -> str:
    """Hash (16 hex digits) of the names and values of all arrays of a tree, wherever they lie."""
    total = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        total.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        for start, shape in _parts(x.shape, x.dtype.itemsize):
            # Compiled once for a shape; x[start:stop] would be anew for every start.
            part = x if shape == x.shape else jax.lax.dynamic_slice(x, start, shape)
            values = np.ascontiguousarray(weights.whole(part))
            total.update(values.reshape(-1).view(np.uint8).data)
            del part, values  # before the next one is made
    return total.hexdigest()[:16]


def _parts(shape: tuple[int, ...], item: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of the blocks that make up an array, in the order of its values.

    A large array is never gathered as a whole: a block has at most `_GATHERED_BYTES`, at `item` a
    value, or is one row of the last axis.
    """
    if math.prod(shape) * item <= _GATHERED_BYTES or len(shape) < 2:
        yield (0,) * len(shape), shape
        return
    row = math.prod(shape[1:]) * item
    rows = max(1, _GATHERED_BYTES // row)
    for first in range(0, shape[0], rows):
        for start, size in _parts(shape[1:], item):  # one, if whole rows fit
            yield (first, *start), (min(rows, shape[0] - first), *size)
