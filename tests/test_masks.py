"""Which tokens count in the real batches of each loop, against the records they were made from.

What should count is worked out here from the text of the records, message by message; what does
count comes from the batches that the programs make, through packing and shuffling, in their losses.
"""

import collections
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from configs import ppo as ppo_config
from gptlab import ppo, pretrain, reward, sft
from gptlab.data import batches, chat, packing, records
from gptlab.data.records import Candidate, Comparison, Conversation, Message, Prompt, TokenExample
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import episodes as episodes_lib
from gptlab.rl import rollout
from tests import fixtures

SEQ_LEN = 48
BATCH = 8
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def talks():
    """Dialogues of every kind: with and without system message and context, short and overlong."""
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(rng.choice(["tea", "film", "was", "lovely", "dull", "today"], count))

    found = []
    for number in range(60):
        messages = [Message("system", words(2))] if number % 3 == 0 else []
        for turn in range(1 + number % 4):
            context = words(3) if (number + turn) % 5 == 0 else None
            messages.append(Message("user", words(1 + number % 7), context))
            messages.append(Message("assistant", words(1 + (number * turn) % 11)))
        found.append(Conversation(f"talk-{number:02d}", tuple(messages), "made", f"{number}"))
    return found


@pytest.fixture(scope="module")
def corpus(talks, tiny_clean, tiny_vocabulary, tiny_tokenizer, tmp_path_factory):
    examples = [
        TokenExample(talk.id, *chat.encode_conversation(tiny_tokenizer, talk.messages))
        for talk in talks
    ]
    return fixtures.write_artifact(
        tmp_path_factory.mktemp("masks") / "corpus", "prepare", {("dialogues", "train"): examples},
        {"corpus": tiny_clean, "vocabulary": tiny_vocabulary}, mode="tokenize",
    )  # fmt: skip


def model_of(cls, architecture, seed=0):
    model = cls(ModelConfig.build(architecture, common.compute().to_dict()))
    return model, jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(seed))


def learnt_pairs(source):
    """How often an epoch, in shuffled batches of one row, has a token predict the next one."""
    data = batches.TrainBatches(source, 1, seed=0)
    pairs: collections.Counter = collections.Counter()
    for step in range(len(source)):
        row = data.at(step)
        counts = row.loss_mask > 0
        pairs.update(zip(row.tokens[counts].tolist(), row.targets[counts].tolist(), strict=True))
    return pairs


def assistant_pairs(tokenizer, messages):
    """(token, the next one) wherever the next one is the assistant's: its words and its end."""
    for message in messages:
        if message.role == "assistant":
            said = [*tokenizer.encode(message.content), tokenizer.end_id]
            yield from itertools.pairwise([tokenizer.assistant_id, *said])


def length_of(tokenizer, talk):
    parts = [text for m in talk.messages for text in (m.content, m.context) if text is not None]
    headers = len(talk.messages) + len(parts)  # a role or a context mark before, an end after
    return headers + sum(len(tokenizer.encode(text)) for text in parts)


@pytest.mark.parametrize("overlong", ["split", "drop"])
def test_sft_learns_what_the_assistant_says_and_where_it_ends(
    overlong, talks, corpus, tiny_tokenizer, tiny_model
):
    fits = [talk for talk in talks if length_of(tiny_tokenizer, talk) <= SEQ_LEN + 1]
    assert 10 < len(fits) < len(talks) - 10
    assert any(m.context for talk in fits for m in talk.messages)
    read = talks if overlong == "split" else fits
    expected = collections.Counter(
        pair for talk in read for pair in assistant_pairs(tiny_tokenizer, talk.messages)
    )
    source = packing.packed(corpus, "dialogues", "train", SEQ_LEN, overlong=overlong)
    assert learnt_pairs(source) == expected
    # The program's loss is the sum over just these tokens, of its own batches.
    model, params = model_of(LanguageModel, tiny_model)
    batch = batches.TrainBatches(source, BATCH, seed=0).at(0)
    loss, (weight, _) = jax.jit(sft.make_loss_fn(model, "assistant"))(params, batch, KEY)
    logits = jax.jit(model.apply)(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    by_hand = [
        -logprobs[row, slot, batch.targets[row, slot]]
        for row, slot in zip(*np.nonzero(batch.loss_mask), strict=True)
    ]
    assert weight == len(by_hand) and loss == pytest.approx(sum(by_hand), rel=1e-5)


def test_pretraining_learns_every_token_of_a_document_and_its_end(
    tiny_clean, tiny_corpus, tiny_tokenizer, tiny_model
):
    documents = fixtures.read_records(tiny_clean, "documents", "train", records.Document)
    expected: collections.Counter = collections.Counter()
    for document in documents:
        ids = tiny_tokenizer.encode(document.text)
        expected.update(itertools.pairwise([tiny_tokenizer.bos_id, *ids, tiny_tokenizer.eos_id]))
    source = packing.packed(tiny_corpus, "pretrain", "train", SEQ_LEN)
    assert learnt_pairs(source) == expected
    model, params = model_of(LanguageModel, tiny_model)
    batch = batches.TrainBatches(source, BATCH, seed=0).at(0)
    loss_fn = jax.jit(pretrain.make_loss_fn(model, 0.0))
    assert loss_fn(params, batch, KEY)[1][0] == (batch.loss_mask > 0).sum()


def test_reward_reads_each_reply_at_its_end_and_nothing_after(tiny_tokenizer, tiny_model):
    """r(x, y) is read at the last real token, whatever stands in the padding."""

    def ranked(key, replies, ranks, finished=True):
        prompt = Prompt(key, (Message("user", f"how was the {key}?", "a film"),), "made")
        candidates = tuple(Candidate(f"{key}{i}", r, "p", finished) for i, r in enumerate(replies))
        return Comparison(key, prompt, candidates, tuple(ranks), "vader", True)

    comparisons = [
        ranked("film", ["it was great.", "bad", "dull, and long, and sad.", "good"], [1, 4, 3, 2]),
        ranked("tea", ["great", "awful"], [1, 2]),
        ranked("song", ["odd, and then", "lovely, but", "so so"], [2, 1, 2], finished=False),
    ]
    # Two batches of two; the last row is padding.
    data = batches.ComparisonBatches(comparisons, tiny_tokenizer, 2, 4, SEQ_LEN, 24, seed=0)
    batch = jax.tree.map(lambda *x: np.concatenate(x), *data.eval())
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 0])
    for row, comparison in enumerate(comparisons):
        for column, candidate in enumerate(comparison.candidates):
            last = batch.last_index[row, column]
            ids = batch.tokens[row, column]
            end = [tiny_tokenizer.end_id] if candidate.finished else []
            said = [*tiny_tokenizer.encode(candidate.content), *end]
            assert ids[last + 1 - len(said) : last + 1].tolist() == said
            assert ids[last - len(said)] == tiny_tokenizer.assistant_id
            assert not ids[last + 1 :].any()
        absent = batch.ranks[row] == 0
        assert absent.sum() == 4 - len(comparison.candidates)
    model, params = model_of(ScalarModel, tiny_model)
    loss_fn = jax.jit(lambda batch: reward.make_loss_fn(model)(params, batch, KEY)[:2])
    slots = np.arange(SEQ_LEN)
    padding = (slots > batch.last_index[..., None]) | (batch.ranks == 0)[..., None]
    last = (slots == batch.last_index[..., None]) & ~padding
    loss, (weight, _) = loss_fn(batch)
    assert weight == 3
    rubbish, _ = loss_fn(batch.replace(tokens=np.where(padding, 7, batch.tokens)))
    assert rubbish == loss
    changed, _ = loss_fn(batch.replace(tokens=np.where(last, 7, batch.tokens)))
    assert changed != loss


def test_ppo_learns_from_the_reply_up_to_its_first_stop_token(
    tiny_clean, tiny_tokenizer, tiny_model
):
    """Of a real rollout: nothing of the prompt, nothing after the end, the end itself too."""
    config = ppo_config.get_config("scorer")
    config.data.prompt_len, config.sampling.max_new_tokens = 24, 12
    prompts = fixtures.read_records(tiny_clean, "prompts", "train", Prompt)
    data = batches.PromptBatches(prompts, tiny_tokenizer, 64, 24, seed=0)
    asked = data.at(0)
    model, params = model_of(LanguageModel, tiny_model)
    params = jax.tree.map(lambda x: 3.0 * x, params)
    ends = [token for letter in "eatoi" for token in tiny_tokenizer.encode(letter)]
    stop = (tiny_tokenizer.end_id, *ends)  # so that replies do end
    sampling = ppo.rollout.decode.Sampling(**config.sampling.to_dict(), stop_tokens=stop)
    samples = jax.jit(rollout.sample, static_argnums=(0, 5, 6))(
        model, params, asked.tokens, asked.lengths, KEY, sampling, tiny_tokenizer.pad_id
    )
    samples = jax.device_get(samples)
    lengths = []
    for row in range(64):
        reply = samples.response[row].tolist()
        stops = [at for at, token in enumerate(reply) if token in stop]
        length = stops[0] + 1 if stops else 12
        assert samples.finished[row] == bool(stops)
        np.testing.assert_array_equal(samples.response_mask[row], np.arange(12) < length)
        prompt = chat.encode_prompt(tiny_tokenizer, data.prompts[asked.index[row]].messages, 24)
        whole = [*prompt, *reply[:length]]
        assert samples.tokens[row].tolist() == whole + [0] * (24 + 12 - len(whole))
        lengths.append(length)
    assert len(set(lengths)) > 3 and 12 in lengths
    # The update's weight is the number of those tokens, and the loss a sum over them alone.
    logprobs, entropy = jax.jit(rollout.response_logprobs, static_argnums=0)(
        model, params, samples, 1.0
    )
    zeros = jnp.zeros((64, 12), jnp.float32)
    drawn = rollout.Rollout(
        samples, logprobs, entropy, logprobs, zeros, jnp.arange(64, dtype=jnp.float32)
    )
    episodes, _ = jax.jit(lambda drawn: episodes_lib.prepare(drawn, jnp.float32(0.1), config))(
        drawn
    )
    loss, (weight, _) = jax.jit(ppo.make_policy_loss(model, config))(params, episodes, KEY)
    assert weight == sum(lengths)
    ratio_one = -sum(float(episodes.advantages[row, :n].sum()) for row, n in enumerate(lengths))
    assert float(loss) == pytest.approx(ratio_one, rel=1e-4)
    np.testing.assert_array_equal(episodes.value_mask, samples.response_mask)
