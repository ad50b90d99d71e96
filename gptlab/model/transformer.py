"""One decoder-only transformer for the GPT-2 and the Llama/Qwen families.

Functional linen: parameters are a plain tree of float32 arrays, layers are stacked on a leading L
and scanned. `Block` is the only layer there is: training runs it under `nn.scan`, decoding runs the
same class layer by layer with a KV cache (model/decode.py).

Dimensions: B batch, T tokens, D model, H heads, K head dim, F ff, V vocabulary, L layers, S slots.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from gptlab.model import attention as attn
from gptlab.model import kernels, vocabulary
from gptlab.model.product import product
from gptlab.model.sharding import constrain
from gptlab.model.vocabulary import TokenStats
from gptlab.run.errors import UserError

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "position": ("learned", "rope"),
    "activation": ("gelu_tanh", "gelu", "swiglu"),
    "qk_norm": ("none", "before_rope", "after_rope"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "full", "dots", "minimal", "offload"),
    "attention": ("xla", "splash", "cudnn"),
}
# What two of the policies keep of a layer: what attention reads and what it gives. Its weights, its
# output projection and the feed-forward layer are computed again.
_ATTENTION = ("query", "key", "value", "attended")
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name: policies that look for products don't see into those with a gradient of their own.
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
    "minimal": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=_ATTENTION,
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
INIT_STD = 0.02  # GPT-2: embeddings and linears; residual projections are divided by sqrt(2L)
POSITION_STD = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines the network; hashable, so it can be static under jit."""

    # Architecture: what the parameters mean.
    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_len: int  # the context window; learned positions have this many rows
    norm: str  # layernorm | rmsnorm
    norm_eps: float
    position: str  # learned | rope
    rope_theta: float
    activation: str  # gelu_tanh | gelu | swiglu
    use_bias: bool  # of linears and norms, except the query, key and value projections
    qkv_bias: bool
    tie_embeddings: bool
    qk_norm: str  # none | before_rope (Qwen3) | after_rope (nanochat)
    # Of a stretched window (Llama 3.1 and later). Configs from before this key was there lack it.
    rope_scaling: attn.RopeScaling | None = None
    # Compute: how it is evaluated.
    dtype: str
    # none | full (keep nothing) | dots (the products of weights) | minimal (what attention reads
    # and gives) | offload (that, in the host's memory)
    remat: str
    unroll: int  # layers per iteration of the scan
    dropout: float  # of embeddings and of each residual branch
    attention: str  # xla | splash (TPU) | cudnn (GPU); when training: decoding is always xla
    loss_chunk: int = 0  # rows of the vocabulary that a device's loss takes at once; 0: all

    @classmethod
    def build(cls, architecture: Mapping[str, Any], compute: Mapping[str, Any]) -> "ModelConfig":
        """Puts the two config subtrees together.

        Raises:
            UserError: a key is unknown or missing, or a value is not one of the choices.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        names = {
            "model": fields[: fields.index("dtype")],
            "compute": fields[fields.index("dtype") :],
        }
        for part, given in (("model", architecture), ("compute", compute)):
            for key in given:
                if key not in names[part]:
                    near = difflib.get_close_matches(key, names[part], 1)
                    hint = f"; did you mean {near[0]!r}?" if near else f": one of {names[part]}"
                    raise UserError(f"unknown key config.{part}.{key}{hint}")
            missing = [n for n in names[part] if n not in given and n not in optional]
            if missing:
                raise UserError(f"config.{part} lacks {', '.join(missing)}")
        architecture = dict(architecture)
        if (scaling := architecture.get("rope_scaling")) is not None:
            architecture["rope_scaling"] = _rope_scaling(scaling)
        config = cls(**architecture, **dict(compute))
        config.check()
        return config

    def check(self) -> None:
        """Refuses values that no model can be built from, naming the key (UserError)."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {list(choices)}")
        positive = (
            "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff max_len unroll"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even with position='rope'")
        if self.loss_chunk < 0:
            raise UserError(f"loss_chunk={self.loss_chunk} must not be negative (0: all at once)")
        if self.rope_scaling is not None and self.position != "rope":
            raise UserError(f"rope_scaling needs position='rope', not {self.position!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def d_attn(self) -> int:
        """Width of all query heads together (H K; equals D in GPT-2 and Llama)."""
        return self.num_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key heads together."""
        return self.num_kv_heads * self.head_dim

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """(I, O) of each kernel of a layer, by its name."""
        d, a, kv, f = self.d_model, self.d_attn, self.d_kv, self.d_ff
        shapes = {"query": (d, a), "key": (d, kv), "value": (d, kv), "out": (a, d), "up": (d, f)}
        return shapes | ({"gate": (d, f)} if self.activation == "swiglu" else {}) | {"down": (f, d)}

    def num_params(self) -> int:
        """Exact number of parameters of either family: 124,439,808 for GPT-2 small."""
        d, f, a, kv = self.d_model, self.d_ff, self.d_attn, self.d_kv
        norm = d * (2 if self.norm == "layernorm" and self.use_bias else 1)
        layer = sum(inputs * outputs for inputs, outputs in self.kernel_shapes().values())
        layer += (a + 2 * kv) * self.qkv_bias + d * self.use_bias
        if self.use_bias:
            layer += d + (2 * f if self.activation == "swiglu" else f)
        layer += 2 * norm + (2 * self.head_dim if self.qk_norm != "none" else 0)
        total = self.num_layers * layer + norm
        total += self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return total + (self.max_len * d if self.position == "learned" else 0)

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs (forward and backward) per token at length T: 6 N + 12 L (H K) T.

        N leaves position embeddings out; attention is counted in full, as if not causal (PaLM,
        arXiv 2204.02311, appendix B). 855,166,464 for GPT-2 small at T = 1,024.
        """
        positions = self.max_len * self.d_model if self.position == "learned" else 0
        params = self.num_params() - positions
        return 6 * params + 12 * self.num_layers * self.d_attn * seq_len


def _rope_scaling(given: Mapping[str, Any]) -> attn.RopeScaling:
    names = {f.name for f in dataclasses.fields(attn.RopeScaling)}
    if set(given) != names:
        raise UserError(
            f"config.model.rope_scaling has the keys {sorted(given)}; it needs {sorted(names)}"
        )
    scaling = attn.RopeScaling(**given)
    if not scaling.factor > 0 or not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"{scaling}: factor must be positive, low_freq_factor in (0, high_freq_factor)"
        )
    return scaling


class Dense(nn.Module):
    """x [..., I] @ kernel [I, O] (+ bias [O]).

    The one dense layer: it declares its kernel in full with logical axes. (nn.DenseGeneral flattens
    its kernel first, which breaks logical partitioning under `jax.set_mesh`.)
    """

    features: int
    axes: tuple[str | None, str | None]
    std: float
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., I] -> [..., O] in `dtype`."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(self.dtype)
        y = product(x, kernel.astype(self.dtype), self.dtype)
        if self.has_variable("params", "lora_a"):  # put there by model/lora.py
            y += self._adapter(x)
        y = checkpoint_name(y, "product")
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y += _last(bias.astype(self.dtype), y)
        return y

    def _adapter(self, x: jax.Array) -> jax.Array:
        """(alpha / r) (x A) B."""
        a, b, scale = (
            self.get_variable("params", name).astype(self.dtype)
            for name in ("lora_a", "lora_b", "lora_scale")
        )
        narrow = checkpoint_name(product(x, a, self.dtype), "product")  # [..., r]
        # By rank over `tensor`, or each of its devices would do all of this.
        narrow = constrain(narrow, "batch", "length", "act_rank")
        if self.axes[1] == "embed":  # nor is B split over `tensor` then: by rank, as `narrow` is
            b = constrain(b, "act_rank", "act_embed")
        return scale * product(narrow, b, self.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32 whatever the compute dtype."""

    kind: str
    eps: float
    use_bias: bool
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in x's dtype."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * _last(scale, y)
        if self.kind == "layernorm" and self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
            y = y + _last(self.param("bias", zeros, (x.shape[-1],), jnp.float32), y)
        return y.astype(x.dtype)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """[D] -> [1, ..., D] with as many axes as `like`: no implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Attention(nn.Module):
    """Causal self-attention, over this row or over a KV cache."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, mask, rope, cache=None, start=None, row=None):
        """x [B, T, D], mask bool [B or 1, T, S] -> ([B, T, D], cache with T more slots filled).

        Without a cache, the mask is what `attention.visibility` gives; with one it may be a Reach.
        """
        c = self.config
        q = self._heads(x, "query", c.num_heads, "heads")  # [B, T, H, K]
        k = self._heads(x, "key", c.num_kv_heads, "kv_heads")  # [B, T, Hkv, K]
        v = self._heads(x, "value", c.num_kv_heads, "kv_heads")
        if c.qk_norm == "before_rope":
            q, k = self._normalize(q, k)
        if c.position == "rope":
            q, k = attn.apply_rope(q, rope), attn.apply_rope(k, rope)
        if c.qk_norm == "after_rope":
            q, k = self._normalize(q, k)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, Hkv, T, K]
        if cache is not None:
            cache = attn.write_cache(cache, k, v, start, row)
        q = constrain(q, "batch", "length", "act_heads", None)
        if isinstance(mask, attn.Reach):
            out = attn.blockwise_attention(q, cache, mask, row)
        else:
            if cache is not None:
                k, v = attn.read_cache(cache, row)
            keys = "kv_length" if mask.ndim == 3 else "length"
            k = constrain(k, "batch", "act_heads", keys, None)
            v = constrain(v, "batch", "act_heads", keys, None)
            q, k, v = map(checkpoint_name, (q, k, v), _ATTENTION[:3])
            out = attn.self_attention(q, k, v, mask, c.attention)  # [B, T, H, K]
            out = checkpoint_name(out, _ATTENTION[3])
        out = out.reshape(*x.shape[:2], c.d_attn)
        std = INIT_STD * (2 * c.num_layers) ** -0.5
        out = Dense(c.d_model, ("heads", "embed"), std, c.use_bias, c.dtype, name="out")(out)
        return out, cache

    def _normalize(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        eps = self.config.norm_eps
        query_norm = Norm("rmsnorm", eps, False, None, name="query_norm")
        return query_norm(q), Norm("rmsnorm", eps, False, None, name="key_norm")(k)

    def _heads(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        c = self.config
        y = Dense(heads * c.head_dim, ("embed", axis), INIT_STD, c.qkv_bias, c.dtype, name=name)(x)
        return y.reshape(*x.shape[:2], heads, c.head_dim)


class FeedForward(nn.Module):
    """GELU or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        hidden = Dense(c.d_ff, ("embed", "ff"), INIT_STD, c.use_bias, c.dtype, name="up")(x)
        hidden = constrain(hidden, "batch", "length", "act_ff")  # [B, T, F]
        if c.activation == "swiglu":
            gate = Dense(c.d_ff, ("embed", "ff"), INIT_STD, c.use_bias, c.dtype, name="gate")(x)
            hidden = nn.silu(constrain(gate, "batch", "length", "act_ff")) * hidden
        else:
            hidden = nn.gelu(hidden, approximate=c.activation == "gelu_tanh")
        std = INIT_STD * (2 * c.num_layers) ** -0.5
        return Dense(c.d_model, ("ff", "embed"), std, c.use_bias, c.dtype, name="down")(hidden)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: ModelConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, mask, rope, cache=None, start=None, row=None):
        """x [B, T, D] -> (x, cache). Cache: (k, v), each [B, Hkv, S, K], or None when training."""
        c = self.config
        branch = Norm(c.norm, c.norm_eps, c.use_bias, name="attention_norm")(x)
        branch, cache = Attention(c, name="attention")(branch, mask, rope, cache, start, row)
        x = x + self._dropout(branch)
        x = constrain(x, "batch", "length", "act_embed")
        branch = Norm(c.norm, c.norm_eps, c.use_bias, name="feed_forward_norm")(x)
        x = x + self._dropout(FeedForward(c, name="feed_forward")(branch))
        return constrain(x, "batch", "length", "act_embed"), cache

    def _dropout(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)


class Backbone(nn.Module):
    """Embeddings, layers and the final norm; with `unembed`, also the way back to logits."""

    config: ModelConfig
    unembed: bool = True

    def setup(self) -> None:
        """Declares embeddings and norm; the layers are declared by `__call__`."""
        c = self.config
        table = nn.with_logical_partitioning(nn.initializers.normal(INIT_STD), ("vocab", "embed"))
        self.embedding = self.param("embedding", table, (c.vocab_size, c.d_model), jnp.float32)
        if c.position == "learned":
            init = nn.initializers.normal(POSITION_STD)
            init = nn.with_logical_partitioning(init, (None, "embed"))
            self.positions = self.param("positions", init, (c.max_len, c.d_model), jnp.float32)
        if self.unembed and not c.tie_embeddings:
            self.unembedding = self.param(
                "unembedding", table, (c.vocab_size, c.d_model), jnp.float32
            )
        self.final_norm = Norm(c.norm, c.norm_eps, c.use_bias)

    @nn.compact
    def __call__(self, tokens, positions=None, segment_ids=None, deterministic=True) -> jax.Array:
        """Tokens int32 [B, T] -> the final norm's output [B, T, D]."""
        batch, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        x, rope = self.embed(tokens, positions)
        x = nn.Dropout(self.config.dropout, deterministic=deterministic)(x)
        mask = self._visibility(segment_ids, x)
        x, _ = self._layers(deterministic)(x, mask, rope)
        return self.final_norm(x)

    def _visibility(self, segment_ids: jax.Array | None, x: jax.Array) -> jax.Array:
        """What the layers' attention is given, in a form that suits its implementation."""
        c = self.config
        made = c.attention  # parameters are made by a call with one token, which needs no kernel
        if made in kernels.PLATFORMS:
            length = None if self.is_initializing() else x.shape[1]
            kernels.check(made, c.dtype, c.head_dim, length)
            made = "xla" if length is None else made
        return attn.visibility(segment_ids, x, made)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        """Int32 [B, T] twice -> what the first layer reads: x [B, T, D] and RoPE tables or None."""
        c = self.config
        if tokens.shape[1] > c.max_len:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the context window: {c.max_len=}")
        table = constrain(self.embedding.astype(c.dtype), "vocab", None)
        x = jnp.take(table, tokens, axis=0)
        rope = None
        if c.position == "learned":
            x = x + jnp.take(self.positions.astype(c.dtype), positions, axis=0)
        else:
            rope = attn.rope_tables(positions, c.max_len, c.head_dim, c.rope_theta, c.rope_scaling)
        return constrain(x, "batch", "length", "act_embed"), rope

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-norm output [B, T, D] -> float32 [B, T, V]."""
        c = self.config
        logits = product(hidden.astype(c.dtype), self.table().astype(c.dtype).T, "float32")
        return constrain(logits, "batch", "length", "act_vocab")

    def table(self) -> jax.Array:
        """The unembedding, float32 [V, D]."""
        return self.embedding if self.config.tie_embeddings else self.unembedding

    def normalize(self, x: jax.Array) -> jax.Array:
        """The final norm: output of the last layer [B, T, D] -> [B, T, D]."""
        return self.final_norm(x)

    def _layers(self, deterministic: bool) -> nn.Module:
        c = self.config
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(c, deterministic, name="layers")


class LanguageModel(nn.Module):
    """Next-token logits. `init` gives {'backbone': ...} boxed in logical axes (see sharding.py)."""

    config: ModelConfig

    def setup(self) -> None:
        """The backbone is all there is."""
        self.backbone = Backbone(self.config)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of the token that follows each token.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], from 0 in each segment; None: 0..T-1 in each row.
            segment_ids: int32 [B, T], 0 on padding; None: every row is one unpadded segment.
            deterministic: True switches dropout off; False needs the rng collection 'dropout'.

        Returns:
            float32 [B, T, V].

        Raises:
            UserError: T exceeds max_len.
        """
        return self.logits(self.hidden(tokens, positions, segment_ids, deterministic))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """As `__call__`, before the unembedding: [B, T, D] in the compute dtype."""
        return self.backbone(tokens, positions, segment_ids, deterministic)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Unembedding: [B, T, D] -> float32 [B, T, V]."""
        return self.backbone.logits(hidden)

    def score(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> TokenStats:
        """What the model says of `targets` int32 [B, T], the next ones; else as `__call__`.

        With config.loss_chunk, float32 [B, T, V] never exists.
        """
        return self.token_stats(self.hidden(tokens, positions, segment_ids, deterministic), targets)

    def token_stats(
        self, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0
    ) -> TokenStats:
        """The same from `hidden` [B, T, D], of softmax(logits / temperature)."""
        c = self.config
        if not c.loss_chunk:
            return vocabulary.of_logits(self.logits(hidden) / temperature, targets)
        table, hidden = self.backbone.table(), hidden.astype(c.dtype)
        return vocabulary.of_hidden(hidden, table, targets, c.loss_chunk, temperature)


def score_batch(
    model: LanguageModel, params: Any, batch: Any, dropout_key: jax.Array | None = None
) -> TokenStats:
    """`LanguageModel.score` of a packed batch's targets; the model's dropout is on with a key."""
    stats: Any = model.apply(
        {"params": params},
        batch.tokens,
        batch.targets,
        batch.positions,
        batch.segment_ids,
        deterministic=dropout_key is None or model.config.dropout == 0,
        rngs={} if dropout_key is None else {"dropout": dropout_key},
        method=model.score,
    )
    return stats


def init_params(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Float32 parameters still boxed in their logical axes; `nn.unbox` inside jit gives arrays."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def logical_axes(config: ModelConfig) -> Mapping[tuple[str, ...], tuple[str | None, ...]]:
    """The axes of each of a backbone's parameters by its path; of a layer's, its path in the layer.

    Also those of adapters (model/lora.py), beside whichever kernel they may be.
    """
    make = functools.partial(init_params, LanguageModel(config))
    boxed = flatten_dict(jax.eval_shape(make, jax.random.key(0))["backbone"])
    axes: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    for path, box in boxed.items():
        names = box.names
        if path[0] == "layers":
            path, names = path[1:], names[1:]
        axes[path] = names
        if path[-1] == "kernel":
            axes[*path[:-1], "lora_a"] = (names[0], None)
            axes[*path[:-1], "lora_b"] = (None, names[1])
    return axes
