"""Where every array lives: one table from logical axes to the five mesh axes.

A parameter or an activation names its dimensions logically (`embed`, `heads`, `batch`); RULES alone
says which mesh axes those are split over. Mesh axes, outermost first: `replica` (slices joined by
slow network), `data`, `fsdp` (parameters split, gathered when used), `context` (the sequence) and
`tensor` (heads, ff and vocabulary; innermost, fastest links). An axis of size 1 changes nothing, so
one device and a pod run the same program.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.run.errors import UserError

MESH_AXES = ("replica", "data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Names starting with `act_` are activations.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "batch": ("replica", "data", "fsdp"),
    "length": "context",
    # A step of decoding has no sequence to split: its rows are, over `context` too.
    "decoding_batch": ("replica", "data", "fsdp", "context"),
    "kv_length": None,  # keys and values are gathered over `context` before attention
    "act_embed": None,
    "act_heads": "tensor",
    "act_ff": "tensor",
    "act_vocab": "tensor",
    "act_rank": "tensor",
}

# Sizes that a user may change freely (one row of chat on an eight-device mesh, an adapter's rank):
# split over as many of their mesh axes, the outermost first, as divide them. A *training* batch
# that is not divisible is refused by train.mesh.
_FLEXIBLE = frozenset({"batch", "decoding_batch", "length", "act_rank"})
# What the layers' names of dimensions stand for while `decoding`.
_WHILE_DECODING: Mapping[str, str | None] = {"batch": "decoding_batch", "length": None}
_decoding = contextvars.ContextVar("decoding", default=False)


def partition_spec(axes: tuple[str | None, ...], mesh_axes: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of an array with logical `axes` (None: never split) on such a mesh."""
    entries: list[Any] = []
    for axis in axes:
        target = () if axis is None else RULES[axis]
        target = (target,) if isinstance(target, str) else (target or ())
        kept = tuple(name for name in target if name in mesh_axes)
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*entries)


def _ways(entry: Any, sizes: Mapping[str, int]) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    product = 1
    for name in names:
        product *= sizes[name]
    return product


def _checked_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: Mapping[str, int], what: str
) -> PartitionSpec:
    """The spec, with flexible dimensions that do not divide left whole and others refused."""
    entries = list(partition_spec(axes, tuple(sizes)))
    for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        while axis in _FLEXIBLE and size % _ways(entries[i], sizes):
            entries[i] = entries[i][:-1] if isinstance(entries[i], tuple) else None
        ways = _ways(entries[i], sizes)
        if size % ways == 0:
            continue
        raise UserError(
            f"{what}: dimension {axis!r} of size {size} is not divisible by mesh axis "
            f"{entries[i]!r} of size {ways}; change the mesh or the model's shape"
        )
    return PartitionSpec(*entries)


def mesh_sizes() -> dict[str, int]:
    """Size of each axis of the mesh in use (`jax.set_mesh`); empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def platform() -> str:
    """What compiles and runs this: 'cpu', 'gpu' or 'tpu', of the mesh in use or else of JAX."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def splits(x: jax.Array) -> bool:
    """Whether x is to be split: there is a mesh of several devices, and we are inside jit.

    Outside, arrays already live somewhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and isinstance(x, jax.core.Tracer)


def activation_spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """How RULES splits an activation over the mesh in use; rows that do not divide stay whole.

    Raises:
        UserError: heads, ff or vocabulary are not divisible by the tensor axis.
    """
    if _decoding.get():
        axes = tuple(axis and _WHILE_DECODING.get(axis, axis) for axis in axes)
    return _checked_spec(shape, axes, mesh_sizes(), "activation")


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """What is traced within decodes: the layers' activations lie as RULES says for that.

    To be entered by the decoding function itself, or a jitted one could be traced without it.
    """
    token = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Splits an activation as RULES says over the mesh in use (`jax.set_mesh`).

    Without a mesh, and outside jit (where arrays already live somewhere), it does nothing.

    Raises:
        UserError: heads, ff or vocabulary are not divisible by the tensor axis.
    """
    if not splits(x):
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes))


def logical_to_sharding(mesh: Mesh, abstract_tree: Any) -> Any:
    """NamedShardings for any tree of boxed arrays: parameters, or a whole train state.

    Args:
        mesh: the mesh.
        abstract_tree: `jax.eval_shape` of an init function whose parameters are still boxed in
            their logical axes (what `LanguageModel.init` returns, and what optax makes of it).
            Leaves without a box, such as step counters, are replicated.

    Returns:
        A tree of NamedSharding with the structure of the *unboxed* tree.

    Raises:
        UserError: a dimension is not divisible by its mesh axis; the parameter is named.
    """
    sizes = dict(mesh.shape)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        name = "parameter " + jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _checked_spec(leaf.value.shape, leaf.names, sizes, name))

    return jax.tree_util.tree_map_with_path(
        sharding, abstract_tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def batch_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of an array of a batch; dimensions after its logical `axes` are never split."""
    axes = (*axes, *[None] * len(shape))[: len(shape)]
    return _checked_spec(shape, axes, dict(mesh.shape), "batch")


def split_rows(x: jax.Array) -> jax.Array:
    """Constrains x [B, ...] to lie as a batch does: its rows over the data axes."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))
