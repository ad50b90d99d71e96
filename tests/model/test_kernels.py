"""Splash and cuDNN attention: the same numbers where a CPU can tell, and refusals before compiling.

Splash runs in Pallas' interpreter, and is lowered for a TPU; cuDNN's call is built for a GPU.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import common
from gptlab.model import attention as attn
from gptlab.model import kernels, sharding
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError

B, T, H, N, K = 2, 256, 4, 2, 64
LENGTH = 384  # of the model's rows: no other dimension has this size


def make_mesh(**sizes):
    shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5)


@functools.cache
def example(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, H, K), dtype)
    k, v = (jax.random.normal(key, (B, N, T, K), dtype) for key in keys[1:])
    at = jnp.arange(T)
    segments = jnp.stack([1 + (at >= 100), jnp.where(at < 200, 1, 0)]).astype(jnp.int32)
    return q, k, v, segments


def loss_and_grads(attend, q, k, v, segments):
    def loss(q, k, v):
        out = attend(q, k, v, segments)
        out = jnp.where((segments > 0)[:, :, None, None], out, 0.0)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


def plain(q, k, v, segments):
    return attn.attention(q, k, v, attn.causal_mask(segments, q.shape[1]))


def test_splash_equals_plain_attention_in_value_and_gradient():
    attends = functools.partial(kernels.splash, interpret=True), plain
    got, want = (jax.jit(functools.partial(loss_and_grads, f))(*example()) for f in attends)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def model(attention, dtype="bfloat16"):
    compute = common.compute(dtype=dtype, attention=attention).to_dict()
    architecture = {**PRESETS["tiny"], "head_dim": 64, "max_len": LENGTH}
    return LanguageModel(ModelConfig.build(architecture, compute))


def as_if_on(monkeypatch, platform):
    monkeypatch.setattr(sharding, "platform", lambda: platform)


def train_step(model):
    """jitted loss and gradients of 8 packed rows."""

    def loss(params, tokens, segments):
        return jnp.square(model.apply({"params": params}, tokens, None, segments)).mean()

    return jax.jit(jax.grad(loss))


def test_splash_is_lowered_for_a_tpu_under_a_mesh(monkeypatch):
    as_if_on(monkeypatch, "tpu")
    splash = model("splash")
    params = jax.eval_shape(lambda key: nn.unbox(init_params(splash, key)), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        traced = train_step(splash).trace(params, tokens, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # Forward, and backward for the queries and for keys and values.
    assert text.count("tpu_custom_call") >= 3
    assert f"x{LENGTH}x{LENGTH}x" not in text, "scores of the whole square"


def test_cudnn_is_called_for_a_gpu(monkeypatch):
    """A CPU cannot ask cuDNN for its version; the call itself is built as on a GPU."""
    as_if_on(monkeypatch, "gpu")
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    cudnn = model("cudnn")
    params = jax.eval_shape(lambda key: nn.unbox(init_params(cudnn, key)), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    text = str(train_step(cudnn).trace(params, tokens, tokens).jaxpr)
    assert "dot_product_attention_fwd" in text and "dot_product_attention_bwd" in text


@pytest.mark.parametrize(
    ("platform", "change", "words"),
    [
        ("cpu", {"attention": "splash"}, "'splash' runs on a tpu, and this is a cpu"),
        ("gpu", {"attention": "splash"}, "'splash' runs on a tpu, and this is a gpu"),
        ("cpu", {"attention": "cudnn"}, "'cudnn' runs on a gpu, and this is a cpu"),
        ("tpu", {"attention": "cudnn"}, "'cudnn' runs on a gpu, and this is a tpu"),
        ("gpu", {"attention": "cudnn", "dtype": "float32"}, "needs config.compute.dtype"),
        ("gpu", {"attention": "cudnn", "head_dim": 20}, "head_dim, here 20"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_when_the_model_is_made(
    monkeypatch, platform, change, words
):
    as_if_on(monkeypatch, platform)
    wrong = LanguageModel(dataclasses.replace(model("xla").config, **change))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(functools.partial(init_params, wrong), jax.random.key(0))


def test_splash_wants_lengths_of_whole_blocks_and_whole_sequences(monkeypatch):
    as_if_on(monkeypatch, "tpu")
    splash = model("splash")
    params = jax.eval_shape(lambda key: nn.unbox(init_params(splash, key)), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 200), jnp.int32)
    with pytest.raises(UserError, match="multiple of 128 tokens, not 200"):
        train_step(splash).trace(params, tokens, tokens)
    with jax.set_mesh(make_mesh(data=4, context=2)), pytest.raises(UserError, match="context=2"):
        jax.eval_shape(functools.partial(init_params, splash), jax.random.key(0))


def test_the_platform_is_that_of_the_mesh_in_use():
    assert sharding.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.platform() == "tpu"
