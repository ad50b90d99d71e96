"""Decoding: equality with the training forward, independence of rows, sampling, stopping."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptlab.model import decode
from gptlab.model.attention import RopeScaling
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run.errors import UserError

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
TINY = ("tiny", "tiny_gpt2", "tiny_qwen3")
WIDTH, NEW = 12, 10
LENGTHS = np.array([12, 5, 1, 8], np.int32)
DRAW = decode.Sampling(temperature=0.9, top_k=0, top_p=1.0, max_new_tokens=NEW, stop_tokens=())
GREEDY = dataclasses.replace(DRAW, temperature=0.0)


@functools.cache
def build(name="tiny", **changes):
    config = dataclasses.replace(ModelConfig.build(PRESETS[name], COMPUTE), **changes)
    model = LanguageModel(config)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    return model, jax.tree.map(lambda x: 4 * x, params)  # sharper than at birth


def prompts(seed=1):
    tokens = np.asarray(jax.random.randint(jax.random.key(seed), (4, WIDTH), 3, 512))
    return np.where(np.arange(WIDTH)[None] < LENGTHS[:, None], tokens, 0).astype(np.int32)


def keys(seed=2):
    return jax.random.split(jax.random.key(seed), 4)


def generate(model, params, sampling, tokens=None, lengths=LENGTHS, request_keys=None):
    tokens = prompts() if tokens is None else tokens
    request_keys = keys() if request_keys is None else request_keys
    return decode.generate(model, params, tokens, lengths, request_keys, sampling)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def forward_logits(model, params, tokens, reply):
    """Training forward over prompt + reply, at the positions that predict the reply [N, V]."""
    row = np.zeros(WIDTH + NEW, np.int32)  # one shape, compiled once; attention looks back only
    row[: len(tokens) + NEW] = np.concatenate([tokens, reply])
    logits = forward(model, params, row[None])[0]
    return logits[len(tokens) - 1 : len(tokens) + NEW - 1]


@pytest.mark.parametrize("name", TINY)
def test_cached_decoding_equals_the_training_forward(name):
    """Log-probabilities within 1e-5 in float32, ragged rows."""
    model, params = build(name)
    out = generate(model, params, DRAW)
    for b, length in enumerate(LENGTHS):
        reply = np.asarray(out.tokens[b])
        logits = forward_logits(model, params, prompts()[b, :length], reply)
        expected = jax.nn.log_softmax(logits / 0.9)[np.arange(NEW), reply]
        np.testing.assert_allclose(out.logprobs[b], expected, atol=1e-5)
        forgotten = jax.nn.log_softmax(logits)[np.arange(NEW), reply]
        assert np.abs(forgotten - expected).max() > 1e-3  # the temperature matters


def test_a_stretched_window_is_decoded_as_it_is_trained():
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=16
    )
    model, params = build(rope_scaling=scaling)
    plain, _ = build()
    out = generate(model, params, GREEDY)
    for b, length in enumerate(LENGTHS):
        reply = np.asarray(out.tokens[b])
        expected, other = (
            jax.nn.log_softmax(forward_logits(m, params, prompts()[b, :length], reply))
            for m in (model, plain)
        )
        chosen = np.arange(NEW), reply
        np.testing.assert_allclose(out.logprobs[b], expected[chosen], atol=1e-5)
        assert np.abs(expected[chosen] - other[chosen]).max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_greedy_is_the_argmax_of_the_training_forward(name):
    model, params = build(name)
    out = generate(model, params, GREEDY)
    for b, length in enumerate(LENGTHS):
        reply = np.asarray(out.tokens[b])
        logits = forward_logits(model, params, prompts()[b, :length], reply)
        np.testing.assert_array_equal(reply, logits.argmax(-1))
        expected = jax.nn.log_softmax(logits)[np.arange(NEW), reply]
        np.testing.assert_allclose(out.logprobs[b], expected, atol=1e-5)


def test_a_request_is_independent_of_the_other_rows():
    model, params = build()
    whole = generate(model, params, DRAW)
    order = np.array([2, 0, 3, 1])
    moved = generate(model, params, DRAW, prompts()[order], LENGTHS[order], keys()[order])
    np.testing.assert_array_equal(whole.tokens[order], moved.tokens)
    np.testing.assert_allclose(whole.logprobs[order], moved.logprobs, atol=1e-5)
    alone = generate(model, params, DRAW, prompts()[1:2], LENGTHS[1:2], keys()[1:2])
    np.testing.assert_array_equal(whole.tokens[1:2], alone.tokens)
    other = np.where(np.arange(4)[:, None] == 1, prompts(), prompts(seed=9))
    changed = generate(model, params, DRAW, other)
    np.testing.assert_array_equal(whole.tokens[1], changed.tokens[1])
    assert (whole.tokens[0] != changed.tokens[0]).any()


def test_a_request_is_independent_of_its_padding():
    model, params = build()
    whole = generate(model, params, DRAW)
    wider = np.pad(prompts(), ((0, 0), (0, 9)), constant_values=77)  # any token may pad
    padded = generate(model, params, DRAW, wider)
    np.testing.assert_array_equal(whole.tokens, padded.tokens)
    np.testing.assert_allclose(whole.logprobs, padded.logprobs, atol=1e-5)


def test_keys_decide_and_draws_differ_by_position():
    model, params = build()
    np.testing.assert_array_equal(
        generate(model, params, DRAW).tokens, generate(model, params, DRAW).tokens
    )
    other = generate(model, params, DRAW, request_keys=keys(seed=3))
    assert (generate(model, params, DRAW).tokens != other.tokens).any()
    # A flat distribution, the same key: were the key reused, every position would draw alike.
    logits = jnp.zeros((1, 512))
    drawn = {int(decode.sample(logits, keys()[:1], jnp.array([p]), DRAW)[0][0]) for p in range(20)}
    assert len(drawn) > 15


def test_generate_continues_where_decode_step_stands():
    """Streaming by decode_step gives generate's tokens."""
    model, params = build()
    out = generate(model, params, DRAW)
    ready = jax.jit(decode.unstack_layers, static_argnums=0)(model.config, params)
    start = jax.jit(decode.prefill, static_argnums=(0, 4))
    cache, logits = start(model, ready, prompts(), jnp.asarray(LENGTHS), 32)
    token, logprob = decode.sample(logits, keys(), jnp.asarray(LENGTHS), DRAW)
    for step in range(NEW):
        np.testing.assert_array_equal(token, out.tokens[:, step])
        np.testing.assert_allclose(logprob, out.logprobs[:, step], atol=1e-5)
        cache, token, logprob = decode.decode_step(
            model, ready, cache, token, LENGTHS + step, keys(), DRAW
        )


def test_stop_tokens():
    """The reply ends with its first stop token; padding and zeros follow; others go on."""
    model, params = build()
    free = generate(model, params, DRAW)
    reply = np.asarray(free.tokens[1]).tolist()
    at = next(i for i in range(2, NEW - 2) if reply[i] not in reply[:i])
    stop = reply[at]
    sampling = dataclasses.replace(DRAW, stop_tokens=(511, stop))
    out = decode.generate(model, params, prompts(), LENGTHS, keys(), sampling, pad_id=7)
    assert out.lengths[1] == at + 1 and out.finished[1]
    assert out.tokens[1, : at + 1].tolist() == reply[: at + 1]
    assert (out.tokens[1, at + 1 :] == 7).all() and (out.logprobs[1, at + 1 :] == 0).all()
    for b in (0, 2, 3):
        row = np.asarray(free.tokens[b])
        stops = np.flatnonzero((row == stop) | (row == 511))
        length = stops[0] + 1 if len(stops) else NEW
        assert out.lengths[b] == length and out.finished[b] == bool(len(stops))
        np.testing.assert_array_equal(out.tokens[b, :length], row[:length])
        np.testing.assert_array_equal(out.logprobs[b, :length], free.logprobs[b, :length])


def test_a_halt_token_ends_a_reply_that_is_not_finished():
    model, params = build()
    free = generate(model, params, DRAW)
    reply = np.asarray(free.tokens[1]).tolist()
    halt, stop = (next(t for t in reply[at:] if reply.count(t) == 1) for at in (2, 5))
    sampling = dataclasses.replace(DRAW, stop_tokens=(stop,), halt_tokens=(halt,))
    out = generate(model, params, sampling)
    at = reply.index(halt)
    assert at < reply.index(stop)
    assert out.lengths[1] == at + 1 and out.halted[1] and not out.finished[1]
    assert out.tokens[1].tolist() == reply[: at + 1] + [0] * (NEW - at - 1)
    # Whichever comes first: what would have halted a reply that had ended does not.
    out = generate(
        model, params, dataclasses.replace(sampling, stop_tokens=(halt,), halt_tokens=(stop,))
    )
    assert out.lengths[1] == at + 1 and out.finished[1] and not out.halted[1]


def test_loop_ends_when_all_rows_are_done():
    """A long budget costs nothing once every row has stopped."""
    model, params = build(max_len=4096)
    stop = tuple(range(512))  # every token stops
    sampling = dataclasses.replace(DRAW, max_new_tokens=3000, stop_tokens=stop)
    out = generate(model, params, sampling)
    assert (out.lengths == 1).all() and out.finished.all()
    padding_rows = generate(model, params, DRAW, lengths=np.zeros(4, np.int32))
    assert not padding_rows.lengths.any() and not padding_rows.finished.any()
    assert not padding_rows.halted.any()
    assert (padding_rows.tokens == 0).all()


def draws(logits, sampling, count=4000):
    """Histogram of draws from one distribution."""
    request_keys = jax.random.split(jax.random.key(5), count)
    rows = jnp.tile(logits[None], (count, 1))
    sample = jax.jit(decode.sample, static_argnums=3)
    tokens, logprobs = sample(rows, request_keys, jnp.zeros(count, jnp.int32), sampling)
    return np.bincount(tokens, minlength=logits.shape[0]) / count, np.asarray(tokens), logprobs


def test_draws_follow_the_tempered_distribution():
    logits = jnp.array([2.0, 1.0, 0.0, -1.0, -30.0])
    for temperature in (0.5, 1.0, 2.0):
        sampling = dataclasses.replace(DRAW, temperature=temperature)
        share, tokens, logprobs = draws(logits, sampling)
        probs = np.asarray(jax.nn.softmax(logits / temperature))
        assert np.abs(share - probs).max() < 0.03
        np.testing.assert_allclose(logprobs, np.log(probs)[tokens], atol=1e-5)


def test_top_k_and_top_p_keep_exactly_the_right_tokens():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.permutation(np.linspace(-3, 3, 64)), jnp.float32)
    probs = np.asarray(jax.nn.softmax(logits))
    order = np.argsort(-probs)
    for k in (1, 2, 7, 63, 64, 100):
        kept = np.isfinite(decode._restrict(logits[None], dataclasses.replace(DRAW, top_k=k))[0])
        assert set(np.flatnonzero(kept)) == set(order[:k])
    for p in (0.01, 0.3, 0.77, 0.999):
        count = int(np.searchsorted(np.cumsum(probs[order]), p)) + 1  # smallest set of mass >= p
        kept = np.isfinite(decode._restrict(logits[None], dataclasses.replace(DRAW, top_p=p))[0])
        assert set(np.flatnonzero(kept)) == set(order[:count])
    both = dataclasses.replace(DRAW, top_k=4, top_p=0.5)  # top-p of what top-k left
    mass = np.cumsum(probs[order[:4]] / probs[order[:4]].sum())
    kept = np.isfinite(decode._restrict(logits[None], both)[0])
    assert set(np.flatnonzero(kept)) == set(order[: int(np.searchsorted(mass, 0.5)) + 1])


def test_rows_draw_by_settings_of_their_own_as_if_all_had_them():
    kinds = [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 7, 1.0), (1.0, 0, 0.6), (0.9, 20, 0.8)]
    rows = 64
    logits = 3 * jax.random.normal(jax.random.key(0), (rows, 50))
    request_keys = jax.random.split(jax.random.key(1), rows)
    at = jnp.arange(rows)
    of_rows = np.arange(rows) % len(kinds)
    columns = [np.array([kind[i] for kind in kinds])[of_rows] for i in range(3)]
    mixed = decode.RowSampling(
        jnp.asarray(columns[0], jnp.float32),
        jnp.asarray(columns[1], jnp.int32),
        jnp.asarray(columns[2], jnp.float32),
    )
    tokens, logprobs = jax.jit(decode.sample)(logits, request_keys, at, mixed)
    for number, (temperature, top_k, top_p) in enumerate(kinds):
        own = decode.Sampling(temperature, top_k, top_p, 1, ())
        expected = decode.sample(logits, request_keys, at, own)
        of = of_rows == number
        assert tokens[of].tolist() == expected[0][of].tolist()
        np.testing.assert_allclose(logprobs[of], expected[1][of], atol=1e-5)


def test_restricted_draws_report_unrestricted_logprobs():
    """RL needs log-probabilities of logits/T; a truncated sampler must not renormalise them."""
    logits = jnp.array([1.0, 0.9, 0.0, -1.0])
    share, tokens, logprobs = draws(logits, dataclasses.replace(DRAW, temperature=1.0, top_k=2))
    assert share[2:].sum() == 0 and share[:2].min() > 0.3
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[tokens], atol=1e-5)


def test_compiled_once_for_given_shapes():
    model, params = build()
    generate(model, params, GREEDY)
    before = decode.generate._cache_size()
    again = LanguageModel(dataclasses.replace(model.config))  # equal, not identical
    generate(again, params, dataclasses.replace(GREEDY), prompts(7), LENGTHS[::-1].copy())
    assert decode.generate._cache_size() == before


def test_stacked_and_unstacked_parameters_agree():
    model, params = build()
    ready = decode.unstack_layers(model.config, params)
    assert isinstance(ready["backbone"]["layers"], tuple)
    a, b = generate(model, params, GREEDY), generate(model, ready, GREEDY)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_bfloat16_decoding_casts_matrices_once():
    model, params = build(dtype="bfloat16")
    ready = decode.unstack_layers(model.config, params)["backbone"]
    assert ready["embedding"].dtype == jnp.bfloat16
    assert ready["layers"][0]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert ready["final_norm"]["scale"].dtype == jnp.float32  # norms are computed in float32
    out = generate(model, params, DRAW)
    assert out.logprobs.dtype == jnp.float32 and np.isfinite(out.logprobs).all()


def test_overfull_windows_are_refused():
    model, params = build()
    with pytest.raises(UserError, match="max_len=128"):
        generate(model, params, dataclasses.replace(DRAW, max_new_tokens=117))


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_new_tokens": 0}]
)
def test_bad_sampling_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(DRAW, **change)


def test_draws_stay_within_what_is_possible_at_both_ends():
    """Tokens of probability 0 first and last; the smallest and the largest random number."""
    logits = jnp.log(jnp.asarray([[0.0, 0.3, 0.0, 0.7, 0.0]] * 4, jnp.float32))
    uniform = jnp.asarray([0.0, 0.29, 0.31, 1 - 2**-23], jnp.float32)
    np.testing.assert_array_equal(decode._invert(logits, uniform), [1, 1, 3, 3])
