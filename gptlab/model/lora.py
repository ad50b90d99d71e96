"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a few weights learn, the rest stand.

    y = x W + (alpha / r) (x A) B        W [I, O] frozen, A [I, r] random, B [r, O] zero at first

Adapters lie beside the kernel that they adapt, in the one tree of parameters: `lora_a`, `lora_b`
and `lora_scale`, which is alpha / r. What is trained follows from the tree alone (`split`), and
every function of parameters takes it with adapters or without. Two functions of the adapted model
need no copy of it: `off` is the model as it was before training, which is how a policy and its
reference share one frozen base, and `merge` is the model after it, as an ordinary tree. With
frozen_dtype='bfloat16' whoever shares a base reads its rounded matrices: PPO's reference and reward
model too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.model.transformer import ModelConfig
from gptlab.run import program
from gptlab.run.errors import UserError

FROZEN_DTYPES = ("float32", "bfloat16")
_A, _B, _SCALE = "lora_a", "lora_b", "lora_scale"
_HEAD = "head"  # of a scalar model: fresh as a rule, so it is trained as a whole
Flat = dict[tuple[str, ...], Any]


def check(config: ConfigDict, model: ModelConfig) -> None:
    """UserError for a `config.lora` (rank, alpha, targets, frozen_dtype) without meaning.

    With rank 0, also for keys given on the command line that then nobody reads; if the rank is
    given there too, it is meant.
    """
    given = [key for key in program.given_keys() if key.startswith("lora.")]
    if not config.rank and given and "lora.rank" not in given:
        raise UserError(
            f"--config.{given[0]} means nothing while config.lora.rank is 0 (no LoRA): give "
            "--config.lora.rank=16, say, too"
        )
    if config.rank < 0 or not config.alpha > 0:
        raise UserError(
            f"config.lora.rank={config.rank} must not be negative (0: no LoRA) and "
            f"config.lora.alpha={config.alpha} must be positive"
        )
    known = list(model.kernel_shapes())
    if unknown := [name for name in config.targets if name not in known]:
        raise UserError(f"config.lora.targets: this model has no {unknown[0]!r}, only {known}")
    if not config.targets or config.frozen_dtype not in FROZEN_DTYPES:
        raise UserError(
            f"config.lora.targets={tuple(config.targets)} must name some of {known}, and "
            f"config.lora.frozen_dtype={config.frozen_dtype!r} be one of {FROZEN_DTYPES}"
        )


def num_params(config: ConfigDict, model: ModelConfig) -> int:
    """Parameters of the adapters: r (I + O) for each kernel."""
    sides = model.kernel_shapes()
    return model.num_layers * config.rank * sum(sum(sides[name]) for name in config.targets)


def flops_per_token(config: ConfigDict, model: ModelConfig, seq_len: int) -> int:
    """Of training, as ModelConfig.flops_per_token: 4 instead of 6 for a parameter that stands."""
    whole = model.flops_per_token(seq_len)
    if not config.rank:
        return whole
    attention = 12 * model.num_layers * model.d_attn * seq_len
    return whole - (whole - attention) // 3 + 6 * num_params(config, model)


def add(params: Any, config: ConfigDict, key: jax.Array) -> Any:
    """Parameters with fresh adapters, which change nothing yet; with rank 0 as they are.

    Args:
      params: of any of our models, on a mesh. A tensor and its copy in frozen_dtype are both there
        until the caller lets the tensor go.
      config: `config.lora`.
      key: of the random A ~ N(0, 1/I).
    """
    if not config.rank:
        return params
    extended = extend(params, jax.tree.map(lambda x: x.sharding, params), config)
    abstract, shardings = (flatten_dict(tree) for tree in extended)
    old = flatten_dict(params)
    fresh = [path for path in abstract if path not in old]

    def create(key: jax.Array) -> Flat:
        keys = jax.random.split(key, len(fresh))
        return {p: _value(p, abstract[p], k, config) for p, k in zip(fresh, keys, strict=True)}

    cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)
    kept: Flat = {
        path: x if x.dtype == abstract[path].dtype else cast(x, config.frozen_dtype)
        for path, x in old.items()
    }
    made = jax.jit(create, out_shardings={path: shardings[path] for path in fresh})(key)
    return unflatten_dict(kept | made)


def _value(path: tuple[str, ...], x: Any, key: jax.Array, config: ConfigDict) -> jax.Array:
    if path[-1] == _A:
        return jax.random.normal(key, x.shape, x.dtype) * x.shape[-2] ** -0.5
    return jnp.full(x.shape, config.alpha / config.rank if path[-1] == _SCALE else 0.0, x.dtype)


def extend(params: Any, shardings: Any, config: ConfigDict) -> tuple[Any, Any]:
    """(shapes and dtypes, shardings) of `add`'s result; `params` need have no more than these.

    A is split as the kernel's inputs are and B as its outputs: the adapter's product needs the
    collectives that the kernel's needs.
    """
    if not config.rank:
        return params, shardings
    shapes: Flat = {}
    places: Flat = {}
    placed = flatten_dict(shardings)
    for path, x in flatten_dict(params).items():
        matrix = x.ndim - ("layers" in path) >= 2
        dtype = config.frozen_dtype if matrix and path[0] != _HEAD else x.dtype
        shapes[path], places[path] = jax.ShapeDtypeStruct(x.shape, dtype), placed[path]
        if path[-1] != "kernel" or path[-2] not in config.targets:
            continue
        *front, inputs, outputs = x.shape
        spec = tuple(placed[path].spec) + (None,) * (x.ndim - len(placed[path].spec))
        for name, shape, entries in (
            (_A, (*front, inputs, config.rank), (*spec[:-1], None)),
            (_B, (*front, config.rank, outputs), (*spec[:-2], None, spec[-1])),
            (_SCALE, tuple(front), spec[:-2]),
        ):
            beside = (*path[:-1], name)
            shapes[beside] = jax.ShapeDtypeStruct(shape, jnp.float32)
            places[beside] = NamedSharding(placed[path].mesh, PartitionSpec(*entries))
    return unflatten_dict(shapes), unflatten_dict(places)


def split(params: Any) -> tuple[Any, Any]:
    """(what is trained, what stands): adapters and a scalar model's head, and the rest.

    Without adapters, all and nothing.
    """
    if not adapted(params):
        return params, {}
    flat = flatten_dict(params)
    trained = {p: x for p, x in flat.items() if p[-1] in (_A, _B) or p[0] == _HEAD}
    return unflatten_dict(trained), unflatten_dict({p: flat[p] for p in flat.keys() - trained})


def join(trained: Any, frozen: Any) -> Any:
    """What was split."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def adapted(params: Any) -> bool:
    """Whether a tree, of any kind, holds adapters."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return any(path and getattr(path[-1], "key", None) == _SCALE for path in paths)


def off(params: Any) -> Any:
    """The same arrays with every adapter's scale 0: what the model was before its adapters learnt.

    The tree keeps its structure, so it runs through the same executable, and the same parameters
    give the same numbers bit for bit.
    """
    flat = flatten_dict(params)
    zeros = {path: jnp.zeros_like(x) for path, x in flat.items() if path[-1] == _SCALE}
    return unflatten_dict(flat | zeros)


def merge(params: Any) -> Any:
    """W + (alpha / r) A B in place of W and its adapters: an ordinary tree, in float32."""
    if not adapted(params):
        return params
    flat = flatten_dict(params)
    merged: Flat = {}
    for path, x in flat.items():
        if path[-1] in (_A, _B, _SCALE):
            continue
        beside = {name: flat.get((*path[:-1], name)) for name in (_A, _B, _SCALE)}
        if path[-1] == "kernel" and beside[_SCALE] is not None:
            whole = jax.jit(_merged, out_shardings=x.sharding)
            merged[path] = whole(x, beside[_A], beside[_B], beside[_SCALE])
        else:
            merged[path] = x.astype(jnp.float32)
    return unflatten_dict(merged)


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    whole = jnp.matmul(a, b, precision="highest") * scale[..., None, None]
    return kernel.astype(jnp.float32) + whole
