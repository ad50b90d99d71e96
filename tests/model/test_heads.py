"""Reward and value heads."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.model.heads import ScalarModel, scalar_from_language
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
CONFIG = ModelConfig.build(PRESETS["tiny"], COMPUTE)


@functools.partial(jax.jit, static_argnums=0)
def create(model, seed=0):
    return nn.unbox(init_params(model, jax.random.key(seed)))


def test_reward_head_standard_deviation():
    """1/sqrt(D+1), over many seeds."""
    heads = [create(ScalarModel(CONFIG), seed)["head"] for seed in range(40)]
    weights = np.concatenate([np.ravel(head["kernel"]) for head in heads])  # 1,280 draws
    assert abs(weights.std() * 33**0.5 - 1) < 0.08
    assert abs(weights.mean()) < 0.02
    assert all(head["bias"] == 0 for head in heads)


def test_zero_head_predicts_zero():
    model = ScalarModel(CONFIG, init_scheme="zero")
    values = jax.jit(model.apply)({"params": create(model)}, jnp.ones((2, 8), jnp.int32))
    assert values.shape == (2, 8) and values.dtype == jnp.float32
    assert not values.any()


def test_unknown_init_is_refused():
    with pytest.raises(ValueError, match="init_scheme"):
        create(ScalarModel(CONFIG, init_scheme="ones"))


@pytest.mark.parametrize("tied", [True, False])
def test_scalar_from_language(tied):
    """The scalar model reads exactly the language model's final hidden state."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    language, scalar = LanguageModel(config), ScalarModel(config)
    lm_params = create(language)
    params = scalar_from_language(lm_params, create(scalar, 1)["head"])
    assert jax.tree.structure(params) == jax.tree.structure(create(scalar))
    tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, 512)
    hidden = jax.jit(functools.partial(language.apply, method=language.hidden))(
        {"params": lm_params}, tokens
    )
    expected = hidden @ params["head"]["kernel"]
    values = jax.jit(scalar.apply)({"params": params}, tokens)
    np.testing.assert_allclose(values, expected[..., 0], atol=1e-5)
    assert values.std() > 0.1


def test_reward_at_the_last_real_token_ignores_padding():
    """More padding changes nothing."""
    model = ScalarModel(CONFIG)
    params = create(model)
    tokens = jax.random.randint(jax.random.key(3), (1, 6), 0, 512)
    short = jax.jit(model.apply)({"params": params}, tokens)[0, 5]
    padded = jnp.pad(tokens, ((0, 0), (0, 10)), constant_values=7)
    segments = (jnp.arange(16) < 6).astype(jnp.int32)[None]
    long = jax.jit(model.apply)({"params": params}, padded, None, segments)[0, 5]
    np.testing.assert_allclose(short, long, atol=1e-5)
