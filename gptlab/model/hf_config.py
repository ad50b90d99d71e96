"""config.json of Hugging Face checkpoints, to and from `config.model`.

A key that is not known, or that asks for something this network does not compute, is an error: an
ignored one would give a model that runs and says nonsense.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptlab.model.transformer import ModelConfig
from gptlab.run.errors import UserError

# A classifier's score has no bias in transformers. Ours has one: it is added to the logit.
REWARD_OFFSET = "reward_offset"
# model_type -> its classes: language model, sequence classifier.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
}

# Keys that say nothing of what the network computes.
_NEUTRAL = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id dtype eos_token_id finetuning_task id2label
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id
    max_window_layers model_type num_labels output_attentions output_hidden_states pad_token_id
    pretraining_tp problem_type return_dict tie_word_embeddings task_specific_params tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_version use_cache
    attention_dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    n_ctx reorder_and_upcast_attn
    """.split()
) | {REWARD_OFFSET}
# Keys with the values (also null) that ask for nothing else than this network computes.
_ONLY: Mapping[str, Sequence[Any]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
    "partial_rotary_factor": (1.0,),
}
_LLAMA_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling
    rope_parameters sliding_window use_sliding_window layer_types
    """.split()
)
_GPT2_KEYS = frozenset(
    """
    vocab_size n_embd n_inner n_layer n_head n_positions layer_norm_epsilon activation_function
    """.split()
)
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def architecture(
    stated: Mapping[str, Any], source: str, max_len: int | None = None
) -> dict[str, Any]:
    """`config.model` of a config.json.

    Args:
        stated: its content.
        source: its path, for error messages.
        max_len: the window to use; None takes the checkpoint's.

    Raises:
        UserError: another architecture, a key that is missing, or one that is not known or asks
            for what this network does not compute.
    """
    family = stated.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{source}: model_type {family!r} is none of {', '.join(FAMILIES)}, which are what "
            "gptlab reads"
        )
    known = _GPT2_KEYS if family == "gpt2" else _LLAMA_KEYS
    for key, value in stated.items():
        if key in _ONLY and value is not None and value not in _ONLY[key]:
            raise UserError(f"{source}: {key}={value!r}; gptlab computes {_ONLY[key][0]!r} only")
        if key not in _ONLY and key not in known and key not in _NEUTRAL:
            raise UserError(
                f"{source}: the key {key!r} (value {value!r}) is not known, and it may change what "
                "a model computes; remove it if it does not"
            )
    try:
        fields = _gpt2_fields(stated, source) if family == "gpt2" else _llama_fields(stated, source)
    except KeyError as error:
        raise UserError(f"{source} lacks {error.args[0]}") from None
    if max_len is not None:
        if family == "gpt2" and max_len != fields["max_len"] or max_len > fields["max_len"]:
            raise UserError(
                f"config.max_len={max_len}: the window of {source} is {fields['max_len']} tokens, "
                "which may be shortened where positions are rotary, and never lengthened"
            )
        fields["max_len"] = max_len
    _check_window(stated, fields["max_len"], source)
    return fields


def _gpt2_fields(stated: Mapping[str, Any], source: str) -> dict[str, Any]:
    width, heads = stated["n_embd"], stated["n_head"]
    activation = stated.get("activation_function", "gelu_new")
    if activation not in _GELU:
        raise UserError(f"{source}: activation_function={activation!r} is none of {list(_GELU)}")
    return {
        "vocab_size": stated["vocab_size"],
        "num_layers": stated["n_layer"],
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "d_ff": stated.get("n_inner") or 4 * width,
        "max_len": stated["n_positions"],
        "norm": "layernorm",
        "norm_eps": stated["layer_norm_epsilon"],
        "position": "learned",
        "rope_theta": 1e4,  # of no meaning
        "activation": _GELU[activation],
        "use_bias": True,
        "qkv_bias": True,
        "tie_embeddings": stated.get("tie_word_embeddings", True),
        "qk_norm": "none",
    }


def _llama_fields(stated: Mapping[str, Any], source: str) -> dict[str, Any]:
    family, width, heads = (
        stated["model_type"],
        stated["hidden_size"],
        stated["num_attention_heads"],
    )
    theta, scaling = _rope(stated, source)
    own_head_dim = 128 if family == "qwen3" else width // heads
    fields = {
        "vocab_size": stated["vocab_size"],
        "num_layers": stated["num_hidden_layers"],
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": stated.get("num_key_value_heads") or heads,
        "head_dim": stated.get("head_dim") or own_head_dim,
        "d_ff": stated["intermediate_size"],
        "max_len": stated["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": stated["rms_norm_eps"],
        "position": "rope",
        "rope_theta": theta,
        "activation": "swiglu",
        "use_bias": False,
        "qkv_bias": family == "qwen2",
        "tie_embeddings": stated.get("tie_word_embeddings", False),
        "qk_norm": "before_rope" if family == "qwen3" else "none",
    }
    return fields if scaling is None else fields | {"rope_scaling": scaling}


def _rope(stated: Mapping[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """theta and `rope_scaling`; transformers 5 writes both as rope_parameters."""
    given = dict(stated.get("rope_parameters") or stated.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or stated.get("rope_theta") or 1e4)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)  # some files carry both names
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor; gptlab rotates the whole head")
    keys = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_len",
    }
    if kind == "default" and not given:
        return theta, None
    if kind != "llama3" or set(given) != set(keys):
        raise UserError(
            f"{source}: RoPE scaling of type {kind!r} with the keys {sorted(given)}; gptlab has "
            f"Llama 3's ('llama3' with {sorted(keys)}) and none"
        )
    return theta, {ours: given[theirs] for theirs, ours in keys.items()}


def _check_window(stated: Mapping[str, Any], max_len: int, source: str) -> None:
    """A sliding window as long as the context, or longer, changes nothing; others are refused."""
    family = stated["model_type"]
    window = stated.get("sliding_window", 4096 if family == "mistral" else None)
    types = set(stated.get("layer_types") or ())
    if types - {"full_attention", "sliding_attention"}:
        raise UserError(f"{source}: layer_types {sorted(types)}; gptlab attends in full only")
    if family in ("qwen2", "qwen3"):
        slides = bool(stated.get("use_sliding_window", False))
    else:
        slides = family == "mistral"
    if (slides or "sliding_attention" in types) and window is not None and window < max_len:
        raise UserError(
            f"{source}: layers attend to the last {window} tokens only (sliding_window), which "
            f"gptlab does not compute; up to there they attend in full: --config.max_len={window}"
        )


def is_reward(stated: Mapping[str, Any], source: str) -> bool:
    """Whether it is a classifier with one label; UserError if it is no language model either."""
    names = stated.get("architectures") or []
    language, classifier = FAMILIES[stated["model_type"]]
    if names == [language]:
        return False
    if names != [classifier]:
        raise UserError(
            f"{source}: architectures {names}; gptlab reads {language} or, as a reward model, "
            f"{classifier}"
        )
    labels = stated.get("num_labels") or len(stated.get("id2label") or (0, 1))
    if labels != 1:
        raise UserError(f"{source}: a classifier with {labels} labels; a reward model has one")
    return True


def config_json(config: ModelConfig, for_reward: bool) -> dict[str, Any]:
    """What transformers needs to build the same network: the content of config.json.

    Raises:
        UserError: none of its architectures computes this; the field is named.
    """
    family = "gpt2" if config.position == "learned" else _llama_family(config)
    _check_expressible(config, family)
    content = {
        "architectures": [FAMILIES[family][1 if for_reward else 0]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if for_reward:
        content |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return content | (_gpt2_config(config) if family == "gpt2" else _llama_config(config, family))


def _llama_family(config: ModelConfig) -> str:
    if config.qk_norm != "none":
        return "qwen3"
    return "qwen2" if config.qkv_bias else "llama"


def _check_expressible(config: ModelConfig, family: str) -> None:
    gpt2 = family == "gpt2"
    demands: dict[str, tuple[Any, ...]] = {
        "norm": ("layernorm",) if gpt2 else ("rmsnorm",),
        "activation": ("gelu_tanh", "gelu") if gpt2 else ("swiglu",),
        "use_bias": (gpt2,),
        "qkv_bias": (gpt2 or family == "qwen2",),
        "qk_norm": ("before_rope",) if family == "qwen3" else ("none",),
    }
    if gpt2:
        demands |= {
            "num_kv_heads": (config.num_heads,),
            "head_dim": (config.d_model / config.num_heads,),
        }
    for field, allowed in demands.items():
        value = getattr(config, field)
        if value not in allowed:
            raise UserError(
                f"no Hugging Face architecture has {field}={value!r} with what else this model is: "
                f"{family}, the nearest, has {' or '.join(map(repr, allowed))}"
            )
    if family == "llama" and config.d_model % config.num_heads:
        raise UserError(
            f"Hugging Face's Llama wants d_model={config.d_model} to be a multiple of "
            f"num_heads={config.num_heads}"
        )


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_len,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
    }


def _llama_config(config: ModelConfig, family: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
    }
    if family != "qwen2":
        content["attention_bias"] = False
    if (scaling := config.rope_scaling) is not None:
        content["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        }
    return content
