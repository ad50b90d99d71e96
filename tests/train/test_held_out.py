"""Held-out figures against NumPy, whatever the mesh and the padding."""

import jax
import numpy as np
import pytest

from configs import common
from gptlab.data.batches import TokenBatch
from gptlab.model import presets, transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib
from gptlab.train.held_out import make_held_out

MODEL = LanguageModel(ModelConfig.build(presets.PRESETS["tiny"], common.compute().to_dict()))


def batch(seed, rows=8, length=6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 512, (rows, length + 1)).astype(np.int32)
    mask = (rng.random((rows, length)) < 0.6).astype(np.float32)
    ones = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, ones, positions)


def test_loss_accuracy_and_bits_per_byte():
    params = transformer.nn.unbox(transformer.init_params(MODEL, jax.random.key(0)))
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params)
    token_bytes = np.arange(400) % 7  # fewer than the model's vocabulary
    mesh = mesh_lib.make_mesh(common.mesh(data=2, tensor=2))
    batches = [batch(0), batch(1)]
    with jax.set_mesh(mesh):
        got = make_held_out(MODEL, mesh, token_bytes, "x")(params, batches)
    nats = tokens = right = num_bytes = 0.0
    for b in batches:
        logits = np.asarray(MODEL.apply({"params": params}, b.tokens), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for r, t in zip(*np.nonzero(b.loss_mask), strict=True):
            target = b.targets[r, t]
            nats -= logprobs[r, t, target]
            right += logits[r, t].argmax() == target
            num_bytes += token_bytes[target] if target < 400 else 0
            tokens += 1
    assert got.keys() == {
        f"eval/x/{n}" for n in ("loss", "perplexity", "accuracy", "bits_per_byte")
    }
    np.testing.assert_allclose(got["eval/x/loss"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(got["eval/x/perplexity"], np.exp(nats / tokens), rtol=1e-4)
    np.testing.assert_allclose(got["eval/x/accuracy"], right / tokens, rtol=1e-6)
    np.testing.assert_allclose(got["eval/x/bits_per_byte"], nats / np.log(2) / num_bytes, rtol=1e-5)


def test_no_token_to_predict_is_a_users_mistake():
    mesh = mesh_lib.make_mesh(common.mesh())
    with pytest.raises(UserError, match="no token to predict"):
        make_held_out(MODEL, mesh, np.ones(512), "x")({}, [])
