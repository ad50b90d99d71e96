"""Rollouts on a two-layer model: what is scored, where, and at which temperature."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gptlab.model import decode, presets
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import rollout
from gptlab.run.errors import UserError
from gptlab.train import mesh as mesh_lib

PAD, STOP, VOCAB = 0, 1, 512
COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
CONFIG = ModelConfig.build(presets.PRESETS["tiny"], COMPUTE)


def init(model, seed):
    return jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(seed))


@functools.cache
def language_model():
    model = LanguageModel(CONFIG)
    # At initialisation the logits are nearly flat; a test of slices and temperatures needs
    # contrast.
    return model, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, init(model, 0))


@functools.cache
def scalar_model():
    return ScalarModel(CONFIG), init(ScalarModel(CONFIG), 5)


# Not jitted, every operation of a model would be compiled by itself.
apply = jax.jit(
    lambda model, params, *args: model.apply({"params": params}, *args), static_argnums=0
)
response_logprobs = jax.jit(rollout.response_logprobs, static_argnums=(0, 3))
token_scalars = jax.jit(rollout.token_scalars, static_argnums=0)
sample = jax.jit(rollout.sample, static_argnums=(0, 5, 6))


def sampling(**changes):
    options = {
        "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "stop_tokens": (STOP,)
    }  # fmt: skip
    return decode.Sampling(**(options | changes))


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    lengths = np.asarray([3, 5, 1, 4], np.int32)
    tokens = rng.integers(4, VOCAB, (4, 5)).astype(np.int32)
    return jnp.asarray(np.where(np.arange(5)[None] < lengths[:, None], tokens, PAD)), jnp.asarray(
        lengths
    )


@functools.cache
def samples():
    model, params = language_model()
    return sample(model, params, *prompts(), jax.random.key(1), sampling(), PAD)


def test_a_halt_token_is_an_action_but_no_reward_model_reads_it():
    model, params = language_model()
    free = samples()
    lengths = np.asarray(free.response_mask.sum(1), int)
    row = next(b for b in range(4) if lengths[b] > 2 and free.response[b, 1] != STOP)
    halt = int(free.response[row, 1])
    drawn = sample(model, params, *prompts(), jax.random.key(1), sampling(halt_tokens=(halt,)), PAD)
    at = int(np.flatnonzero(np.asarray(free.response[row]) == halt)[0])
    assert drawn.response_mask[row].sum() == at + 1 and not drawn.finished[row]
    assert drawn.lengths[row] == drawn.scored_lengths[row] + 1
    logprobs, _ = response_logprobs(model, params, drawn, 0.7)
    assert logprobs[row, at] < 0
    whole = [b for b in range(4) if halt not in np.asarray(free.response[b])]
    for b in whole:
        assert drawn.lengths[b] == drawn.scored_lengths[b] == free.lengths[b]


def test_halt_tokens_are_all_control_tokens_but_the_end(tiny_tokenizer):
    halts = rollout.halt_tokens(tiny_tokenizer, tiny_tokenizer.vocab_size)
    assert set(halts) | {tiny_tokenizer.end_id} == set(range(9))
    assert tiny_tokenizer.decode_bytes(halts) == b"" and tiny_tokenizer.end_id not in halts


def test_join_writes_the_response_directly_after_its_prompt():
    tokens, lengths = rollout.join(
        jnp.asarray([[5, 6, PAD], [5, 6, 7]]), jnp.asarray([2, 3]),
        jnp.asarray([[8, STOP], [9, PAD]]), jnp.asarray([[1.0, 1.0], [1.0, 0.0]]), PAD,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, [[5, 6, 8, STOP, PAD], [5, 6, 7, 9, PAD]])
    np.testing.assert_array_equal(lengths, [4, 4])


def slow_logprobs(drawn, temperature):
    """Row by row in float64, from logits of whole rows without a mask: attention looks back."""
    model, params = language_model()
    logits = np.asarray(apply(model, params, drawn.tokens), np.float64) / temperature
    out = np.zeros(drawn.response.shape)
    for row in range(len(out)):
        start = int(drawn.prompt_lengths[row])
        for t in range(start, int(drawn.lengths[row])):
            z = logits[row, t - 1] - logits[row, t - 1].max()
            out[row, t - start] = z[int(drawn.tokens[row, t])] - np.log(np.exp(z).sum())
    return out


def test_logprobs_are_sliced_where_they_are_predicted():
    """[context - 1 : -1]; a slice off by one would be far away."""
    model, params = language_model()
    got, _ = response_logprobs(model, params, samples(), 0.7)
    want = slow_logprobs(samples(), 0.7)
    np.testing.assert_allclose(got, want, atol=2e-5)
    shifted = np.roll(want, 1, axis=1)
    assert np.abs(np.asarray(got) - shifted).max() > 0.1


def test_temperature_divides_logits_before_the_log_softmax():
    """A forgotten temperature, or one applied to log-probs, is caught."""
    model, params = language_model()
    got, _ = response_logprobs(model, params, samples(), 0.7)
    forgotten, _ = response_logprobs(model, params, samples(), 1.0)
    np.testing.assert_allclose(got, slow_logprobs(samples(), 0.7), atol=2e-5)
    assert np.abs(np.asarray(got - forgotten)).max() > 0.05
    assert np.abs(np.asarray(got - forgotten / 0.7)).max() > 0.05


def test_decoder_and_scoring_forward_agree():
    """Rollout and scoring use one temperature and one model."""
    model, params = language_model()
    got, _ = response_logprobs(model, params, samples(), 0.7)
    np.testing.assert_allclose(got, samples().decode_logprobs, atol=2e-5)


def test_entropy_is_that_of_the_sampling_distribution():
    model, params = language_model()
    _, entropy = response_logprobs(model, params, samples(), 0.7)
    drawn = samples()
    logits = np.asarray(apply(model, params, drawn.tokens)[0]) / 0.7
    logp = np.asarray(jax.nn.log_softmax(logits[int(drawn.prompt_lengths[0]) - 1]))
    assert abs(float(entropy[0, 0]) + (np.exp(logp) * logp).sum()) < 1e-4


def test_equal_parameters_give_exactly_equal_logprobs():
    """One compiled function, so a copy of the policy has a KL of exactly zero."""
    model, params = language_model()
    policy, _ = response_logprobs(model, params, samples(), 0.7)
    reference, _ = response_logprobs(model, jax.tree.map(jnp.copy, params), samples(), 0.7)
    np.testing.assert_array_equal(policy, reference)


def widen(drawn, extra):
    """The same samples with more padding on the right."""
    tokens = jnp.pad(drawn.tokens, ((0, 0), (0, extra)), constant_values=PAD)
    return drawn.replace(tokens=tokens)


def test_position_ids_from_the_mask_make_padding_irrelevant():
    """Right-padded rows, and the same rows without any padding, agree."""
    model, params = language_model()
    positions, segments = rollout.layout(jnp.asarray([2, 4]), 4)
    np.testing.assert_array_equal(positions, [[0, 1, 0, 0], [0, 1, 2, 3]])
    np.testing.assert_array_equal(segments, [[1, 1, 0, 0], [1, 1, 1, 1]])
    plain, _ = response_logprobs(model, params, samples(), 0.7)
    padded, _ = response_logprobs(model, params, widen(samples(), 7), 0.7)
    np.testing.assert_allclose(plain, padded, atol=1e-5)


def test_left_padded_rows_give_the_same_logits():
    """Positions count real tokens, so the side of the padding does not matter."""
    model, params = language_model()
    rng = np.random.default_rng(3)
    row = jnp.asarray(rng.integers(4, VOCAB, (1, 5)), jnp.int32)
    alone = apply(model, params, row)
    left = jnp.pad(row, ((0, 0), (3, 0)))
    segments = jnp.pad(jnp.ones_like(row), ((0, 0), (3, 0)))
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    padded = apply(model, params, left, positions, segments)[:, 3:]
    np.testing.assert_allclose(alone, padded, atol=1e-4)


def test_reward_is_read_at_the_last_real_token_whatever_the_padding():
    model, params = scalar_model()
    drawn = samples()
    read = lambda s: rollout.at_last(  # noqa: E731
        token_scalars(model, params, s.tokens, s.lengths), s.lengths
    )
    np.testing.assert_allclose(read(drawn), read(widen(drawn, 9)), atol=1e-6)
    scalars = apply(model, params, drawn.tokens)
    want = [scalars[row, int(length) - 1] for row, length in enumerate(drawn.lengths)]
    np.testing.assert_allclose(read(drawn), want, atol=1e-5)


def test_values_stand_before_each_response_token():
    """Value t has seen t response tokens and no more."""
    model, params = scalar_model()
    drawn = samples()
    scalars = token_scalars(model, params, drawn.tokens, drawn.lengths)
    values = rollout.at_response(scalars, drawn.prompt_lengths, drawn.response.shape[1])
    row, t = 1, 0
    seen = drawn.tokens[row : row + 1, : int(drawn.prompt_lengths[row]) + t]
    want = apply(model, params, seen)[0, -1]
    assert abs(float(values[row, t]) - float(want)) < 1e-5


def test_log_softmax_in_float32_although_the_model_computes_in_bfloat16():
    """A bf16 log-softmax is measured, and ours is an order below it."""
    _, params = language_model()
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = LanguageModel(config)
    drawn = samples()
    got, _ = response_logprobs(model, params, drawn, 0.7)
    positions, segments = rollout.layout(drawn.lengths, drawn.tokens.shape[1])
    logits = apply(model, params, drawn.tokens, positions, segments)
    logits = rollout.at_response(logits, drawn.prompt_lengths, drawn.response.shape[1]) / 0.7

    def pick(logp):
        return jnp.take_along_axis(logp, drawn.response[..., None], axis=-1)[..., 0]

    mask = np.asarray(drawn.response_mask)
    exact = np.asarray(pick(jax.nn.log_softmax(logits.astype(jnp.float32)))) * mask
    low = np.asarray(pick(jax.nn.log_softmax(logits.astype(jnp.bfloat16))), np.float32) * mask
    error, low_error = np.abs(got - exact).max(), np.abs(low - exact).max()
    assert got.dtype == jnp.float32 and error < 1e-4 and low_error > 10 * max(error, 1e-5)


def test_gradient_ignores_padding():
    """Tokens after the end change neither log-probs nor their gradient."""
    model, params = language_model()
    drawn = samples()
    slots = jnp.arange(drawn.tokens.shape[1])[None, :]
    dirty = drawn.replace(tokens=jnp.where(slots < drawn.lengths[:, None], drawn.tokens, 77))

    gradient = jax.jit(
        jax.grad(
            lambda params, drawn: rollout.response_logprobs(model, params, drawn, 0.7)[0].sum()
        )
    )
    pairs = zip(
        *map(jax.tree.leaves, (gradient(params, drawn), gradient(params, dirty))), strict=True
    )
    for a, b in pairs:
        assert np.any(np.asarray(a) != 0)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_row_draws_the_same_whatever_the_batch():
    """Row b's key is fold_in(key, b), so a smaller batch gives the same first rows."""
    model, params = language_model()
    tokens, lengths = prompts()
    half = sample(model, params, tokens[:2], lengths[:2], jax.random.key(1), sampling(), PAD)
    np.testing.assert_array_equal(half.response, samples().response[:2])


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}])
def test_truncated_or_greedy_sampling_is_refused(change):
    with pytest.raises(UserError):
        rollout.check_sampling(sampling(**change))


def test_local_rows_of_one_process_are_the_array():
    x = jnp.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(rollout.local_rows(x), x)


def test_where_context_splits_decoding_each_process_still_gets_its_prompts_rows():
    """The replies of one device; and rows lie over the data axes again, as prompts do."""
    model, params = language_model()
    mesh = mesh_lib.make_mesh(common.mesh(data=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        asked = mesh_lib.put_batch(jax.device_get(prompts()), mesh)
        drawn = sample(model, params, *asked, jax.random.key(1), sampling(), PAD)
    for name in ("tokens", "lengths", "response", "finished"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(samples(), name))
    np.testing.assert_allclose(drawn.decode_logprobs, samples().decode_logprobs, atol=1e-5)
    assert drawn.response.addressable_shards[0].data.shape == (2, 6)  # of 4 rows, over data 2
    np.testing.assert_array_equal(rollout.local_rows(drawn.response), drawn.response)
