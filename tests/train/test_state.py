"""States are born sharded, and moments lie where their parameters lie."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from gptlab.model import presets, transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train.optimizer import make_optimizer

MODEL = LanguageModel(ModelConfig.build(presets.PRESETS["tiny"], common.compute().to_dict()))


def init(key):
    return transformer.init_params(MODEL, key)


def make_state():
    mesh = mesh_lib.make_mesh(common.mesh(data=2, fsdp=2, tensor=2))
    tx, _ = make_optimizer(common.adamw(0.1), 10)
    with jax.set_mesh(mesh):
        return mesh, tx, *state_lib.init_state(init, tx, mesh, jax.random.key(0))


def shard_shape(x):
    return x.addressable_shards[0].data.shape


def test_parameters_and_moments_are_sharded():
    _, _, state, shardings = make_state()
    layers = state.params["backbone"]["layers"]
    up = layers["feed_forward"]["up"]["kernel"]  # [L, D, F], D over fsdp and F over tensor
    assert up.shape == (2, 32, 64) and shard_shape(up) == (2, 16, 32)
    embedding = state.params["backbone"]["embedding"]  # [V, D]
    assert shard_shape(embedding) == (256, 16)
    adam = state.opt_state[1]
    for moments in (adam.mu, adam.nu):
        shapes = jax.tree.map(shard_shape, (moments, state.params))
        assert shapes[0] == shapes[1]
    assert state.step == 0 and adam.count.sharding.is_fully_replicated
    same = jax.tree.map(lambda x, s: x.sharding == s, state, shardings)
    assert all(jax.tree.leaves(same))


def test_sharding_does_not_change_the_initial_values():
    _, _, state, _ = make_state()
    plain = nn.unbox(init(jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, plain)


def test_a_state_around_given_parameters_is_the_same():
    mesh, tx, state, shardings = make_state()
    with jax.set_mesh(mesh):
        again, again_shardings = state_lib.state_from_params(state.params, tx, mesh)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert jax.tree.map(shard_shape, state) == jax.tree.map(shard_shape, again)
    assert shardings == again_shardings


def test_the_digest_of_a_large_array_is_taken_part_by_part(monkeypatch):
    tree = {"a": jnp.arange(70.0).reshape(7, 10), "b": jnp.float32(3), "c": jnp.zeros((0, 2))}
    whole, gathered = state_lib.digest(tree), []
    monkeypatch.setattr(state_lib, "_GATHERED_BYTES", 100)  # two rows and a half
    original = state_lib.weights.whole
    monkeypatch.setattr(
        state_lib.weights, "whole", lambda x: gathered.append(x.shape) or original(x)
    )
    assert state_lib.digest(tree) == whole
    assert gathered == [(2, 10), (2, 10), (2, 10), (1, 10), (), (0, 2)]
    layers = {"a": jnp.arange(120.0).reshape(2, 6, 10)}  # a row alone is too large
    gathered.clear()
    in_parts = state_lib.digest(layers)
    assert gathered == [(1, 2, 10)] * 6
    monkeypatch.undo()
    assert state_lib.digest(layers) == in_parts


def test_the_digest_sees_values_and_names_but_not_the_layout():
    _, _, state, _ = make_state()
    host = jax.tree.map(lambda x: jnp.array(np.asarray(x)), state.params)
    assert state_lib.digest(state.params) == state_lib.digest(host)
    assert state_lib.digest({"a": jnp.ones((2,))}) != state_lib.digest({"b": jnp.ones((2,))})
    changed = jax.tree.map(lambda x: x, host)
    changed["backbone"]["embedding"] = host["backbone"]["embedding"].at[0, 0].add(1e-6)
    assert state_lib.digest(host) != state_lib.digest(changed)
