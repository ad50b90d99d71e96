"""GGUF files, llama.cpp's format: metadata, a tokenizer and tensors, quantised or not, in one file.

The metadata are translated to what a config.json of Hugging Face would say, and judged there. What
`gguf.quants` dequantises can be read (F32, F16, BF16, Q8_0, Q4_0, Q4_1 among others).

llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head, Hugging Face and we the halves' pairs
(i, i + K/2): in files of architecture 'llama' the rows of the query and key projections are
reordered for that, which is undone here.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.model.attention import RopeScaling, rope_frequencies
from gptlab.model.hf_config import architecture
from gptlab.model.weights import Pretrained, Tensor, Weight
from gptlab.run.errors import UserError

_ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"  # how Llama 3's stretched window is kept
# What the metadata are called in config.json: those of every architecture, then of one kind.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
# Checked or of no meaning here.
_OTHER_KEYS = (
    "attention.value_length",
    "attention.causal",
    "rope.dimension_count",
    "rope.scaling.type",
)

_LAYER = {
    "attention_norm/scale": Weight("attn_norm.weight"),
    "attention_norm/bias": Weight("attn_norm.bias"),
    "feed_forward_norm/scale": Weight("ffn_norm.weight"),
    "feed_forward_norm/bias": Weight("ffn_norm.bias"),
    "attention/out/kernel": Weight("attn_output.weight", transposed=True),
    "attention/out/bias": Weight("attn_output.bias"),
    "attention/query_norm/scale": Weight("attn_q_norm.weight"),
    "attention/key_norm/scale": Weight("attn_k_norm.weight"),
    "feed_forward/gate/kernel": Weight("ffn_gate.weight", transposed=True),
    "feed_forward/up/kernel": Weight("ffn_up.weight", transposed=True),
    "feed_forward/up/bias": Weight("ffn_up.bias"),
    "feed_forward/down/kernel": Weight("ffn_down.weight", transposed=True),
    "feed_forward/down/bias": Weight("ffn_down.bias"),
}
_REST = {
    "backbone/embedding": Weight("token_embd.weight"),
    "backbone/positions": Weight("position_embd.weight"),
    "backbone/final_norm/scale": Weight("output_norm.weight"),
    "backbone/final_norm/bias": Weight("output_norm.bias"),
    "backbone/unembedding": Weight("output.weight"),
}


def weights(is_gpt2: bool) -> dict[str, Weight]:
    """Where llama.cpp keeps each parameter; GPT-2's query, key and value are one tensor."""
    layer = dict(_LAYER)
    for part, name in enumerate(("query", "key", "value")):
        stored, which = ("attn_qkv", (part, 3)) if is_gpt2 else (f"attn_{name[0]}", (0, 1))
        layer[f"attention/{name}/kernel"] = Weight(f"{stored}.weight", True, *which)
        layer[f"attention/{name}/bias"] = Weight(f"{stored}.bias", False, *which)
    layers = {
        f"backbone/layers/{name}": dataclasses.replace(weight, name=f"blk.{{layer}}.{weight.name}")
        for name, weight in layer.items()
    }
    return _REST | layers


def open_file(path: str | os.PathLike[str], max_len: int | None) -> Pretrained:
    """A .gguf file, looked at but not read yet.

    Args:
        path: of a file that holds the whole model.
        max_len: the window to use; None takes the file's.

    Raises:
        UserError: it is damaged, or of a network that is not ours.
    """
    library = _library()
    source = str(path)
    try:
        reader = library.GGUFReader(path)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{source} is no GGUF file, or not all of it: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors: dict[str, Tensor] = {
        t.name: GGUFTensor(
            source, t.name, int(t.tensor_type), tuple(int(n) for n in reversed(t.shape)),
            t.data_offset, tuple(t.data.shape), t.data.dtype.str,
        )
        for t in reader.tensors
    }  # fmt: skip
    config = _config_json(fields, tensors, source)
    model = architecture(config, source, max_len)
    for name in ("attention.value_length", "rope.dimension_count"):
        name = f"{fields['general.architecture']}.{name}"
        if fields.get(name, model["head_dim"]) != model["head_dim"]:
            raise UserError(f"{source}: {name}={fields[name]}, and head_dim is {model['head_dim']}")
    if fields["general.architecture"] == "llama":
        for name, tensor in tensors.items():
            if name.endswith((".attn_q.weight", ".attn_k.weight")):
                tensors[name] = HalvesTensor(tensor, model["head_dim"])
    return Pretrained(
        architecture=model,
        is_reward=False,
        weights=weights(config["model_type"] == "gpt2"),
        tensors=tensors,
        files=[source],
        tokenizer=lambda: _tokenizer(fields),
    )


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file; a model.weights.Tensor.

    Its bytes are read, not mapped: pages of a mapped file would count as the process's memory.
    """

    path: str
    name: str
    kind: int  # GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    stored_shape: tuple[int, ...]  # of what is in the file: rows are whole blocks of bytes
    stored_dtype: str

    def check(self) -> None:
        """UserError if it is quantised in a way that the gguf package can't undo."""
        try:
            self.read(0, 1)
        except NotImplementedError:
            name = _library().GGMLQuantizationType(self.kind).name
            raise UserError(
                f"{self.path}: {self.name} is quantised as {name}, which the gguf package does not "
                "undo; take a file of another quantisation, Q8_0 say"
            ) from None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 as float32."""
        library, dtype = _library(), np.dtype(self.stored_dtype)
        row = int(np.prod(self.stored_shape[1:], dtype=np.int64))
        offset = self.offset + start * row * dtype.itemsize
        stored = np.fromfile(self.path, dtype, (stop - start) * row, offset=offset)
        stored = stored.reshape(stop - start, *self.stored_shape[1:])
        kind = library.GGMLQuantizationType(self.kind)
        return np.asarray(library.quants.dequantize(stored, kind), np.float32)


@dataclasses.dataclass(frozen=True)
class HalvesTensor:
    """Rows of heads [H K, D] stored as (pair, half), read as (half, pair)."""

    stored: Tensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.shape

    def check(self) -> None:
        """As what is stored."""
        self.stored.check()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 as float32; whole heads are read for them."""
        k = self.head_dim
        first, last = start // k * k, -(-stop // k) * k
        rows = self.stored.read(first, last)
        heads = rows.reshape(-1, k // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
        return heads.reshape(rows.shape)[start - first : stop - first]


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "reading GGUF needs the package gguf: pip install 'gptlab[convert]'"
        ) from error
    return gguf


def _config_json(
    fields: Mapping[str, Any], tensors: dict[str, Tensor], source: str
) -> dict[str, Any]:
    """What a config.json would say. Takes the factors of RoPE out of the tensors."""
    family = fields.get("general.architecture")
    if family not in _ARCHITECTURES:
        raise UserError(f"{source}: architecture {family!r} is none of {list(_ARCHITECTURES)}")
    given = {
        name.removeprefix(f"{family}."): value
        for name, value in fields.items()
        if name.startswith(f"{family}.")
    }
    names = _GPT2_KEYS if family == "gpt2" else _KEYS
    for name, value in given.items():
        if name not in names and name not in _OTHER_KEYS:
            raise UserError(
                f"{source}: the key {family}.{name} (value {value!r}) is not known, and it may "
                "change what a model computes"
            )
        if isinstance(value, list):
            raise UserError(f"{source}: {family}.{name} differs from layer to layer")
    stated = {
        # Floats are float32 in the file: 1e-5 is what was meant by 9.999999747378752e-06.
        names[name]: float(str(np.float32(value))) if isinstance(value, float) else value
        for name, value in given.items()
        if name in names
    }
    table = tensors.get("token_embd.weight")
    stated.setdefault("vocab_size", table.shape[0] if table is not None else 0)
    stated["tie_word_embeddings"] = "output.weight" not in tensors
    stated["model_type"] = "mistral" if "sliding_window" in stated else family
    if not given.get("attention.causal", True):
        raise UserError(
            f"{source}: {family}.attention.causal is false: a model that reads in both directions, "
            "which gptlab does not compute"
        )
    if family == "gpt2":
        return stated
    if given.get("rope.scaling.type", "none") != "none":
        stated["rope_scaling"] = {"rope_type": given["rope.scaling.type"]}
    if (factors := tensors.pop(_ROPE_FACTORS, None)) is not None:
        values = factors.read(0, factors.shape[0])
        stated["rope_scaling"] = _stretching(values, stated.get("rope_theta", 1e4), source)
    return stated


def _stretching(factors: np.ndarray, theta: float, source: str) -> dict[str, Any]:
    """Llama 3's RoPE scaling, known by what it makes of each frequency."""
    scaling = RopeScaling(
        factor=float(np.max(factors)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_len=8192,
    )
    plain, stretched = (rope_frequencies(2 * len(factors), theta, s) for s in (None, scaling))
    if not np.allclose(np.asarray(plain / stretched), factors, rtol=1e-3):
        raise UserError(
            f"{source}: {_ROPE_FACTORS} stretches RoPE otherwise than Llama 3 (from a window of "
            "8,192 tokens), which gptlab does not compute"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_len,
    }


def _tokenizer(fields: Mapping[str, Any]) -> Mapping[str, bytes]:
    if "tokenizer.ggml.tokens" not in fields:
        return {}
    from gptlab.data import gguf_tokenizer

    return gguf_tokenizer.gguf_tokenizer_files(fields)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of a .gguf file, by its name."""
    return Path(path).suffix == ".gguf"
