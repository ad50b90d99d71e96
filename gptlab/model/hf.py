"""Hugging Face checkpoints: a folder with config.json, safetensors and a tokenizer.

GPT-2, Llama (SmolLM2 is one), Mistral, Qwen2 and Qwen3, as causal language models or as sequence
classifiers with one label, which are reward models. What config.json means: model/hf_config.py.
"""

import json
import os
import re
from pathlib import Path

import numpy as np

from gptlab.data.hf_tokenizer import FILES as TOKENIZER_FILES
from gptlab.model import safetensors
from gptlab.model.hf_config import REWARD_OFFSET, architecture, is_reward
from gptlab.model.weights import Constant, Pretrained, Tensor, Weight
from gptlab.run.errors import UserError

CONFIG = "config.json"
_ALL_ROWS = 1 << 12  # compared at a time

# Arrays that old checkpoints hold although they follow from the configuration.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
    r"|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)

_GPT2_LAYER = {
    "attention_norm/scale": Weight("ln_1.weight"),
    "attention_norm/bias": Weight("ln_1.bias"),
    "feed_forward_norm/scale": Weight("ln_2.weight"),
    "feed_forward_norm/bias": Weight("ln_2.bias"),
    "attention/out/kernel": Weight("attn.c_proj.weight"),
    "attention/out/bias": Weight("attn.c_proj.bias"),
    "feed_forward/up/kernel": Weight("mlp.c_fc.weight"),
    "feed_forward/up/bias": Weight("mlp.c_fc.bias"),
    "feed_forward/down/kernel": Weight("mlp.c_proj.weight"),
    "feed_forward/down/bias": Weight("mlp.c_proj.bias"),
} | {
    f"attention/{name}/{kind}": Weight(f"attn.c_attn.{stored}", part=part, parts=3)
    for part, name in enumerate(("query", "key", "value"))
    for kind, stored in (("kernel", "weight"), ("bias", "bias"))
}
_LLAMA_LAYER = {
    "attention_norm/scale": Weight("input_layernorm.weight"),
    "feed_forward_norm/scale": Weight("post_attention_layernorm.weight"),
    "attention/query/kernel": Weight("self_attn.q_proj.weight", transposed=True),
    "attention/key/kernel": Weight("self_attn.k_proj.weight", transposed=True),
    "attention/value/kernel": Weight("self_attn.v_proj.weight", transposed=True),
    "attention/query/bias": Weight("self_attn.q_proj.bias"),
    "attention/key/bias": Weight("self_attn.k_proj.bias"),
    "attention/value/bias": Weight("self_attn.v_proj.bias"),
    "attention/out/kernel": Weight("self_attn.o_proj.weight", transposed=True),
    "attention/query_norm/scale": Weight("self_attn.q_norm.weight"),
    "attention/key_norm/scale": Weight("self_attn.k_norm.weight"),
    "feed_forward/gate/kernel": Weight("mlp.gate_proj.weight", transposed=True),
    "feed_forward/up/kernel": Weight("mlp.up_proj.weight", transposed=True),
    "feed_forward/down/kernel": Weight("mlp.down_proj.weight", transposed=True),
}
_GPT2_REST = {
    "embedding": Weight("wte.weight"),
    "positions": Weight("wpe.weight"),
    "final_norm/scale": Weight("ln_f.weight"),
    "final_norm/bias": Weight("ln_f.bias"),
}
_LLAMA_REST = {
    "embedding": Weight("embed_tokens.weight"),
    "final_norm/scale": Weight("norm.weight"),
}
_HEADS = {
    "backbone/unembedding": Weight("lm_head.weight"),
    "head/kernel": Weight("score.weight", transposed=True),
    "head/bias": Weight(REWARD_OFFSET),
}


def weights(is_gpt2: bool, prefix: str | None = None) -> dict[str, Weight]:
    """Where transformers keeps each parameter. `prefix`: of the backbone's tensors, if unusual."""
    if prefix is None:
        prefix = "transformer." if is_gpt2 else "model."
    rest, layer = (_GPT2_REST, _GPT2_LAYER) if is_gpt2 else (_LLAMA_REST, _LLAMA_LAYER)
    of_layer = f"{prefix}{'h' if is_gpt2 else 'layers'}.{{layer}}."
    return {
        **{f"backbone/{name}": _prefixed(weight, prefix) for name, weight in rest.items()},
        **{f"backbone/layers/{name}": _prefixed(w, of_layer) for name, w in layer.items()},
        **_HEADS,
    }


def _prefixed(weight: Weight, prefix: str) -> Weight:
    return Weight(prefix + weight.name, weight.transposed, weight.part, weight.parts)


def open_folder(folder: str | os.PathLike[str], max_len: int | None) -> Pretrained:
    """A folder with config.json and safetensors, looked at but not read yet.

    Args:
        folder: as huggingface_hub or save_pretrained leave it.
        max_len: the window to use; None takes the checkpoint's.

    Raises:
        UserError: not all of it is there, or it asks for what this network does not compute.
    """
    folder = Path(folder)
    try:
        stated = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from error
    source = str(folder / CONFIG)
    model = architecture(stated, source, max_len)
    for_reward = is_reward(stated, source)
    found, files = safetensors.read_folder(folder)
    tensors: dict[str, Tensor] = {
        name: tensor for name, tensor in found.items() if not _BUFFERS.fullmatch(name)
    }
    is_gpt2 = model["position"] == "learned"
    bare = ("wte.weight" if is_gpt2 else "embed_tokens.weight") in tensors
    names = weights(is_gpt2, "" if bare else None)
    if for_reward:
        offset = np.array([stated.get(REWARD_OFFSET, 0.0)], np.float32)
        tensors[REWARD_OFFSET] = Constant(offset)
    elif model["tie_embeddings"] and (head := tensors.pop("lm_head.weight", None)) is not None:
        _check_tied(tensors.get(names["backbone/embedding"].name), head, folder)
    beside = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return Pretrained(
        architecture=model,
        is_reward=for_reward,
        weights=names,
        tensors=tensors,
        files=[str(path) for path in (folder / CONFIG, *files, *beside)],
        tokenizer=lambda: {path.name: path.read_bytes() for path in beside},
    )


def _check_tied(table: Tensor | None, head: Tensor, folder: Path) -> None:
    """A tied model may hold its table twice; two tables would be one too many."""
    if table is None or table.shape != head.shape:
        raise UserError(f"{folder}: lm_head.weight is not the embedding that it is tied to")
    for start in range(0, head.shape[0], _ALL_ROWS):
        stop = min(start + _ALL_ROWS, head.shape[0])
        if not np.array_equal(table.read(start, stop), head.read(start, stop)):
            raise UserError(
                f"{folder}: config.json ties the embeddings (tie_word_embeddings), yet "
                "lm_head.weight differs from the embedding: one of the two is wrong"
            )
