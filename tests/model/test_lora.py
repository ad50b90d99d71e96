"""Low-rank adapters: what they change, what stands, and what of both a function sees."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from configs import common
from gptlab.model import lora
from gptlab.model.heads import ScalarModel
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib
from gptlab.train import state, step

ALL = ("query", "key", "value", "out", "up", "gate", "down")
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 50


def config_of(preset="tiny", **compute):
    return ModelConfig.build(PRESETS[preset], common.compute(**compute).to_dict())


@functools.cache
def plain(preset="tiny", kind=LanguageModel):
    """(model, its parameters)."""
    model = kind(config_of(preset))
    mesh = mesh_lib.make_mesh(common.mesh(), jax.devices()[:1])
    init_fn = functools.partial(init_params, model)
    _, shardings = state.param_shardings(init_fn, mesh)
    return model, jax.device_put(nn.unbox(init_fn(jax.random.key(0))), shardings)


def learnt(given=None, preset="tiny", kind=LanguageModel):
    """(model, parameters with adapters as if they had learnt)."""
    model, params = plain(preset, kind)
    given = given or common.lora(3, targets=ALL)
    flat = flatten_dict(lora.add(params, given, jax.random.key(1)))
    keys = iter(jax.random.split(jax.random.key(2), len(flat)))
    for path in sorted(flat):
        if path[-1] == "lora_b":
            flat[path] = jax.random.normal(next(keys), flat[path].shape) * 0.1
    return model, lora.unflatten_dict(flat)


def run(model, params):
    return model.apply({"params": params}, TOKENS)


def test_fresh_adapters_change_nothing():
    model, params = plain()
    added = lora.add(params, common.lora(3, targets=ALL), jax.random.key(1))
    np.testing.assert_array_equal(run(model, added), run(model, params))
    assert lora.add(params, common.lora(0), jax.random.key(1)) is params


def test_as_many_are_trained_as_are_counted():
    given = common.lora(3, targets=ALL)
    model, params = learnt(given)
    trained, frozen = lora.split(params)
    assert {p[-1] for p in flatten_dict(trained)} == {"lora_a", "lora_b"}
    assert sum(x.size for x in jax.tree.leaves(trained)) == lora.num_params(given, model.config)
    assert sum(x.size for x in jax.tree.leaves(lora.merge(params))) == model.config.num_params()
    rejoined = flatten_dict(lora.join(trained, frozen))
    assert rejoined.keys() == flatten_dict(params).keys()
    assert all(rejoined[path] is x for path, x in flatten_dict(params).items())


@pytest.mark.parametrize("preset", ["tiny", "tiny_gpt2", "tiny_qwen3"])
def test_merged_is_the_adapted_model(preset):
    targets = [name for name in ALL if name in config_of(preset).kernel_shapes()]
    model, params = learnt(common.lora(3, alpha=5.0, targets=targets), preset)
    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(plain(preset)[1])
    before, after = run(model, plain(preset)[1]), run(model, params)
    assert np.abs(before - after).max() > 0.05
    np.testing.assert_allclose(run(model, merged), after, atol=2e-5)
    kernel = merged["backbone"]["layers"]["attention"]["query"]["kernel"][1]
    beside = jax.tree.map(lambda x: x[1], params["backbone"]["layers"]["attention"]["query"])
    expected = beside["kernel"] + 5.0 / 3 * np.asarray(beside["lora_a"]) @ beside["lora_b"]
    np.testing.assert_allclose(kernel, expected, atol=1e-6)


def test_switched_off_is_the_model_of_before_bit_for_bit():
    model, params = learnt()
    standing = lora.off(params)
    assert jax.tree.structure(standing) == jax.tree.structure(params)
    np.testing.assert_array_equal(run(model, standing), run(model, plain()[1]))
    flat = flatten_dict(params)
    shared = [p for p, x in flatten_dict(standing).items() if x is flat[p]]
    assert len(flat) - len(shared) == len(ALL)  # no copy but of the scales


def losses(model, params, batch, rng):
    del rng
    loss = jnp.sum(jnp.square(model.apply({"params": params}, batch)))
    return loss, (jnp.float32(batch.size), {})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_the_chain_rules_of_the_full_ones(accumulation):
    """dA = s dW B^T and dB = s A^T dW, of the gradient of merged weights."""
    model, params = learnt(common.lora(3, alpha=5.0, targets=("query", "down")))
    loss_fn = functools.partial(losses, model)
    with jax.default_matmul_precision("highest"):
        key = jax.random.key(0)
        grads, *_ = step.accumulate(loss_fn, params, TOKENS, accumulation, key)
        full, *_ = step.accumulate(loss_fn, lora.merge(params), TOKENS, accumulation, key)
    grads, full, flat = flatten_dict(grads), flatten_dict(full), flatten_dict(params)
    assert len(grads) == 4
    for path, d_kernel in full.items():
        a, b = (*path[:-1], "lora_a"), (*path[:-1], "lora_b")
        if a not in grads:
            continue
        d_a = 5 / 3 * np.einsum("lio,lro->lir", d_kernel, flat[b])
        d_b = 5 / 3 * np.einsum("lir,lio->lro", flat[a], d_kernel)
        np.testing.assert_allclose(grads[a], d_a, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(grads[b], d_b, rtol=1e-3, atol=1e-6)


def test_a_scalar_models_head_is_trained():
    _, params = learnt(kind=ScalarModel)
    trained, frozen = lora.split(params)
    assert set(trained["head"]) == {"kernel", "bias"} and "head" not in frozen


def test_frozen_matrices_in_bfloat16():
    """Gains and biases stay, and so does what is trained."""
    given = common.lora(3, targets=("value",), frozen_dtype="bfloat16")
    model, params = plain(kind=ScalarModel)
    added = lora.add(jax.tree.map(jnp.copy, params), given, jax.random.key(1))
    dtypes = {path: x.dtype for path, x in flatten_dict(added).items()}
    assert dtypes["backbone", "layers", "feed_forward", "down", "kernel"] == jnp.bfloat16
    assert dtypes["backbone", "embedding"] == jnp.bfloat16
    for path, dtype in dtypes.items():
        if path[-1] == "scale" or path[-1].startswith("lora") or path[0] == "head":
            assert dtype == jnp.float32, path
    np.testing.assert_allclose(run(model, added), run(model, params), atol=0.02)
    assert {x.dtype for x in jax.tree.leaves(lora.merge(added))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 4, "alpha": 0.0}, "alpha=0.0"),
        ({"rank": 4, "targets": ("querry",)}, "no 'querry'"),
        ({"rank": 4, "targets": ("gate",)}, "no 'gate'"),
        ({"rank": 4, "targets": ()}, "must name some of"),
        ({"rank": 4, "frozen_dtype": "int8"}, "'int8'"),
    ],
)
def test_bad_values_are_named(given, message):
    config = common.lora()
    config.update(given)
    with pytest.raises(UserError, match=message):
        lora.check(config, config_of("tiny_gpt2"))


@pytest.mark.parametrize(
    "arguments, refused",
    [
        (["--config.lora.alpha=8"], "--config.lora.alpha means nothing"),
        (["--config.lora.targets", "('up',)"], "--config.lora.targets means nothing"),
        (["--config.lora.alpha=8", "--config.lora.rank=0"], None),  # meant: the baseline of a sweep
        (["--config.optimizer.lr=1"], None),
    ],
)
def test_a_key_that_nobody_would_read_is_not_accepted(monkeypatch, arguments, refused):
    monkeypatch.setattr(sys, "argv", ["sft", "--config=configs/sft.py", *arguments])
    if refused is None:
        lora.check(common.lora(), config_of())
        return
    with pytest.raises(UserError, match=re.escape(refused)):
        lora.check(common.lora(), config_of())


def test_flops_a_token():
    """Less than a full training's, by 2 for every parameter that stands."""
    config, given = config_of(), common.lora(2, targets=("query", "value"))
    attention = 12 * config.num_layers * config.d_attn * 32
    expected = 4 * config.num_params() + attention + 6 * lora.num_params(given, config)
    assert lora.flops_per_token(given, config, 32) == expected
    assert lora.flops_per_token(common.lora(), config, 32) == config.flops_per_token(32)
