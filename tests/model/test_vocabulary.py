"""The loss without logits of the whole vocabulary: equal to the one with them, and smaller."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from configs import common
from gptlab.model import sharding, vocabulary
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import rollout
from gptlab.train import losses
from tests import hlo

B, T, D, V = 8, 48, 32, 50
MESHES = {
    "data8": (1, 8, 1, 1, 1),
    "tensor2_fsdp2_data2": (1, 2, 2, 1, 2),
    "replica2_context2_tensor2": (2, 1, 1, 2, 2),
    "fsdp8": (1, 1, 8, 1, 1),
}


def make_mesh(shape):
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5)


@functools.cache
def example(vocab=V):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (B, T, D))
    table = jax.random.normal(keys[1], (vocab, D))
    targets = jax.random.randint(keys[2], (B, T), 0, vocab)
    weights = jax.random.normal(keys[3], (2, B, T))
    return hidden, table, targets, weights


def whole(hidden, table, targets, temperature=0.7):
    return vocabulary.of_logits(hidden @ table.T / temperature, targets)


def with_gradients(stats_of, hidden, table, targets, weights):
    """The four figures, and the gradients of a sum that weighs log_z and logit differently."""

    def total(hidden, table):
        stats = stats_of(hidden, table, targets)
        return jnp.sum(weights[0] * stats.log_z + weights[1] * stats.logit), stats

    (_, stats), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table)
    return stats, grads


def assert_close(got, want, rtol=1e-5, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize("chunk", [1, 16, 25, 1000])
def test_chunks_equal_the_whole_whether_or_not_they_divide_it(chunk):
    args = example()
    chunked = functools.partial(vocabulary.of_hidden, chunk=chunk, temperature=0.7)
    got = jax.jit(functools.partial(with_gradients, chunked))(*args)
    assert_close(got, jax.jit(functools.partial(with_gradients, whole))(*args))


def test_entropy_and_the_largest_logit_have_no_gradient():
    hidden, table, targets, _ = example()

    def loss(hidden, table):
        stats = vocabulary.of_hidden(hidden, table, targets, 16, 1.0)
        return jnp.sum(stats.entropy + stats.max_logit)

    for grad in jax.jit(jax.grad(loss, (0, 1)))(hidden, table):
        assert not grad.any()


def test_large_logits_stay_finite_and_what_is_not_finite_shows():
    hidden, table, targets, _ = example()
    stats = vocabulary.of_hidden(1e4 * hidden, table, targets, 16, 1.0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stats))
    stats = vocabulary.of_hidden(hidden.at[1, 2, 3].set(jnp.nan), table, targets, 16, 1.0)
    assert np.isnan(stats.log_z[1, 2]) and np.isnan(stats.log_z).sum() == 1


@pytest.mark.parametrize("name", sorted(MESHES))
def test_on_a_mesh_it_gives_the_same_and_gathers_no_logits(name):
    hidden, table, targets, weights = example(vocab=512)
    want = jax.jit(functools.partial(with_gradients, whole))(hidden, table, targets, weights)
    mesh = make_mesh(MESHES[name])
    _, data, fsdp, context, tensor = MESHES[name]
    specs = [("batch", "length", None), ("vocab", "embed")]  # of hidden and table
    rows = [
        NamedSharding(mesh, sharding.partition_spec(axes, sharding.MESH_AXES)) for axes in specs
    ]
    chunk = 48
    chunked = functools.partial(vocabulary.of_hidden, chunk=chunk, temperature=0.7)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(
            mesh, sharding.partition_spec(("batch", "length"), sharding.MESH_AXES)
        )
        args = (
            jax.device_put(hidden, rows[0]), jax.device_put(table, rows[1]),
            jax.device_put(targets, tokens), weights,
        )  # fmt: skip
        out = (None, tuple(rows))
        compiled = jax.jit(functools.partial(with_gradients, chunked), out_shardings=out)
        compiled = compiled.lower(*args).compile()
    assert_close(compiled(*args), want)
    text = compiled.as_text()
    parts = 8 // tensor
    assert max(hlo.sizes(text)) < B * T * 512 // 8, "a device's share of the logits exists"
    # What is gathered are chunks of the table, never more.
    gathered = hlo.results(text, "all-gather")
    assert all(size <= chunk * D for size in gathered) and bool(gathered) == (fsdp > 1)
    reduced = max(hlo.results(text, "all-reduce"), default=0)
    assert reduced <= max(3 * B * T * D // parts, 512 * D // tensor)
    assert not hlo.results(text, "all-to-all")


def test_no_array_of_all_logits_exists_and_memory_is_smaller():
    vocab, chunk = 4096, 256
    hidden, table, targets, weights = example(vocab=vocab)
    chunked = functools.partial(vocabulary.of_hidden, chunk=chunk, temperature=0.7)
    found = {}
    for name, fn in (("chunked", chunked), ("whole", whole)):
        step = jax.jit(functools.partial(with_gradients, fn))
        compiled = step.lower(hidden, table, targets, weights).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        found[name] = max(hlo.sizes(compiled.as_text())), memory
    assert found["whole"][0] >= B * T * vocab  # the test can tell
    assert found["chunked"][0] < B * T * vocab
    assert found["chunked"][1] < B * T * vocab * 4 < found["whole"][1] + 1


@pytest.mark.parametrize(("dtype", "tie"), [("float32", True), ("bfloat16", False)])
def test_the_models_loss_is_the_same_by_chunks(dtype, tie):
    compute = common.compute(dtype=dtype).to_dict()
    config = ModelConfig.build({**PRESETS["tiny"], "tie_embeddings": tie}, compute)
    model = LanguageModel(config)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    tokens, targets = (jax.random.randint(key, (4, 16), 0, config.vocab_size) for key in keys)
    segments = jnp.where(jnp.arange(16) < 6, 1, jnp.where(jnp.arange(16) < 13, 2, 0))
    segments = jnp.broadcast_to(segments, (4, 16))
    positions = jnp.broadcast_to(
        jnp.where(segments[0] == 2, jnp.arange(16) - 6, jnp.arange(16)), (4, 16)
    )
    mask = (segments > 0) * jnp.linspace(0.1, 1.0, 64).reshape(4, 16)

    def sums(params, model):
        stats = model.apply(
            {"params": params}, tokens, targets, positions, segments, method=model.score
        )
        loss, weight, figures = losses.cross_entropy_sums(stats, mask, 0.01)
        return loss / weight, (weight, figures)

    got, want = (
        jax.jit(jax.value_and_grad(sums, has_aux=True), static_argnums=1)(
            params, LanguageModel(dataclasses.replace(config, loss_chunk=chunk))
        )
        for chunk in (100, 0)
    )
    exact = dtype == "float32"
    assert_close(got, want, rtol=1e-5 if exact else 2e-2, atol=1e-6 if exact else 2e-3)


def test_rollouts_are_scored_alike_by_chunks():
    config = ModelConfig.build(PRESETS["tiny"], common.compute().to_dict())
    model = LanguageModel(config)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    response = jax.random.randint(jax.random.key(2), (4, 6), 0, 512)
    mask = (jnp.arange(6)[None] < jnp.array([6, 3, 1, 5])[:, None]).astype(jnp.float32)
    prompts, lengths = (
        jax.random.randint(jax.random.key(3), (4, 8), 0, 512),
        jnp.array([8, 2, 5, 1]),
    )
    tokens, total = rollout.join(prompts, lengths, response, mask, 0)
    done = jnp.ones((4,), bool)
    samples = rollout.Samples(tokens, lengths, total, total, response, mask, done, mask)

    def loss(params, model):
        logprobs, entropy = rollout.response_logprobs(model, params, samples, 0.7)
        return jnp.sum(logprobs**2), (logprobs, entropy)

    got, want = (
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
            params, LanguageModel(dataclasses.replace(config, loss_chunk=chunk))
        )
        for chunk in (100, 0)
    )
    assert_close(got, want, rtol=1e-4, atol=2e-4)
