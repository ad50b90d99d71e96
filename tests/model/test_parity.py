"""The transformer against Hugging Face's, through fixtures made by make_parity_fixtures.py."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from gptlab.model.transformer import LanguageModel, ModelConfig

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def golden(request):
    return load(request.param)


def load(family):
    """(config, params, arrays) of a fixture."""
    with np.load(Path(__file__).parent / "fixtures" / f"{family}.npz") as file:
        arrays = dict(file)
    config = ModelConfig.build(json.loads(str(arrays.pop("architecture"))), COMPUTE)
    flat = {tuple(k.split("/")[1:]): v for k, v in arrays.items() if k.startswith("params/")}
    return config, unflatten_dict(flat), arrays


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, tokens, positions=None, segment_ids=None):
    return LanguageModel(config).apply({"params": params}, tokens, positions, segment_ids)


def error(config, params, arrays):
    logits = forward(config, params, arrays["tokens"])
    return float(np.abs(logits - arrays["logits"]).max())


def test_logits(golden):
    config, params, arrays = golden
    assert error(config, params, arrays) < TOLERANCE
    assert arrays["logits"].std() > 1  # not all near zero


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits(golden, side):
    """Positions and mask come from the padding: either side gives the reference's logits."""
    config, params, arrays = golden
    mask = arrays[f"{side}_mask"]
    logits = forward(config, params, arrays[f"{side}_tokens"], arrays[f"{side}_positions"], mask)
    logits = np.asarray(logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], arrays[f"{side}_logits"][real], atol=TOLERANCE)
    np.testing.assert_allclose(
        logits[real].reshape(arrays["logits"].shape), arrays["logits"], atol=TOLERANCE
    )


def test_loss_and_gradient_norm(golden):
    config, params, arrays = golden

    def loss_fn(params):
        logits = forward(config, params, arrays["tokens"])
        targets = jnp.asarray(arrays["tokens"][:, 1:])
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(optax.tree.norm(grads), arrays["grad_norm"], rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", {"activation": "gelu"}),
        ("gpt2", {"norm_eps": 1e-3}),
        ("llama", {"rope_theta": 5e5}),
        ("qwen3", {"qk_norm": "after_rope"}),
    ],
)
def test_the_fixture_tells_options_apart(family, change):
    """A wrong option of the same parameters misses the tolerance by far."""
    config, params, arrays = load(family)
    assert error(dataclasses.replace(config, **change), params, arrays) > 5 * TOLERANCE


def test_scan_unroll_and_remat_change_nothing(golden):
    config, params, arrays = golden
    for change in ({"unroll": 2}, {"remat": "full"}, {"remat": "dots", "unroll": 2}):
        assert error(dataclasses.replace(config, **change), params, arrays) < TOLERANCE
