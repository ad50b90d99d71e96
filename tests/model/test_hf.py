"""Imported Hugging Face models against transformers' own outputs: tests/hf_fixtures/make.py."""

import dataclasses
import functools
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import AxisType, Mesh, PartitionSpec

from gptlab.model import hf, weights
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError
from gptlab.train import state as state_lib

FIXTURES = Path(__file__).parents[1] / "hf_fixtures"
FAMILIES = ("gpt2", "llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm2")
COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
TOLERANCE = 1e-4
AXES = ("replica", "data", "fsdp", "context", "tensor")


def model_of(source):
    config = ModelConfig.build(source.architecture, COMPUTE)
    return ScalarModel(config) if source.is_reward else LanguageModel(config)


def load(source, sizes=(1, 1, 1, 1, 1)):
    """(model, parameters) of an opened checkpoint on a mesh of so many devices."""
    model = model_of(source)
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 5)
    abstract, shardings = state_lib.param_shardings(functools.partial(init_params, model), mesh)
    weights.check(abstract, source.weights, source.tensors, "the fixture")
    return model, weights.load(abstract, shardings, source.weights, source.tensors, lambda: None)


@functools.cache
def imported(name):
    """(model, parameters on the host) of a fixture."""
    model, params = load(hf.open_folder(FIXTURES / name, None))
    return model, jax.device_get(params)


def expected(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


def padded_logits(name, model):
    """Logits of the rows padded on the left, then of those padded on the right."""
    _, params = imported(name)
    arrays = expected(name)
    tokens, positions, mask = (
        np.concatenate([arrays[f"left_{kind}"], arrays[f"right_{kind}"]])
        for kind in ("tokens", "positions", "mask")
    )
    out = np.asarray(jax.jit(model.apply)({"params": params}, tokens, positions, mask))
    return {"left": out[: len(out) // 2], "right": out[len(out) // 2 :]}


def largest_difference(name):
    """Of a fixture's logits or scores, at all real positions, from those stored with it."""
    arrays, found = expected(name), []
    for side, out in padded_logits(name, imported(name)[0]).items():
        real = arrays[f"{side}_mask"].astype(bool)
        stored = arrays[f"{side}_logits"]
        if stored.ndim == 1:  # a classifier's, of the last position
            out = out[np.arange(len(out)), real.shape[1] - 1 - real[:, ::-1].argmax(1)]
            real = slice(None)
        found.append(np.abs(out[real] - stored[real]).max())
    return float(max(found))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_at_every_position_of_padded_rows(name):
    model, _ = imported(name)
    arrays = expected(name)
    for side, logits in padded_logits(name, model).items():
        real = arrays[f"{side}_mask"].astype(bool)
        np.testing.assert_allclose(logits[real], arrays[f"{side}_logits"][real], atol=TOLERANCE)
        rows = logits[real].reshape(arrays["logits"].shape)
        np.testing.assert_allclose(rows, arrays["logits"], atol=TOLERANCE)
    assert arrays["logits"].std() > 1  # not all near zero


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradient_norm(name):
    model, params = imported(name)
    arrays = expected(name)

    def loss_fn(params):
        logits = model.apply({"params": params}, arrays["tokens"])
        targets = jnp.asarray(arrays["tokens"][:, 1:])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean()
        return loss, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, arrays["logits"], atol=TOLERANCE)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(optax.tree.norm(grads), arrays["grad_norm"], rtol=TOLERANCE)


def test_a_classifier_is_a_reward_model():
    model, params = imported("llama_classifier")
    assert isinstance(model, ScalarModel) and float(params["head"]["bias"][0]) == 0.0
    arrays = expected("llama_classifier")
    assert largest_difference("llama_classifier") < TOLERANCE

    def mean(params):
        return model.apply({"params": params}, arrays["tokens"])[:, -1].mean()

    grads = jax.jit(jax.grad(mean))(params)
    assert float(grads["head"]["bias"][0]) == pytest.approx(1.0)  # which transformers' has not
    grads["head"]["bias"] *= 0
    np.testing.assert_allclose(optax.tree.norm(grads), arrays["grad_norm"], rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("smollm2", {"rope_theta": 1e4}),
        ("qwen3", {"qk_norm": "after_rope"}),
        ("gpt2", {"activation": "gelu"}),
        ("mistral", {"norm_eps": 1e-3}),
    ],
)
def test_the_fixture_tells_options_apart(name, change):
    """A wrong option of the same parameters misses the tolerance by far."""
    source = hf.open_folder(FIXTURES / name, None)
    config = ModelConfig.build({**source.architecture, **change}, COMPUTE)
    logits = padded_logits(name, LanguageModel(config))["right"][
        :, : expected(name)["logits"].shape[1]
    ]
    off = np.abs(logits - expected(name)["logits"]).max(axis=(0, 2))
    assert off.max() > 5 * TOLERANCE
    if name == "llama3":  # positions do matter: all but the first two
        assert off[2:].min() > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize(
    "change", [{"unroll": 2}, {"remat": "full"}, {"remat": "dots", "unroll": 2}], ids=str
)
def test_scan_unroll_and_remat_change_nothing(name, change):
    model = LanguageModel(dataclasses.replace(imported(name)[0].config, **change))
    arrays = expected(name)
    right = padded_logits(name, model)["right"][:, : arrays["logits"].shape[1]]
    np.testing.assert_allclose(right, arrays["logits"], atol=TOLERANCE)


def test_fixtures_are_what_their_names_say():
    def fields(name):
        return model_of(hf.open_folder(FIXTURES / name, None)).config

    assert fields("qwen3").head_dim != fields("qwen3").d_model // fields("qwen3").num_heads
    assert fields("smollm2").tie_embeddings and not fields("llama3").tie_embeddings
    assert fields("llama3").rope_scaling.original_max_len < expected("llama3")["tokens"].shape[1]
    assert fields("qwen2").qkv_bias and fields("mistral").num_kv_heads == 2
    assert len(list((FIXTURES / "llama2").glob("model-*.safetensors"))) == 3
    assert imported("smollm2")[1]["backbone"]["embedding"].dtype == np.float32
    stored = hf.open_folder(FIXTURES / "smollm2", None).tensors["model.norm.weight"]
    assert stored.dtype == "BF16"


def test_tensors_arrive_as_shards():
    _, params = load(hf.open_folder(FIXTURES / "qwen2", None), (1, 1, 2, 1, 2))
    attention = params["backbone"]["layers"]["attention"]
    assert attention["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {s.data.shape for s in attention["query"]["kernel"].addressable_shards} == {(2, 16, 16)}
    assert {s.data.shape for s in attention["key"]["bias"].addressable_shards} == {(2, 8)}
    _, whole = imported("qwen2")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), whole)


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen3", "llama_classifier"])
def test_what_is_stored_is_what_was_read(name):
    """`store` undoes `load`: the tensors of the files, name by name and bit by bit."""
    source = hf.open_folder(FIXTURES / name, None)
    _, params = imported(name)
    params = jax.tree.map(jnp.asarray, params)
    if source.is_reward:
        del params["head"]["bias"]
    names = hf.weights(is_gpt2=name == "gpt2")
    shapes = weights.tensor_shapes(params, names)
    files = (FIXTURES / name).glob("*.safetensors")
    found = functools.reduce(dict.__or__, map(safetensors.numpy.load_file, files))
    assert sorted(shapes) == sorted(found)
    for key, value in zip(shapes, weights.store(params, names, list(shapes)), strict=True):
        assert value.shape == shapes[key]
        np.testing.assert_array_equal(value, found[key])


def changed(tmp_path, name, change):
    """A copy of a fixture of one file, with its tensors changed."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return hf.open_folder(folder, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.extra": np.zeros(3, np.float32)}), "also holds model.extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight is \(3,\), not \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
            "stored as I8",
        ),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, message):
    source = changed(tmp_path, "qwen3", change)
    with pytest.raises(UserError, match=message):
        load(source)


def test_a_copy_of_the_tied_table_is_taken_for_one_and_another_is_refused(tmp_path):
    def copy(tensors, factor):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * np.float32(factor)

    source = changed(tmp_path, "qwen2", lambda t: copy(t, 1.0))
    assert "lm_head.weight" not in source.tensors
    with pytest.raises(UserError, match="lm_head.weight differs"):
        changed(tmp_path / "other", "qwen2", lambda t: copy(t, 1.5))


def test_old_names_of_gpt2(tmp_path):
    """The first GPT-2 files: no prefix, and causal masks among the tensors."""

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.zeros((1, 1, 64, 64), np.uint8)

    _, params = load(changed(tmp_path, "gpt2", rename))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), imported("gpt2")[1])


def test_a_folder_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text((FIXTURES / "llama2" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        hf.open_folder(tmp_path, None)
    with pytest.raises(UserError, match="cannot read .*config.json"):
        hf.open_folder(tmp_path / "nowhere", None)
