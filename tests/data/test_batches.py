"""Batches: pure functions of (seed, step), alike for any number of processes, rightly masked."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest

from gptlab.data import batches, chat, packing, records
from gptlab.data.batches import ComparisonBatches, PromptBatches, TrainBatches
from gptlab.data.mixtures import PackedMixture
from gptlab.data.records import Candidate, Comparison, Message, Prompt, TokenExample
from gptlab.run.errors import UserError
from tests.fixtures import read_records

T = 64


@pytest.fixture(scope="module")
def sources(tiny_corpus, tmp_path_factory):
    """Packed rows of the tiny corpus, made in a directory of their own."""
    workdir = tmp_path_factory.mktemp("packed")
    for name in ("pretrain", "dialogues"):
        examples = read_records(tiny_corpus, name, "train", TokenExample)
        records.write_shards(workdir / "records", name, "train", examples)
    return {name: packing.packed(workdir, name, "train", T) for name in ("pretrain", "dialogues")}


def mix(sources, rates=(3.0, 1.0)):
    return PackedMixture(tuple(sources.values()), rates)


@pytest.fixture(scope="module")
def prompts(tiny_clean):
    return read_records(tiny_clean, "prompts", "train", Prompt)


@pytest.fixture(scope="module")
def comparisons(tiny_comparisons):
    return read_records(tiny_comparisons, "comparisons", "train", Comparison)


@pytest.fixture(params=["rows", "mixture", "comparisons", "prompts"])
def make(request, sources, prompts, comparisons, tiny_tokenizer):
    """Every source of batches as a function of (seed, process_index, process_count); B = 8."""

    def build(seed=0, process_index=0, process_count=1):
        process = {"process_index": process_index, "process_count": process_count}
        if request.param == "rows":
            return TrainBatches(sources["pretrain"], 8, seed, **process)
        if request.param == "mixture":
            return TrainBatches(mix(sources), 8, seed, **process)
        if request.param == "comparisons":
            return ComparisonBatches(comparisons, tiny_tokenizer, 8, 4, T, T, seed, **process)
        return PromptBatches(prompts, tiny_tokenizer, 8, 32, seed, **process)

    return build


def fields(batch):
    return dict(vars(batch))


def same(one, other):
    return all(np.array_equal(value, fields(other)[name]) for name, value in fields(one).items())


def test_a_batch_depends_on_seed_and_step_alone(make):
    first, again = make(), make()
    later = [first.at(step) for step in (0, 1, 90, 1000)]
    for step, batch in zip((1000, 90, 1, 0), reversed(later), strict=True):
        assert same(again.at(step), batch)
    assert not same(first.at(0), first.at(1))
    assert not same(first.at(0), make(seed=1).at(0))


def test_processes_one_after_another_are_the_single_process(make):
    for step in (0, 7, 123):
        whole = fields(make().at(step))
        parts = [fields(make(process_index=i, process_count=4).at(step)) for i in range(4)]
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_iterating_from_a_step_gives_the_batches_from_there(make):
    source = make()
    iterator = source.iterate(start_step=5)
    for step in range(5, 10):
        assert same(next(iterator), source.at(step))
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_an_error_in_the_thread_arrives_where_the_batch_is_asked_for(make, monkeypatch):
    source = make()

    def fail(step):
        raise UserError(f"step {step} is corrupt")

    monkeypatch.setattr(source, "at", fail)
    with pytest.raises(UserError, match="step 3 is corrupt"):
        next(source.iterate(3))


def test_batches_must_divide_among_processes(make):
    with pytest.raises(UserError, match="batch_size=8 can't be divided among 3 processes"):
        make(process_count=3)


def test_too_little_data_for_one_batch(sources, prompts, comparisons, tiny_tokenizer):
    for build in (
        lambda: TrainBatches(sources["pretrain"], 4096, 0),
        lambda: ComparisonBatches(comparisons, tiny_tokenizer, 4096, 4, T, T, 0),
        lambda: PromptBatches(prompts, tiny_tokenizer, 4096, 32, 0),
        lambda: PromptBatches([], tiny_tokenizer, 1, 32, 0),
    ):
        with pytest.raises(UserError, match="too little data for one batch: .*batch_size="):
            build()


def test_an_epoch_has_every_row_once_and_the_next_another_order(sources):
    source = sources["pretrain"]
    order = TrainBatches(source, 1, 0)

    def epoch(number):
        steps = range(number * len(source), (number + 1) * len(source))
        return [order.at(step).tokens.tobytes() for step in steps]

    rows = [row.tobytes() for row in source.rows(range(len(source)))["tokens"]]
    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(rows)
    assert epoch(0) != epoch(1) != rows


def test_neighbouring_seeds_do_not_share_epochs(sources):
    """Grain shuffles epoch e by seed + e; epoch 1 of seed 0 must not be epoch 0 of seed 1."""
    source = sources["pretrain"]
    a, b = TrainBatches(source, 1, 0), TrainBatches(source, 1, 1)
    pairs = [(a.at(len(source) + i), b.at(i)) for i in range(10)]
    assert not all(same(one, other) for one, other in pairs)


def shares(sources, found):
    """How many rows of each source are among the rows of some batches."""
    own = {name: {row.tobytes() for row in _all(sources[name])["tokens"]} for name in sources}
    assert not own["dialogues"] & own["pretrain"]
    rows = [row.tobytes() for batch in found for row in batch.tokens if row.any()]
    return {name: sum(row in own[name] for row in rows) for name in sources}


def test_a_mixture_keeps_its_rates(sources):
    mixed = TrainBatches(mix(sources), 8, 0)
    assert shares(sources, map(mixed.at, range(100))) == {"pretrain": 600, "dialogues": 200}
    # Beyond one epoch of the smaller source, its rows come again.
    assert len(sources["dialogues"]) < 200


def test_other_rates_make_other_batches(sources):
    one, other = TrainBatches(mix(sources), 8, 0), TrainBatches(mix(sources, (1.0, 3.0)), 8, 0)
    assert not any(same(one.at(step), other.at(step)) for step in range(10))
    assert shares(sources, map(other.at, range(100))) == {"pretrain": 200, "dialogues": 600}


def test_a_mixture_is_evaluated_at_its_rates_and_no_row_twice(sources):
    for rates in ((3.0, 1.0), (1.0, 9.0)):
        found = list(batches.eval_batches(mix(sources, rates), 8))
        rows = [row.tobytes() for batch in found for row in batch.tokens if row.any()]
        assert len(rows) == len(set(rows))
        seen = shares(sources, found)
        expected = rates[0] / sum(rates)
        assert seen["pretrain"] / len(rows) == pytest.approx(expected, abs=2 / len(rows))
        # It ends where a member has no more, so it is not a short one by mistake.
        assert any(seen[name] >= len(sources[name]) - 1 for name in sources)
        first = shares(sources, found[:2])
        assert first["pretrain"] / 16 == pytest.approx(expected, abs=1 / 16)
        # Several processes see the same rows.
        parts = [list(batches.eval_batches(mix(sources, rates), 8, None, i, 2)) for i in range(2)]
        for whole, *pair in zip(found, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate([p.tokens for p in pair]), whole.tokens)


def test_a_mixture_needs_a_rate_for_each_source(sources):
    for rates in ((), (1.0,), (1.0, 0.0)):
        with pytest.raises(UserError, match="2 sources need as many positive rates"):
            mix(sources, rates)


def _all(source):
    return source.rows(range(len(source)))


def test_dtypes_and_shapes(sources):
    batch = TrainBatches(sources["dialogues"], 8, 0).at(0)
    for name, value in fields(batch).items():
        assert value.shape == (8, T)
        assert value.dtype == (np.float32 if name == "loss_mask" else np.int32), name


def test_the_batch_of_dialogues_has_loss_on_the_assistant_only(sources, tiny_tokenizer):
    """Of whole dialogues: what counts is exactly each reply and its end-of-turn token."""
    tok = tiny_tokenizer
    checked = 0
    for step in range(5):
        batch = TrainBatches(sources["dialogues"], 8, 0).at(step)
        for row, segment in itertools.product(range(8), (1, 2, 3)):
            at = batch.segment_ids[row] == segment
            ids, targets = batch.tokens[row, at], batch.targets[row, at]
            if not at.any() or ids[0] != tok.user_id or targets[-1] != tok.end_id:
                continue  # A chunk of a dialogue that was cut.
            speaker, expected = None, []
            for token, target in zip(ids, targets, strict=True):
                speaker = token if token in (tok.user_id, tok.assistant_id) else speaker
                in_turn = target not in (tok.user_id, tok.assistant_id)
                expected.append(float(speaker == tok.assistant_id and in_turn))
            np.testing.assert_array_equal(batch.loss_mask[row, at], expected)
            assert 0 < sum(expected) < len(expected)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_row_once(sources, process_count):
    source = sources["pretrain"]
    parts = [
        list(batches.eval_batches(source, 64, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    counted = sum(batch.loss_mask.sum() for part in parts for batch in part)
    assert counted == source.stats["loss_tokens"]
    assert len(parts[0]) == -(-len(source) // 64)
    assert {batch.tokens.shape for part in parts for batch in part} == {(64 // process_count, T)}
    first = np.concatenate([part[0].tokens for part in parts])
    np.testing.assert_array_equal(first, source.rows(range(64))["tokens"])
    assert len(list(batches.eval_batches(source, 64, max_batches=1))) == 1
    assert len(list(batches.eval_batches(source, 64, max_batches=99))) == len(parts[0])


def ranking(key, prompt, replies, ranks, finished=True):
    candidates = tuple(
        Candidate(f"{key}{i}", reply, "human", finished) for i, reply in enumerate(replies)
    )
    return Comparison(key, prompt, candidates, tuple(ranks), "human", False)


def talk(*turns):
    roles = itertools.cycle(("user", "assistant"))
    return Prompt("p", tuple(Message(r, t) for r, t in zip(roles, turns, strict=False)), "s")


def decoded(tok, ids):
    return tok.decode([int(i) for i in ids])


def test_comparisons_are_prompt_and_reply_with_absent_candidates_at_rank_0(tiny_tokenizer):
    tok = tiny_tokenizer
    pair = ranking("a", talk("hi?"), ["yes!", "no, no."], [2, 1])
    three = ranking("b", talk("why?"), ["so", "it", "is"], [1, 1, 2], finished=False)
    source = ComparisonBatches([pair, three], tok, 2, 3, T, T, 0)
    (batch,) = source.eval()
    np.testing.assert_array_equal(batch.ranks, [[2, 1, 0], [1, 1, 2]])
    np.testing.assert_array_equal(batch.weight, [1, 1])
    assert batch.last_index[0, 2] == 0 and not batch.tokens[0, 2].any()
    for row, comparison in enumerate((pair, three)):
        for column, candidate in enumerate(comparison.candidates):
            ids = batch.tokens[row, column]
            last = batch.last_index[row, column]
            assert ids[last] and not ids[last + 1 :].any()
            assert (ids[last] == tok.end_id) == candidate.finished
            at = int(np.flatnonzero(ids == tok.assistant_id)[0])
            assert decoded(tok, ids[at : last + 1]) == candidate.content
            assert decoded(tok, ids[:at]) == comparison.prompt.messages[0].content
    assert batch.tokens.dtype == batch.last_index.dtype == batch.ranks.dtype == np.int32
    assert batch.weight.dtype == np.float32


def test_a_comparison_counts_by_its_weight_and_padding_not_at_all(tiny_tokenizer):
    thumb = dataclasses.replace(ranking("a", talk("hi?"), ["yes!", "no."], [2, 1]), weight=0.25)
    plain = ranking("b", talk("why?"), ["so", "it"], [1, 2])
    source = ComparisonBatches([thumb, plain], tiny_tokenizer, 2, 2, T, T, 0)
    assert next(iter(source.eval())).weight.tolist() == [0.25, 1.0]
    padded = ComparisonBatches([thumb, plain, plain], tiny_tokenizer, 2, 2, T, T, 0)
    assert [batch.weight.tolist() for batch in padded.eval()][1] == [1.0, 0.0]


def test_the_prompt_is_trimmed_by_whole_turns_and_alike_for_all_candidates(tiny_tokenizer):
    tok = tiny_tokenizer
    prompt = talk("the film was odd", "yes it was", "tell me about the day at home")
    long_reply = "the song was lovely today, and the tea"
    pair = ranking("a", prompt, ["ok", long_reply], [1, 2])
    source = ComparisonBatches([pair], tok, 1, 2, 48, 48, 0)
    (batch,) = source.eval()
    ends = [int(np.flatnonzero(ids == tok.assistant_id)[-1]) for ids in batch.tokens[0]]
    assert ends[0] == ends[1]
    np.testing.assert_array_equal(batch.tokens[0, 0, : ends[0]], batch.tokens[0, 1, : ends[0]])
    assert batch.tokens[0, 0, 0] == tok.user_id
    assert decoded(tok, batch.tokens[0, 0, : ends[0]]) == "tell me about the day at home"
    last = batch.last_index[0, 1]
    assert decoded(tok, batch.tokens[0, 1, ends[0] : last + 1]) == long_reply


@pytest.mark.parametrize("prompt_len", [12, 20, 32])
def test_the_prompt_is_the_one_that_ppo_and_evaluation_read(tiny_tokenizer, prompt_len):
    tok = tiny_tokenizer
    prompt = talk("the film was odd", "yes it was", "tell me about the day at home")
    pair = ranking("a", prompt, ["ok", "no"], [1, 2])
    (ranked,) = ComparisonBatches([pair], tok, 1, 2, T, prompt_len, 0).eval()
    (asked,) = PromptBatches([prompt], tok, 1, prompt_len, 0).eval()
    length = int(asked.lengths[0])
    assert length <= prompt_len
    np.testing.assert_array_equal(ranked.tokens[0, 0, :length], asked.tokens[0, :length])
    assert ranked.last_index[0, 0] + 1 == length + len(chat.encode_reply(tok, "ok"))


def test_a_reply_that_does_not_fit_is_absent_and_alone_drops_the_comparison(tiny_tokenizer):
    endless = "odd " * 100
    some = ranking("a", talk("hi?"), ["yes", endless, "no"], [2, 1, 3])
    none = ranking("b", talk("hi?"), ["yes", endless], [2, 1])
    source = ComparisonBatches([none, some], tiny_tokenizer, 1, 3, T, T, 0)
    assert source.dropped == 1 and source.comparisons == [some] and len(source) == 1
    (batch,) = source.eval()
    np.testing.assert_array_equal(batch.ranks, [[2, 0, 3]])
    with pytest.raises(UserError, match=r"0 comparisons \(1 do not fit 64 tokens\)"):
        ComparisonBatches([none], tiny_tokenizer, 1, 3, T, T, 0)


def test_too_many_candidates_name_the_key_to_raise(tiny_tokenizer):
    wide = ranking("a", talk("hi?"), ["a", "b", "c"], [1, 2, 3])
    with pytest.raises(UserError, match="a has 3 candidates: raise data.max_candidates=2"):
        ComparisonBatches([wide], tiny_tokenizer, 1, 2, T, T, 0)


def test_evaluation_pads_comparisons_and_prompts(prompts, comparisons, tiny_tokenizer):
    ranked = ComparisonBatches(comparisons[:5], tiny_tokenizer, 4, 4, T, T, 0)
    weights = [batch.weight.tolist() for batch in ranked.eval()]
    assert weights == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert not list(ranked.eval())[1].ranks[1:].any()
    asked = PromptBatches(prompts[:5], tiny_tokenizer, 4, 32, 0)
    indices = [batch.index.tolist() for batch in asked.eval()]
    assert indices == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert len(list(asked.eval(max_batches=1))) == 1
    assert min(batch.lengths.min() for batch in asked.eval()) == 1


def test_prompts_end_with_the_assistants_header(prompts, tiny_tokenizer):
    source = PromptBatches(prompts, tiny_tokenizer, 8, 32, 0)
    batch = source.at(3)
    for ids, length, index in zip(batch.tokens, batch.lengths, batch.index, strict=True):
        assert ids[length - 1] == tiny_tokenizer.assistant_id and not ids[length:].any()
        text = decoded(tiny_tokenizer, ids[:length])
        assert text.endswith(source.prompts[index].messages[-1].content)
    assert batch.tokens.dtype == batch.lengths.dtype == batch.index.dtype == np.int32
