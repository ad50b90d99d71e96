"""config.json to `config.model` and back: what published ones say, and what is refused."""

import json
from pathlib import Path

import pytest

from gptlab.model.hf_config import architecture, config_json, is_reward
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import ModelConfig
from gptlab.run.errors import UserError

FIXTURES = Path(__file__).parents[1] / "hf_fixtures"
NAMES = ("gpt2", "llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm2")
COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}

# As the makers publish them: the keys of transformers 4 that decide what is computed.
PUBLISHED = {
    "gpt2_124m": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
        "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "resid_pdrop": 0.1,
    },
    "llama3.1_8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "mlp_bias": False, "attention_bias": False, "pretraining_tp": 1, "hidden_act": "silu",
    },
    "mistral_7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen2_0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 131072,
        "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072,
        "use_sliding_window": False, "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "qwen3_0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960,
        "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
        "attention_bias": False, "hidden_act": "silu",
    },
    "smollm2_135m": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000, "rope_scaling": None, "is_llama_config": True,
        "rope_interleaved": False, "tie_word_embeddings": True, "hidden_act": "silu",
    },
}  # fmt: skip


def fixture(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_the_makers_publish(name):
    found = ModelConfig.build(architecture(PUBLISHED[name], name), COMPUTE)
    assert found == ModelConfig.build(PRESETS[name], COMPUTE)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_as_the_same_model(name):
    config = ModelConfig.build(architecture(fixture(name), name), COMPUTE)
    content = json.loads(json.dumps(config_json(config, False)))
    assert ModelConfig.build(architecture(content, name), COMPUTE) == config
    family = "llama" if name == "mistral" else fixture(name)["model_type"]
    assert content["model_type"] == family and not is_reward(content, name)
    assert is_reward(config_json(config, True), name)


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama2", {"model_type": "gemma"}, "model_type 'gemma' is none of gpt2, llama"),
        ("llama2", {"model_type": None}, "model_type None"),
        ("llama2", {"attention_bias": True}, "attention_bias=True; gptlab computes False only"),
        ("llama2", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama2", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama2", {"logit_scale": 2.0}, "the key 'logit_scale' .* is not known"),
        ("llama2", {"n_embd": 3}, "the key 'n_embd'"),
        ("llama2", {"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
        ("llama2", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
         "type 'linear'"),
        ("llama2", {"rope_parameters": LLAMA3}, "type 'default' with the keys"),
        ("llama2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' with"),
        ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("mistral", {"sliding_window": 32}, r"--config.max_len=32"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "--config.max_len=16"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
         "--config.max_len=16"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_layer": ...}, "lacks n_layer"),
        ("llama2", {"hidden_size": ...}, "lacks hidden_size"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(name, change, message):
    content = {k: v for k, v in {**fixture(name), **change}.items() if v is not ...}
    with pytest.raises(UserError, match=message):
        architecture(content, name)


def test_a_window_may_be_shortened_and_never_lengthened():
    assert architecture(fixture("mistral") | {"sliding_window": 32}, "", 32)["max_len"] == 32
    assert architecture(fixture("qwen3"), "", 16)["max_len"] == 16
    for name, length in (("qwen3", 65), ("gpt2", 32)):
        with pytest.raises(UserError, match=f"config.max_len={length}: the window of"):
            architecture(fixture(name), "", length)


def test_a_key_that_is_absent_means_what_it_means_to_transformers():
    def without(name, *keys):
        content = {k: v for k, v in fixture(name).items() if k not in keys}
        return architecture(content, name)

    assert without("llama2", "rope_parameters")["rope_theta"] == 1e4
    assert without("qwen2", "tie_word_embeddings")["tie_embeddings"] is False
    assert without("gpt2", "tie_word_embeddings", "n_inner")["tie_embeddings"] is True
    assert without("llama3", "num_key_value_heads")["num_kv_heads"] == 4
    assert without("qwen3", "head_dim")["head_dim"] == 128
    with pytest.raises(UserError, match="max_len=4096"):  # Mistral's own default
        content = {k: v for k, v in PUBLISHED["mistral_7b"].items() if k != "sliding_window"}
        architecture(content, "")


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["LlamaModel"], None, "architectures"),
        (["LlamaForTokenClassification"], None, "LlamaForSequenceClassification"),
        (["LlamaForSequenceClassification"], {"0": "a", "1": "b"}, "2 labels"),
        (["LlamaForSequenceClassification"], None, "2 labels"),
        ([], None, "architectures"),
    ],
)
def test_other_heads_are_refused(names, labels, message):
    with pytest.raises(UserError, match=message):
        is_reward({"model_type": "llama", "architectures": names, "id2label": labels}, "x")


@pytest.mark.parametrize(
    ("preset", "change", "field"),
    [
        ("tiny", {"qk_norm": "after_rope"}, "qk_norm='after_rope'"),
        ("tiny", {"activation": "gelu"}, "activation='gelu'"),
        ("tiny", {"norm": "layernorm"}, "norm='layernorm'"),
        ("tiny", {"use_bias": True}, "use_bias=True"),
        ("tiny_qwen3", {"qkv_bias": True}, "qkv_bias=True"),
        ("tiny_gpt2", {"num_kv_heads": 2}, "num_kv_heads=2"),
        ("tiny_gpt2", {"head_dim": 16}, "head_dim=16"),
        ("nano_shakespeare", {}, "use_bias=False"),
    ],
)
def test_what_no_architecture_computes_is_named(preset, change, field):
    config = ModelConfig.build({**PRESETS[preset], **change}, COMPUTE)
    with pytest.raises(UserError, match=f"no Hugging Face architecture has {field}"):
        config_json(config, False)
