"""The optimiser against hand-computed updates, the decay mask and every schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import common
from gptlab.model import presets, transformer
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib
from gptlab.train import optimizer
from gptlab.train import state as state_lib
from gptlab.train import step as step_lib


def config(**overrides):
    plain = {"weight_decay": 0.0, "clip_norm": None, "schedule": "constant"}
    return common.adamw(0.1, **{**plain, **overrides})


def updates(config, params, grads, total_steps=10):
    """The parameters after each of the given gradients."""
    tx, _ = optimizer.make_optimizer(config, total_steps)
    state, trace = tx.init(params), []
    for grad in grads:
        change, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, change)
        trace.append(params)
    return trace


@pytest.mark.parametrize("style", ["torch", "tensorflow"])
def test_adam_by_hand_with_an_epsilon_that_matters(style):
    b1, b2, eps, lr = 0.9, 0.95, 0.3, 0.1
    grads = [0.5, -2.0, 1.0]
    got = updates(
        config(eps=eps, adam_eps_style=style),
        {"kernel": jnp.zeros((1,))},
        [{"kernel": jnp.array([g])} for g in grads],
    )
    m = v = x = 0.0
    for t, (g, params) in enumerate(zip(grads, got, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if style == "torch":
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        else:
            step = np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        x -= lr * step
        np.testing.assert_allclose(params["kernel"], [x], rtol=1e-5)


@pytest.mark.parametrize("style", ["torch", "tensorflow"])
def test_a_first_moment_in_bfloat16_moves_the_parameters_nearly_alike(style):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    grads = [{"kernel": jax.random.normal(jax.random.key(i), (8, 4))} for i in range(1, 6)]
    rounded = config(adam_eps_style=style, mu_dtype="bfloat16")
    exact = updates(config(adam_eps_style=style), params, grads)[-1]["kernel"]
    near = updates(rounded, params, grads)[-1]["kernel"]
    moved = np.abs(exact - params["kernel"]).mean()
    assert 0 < np.abs(near - exact).max() < 0.02 * moved
    state = optimizer.make_optimizer(rounded, 10)[0].init(params)
    tx, _ = optimizer.make_optimizer(rounded, 10)
    _, after = tx.update(grads[0], state, params)
    for each in (state, after):
        (moments,) = [x for x in each if hasattr(x, "mu")]
        assert moments.mu["kernel"].dtype == jnp.bfloat16
        assert moments.nu["kernel"].dtype == jnp.float32


def test_clipping_scales_all_gradients_by_one_factor():
    # Adam forgets the scale of a constant gradient, so look at the second of two unequal ones.
    params = {"kernel": jnp.zeros((2,))}
    grads = [{"kernel": jnp.array([30.0, 40.0])}, {"kernel": jnp.array([0.3, 0.4])}]
    clipped = [{"kernel": jnp.array([0.6, 0.8])}, grads[1]]
    got = updates(config(clip_norm=1.0), params, grads)[-1]["kernel"]
    np.testing.assert_allclose(got, updates(config(), params, clipped)[-1]["kernel"], rtol=1e-5)
    assert not np.allclose(got, updates(config(), params, grads)[-1]["kernel"], rtol=1e-3)


def test_decay_is_decoupled_from_the_gradient_and_scaled_by_the_rate():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    got = updates(config(weight_decay=0.5), params, [zero])[0]
    np.testing.assert_allclose(got["kernel"], 3.0 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(got["bias"], params["bias"])


@pytest.mark.parametrize("preset", ["tiny", "tiny_gpt2", "tiny_qwen3"])
def test_only_matrices_of_one_layer_are_decayed(preset):
    compute = common.compute().to_dict()
    model = LanguageModel(ModelConfig.build(presets.PRESETS[preset], compute))
    unboxed = transformer.nn.unbox(transformer.init_params(model, jax.random.key(0)))
    mask = jax.tree_util.tree_flatten_with_path(optimizer.decay_mask(unboxed))[0]
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in mask if yes}
    left = {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in mask if not yes}
    assert all(name.split("/")[-1] in ("bias", "scale") for name in left)
    assert any("layers" in name for name in left), "stacked norms have two axes and no decay"
    assert all(name.endswith(("kernel", "embedding", "positions")) for name in decayed)


def curve(total=100, **overrides):
    _, schedule = optimizer.make_optimizer(config(**overrides), total)
    return np.array([schedule(step) for step in range(total)]) / 0.1


def test_every_schedule_warms_up_from_the_first_update_and_ends_at_its_fraction():
    for name, extra in (
        ("cosine", {}),
        ("linear", {}),
        ("wsd", {"decay_fraction": 0.2}),
    ):
        y = curve(schedule=name, warmup_steps=10, final_fraction=0.1, **extra)
        np.testing.assert_allclose(y[:10], np.arange(1, 11) / 10, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(y[-1], 0.1, rtol=1e-4, err_msg=name)
        assert (np.diff(y[9:]) <= 1e-6).all(), name
    np.testing.assert_allclose(curve(warmup_steps=4), np.minimum(1, np.arange(1, 101) / 4))


def test_schedules_between_their_ends():
    update = np.arange(1, 101)
    linear = curve(schedule="linear", final_fraction=0.0)
    np.testing.assert_allclose(linear, 1 - update / 100, atol=1e-6)
    cosine = curve(schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(
        cosine, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * update / 100)), atol=1e-5
    )
    wsd = curve(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    np.testing.assert_allclose(wsd[9:80], 1.0)
    np.testing.assert_allclose(wsd[80:], 1 - np.arange(1, 21) / 20, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin' is unknown"),
        ({"adam_eps_style": "jax"}, "adam_eps_style='jax' is unknown"),
        ({"mu_dtype": "float16"}, "mu_dtype='float16' is unknown"),
        ({"schedule": "constant", "final_fraction": 0.1}, "final_fraction=0.1 has no meaning"),
        ({"schedule": "wsd"}, "decay_fraction belongs to schedule 'wsd'"),
        ({"schedule": "cosine", "decay_fraction": 0.5}, "decay_fraction belongs to"),
        ({"warmup_steps": 11}, "warmup_steps=11 does not fit into the 10 steps"),
    ],
)
def test_values_without_a_meaning_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        optimizer.make_optimizer(config(**overrides), 10)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    # Two layers whose gradients differ a thousandfold in size and within each in their spectrum.
    grad = (
        rng.normal(size=(2, 16, 8)) * np.array([1.0, 1e-3])[:, None, None] * np.geomspace(1, 9, 8)
    )
    params = {
        "layers": {"up": {"kernel": jnp.ones((2, 16, 8)), "bias": jnp.ones((2, 8))}},
        "embedding": jnp.ones((4, 8)),
    }
    grads = {
        "layers": {"up": {"kernel": jnp.asarray(grad, jnp.float32), "bias": jnp.full((2, 8), 3.0)}},
        "embedding": jnp.full((4, 8), -5.0),
    }
    plain = {"schedule": "constant", "clip_norm": None}
    muon = common.muon(0.02, adam_lr=0.1, **plain)
    after = updates(muon, params, [grads])[-1]
    change = jax.tree.map(jnp.subtract, after, params)
    kernel = np.asarray(change["layers"]["up"]["kernel"])
    for layer in kernel:
        sizes = np.linalg.svd(layer, compute_uv=False)
        assert sizes.max() / sizes.min() < 2.0, "Newton-Schulz brings singular values to about 1"
        assert 0.01 < sizes.mean() < 0.04
    # The first step of Adam with Nesterov momentum (Dozat 2016) is lr sign(g) times this.
    b1 = muon.betas[0]
    size = 0.1 * (b1 * (1 - b1) / (1 - b1**2) + (1 - b1) / (1 - b1))
    np.testing.assert_allclose(change["layers"]["up"]["bias"], np.full((2, 8), -size), rtol=1e-4)
    np.testing.assert_allclose(change["embedding"], np.full((4, 8), size), rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny_gpt2", "tiny_qwen3"])
def test_muon_takes_the_matrices_of_layers_and_no_other_tensor(name):
    compute = common.compute().to_dict()
    model = LanguageModel(ModelConfig.build(presets.PRESETS[name], compute))
    params = jax.eval_shape(
        lambda key: nn.unbox(transformer.init_params(model, key)), jax.random.key(0)
    )
    axes = optimizer.muon_matrices(params)
    is_axes = lambda x: x is None or hasattr(x, "reduction_axis")  # noqa: E731
    for path, taken in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]:
        names = [key.key for key in path]
        assert (taken is not None) == ("layers" in names and names[-1] == "kernel"), names


def test_muon_state_lies_as_its_parameters_do():
    mesh = mesh_lib.make_mesh(common.mesh(fsdp=2, data=2, tensor=2))
    model = LanguageModel(ModelConfig.build(presets.PRESETS["tiny"], common.compute().to_dict()))
    tx, _ = optimizer.make_optimizer(common.muon(0.02, adam_lr=0.01), 10)
    with jax.set_mesh(mesh):
        state, _ = state_lib.init_state(
            lambda key: transformer.init_params(model, key), tx, mesh, jax.random.key(0)
        )
    kernel = state.params["backbone"]["layers"]["feed_forward"]["up"]["kernel"]
    shard = kernel.sharding.shard_shape(kernel.shape)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert moments
    for moment in moments:
        assert moment.sharding.shard_shape(moment.shape) == kernel.sharding.shard_shape(
            kernel.shape
        )
    assert shard != kernel.shape
    assert int(step_lib.applied_updates(state.opt_state)) == 0
