"""Architectures by name. A preset is a plain dict: override any field, then `ModelConfig.build`.

Sources: GPT-2 (Radford et al. 2019, table 2), GPT-3 (arXiv 2005.14165, table 2.1, with heads that
fill the width), Llama 3 (arXiv 2407.21783, table 3), Mistral 7B (arXiv 2310.06825), Qwen2 (arXiv
2407.10671), SmolLM2 (arXiv 2502.02737), Qwen3 (arXiv 2505.09388) and what their published
config.json say; nanoGPT's README for the CPU recipe.
"""

from collections.abc import Mapping
from typing import Any


def _gpt2(num_layers: int, d_model: int, num_heads: int, **overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": d_model // num_heads,
        "d_ff": 4 * d_model,
        "max_len": 1024,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "position": "learned",
        "rope_theta": 1e4,
        "activation": "gelu_tanh",
        "use_bias": True,
        "qkv_bias": True,
        "tie_embeddings": True,
        "qk_norm": "none",
    } | overrides


def _llama(
    num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, **overrides: Any
) -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": d_model // num_heads,
        "d_ff": d_ff,
        "max_len": 8192,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "position": "rope",
        "rope_theta": 5e5,
        "activation": "swiglu",
        "use_bias": False,
        "qkv_bias": False,
        "tie_embeddings": False,
        "qk_norm": "none",
    } | overrides


def _stretched(factor: float) -> dict[str, Any]:
    """The window of Llama 3.1 and 3.2: 8,192 tokens, stretched to 131,072."""
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_len": 8192,
    }
    return {"max_len": 131072, "rope_scaling": scaling}


_QWEN2 = {
    "vocab_size": 151936, "max_len": 131072, "norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True,
}  # fmt: skip
_SMALL = {"vocab_size": 2048, "tie_embeddings": True, "rope_theta": 1e4}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # For tests: two layers, every part present (grouped queries included), compiled in a second.
    "tiny": _llama(2, 32, 4, 2, 64, max_len=128, **_SMALL | {"vocab_size": 512}),
    "tiny_gpt2": _gpt2(2, 32, 4, vocab_size=512, max_len=128),
    "tiny_qwen3": _llama(
        2, 32, 4, 2, 64, max_len=128, qk_norm="before_rope", **_SMALL | {"vocab_size": 512}
    ),
    # About 1M parameters: what two CPU cores train in minutes, faster with few wide heads.
    "quickstart": _llama(4, 128, 2, 2, 384, max_len=256, **_SMALL),
    # nanoGPT's CPU recipe on tinyshakespeare characters.
    "nano_shakespeare": _gpt2(
        4, 128, 4, vocab_size=65, max_len=64, use_bias=False, qkv_bias=False
    ),
    "gpt2_124m": _gpt2(12, 768, 12),
    "gpt2_350m": _gpt2(24, 1024, 16),
    "gpt2_774m": _gpt2(36, 1280, 20),
    "gpt2_1.5b": _gpt2(48, 1600, 25),
    "gpt3_1.3b": _gpt2(24, 2048, 16, max_len=2048),
    "gpt3_6.7b": _gpt2(32, 4096, 32, max_len=2048),
    "llama3_8b": _llama(32, 4096, 32, 8, 14336),
    "llama3_70b": _llama(80, 8192, 64, 8, 28672),
    "llama3.1_8b": _llama(32, 4096, 32, 8, 14336, **_stretched(8.0)),
    "llama3.1_70b": _llama(80, 8192, 64, 8, 28672, **_stretched(8.0)),
    "llama3.2_1b": _llama(16, 2048, 32, 8, 8192, **_stretched(32.0), tie_embeddings=True),
    "llama3.2_3b": _llama(
        28, 3072, 24, 8, 8192, **_stretched(32.0), tie_embeddings=True
    ),
    # Version 0.2: version 0.1 attends to the last 4,096 tokens only.
    "mistral_7b": _llama(32, 4096, 32, 8, 14336, vocab_size=32000, max_len=32768, rope_theta=1e6),
    "smollm2_135m": _llama(
        30, 576, 9, 3, 1536, vocab_size=49152, rope_theta=1e5, tie_embeddings=True
    ),
    "qwen2_0.5b": _llama(24, 896, 14, 2, 4864, **_QWEN2, tie_embeddings=True),
    "qwen2_7b": _llama(28, 3584, 28, 4, 18944, **_QWEN2 | {"vocab_size": 152064}),
    "qwen3_0.6b": _llama(
        28, 1024, 16, 8, 3072, vocab_size=151936, head_dim=128, max_len=40960, norm_eps=1e-6,
        rope_theta=1e6, tie_embeddings=True, qk_norm="before_rope",
    ),
}  # fmt: skip
