"""Makes the fixtures: tiny random Hugging Face models, as save_pretrained leaves them, and outputs.

    python -m venv torchenv && torchenv/bin/pip install torch==2.13.0 transformers==5.23.0
    torchenv/bin/python tests/hf_fixtures/make.py

Needs no JAX, and the tests that read the fixtures need no torch. Beside config.json and safetensors
each folder has expected.npz: tokens [B, T], logits [B, T, V] (of a classifier [B], at the last
token), the same rows padded on the left and on the right with their logits, and the norm of the
gradient of the mean cross-entropy (of a classifier, of the mean logit).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

VOCAB, LAYERS, D_MODEL, HEADS, KV_HEADS, D_FF, MAX_LEN = 96, 2, 32, 4, 2, 64, 64
BATCH, LENGTH, PADDING = 2, 12, 5
PAD = 0
OUTPUT = Path(__file__).parent
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def gpt2():
    """LayerNorm, learned positions, tanh GELU, Conv1D, tied."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=MAX_LEN,
            n_embd=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
    )


def family(name, kind="ForCausalLM", **changes):
    """A model of the Llama family: RMSNorm, RoPE, SwiGLU, grouped queries."""
    settings = dict(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=MAX_LEN,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    return getattr(transformers, name + kind)(config)


MODELS = {
    "gpt2": gpt2,
    "llama2": lambda: family("Llama", num_key_value_heads=HEADS),  # in several files
    # Positions beyond the window of before it was stretched, where the wavelengths differ most.
    "llama3": lambda: family("Llama", rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: family("Mistral", sliding_window=MAX_LEN),
    "qwen2": lambda: family("Qwen2", tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3": lambda: family("Qwen3", head_dim=16, rms_norm_eps=1e-6),
    # Its shape in small: three heads of one key head, tied; weights in bfloat16.
    "smollm2": lambda: family(
        "Llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=48,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
    "llama_classifier": lambda: family(
        "Llama", "ForSequenceClassification", num_labels=1, pad_token_id=PAD
    ),
}  # fmt: skip
LENGTHS = {"llama3": 48}
IN_PARTS = {"llama2": "48KB"}
IN_BFLOAT16 = {"smollm2"}


def randomize(model, bfloat16):
    """Weights large enough that activations are far from linear (tanh and erf GELU differ)."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name or "ln_" in name
            if p.ndim >= 2:
                p.normal_(0.0, 0.25)
            else:
                p.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.1)
            if bfloat16:
                p.copy_(p.bfloat16())


def outputs(model, tokens):
    """Arrays that the model computes."""
    arrays = {"tokens": tokens.numpy().astype(np.int32)}
    logits = model(tokens).logits
    if logits.ndim == 3:
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
        )
    else:
        logits = logits[:, 0]
        loss = logits.mean()
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters()]
    arrays["loss"] = np.float32(loss.item())
    arrays["grad_norm"] = np.float32(torch.stack(squares).sum().sqrt().item())
    arrays["logits"] = logits.detach().numpy()
    for side in ("left", "right"):
        pad = torch.full((BATCH, PADDING), PAD)
        ones, none = torch.ones_like(tokens), torch.zeros_like(pad)
        order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
        mask = torch.cat(order(none, ones), 1)
        padded = torch.cat(order(pad, tokens), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = model(padded, attention_mask=mask, position_ids=positions).logits
        arrays[f"{side}_tokens"] = padded.numpy().astype(np.int32)
        arrays[f"{side}_mask"] = mask.numpy().astype(np.int32)
        arrays[f"{side}_positions"] = positions.numpy().astype(np.int32)
        arrays[f"{side}_logits"] = (found if found.ndim == 3 else found[:, 0]).numpy()
    return arrays


def main():
    """Writes every fixture."""
    for name, build in MODELS.items():
        model = build()
        model.set_attn_implementation("eager")
        randomize(model, name in IN_BFLOAT16)
        torch.manual_seed(1)
        length = LENGTHS.get(name, LENGTH)
        arrays = outputs(model.eval(), torch.randint(1, VOCAB, (BATCH, length)))
        folder = OUTPUT / name
        shutil.rmtree(folder, ignore_errors=True)
        stored = model.bfloat16() if name in IN_BFLOAT16 else model
        stored.save_pretrained(folder, max_shard_size=IN_PARTS.get(name, "1GB"))
        np.savez_compressed(folder / "expected.npz", **arrays)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(name, size, "bytes, gradient norm", arrays["grad_norm"])
        print("  ", sorted(json.loads((folder / "config.json").read_text())))


if __name__ == "__main__":
    main()
