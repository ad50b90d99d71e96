"""GGUF files of every quantisation, written with the gguf package and compared with its own."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gptlab.model import gguf as gguf_lib
from gptlab.model import hf
from gptlab.model.attention import RopeScaling, rope_frequencies
from gptlab.model.transformer import ModelConfig
from gptlab.run.errors import UserError
from tests.model.test_hf import COMPUTE, FIXTURES, imported, load

gguf = pytest.importorskip("gguf")

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
HF_NAMES = {  # of the Llama family, within a layer
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # GPT-2
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
REST = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}  # fmt: skip


def name_of(name):
    stem, kind = name.rsplit(".", 1)
    if stem in REST:
        return f"{REST[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{HF_NAMES[rest]}.{kind}"


def interleaved(rows, heads):
    """What llama.cpp's converter does to query and key: the halves of a head become neighbours."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def write(path, fixture, kind="F32", extra=None, drop=(), tensors=None):
    """A fixture as llama.cpp's converter would write it; returns its metadata and HF tensors."""
    source = hf.open_folder(FIXTURES / fixture, None)
    config = source.architecture
    family = {"gpt2": "gpt2", "qwen2": "qwen2", "qwen3": "qwen3"}.get(fixture, "llama")
    writer = gguf.GGUFWriter(path, family)
    keys = {
        "context_length": config["max_len"], "embedding_length": config["d_model"],
        "block_count": config["num_layers"], "feed_forward_length": config["d_ff"],
        "attention.head_count": config["num_heads"],
    }  # fmt: skip
    if family == "gpt2":
        keys["attention.layer_norm_epsilon"] = config["norm_eps"]
    else:
        keys |= {
            "attention.layer_norm_rms_epsilon": config["norm_eps"],
            "attention.head_count_kv": config["num_kv_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "rope.freq_base": config["rope_theta"],
        }  # fmt: skip
        if family == "llama":
            keys |= {"rope.dimension_count": config["head_dim"]}
    for key, value in {**keys, **(extra or {})}.items():
        if key in drop:
            continue
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            bool: writer.add_bool,
        }  # fmt: skip
        add.get(type(value), writer.add_array)(f"{family}.{key}", value)
    stored = {}
    for name, tensor in source.tensors.items():
        value = tensor.read(0, tensor.shape[0])
        if family == "gpt2" and value.ndim == 2 and ".h." in name:
            value = np.ascontiguousarray(value.T)  # Conv1D
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_heads" if "q_proj" in name else "num_kv_heads"]
            value = interleaved(value, heads)
        quantised = kind if value.ndim == 2 and not name.endswith("wpe.weight") else "F32"
        which = gguf.GGMLQuantizationType[quantised]
        data = gguf.quants.quantize(value, which)
        stored[name] = gguf.quants.dequantize(data, which)
        writer.add_tensor(name_of(name), data, raw_dtype=which)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_is_what_the_package_makes_of_it(tmp_path, kind):
    stored = write(tmp_path / "x.gguf", "llama2", kind)
    _, params = load(gguf_lib.open_file(tmp_path / "x.gguf", None))
    layers = params["backbone"]["layers"]
    for layer in range(2):
        for ours, theirs in (("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
            found = np.asarray(layers["feed_forward"][ours]["kernel"][layer])
            np.testing.assert_array_equal(found, stored[f"model.layers.{layer}.{theirs}.weight"].T)
    np.testing.assert_array_equal(
        np.asarray(params["backbone"]["embedding"]), stored["model.embed_tokens.weight"]
    )
    exact = np.asarray(imported("llama2")[1]["backbone"]["layers"]["attention"]["key"]["kernel"])
    error = np.abs(np.asarray(layers["attention"]["key"]["kernel"]) - exact).max()
    assert (error == 0) == (kind == "F32") and error < 0.1  # of values around 0.25


@pytest.mark.parametrize("fixture", ["gpt2", "llama2", "mistral", "qwen2", "qwen3"])
def test_a_file_in_float32_is_the_model_of_the_folder(tmp_path, fixture):
    write(tmp_path / "x.gguf", fixture, extra={"attention.causal": True})
    source = gguf_lib.open_file(tmp_path / "x.gguf", None)
    folder = hf.open_folder(FIXTURES / fixture, None)
    found, wanted = (ModelConfig.build(s.architecture, COMPUTE) for s in (source, folder))
    assert found == wanted
    _, params = load(source)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), params, imported(fixture)[1]
    )


def test_llama_3_is_known_by_its_factors(tmp_path):
    scaling = RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
    )
    plain, stretched = (np.asarray(rope_frequencies(8, 5e5, s)) for s in (None, scaling))
    factors = {"rope_freqs.weight": plain / stretched}
    assert 1 < (plain / stretched).max() == 32.0
    base = {"rope.freq_base": 5e5}
    write(tmp_path / "x.gguf", "llama2", extra=base, tensors=factors)
    source = gguf_lib.open_file(tmp_path / "x.gguf", None)
    assert ModelConfig.build(source.architecture, COMPUTE).rope_scaling == scaling
    load(source)  # the factors are no parameter
    factors["rope_freqs.weight"] += np.float32(0.5)
    write(tmp_path / "y.gguf", "llama2", extra=base, tensors=factors)
    with pytest.raises(UserError, match="otherwise than Llama 3"):
        gguf_lib.open_file(tmp_path / "y.gguf", None)


@pytest.mark.parametrize(
    ("extra", "drop", "message"),
    [
        ({"expert_count": 8}, (), "llama.expert_count .value 8. is not known"),
        ({"rope.scaling.type": "yarn"}, (), "type 'yarn'"),
        ({"attention.causal": False}, (), "llama.attention.causal is false"),
        ({"attention.sliding_window": 32}, (), "--config.max_len=32"),
        ({"rope.dimension_count": 4}, (), "llama.rope.dimension_count=4"),
        ({"attention.head_count_kv": [2, 4]}, (), "differs from layer to layer"),
        ({}, ("embedding_length",), "lacks hidden_size"),
    ],
)
def test_metadata_that_ask_for_something_else_are_refused(tmp_path, extra, drop, message):
    write(tmp_path / "x.gguf", "llama2", extra=extra, drop=drop)
    with pytest.raises(UserError, match=message):
        gguf_lib.open_file(tmp_path / "x.gguf", None)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"no such format" * 10)
    with pytest.raises(UserError, match="is no GGUF file"):
        gguf_lib.open_file(path, None)
    write(path, "llama2")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="is no GGUF file, or not all of it"):
        gguf_lib.open_file(path, None)
    with pytest.raises(UserError, match="cannot read"):
        gguf_lib.open_file(tmp_path / "nowhere.gguf", None)
    writer = gguf.GGUFWriter(path, "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'falcon' is none of"):
        gguf_lib.open_file(path, None)


def test_a_quantisation_that_the_package_cannot_undo_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf", "llama2", "Q8_0")
    source = gguf_lib.open_file(tmp_path / "x.gguf", None)

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(UserError, match="is quantised as (Q8_0|F32), which the gguf package"):
        load(source)


def test_without_the_package_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gptlab\[convert\]'"):
        gguf_lib.open_file(Path("x.gguf"), None)
