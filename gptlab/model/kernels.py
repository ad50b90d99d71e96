"""Attention by the accelerators' own kernels: splash attention on TPUs, cuDNN's on GPUs.

Neither ever holds [T, T] scores, and both leave out what causality hides. Each runs on its device's
rows and heads (`jax.shard_map`); a sequence that is split over `context` is model/context.py's.
"""

import functools
from collections.abc import Callable

import jax

from gptlab.model import sharding
from gptlab.run.errors import UserError

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
SPLASH_BLOCKS = (1024, 512, 256, 128)  # 2,048 overflows the scoped VMEM of a v6e
CUDNN_HEAD_DIM = 128


def check(implementation: str, dtype: str, head_dim: int, length: int | None) -> None:
    """UserError unless this kernel can run here: before anything is compiled.

    Args:
        implementation: of PLATFORMS.
        dtype: of queries, keys and values.
        head_dim: K.
        length: T; None while the model is only made.
    """
    where = f"config.compute.attention={implementation!r}"
    platform, needed = sharding.platform(), PLATFORMS[implementation]
    if platform != needed:
        raise UserError(f"{where} runs on a {needed}, and this is a {platform}: set it to 'xla'")
    ways = sharding.mesh_sizes().get("context", 1)
    if ways > 1:
        raise UserError(
            f"{where} needs whole sequences, and config.mesh.context={ways} splits them: use "
            "attention='xla', or context=1"
        )
    if implementation == "splash" and length is not None and length % SPLASH_BLOCKS[-1]:
        raise UserError(
            f"{where} takes sequences of a multiple of {SPLASH_BLOCKS[-1]} tokens, not {length}: "
            "change the length (RL's is prompt and reply together), or use attention='xla'"
        )
    if implementation == "cudnn" and dtype == "float32":
        raise UserError(f"{where} needs config.compute.dtype='bfloat16' or 'float16'")
    if implementation == "cudnn" and (head_dim % 8 or head_dim > CUDNN_HEAD_DIM):
        raise UserError(
            f"{where} needs head_dim, here {head_dim}, to be a multiple of 8 and at most "
            f"{CUDNN_HEAD_DIM}: use attention='xla'"
        )


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, implementation: str
) -> jax.Array:
    """Each token attends to those before it and to itself, within its segment.

    Args:
        q: [B, T, H, K].
        k: [B, Hkv, T, K].
        v: [B, Hkv, T, K].
        segment_ids: int32 [B, T]. Padding (0) attends to padding, which nobody reads.
        implementation: of PLATFORMS; `check` has passed.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    local: Callable[..., jax.Array] = {"splash": splash, "cudnn": cudnn}[implementation]
    if not sharding.splits(q):
        return local(q, k, v, segment_ids)
    queries = sharding.activation_spec(q.shape, ("batch", None, "act_heads", None))
    keys = sharding.activation_spec(k.shape, ("batch", "act_heads", None, None))
    tokens = sharding.activation_spec(segment_ids.shape, ("batch", None))
    mapped = jax.shard_map(
        local, in_specs=(queries, keys, keys, tokens), out_specs=queries, check_vma=False
    )
    return mapped(q, k, v, segment_ids)


def splash_pairs(length: int) -> int:
    """Pairs of query and key that splash attention computes: those of blocks not wholly hidden."""
    block = _splash_block(length)
    blocks = length // block
    return blocks * (blocks + 1) // 2 * block**2


def _splash_block(length: int) -> int:
    # `check` refuses lengths that the smallest does not divide.
    return next((size for size in SPLASH_BLOCKS if length % size == 0), SPLASH_BLOCKS[-1])


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """jax.experimental's splash attention of one device's rows and heads; as `attention`."""
    # Not above: Pallas takes 0.2 s to import, which the terminal chat, say, has no use for.
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, head_dim = q.shape[1:]
    block = _splash_block(length)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([causal] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = q.swapaxes(1, 2) * head_dim**-0.5  # [B, H, T, K]
    segments = splash_attention.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """cuDNN's flash attention of one device's rows and heads; as `attention`.

    It knows no segments: they go in as a mask bool [B, 1, T, T], one for all heads.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=same)
