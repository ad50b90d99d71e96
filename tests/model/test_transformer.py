"""The transformer: counts, initialisation, masks, dropout, refused configs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.model import attention as attn
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
TINY = ("tiny", "tiny_gpt2", "tiny_qwen3")


@functools.cache
def build(name="tiny", **changes):
    """A model of a preset and its parameters; norms and biases moved off their neutral start."""
    config = dataclasses.replace(ModelConfig.build(PRESETS[name], COMPUTE), **changes)
    model = LanguageModel(config)

    @jax.jit
    def noisy():
        leaves, tree = jax.tree.flatten(nn.unbox(init_params(model, jax.random.key(0))))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.05 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, [2 * x + n for x, n in zip(leaves, noise, strict=True)])

    return model, noisy()


def tokens_of(shape, seed=2):
    return jax.random.randint(jax.random.key(seed), shape, 3, 512)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_count_is_the_formula(name):
    model = LanguageModel(ModelConfig.build(PRESETS[name], COMPUTE))
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert model.config.num_params() == sum(x.size for x in jax.tree.leaves(shapes))


def test_published_counts():
    def config(name):
        return ModelConfig.build(PRESETS[name], COMPUTE)

    assert config("gpt2_124m").num_params() == 124_439_808
    assert config("gpt2_124m").flops_per_token(1024) == 855_166_464
    assert config("gpt2_1.5b").num_params() == 1_557_611_200
    assert config("llama3_8b").num_params() == 8_030_261_248
    assert config("llama3_70b").num_params() == 70_553_706_496
    assert config("llama3.1_8b").num_params() == 8_030_261_248
    assert config("llama3.1_70b").num_params() == 70_553_706_496
    assert config("llama3.2_1b").num_params() == 1_235_814_400
    assert config("llama3.2_3b").num_params() == 3_212_749_824
    assert config("mistral_7b").num_params() == 7_241_732_096
    assert config("smollm2_135m").num_params() == 134_515_008
    assert config("qwen2_0.5b").num_params() == 494_032_768
    assert config("qwen2_7b").num_params() == 7_615_616_512
    assert config("qwen3_0.6b").num_params() == 596_049_920


def test_counts_of_every_option():
    """Formula against arrays where no published model pins it: biases with SwiGLU, wide heads."""
    changes = [
        {"activation": "swiglu", "use_bias": True, "qkv_bias": False},
        {"head_dim": 24, "qk_norm": "after_rope", "tie_embeddings": False},
        {"norm": "layernorm", "use_bias": False, "position": "learned"},
    ]
    for change in changes:
        config = dataclasses.replace(ModelConfig.build(PRESETS["tiny"], COMPUTE), **change)
        shapes = jax.eval_shape(
            lambda key, c=config: init_params(LanguageModel(c), key), jax.random.key(0)
        )
        assert config.num_params() == sum(x.size for x in jax.tree.leaves(shapes)), change


def test_initial_values():
    model = LanguageModel(
        dataclasses.replace(ModelConfig.build(PRESETS["tiny_gpt2"], COMPUTE), num_layers=8)
    )
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))["backbone"]
    residual = 0.02 / 16**0.5
    expected = {
        "embedding": 0.02,
        "positions": 0.01,
        ("attention", "query", "kernel"): 0.02,
        ("attention", "out", "kernel"): residual,
        ("feed_forward", "up", "kernel"): 0.02,
        ("feed_forward", "down", "kernel"): residual,
    }
    for path, std in expected.items():
        leaf = params
        for name in (path,) if isinstance(path, str) else ("layers", *path):
            leaf = leaf[name]
        assert leaf.dtype == jnp.float32
        assert abs(float(leaf.std()) / std - 1) < 0.05, path
    layers = params["layers"]
    assert not layers["attention"]["query"]["bias"].any()
    kernels = layers["attention"]["query"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # each layer draws its own


@pytest.mark.parametrize("name", TINY)
def test_causality_by_gradient(name):
    """The logits at position t depend on embeddings 0..t, on all of them, and on no later one."""
    model, params = build(name)
    x = tokens_of((1, 8))
    one_hot = jnp.eye(512)[x]

    def logits_at(t, one_hot):
        rows = one_hot[0] @ params["backbone"]["embedding"]  # [T, D]
        # Each position gets an embedding of its own: token t is row t of the table.
        table = params["backbone"]["embedding"].at[:8].set(rows)
        variables = {"params": {"backbone": params["backbone"] | {"embedding": table}}}
        out = model.apply(variables, jnp.arange(8)[None], method=model.hidden)
        return jnp.abs(out[0, t]).sum()

    sensitivity = jax.jit(jax.vmap(jax.grad(logits_at, argnums=1), (0, None)))
    times = jnp.array([0, 3, 7])
    for t, grads in zip(times, np.abs(sensitivity(times, one_hot)).sum(-1)[:, 0], strict=True):
        assert (grads[: t + 1] > 0).all()
        assert (grads[t + 1 :] == 0).all()


@pytest.mark.parametrize("name", TINY)
def test_packed_segments_are_independent(name):
    model, params = build(name)
    a, b = tokens_of((1, 5), 3), tokens_of((1, 7), 4)
    packed = jnp.concatenate([a, b, jnp.zeros((1, 4), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 4])
    positions = jnp.array([[*range(5), *range(7), *range(4)]])
    logits = jax.jit(model.apply)({"params": params}, packed, positions, segments)
    alone = [jax.jit(model.apply)({"params": params}, x) for x in (a, b)]
    np.testing.assert_allclose(logits[:, :5], alone[0], atol=3e-5)
    np.testing.assert_allclose(logits[:, 5:12], alone[1], atol=3e-5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", TINY)
def test_left_and_right_padding_agree(name):
    model, params = build(name)
    x = tokens_of((2, 6))
    pad = jnp.full((2, 4), 9, jnp.int32)
    ones, none = jnp.ones_like(x), jnp.zeros_like(pad)
    left = jnp.concatenate([none, ones], 1)
    right = jnp.concatenate([ones, none], 1)
    count = jnp.maximum(jnp.cumsum(left, 1) - 1, 0)
    apply = jax.jit(model.apply)
    on_left = apply({"params": params}, jnp.concatenate([pad, x], 1), count, left)[:, 4:]
    on_right = apply({"params": params}, jnp.concatenate([x, pad], 1), None, right)[:, :6]
    np.testing.assert_allclose(on_left, on_right, atol=3e-5)
    np.testing.assert_allclose(on_left, apply({"params": params}, x), atol=3e-5)


def test_padding_takes_no_gradient_and_gives_none():
    model, params = build()
    x = tokens_of((1, 8))
    segments = jnp.array([[1] * 5 + [0] * 3])

    def loss(params, x):
        logits = model.apply({"params": params}, x, None, segments)
        return (jnp.square(logits).sum(-1) * segments).sum()

    grads = jax.jit(jax.grad(loss))
    a, b = grads(params, x), grads(params, x.at[:, 5:].set(7))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_query_heads_repeat_their_key_head():
    """Query heads 0, 1 read key head 0 and 2, 3 read key head 1 (repeated, not tiled)."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 5, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 2, 5, 8)).astype(np.float32)
    attention = jax.jit(lambda q, k, v: attn.attention(q, k, v, attn.causal_mask(None, 5)))
    out = attention(q, k, v)
    repeated = attention(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
    tiled = attention(q, np.tile(k, (1, 2, 1, 1)), np.tile(v, (1, 2, 1, 1)))
    np.testing.assert_allclose(out, repeated, atol=1e-6)
    assert np.abs(out - tiled).max() > 0.1


def test_rope_depends_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in (0, 1))

    def score(at_q, at_k):
        a = attn.apply_rope(q, attn.rope_tables(jnp.array([[at_q]]), 64, 16, 1e4))
        b = attn.apply_rope(k, attn.rope_tables(jnp.array([[at_k]]), 64, 16, 1e4))
        return float((a * b).sum())

    assert abs(score(9, 4) - score(25, 20)) < 1e-5
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("block", [8, 24, 48])  # of 52: the last one begins in the one before
def test_a_cache_is_read_in_blocks_as_if_it_were_read_at_once(dtype, tolerance, block):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q, cache = draw(3, 2, 6, 16), (draw(3, 3, 52, 16), draw(3, 3, 52, 16))
    positions = jnp.array([[0, 1], [22, 23], [50, 51]])
    reach = lambda slots: attn.Reach(positions, jnp.int32(slots), block)  # noqa: E731
    every = jax.jit(lambda slots: attn.blockwise_attention(q, cache, reach(slots)))
    whole = attn.attention(q, *cache, attn.cache_mask(positions, 52))
    assert every(52).dtype == whole.dtype
    np.testing.assert_allclose(every(52), whole, rtol=tolerance, atol=tolerance)
    # As far as a row needs, or further: the same bits. Others may be wrong then.
    np.testing.assert_array_equal(every(24)[:2], every(52)[:2])
    if block == 8:
        assert np.abs(np.float32(every(24)[2] - whole[2])).max() > 0.1
    one = attn.Reach(positions[1:2], jnp.int32(24), block)
    row = attn.blockwise_attention(q[1:2], cache, one, jnp.int32(1))
    np.testing.assert_allclose(row, whole[1:2], rtol=tolerance, atol=tolerance)


def test_stretched_frequencies_are_those_of_llama_3():
    """Frequency by frequency, as Meta's reference code decides (llama-models, apply_scaling)."""
    scaling = attn.RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
    )
    plain, stretched = (np.asarray(attn.rope_frequencies(128, 5e5, s)) for s in (None, scaling))
    kinds = []
    for frequency, found in zip(plain.astype(float), stretched, strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            kind, wanted = "kept", frequency
        elif wavelength > 8192:
            kind, wanted = "divided", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, wanted = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.append(kind)
        assert found == pytest.approx(wanted, rel=1e-6)
    assert kinds == sorted(kinds, key=["kept", "between", "divided"].index)
    assert min(kinds.count(k) for k in ("kept", "between", "divided")) >= 5


def test_rope_scaling_is_checked_and_may_be_absent():
    scaling = dict(PRESETS["llama3.1_8b"]["rope_scaling"])
    tiny = dict(PRESETS["tiny"])
    assert "rope_scaling" not in tiny and build()[0].config.rope_scaling is None
    config = ModelConfig.build({**tiny, "rope_scaling": scaling}, COMPUTE)
    assert config.rope_scaling.factor == 8.0 and hash(config) != hash(build()[0].config)
    for change, message in (
        ({"rope_scaling": {**scaling, "beta": 1.0}}, "has the keys .*beta"),
        ({"rope_scaling": {"factor": 8.0}}, "it needs .*high_freq_factor"),
        ({"rope_scaling": {**scaling, "high_freq_factor": 1.0}}, "low_freq_factor in"),
        ({"rope_scaling": scaling, "position": "learned"}, "rope_scaling needs position='rope'"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig.build({**tiny, **change}, COMPUTE)


def test_rope_angles_looked_up_are_those_computed():
    positions = jnp.arange(24).reshape(2, 12) % 16  # more of them than tokens in the window
    looked_up = attn.rope_tables(positions, 16, 8, 1e4)
    for a, b in zip(looked_up, attn.rope_tables(positions, 24, 8, 1e4), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"unroll": 2}, *({"remat": name} for name in ("full", "dots", "minimal", "offload"))],
    ids=str,
)
def test_compute_options_keep_loss_and_gradients(change):
    model, params = build()
    x = tokens_of((2, 8))
    other = LanguageModel(dataclasses.replace(model.config, **change))

    def grads(model):
        def loss(p):
            return jnp.square(model.apply({"params": p}, x)).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5),
        grads(model),
        grads(other),
    )


def test_dropout():
    model, params = build(dropout=0.5)
    x = tokens_of((2, 8))
    apply = jax.jit(model.apply, static_argnames="deterministic")

    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply({"params": params}, x, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - drop(1)).max() > 0.1
    off = LanguageModel(dataclasses.replace(model.config, dropout=0.0))
    np.testing.assert_array_equal(
        apply({"params": params}, x), jax.jit(off.apply)({"params": params}, x)
    )


def test_bfloat16_keeps_parameters_and_logits_float32():
    model, params = build(dtype="bfloat16")
    exact = LanguageModel(dataclasses.replace(model.config, dtype="float32"))
    x = tokens_of((2, 8))
    logits = jax.jit(model.apply)({"params": params}, x)
    assert logits.dtype == jnp.float32
    reference = jax.jit(exact.apply)({"params": params}, x)
    assert 0 < float(jnp.abs(logits - reference).max()) < 0.1 * float(reference.std()) + 0.2
    fresh = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("architecture", "compute", "words"),
    [
        ({"num_head": 4}, {}, "did you mean 'num_heads'"),
        ({"dtype": "float32"}, {}, "config.model.dtype"),
        ({"norm": "batchnorm"}, {}, "norm='batchnorm'"),
        ({"num_kv_heads": 3}, {}, "not a multiple"),
        ({"head_dim": 7}, {}, "must be even"),
        ({"d_ff": 0}, {}, "d_ff=0"),
        ({}, {"attention": "flash"}, "attention='flash'"),
        ({}, {"remat": "some"}, "remat='some'"),
        ({}, {"loss_chunk": -1}, "loss_chunk=-1"),
        ({}, {"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_configs_are_refused_by_name(architecture, compute, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        ModelConfig.build({**PRESETS["tiny"], **architecture}, {**COMPUTE, **compute})


def test_missing_keys_are_named():
    architecture = {k: v for k, v in PRESETS["tiny"].items() if k != "norm_eps"}
    with pytest.raises(UserError, match="lacks norm_eps"):
        ModelConfig.build(architecture, COMPUTE)


def test_too_long_a_row_is_refused():
    model, params = build()
    with pytest.raises(UserError, match="context window"):
        model.apply({"params": params}, jnp.zeros((1, 129), jnp.int32))
