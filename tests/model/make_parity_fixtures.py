"""Makes the parity fixtures: tiny random Hugging Face models in our parameters, with outputs.

    python -m venv torchenv && torchenv/bin/pip install torch==2.13.0 transformers==5.23.0
    torchenv/bin/python tests/model/make_parity_fixtures.py

Needs no JAX, and the tests that read the fixtures need no torch. Each file holds the architecture
(JSON), parameters under `params/...`, tokens [B, T], logits [B, T, V], the same rows padded on the
left and on the right with their logits, and the norm of the gradient of the mean cross-entropy.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

VOCAB, LAYERS, D_MODEL, HEADS, KV_HEADS, HEAD_DIM, D_FF, MAX_LEN = 96, 2, 32, 4, 2, 8, 64, 32
BATCH, LENGTH, PADDING = 2, 12, 5
OUTPUT = Path(__file__).parent / "fixtures"


def common(**kwargs):
    """The architecture fields that every family shares."""
    return {
        "vocab_size": VOCAB,
        "num_layers": LAYERS,
        "d_model": D_MODEL,
        "num_heads": HEADS,
        "max_len": MAX_LEN,
        "rope_theta": 1e4,
    } | kwargs


def gpt2():
    """GPT-2: LayerNorm, learned positions, tanh GELU, biases, tied."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=MAX_LEN, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    architecture = common(
        num_kv_heads=HEADS, head_dim=D_MODEL // HEADS, d_ff=4 * D_MODEL, norm="layernorm",
        norm_eps=1e-5, position="learned", activation="gelu_tanh", use_bias=True, qkv_bias=True,
        tie_embeddings=True, qk_norm="none",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), architecture, gpt2_params


def llama_family(model_class, config_class, eps, **kwargs):
    """A model of the Llama family and the fields of its architecture that do not vary."""
    config = config_class(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LEN, rms_norm_eps=eps, attn_implementation="eager",
        tie_word_embeddings=kwargs["tie_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    architecture = common(
        num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, d_ff=D_FF, norm="rmsnorm", norm_eps=eps,
        position="rope", activation="swiglu", use_bias=False, **kwargs,
    )  # fmt: skip
    return model_class(config), architecture, llama_params


def llama():
    """Llama: RMSNorm, RoPE, SwiGLU, grouped queries, untied."""
    fields = {"qkv_bias": False, "tie_embeddings": False, "qk_norm": "none"}
    return llama_family(transformers.LlamaForCausalLM, transformers.LlamaConfig, 1e-5, **fields)


def qwen2():
    """Qwen2: Llama with biases on queries, keys and values, tied."""
    fields = {"qkv_bias": True, "tie_embeddings": True, "qk_norm": "none"}
    return llama_family(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, 1e-6, **fields)


def qwen3():
    """Qwen3: Llama with normalised queries and keys before RoPE, tied."""
    fields = {"qkv_bias": False, "tie_embeddings": True, "qk_norm": "before_rope"}
    return llama_family(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, 1e-6, **fields)


def gpt2_params(get):
    """Our parameters of a GPT-2; get(name) -> array. Its Conv1D weights are [in, out] already."""
    tree = {
        "embedding": get("transformer.wte.weight"),
        "positions": get("transformer.wpe.weight"),
        "final_norm/scale": get("transformer.ln_f.weight"),
        "final_norm/bias": get("transformer.ln_f.bias"),
    }
    for i in range(LAYERS):
        prefix = f"transformer.h.{i}."
        layer = {
            "attention/out/kernel": get(prefix + "attn.c_proj.weight"),
            "attention/out/bias": get(prefix + "attn.c_proj.bias"),
            "feed_forward/up/kernel": get(prefix + "mlp.c_fc.weight"),
            "feed_forward/up/bias": get(prefix + "mlp.c_fc.bias"),
            "feed_forward/down/kernel": get(prefix + "mlp.c_proj.weight"),
            "feed_forward/down/bias": get(prefix + "mlp.c_proj.bias"),
        }
        for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
            layer[f"{ours}/scale"] = get(f"{prefix}{theirs}.weight")
            layer[f"{ours}/bias"] = get(f"{prefix}{theirs}.bias")
        kernels = np.split(get(prefix + "attn.c_attn.weight"), 3, axis=1)
        biases = np.split(get(prefix + "attn.c_attn.bias"), 3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            layer[f"attention/{name}/kernel"] = kernel
            layer[f"attention/{name}/bias"] = bias
        for key, value in layer.items():
            tree.setdefault(f"layers/{key}", []).append(value)
    return tree


LLAMA_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "feed_forward/gate/kernel": "mlp.gate_proj.weight",
    "feed_forward/up/kernel": "mlp.up_proj.weight",
    "feed_forward/down/kernel": "mlp.down_proj.weight",
}


def llama_params(get):
    """Our parameters of a model of the Llama family; torch's linears are [out, in]."""
    tree = {
        "embedding": get("model.embed_tokens.weight"),
        "final_norm/scale": get("model.norm.weight"),
    }
    if not np.array_equal(get("lm_head.weight"), tree["embedding"]):
        tree["unembedding"] = get("lm_head.weight")
    for ours, theirs in LLAMA_LAYER.items():
        names = [f"model.layers.{i}.{theirs}" for i in range(LAYERS)]
        if get(names[0]) is None:
            continue
        arrays = [get(name) for name in names]
        tree[f"layers/{ours}"] = [a.T for a in arrays] if ours.endswith("kernel") else arrays
    return tree


def randomize(model):
    """Weights large enough that activations are far from linear (tanh and erf GELU differ)."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name or "ln_" in name
            if p.ndim >= 2:
                p.normal_(0.0, 0.25)
            else:
                p.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.1)


def outputs(model, tokens):
    """Arrays of the fixture that the model computes."""
    arrays = {"tokens": tokens.numpy().astype(np.int32)}
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters()]
    arrays["loss"] = np.float32(loss.item())
    arrays["grad_norm"] = np.float32(torch.stack(squares).sum().sqrt().item())
    arrays["logits"] = logits.detach().numpy()
    for side in ("left", "right"):
        pad = torch.zeros(BATCH, PADDING, dtype=tokens.dtype)
        ones, none = torch.ones_like(tokens), torch.zeros_like(pad)
        order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
        padded = torch.cat(order(pad, tokens), 1)
        mask = torch.cat(order(none, ones), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            padded_logits = model(padded, attention_mask=mask, position_ids=positions).logits
        arrays[f"{side}_tokens"] = padded.numpy().astype(np.int32)
        arrays[f"{side}_mask"] = mask.numpy().astype(np.int32)
        arrays[f"{side}_positions"] = positions.numpy().astype(np.int32)
        arrays[f"{side}_logits"] = padded_logits.numpy()
    return arrays


def main():
    """Writes every fixture."""
    OUTPUT.mkdir(exist_ok=True)
    for make in (gpt2, llama, qwen2, qwen3):
        model, architecture, to_ours = make()
        randomize(model)
        weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
        arrays = {f"params/backbone/{k}": np.array(v) for k, v in to_ours(weights.get).items()}
        torch.manual_seed(1)
        arrays |= outputs(model.eval(), torch.randint(1, VOCAB, (BATCH, LENGTH)))
        path = OUTPUT / f"{make.__name__}.npz"
        np.savez_compressed(path, architecture=json.dumps(architecture), **arrays)
        print(path.name, path.stat().st_size, "bytes, gradient norm", arrays["grad_norm"])


if __name__ == "__main__":
    main()
