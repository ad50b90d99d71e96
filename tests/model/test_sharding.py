"""The sharding table on 8 virtual devices: shapes of shards, equal results, refusals."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptlab.model import decode, sharding, transformer
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError
from gptlab.train.hlo import Program
from tests import hlo

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
# 8 heads and 8 key heads: divisible by every axis below.
WIDE = dataclasses.replace(
    ModelConfig.build(PRESETS["tiny"], COMPUTE), num_heads=8, num_kv_heads=8, head_dim=4
)
MESHES = {
    "data8": (1, 8, 1, 1, 1),
    "fsdp8": (1, 1, 8, 1, 1),
    "tensor8": (1, 1, 1, 1, 8),
    "data2_fsdp2_tensor2": (1, 2, 2, 1, 2),
    "replica2_context2_tensor2": (2, 1, 1, 2, 2),
}
# Shard shapes of (embedding [512, 32], query [2, 32, 32], down [2, 64, 32], final norm [32]).
SHARDS = {
    "data8": [(512, 32), (2, 32, 32), (2, 64, 32), (32,)],
    "fsdp8": [(512, 4), (2, 4, 32), (2, 64, 4), (4,)],
    "tensor8": [(64, 32), (2, 32, 4), (2, 8, 32), (32,)],
    "data2_fsdp2_tensor2": [(256, 16), (2, 16, 16), (2, 32, 16), (16,)],
    "replica2_context2_tensor2": [(256, 32), (2, 32, 16), (2, 32, 32), (32,)],
}


def make_mesh(shape):
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 5)


def sharded(mesh, *axes):
    return NamedSharding(mesh, sharding.partition_spec(axes, sharding.MESH_AXES))


def create(model, mesh):
    init = functools.partial(init_params, model)
    with jax.set_mesh(mesh):
        shardings = sharding.logical_to_sharding(mesh, jax.eval_shape(init, jax.random.key(0)))
        return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(jax.random.key(0))


def loss_and_grads(model, params, tokens):
    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return losses.mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens)


@functools.cache
def on_one_device():
    model = LanguageModel(WIDE)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 512)
    return model, tokens, loss_and_grads(model, params, tokens)


@pytest.mark.parametrize("name", sorted(MESHES))
def test_shard_shapes_and_equality_with_one_device(name):
    model, tokens, ((loss, logits), grads) = on_one_device()
    mesh = make_mesh(MESHES[name])
    params = create(model, mesh)
    layers = params["backbone"]["layers"]
    leaves = [
        params["backbone"]["embedding"],
        layers["attention"]["query"]["kernel"],
        layers["feed_forward"]["down"]["kernel"],
        params["backbone"]["final_norm"]["scale"],
    ]
    assert [x.addressable_shards[0].data.shape for x in leaves] == SHARDS[name]
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, sharded(mesh, "batch", "length"))
        (got_loss, got_logits), got_grads = loss_and_grads(model, params, tokens)
    _, data, fsdp, context, tensor = MESHES[name]
    rows = 8 // (MESHES[name][0] * data * fsdp)
    shard = got_logits.addressable_shards[0].data.shape
    assert shard == (rows, 16 // context, 512 // tensor)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got_logits, logits, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), got_grads, grads
    )


@functools.cache
def decoded(name, rows=8):
    """(replies, products of all devices) of so many rows on a mesh; without a name, on none."""
    model, tokens, _ = on_one_device()
    sampling = decode.Sampling(1.0, 0, 1.0, 6, ())
    lengths = jnp.array([16, 3, 9, 1, 5, 16, 2, 7])
    inputs = [x[:rows] for x in (tokens, lengths, jax.random.split(jax.random.key(2), 8))]
    if name is None:
        params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
        compiled = decode.generate.lower(model, params, *inputs, sampling).compile()
        return compiled(params, *inputs), Program(compiled.as_text()).flops
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, sharding.batch_spec(x.shape, ("batch",), mesh)))
            for x in inputs
        ]
        params = create(model, mesh)
        compiled = decode.generate.lower(model, params, *placed, sampling).compile()
        return compiled(params, *placed), 8 * Program(compiled.as_text()).flops


@pytest.mark.parametrize("name", ["data8", "data2_fsdp2_tensor2", "replica2_context2_tensor2"])
def test_decoding_on_a_mesh_draws_the_same_tokens(name):
    """And multiplies nothing twice: `context`, which has no sequence to split, splits rows."""
    (alone, products), (together, spread) = decoded(None), decoded(name)
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    np.testing.assert_allclose(alone.logprobs, together.logprobs, atol=1e-5)
    assert spread == products > 0


def test_rows_that_context_does_not_divide_are_decoded_by_each_part_of_it():
    """Two rows are split over `replica`; before, what all axes did not divide lay everywhere."""
    (alone, products), (together, spread) = (
        decoded(name, 2) for name in (None, "replica2_context2_tensor2")
    )
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    assert spread == 2 * products


def test_weights_that_stay_split_draw_the_same_tokens_in_less_memory():
    """What looks at a model while it trains may not hold all of its weights on each device."""
    model, tokens, _ = on_one_device()
    sampling = decode.Sampling(1.0, 0, 1.0, 6, ())
    inputs = tokens[:3], jnp.array([16, 3, 9]), jax.random.split(jax.random.key(2), 3)
    mesh, found, memory = make_mesh(MESHES["fsdp8"]), {}, {}
    with jax.set_mesh(mesh):
        params = create(model, mesh)
        for gather in (True, False):
            lowered = decode.generate.lower(model, params, *inputs, sampling, gather=gather)
            compiled = lowered.compile()
            found[gather] = compiled(params, *inputs)
            memory[gather] = compiled.memory_analysis().temp_size_in_bytes
    np.testing.assert_array_equal(found[True].tokens, found[False].tokens)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert memory[True] - memory[False] > whole / 2


def test_the_cache_follows_the_table():
    model, tokens, _ = on_one_device()
    mesh = make_mesh(MESHES["data2_fsdp2_tensor2"])
    params = create(model, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(decode.prefill, static_argnums=(0, 4))
        cache, _ = step(model, params, tokens, jnp.full((8,), 16), 24)
    assert cache[0][0].shape == (8, 8, 24, 4)
    assert cache[0][0].addressable_shards[0].data.shape == (2, 4, 24, 4)
    mesh = make_mesh(MESHES["replica2_context2_tensor2"])
    with jax.set_mesh(mesh):
        step = jax.jit(decode.prefill, static_argnums=(0, 4))
        cache, _ = step(model, create(model, mesh), tokens, jnp.full((8,), 16), 24)
    assert cache[0][0].addressable_shards[0].data.shape == (2, 4, 24, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 500}, "dimension 'vocab' of size 500"),
        ({"d_ff": 60}, "ff' of size 60"),
        ({"num_kv_heads": 2, "head_dim": 16}, "dimension 'act_heads' of size 2"),
    ],
)
def test_indivisible_shapes_are_refused(change, words):
    """Never replicated silently: the user hears which dimension and which axis."""
    model = LanguageModel(dataclasses.replace(WIDE, **change))
    with pytest.raises(UserError, match=words) as error:
        create(model, make_mesh(MESHES["tensor8"]))
    assert "'tensor' of size 8" in str(error.value)


def test_the_parameter_at_fault_is_named():
    model = LanguageModel(dataclasses.replace(WIDE, d_ff=60))
    boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    with pytest.raises(UserError, match="parameter backbone/layers/feed_forward/down/kernel"):
        sharding.logical_to_sharding(make_mesh(MESHES["tensor8"]), boxed)


def test_a_batch_the_mesh_does_not_divide_is_left_whole():
    """One row of chat on an eight-device mesh works."""
    model, tokens, _ = on_one_device()
    mesh = make_mesh(MESHES["data8"])
    params = create(model, mesh)
    with jax.set_mesh(mesh):
        logits = jax.jit(model.apply)({"params": params}, tokens[:1])
    assert logits.shape == (1, 16, 512)


def test_boxes_in_an_optimizer_state_are_sharded_too():
    model, _, _ = on_one_device()
    mesh = make_mesh(MESHES["fsdp8"])
    tx = optax.adam(1e-3)
    state = jax.eval_shape(lambda key: tx.init(init_params(model, key)), jax.random.key(0))
    shardings = sharding.logical_to_sharding(mesh, state)
    moments = shardings[0].mu["backbone"]
    assert moments["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings[0].count.spec == PartitionSpec()


def test_every_parameter_of_every_option_has_a_rule():
    for name in ("tiny", "tiny_gpt2", "tiny_qwen3"):
        model = LanguageModel(ModelConfig.build(PRESETS[name], COMPUTE))
        boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        assert all(isinstance(box, nn.Partitioned) for box in boxes)
        assert all(name in sharding.RULES for box in boxes for name in box.names if name)


@pytest.mark.parametrize("name", sorted(MESHES))
def test_the_products_own_gradient_talks_no_more_than_jaxs(name, monkeypatch):
    """model/product.py turns a product round for a CPU's sake: on a mesh nothing may come of it."""
    model, tokens, _ = on_one_device()
    mesh, found = make_mesh(MESHES[name]), []
    params = create(model, mesh)

    def plain(x, kernel, dtype):
        return jnp.matmul(x, kernel, preferred_element_type=dtype)

    for fn in (transformer.product, plain):
        monkeypatch.setattr(transformer, "product", fn)
        with jax.set_mesh(mesh):
            placed = jax.device_put(tokens, sharded(mesh, "batch", "length"))
            shardings = jax.tree.map(lambda x: x.sharding, params)
            step = jax.jit(
                jax.grad(lambda p, x: jnp.square(model.apply({"params": p}, x)).mean()),
                out_shardings=shardings,
            )
            text = step.lower(params, placed).compile().as_text()
        found.append(text)
    for kind in hlo.COLLECTIVES:
        own, jaxs = (hlo.results(text, kind) for text in found)
        assert len(own) <= len(jaxs) and sum(own) <= sum(jaxs), kind
