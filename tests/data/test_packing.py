"""Packed rows: what is predicted from what, at the boundaries above all."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab.data import packing, records
from gptlab.data.records import TokenExample
from gptlab.run.errors import UserError


def example(key, tokens, mask=None):
    tokens = np.array(tokens, np.int32)
    return TokenExample(key, tokens, np.ones(len(tokens)) if mask is None else np.array(mask))


def write(workdir, examples, name="pretrain"):
    records.write_shards(workdir / "records", name, "train", examples)


def pack(examples, seq_len, overlong="split", max_reply_tokens=0):
    """Rows of all examples at once, without files."""
    chunks = packing.cut(examples, seq_len, overlong, max_reply_tokens)
    return packing.lay_out(chunks, seq_len)


def test_the_boundary_of_two_segments():
    """Rows by hand: an input never predicts another segment's token."""
    rows = pack(
        [example("a", [3, 11, 12, 1], [0, 1, 1, 1]), example("b", [4, 21, 22], [0, 0, 1])], 6
    )
    np.testing.assert_array_equal(rows["tokens"], [[3, 11, 12, 4, 21, 0]])
    np.testing.assert_array_equal(rows["targets"], [[11, 12, 1, 21, 22, 0]])
    np.testing.assert_array_equal(rows["loss_mask"], [[1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(rows["positions"], [[0, 1, 2, 0, 1, 0]])


def test_a_long_example_is_split_with_one_token_of_overlap():
    rows = pack([example("a", range(10, 20))], 4)
    np.testing.assert_array_equal(
        rows["tokens"], [[10, 11, 12, 13], [14, 15, 16, 17], [18, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        rows["targets"], [[11, 12, 13, 14], [15, 16, 17, 18], [19, 0, 0, 0]]
    )


@pytest.mark.parametrize(("tokens", "kept"), [(5, True), (6, False)])
def test_drop_leaves_out_what_exceeds_a_row(tokens, kept):
    rows = pack([example("a", range(1, tokens + 1)), example("b", [1, 2])], 4, "drop")
    assert (rows["loss_mask"].sum() == 1 + 4) == kept
    assert (rows["loss_mask"].sum() == 1) == (not kept)


def test_replies_above_the_limit_are_only_context():
    talk = example("a", [3, 11, 12, 4, 21, 22, 23, 4, 31], [0, 1, 1, 0, 1, 1, 1, 0, 1])
    # An unbroken run never reaches over the border of two examples.
    neighbour = example("b", [5, 41, 42, 43], [1, 1, 1, 0])
    rows = pack([talk, neighbour], 16, max_reply_tokens=2)
    np.testing.assert_array_equal(rows["tokens"][0, :8], [3, 11, 12, 4, 21, 22, 23, 4])
    np.testing.assert_array_equal(rows["loss_mask"][0, :8], [1, 1, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(rows["loss_mask"][0, 8:11], [1, 1, 0])
    everything = pack([talk, neighbour], 16)
    np.testing.assert_array_equal(everything["loss_mask"][0, :8], [1, 1, 0, 1, 1, 1, 0, 1])


def test_chunks_that_teach_nothing_are_left_out():
    """A long prompt's first chunk has no loss; an example of one token has no target."""
    rows = pack([example("a", range(1, 10), [0] * 8 + [1]), example("b", [7]), example("c", [])], 4)
    np.testing.assert_array_equal(rows["targets"], [[6, 7, 8, 9]])
    np.testing.assert_array_equal(rows["loss_mask"], [[0, 0, 0, 1]])


@st.composite
def corpora(draw):
    """Examples whose tokens are all different, so that each can be traced."""
    lengths = draw(st.lists(st.integers(0, 40), max_size=30))
    begins = np.cumsum([1, *lengths])
    mask = st.integers(0, 1)
    return [
        example(str(i), range(begin, begin + n), draw(st.lists(mask, min_size=n, max_size=n)))
        for i, (begin, n) in enumerate(zip(begins[:-1], lengths, strict=True))
    ]


@given(corpora(), st.integers(1, 17))
def test_every_token_with_loss_is_a_target_once_after_its_predecessor(examples, seq_len):
    rows = pack(examples, seq_len)
    expected = {
        int(token): int(before)
        for e in examples
        for before, token, mask in zip(e.tokens, e.tokens[1:], e.loss_mask[1:], strict=False)
        if mask
    }
    at = rows["loss_mask"] > 0
    targets = rows["targets"][at]
    assert sorted(targets) == sorted(expected)
    assert [expected[int(t)] for t in targets] == list(rows["tokens"][at])
    real = rows["segment_ids"] > 0
    # Tokens were numbered consecutively: inside a row, one position on is one token on.
    same = (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]) & real[:, 1:]
    assert (np.diff(rows["tokens"], axis=1)[same] == 1).all()
    assert (np.diff(rows["positions"], axis=1)[same] == 1).all()
    starts = real & ~np.pad(same, ((0, 0), (1, 0)))
    assert (rows["positions"][starts] == 0).all()
    # A segment is one run of slots, numbered from 1 in order; padding is all zeros, at the end.
    for row in rows["segment_ids"]:
        filled = row[row > 0]
        assert (row[: len(filled)] > 0).all()
        assert list(np.unique(filled)) == list(range(1, filled.max() + 1))
        assert (np.diff(filled) >= 0).all()
    for name in packing.FIELDS:
        assert not rows[name][~real].any()
    np.testing.assert_array_equal(packing._positions(rows["segment_ids"]), rows["positions"])


@given(st.lists(st.integers(1, 64), max_size=60))
def test_rows_are_assigned_as_best_fit_decreasing_does(slots):
    """As many rows as the textbook algorithm, chunk by chunk."""
    free: list[int] = []
    for length in sorted(slots, reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(64 - length)
    row, offset, _, num_rows = packing.assign_rows(np.array(slots, np.int64), 64)
    assert num_rows == len(free)
    used = np.zeros((num_rows, 64), int)
    for r, o, length in zip(row, offset, slots, strict=True):
        used[r, o : o + length] += 1
    assert used.max(initial=0) <= 1
    assert sorted(64 - used.sum(1)) == sorted(free)


def test_packed_rows_are_the_same_rows(tmp_path):
    rng = np.random.default_rng(0)
    examples = [example(str(i), rng.integers(1, 99, rng.integers(2, 30))) for i in range(40)]
    write(tmp_path, examples)
    source = packing.packed(tmp_path, "pretrain", "train", 16)
    rows = pack(sorted(examples, key=lambda e: e.id), 16)
    fields = source.rows(range(len(source)))
    assert all(values.dtype == np.int32 for values in fields.values())
    order = np.random.default_rng(1).permutation(len(source))
    for name in packing.FIELDS:
        np.testing.assert_array_equal(fields[name], rows[name][order])
    np.testing.assert_array_equal(source.rows([3])["tokens"][0], fields["tokens"][3])
    assert source.stats["slots"] == sum(len(e.tokens) - 1 for e in examples)
    assert source.directory.name == "pretrain-train-T16"


def test_packing_in_blocks_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, [example(f"{i:02d}", range(10 * i + 1, 10 * i + 8)) for i in range(20)])
    monkeypatch.setattr(packing, "_BLOCK_TOKENS", 30)
    source = packing.packed(tmp_path, "pretrain", "train", 9)
    assert source.stats["blocks"] == 4
    targets = source.rows(range(len(source)))["targets"]
    expected = [t for i in range(20) for t in range(10 * i + 2, 10 * i + 8)]
    assert sorted(targets[targets > 0]) == expected


def test_rows_are_made_once_and_again_only_when_their_source_changes(tmp_path, monkeypatch):
    built = []
    build = packing._build
    monkeypatch.setattr(packing, "_build", lambda *args: (built.append(args[1].name), build(*args)))
    write(tmp_path, [example("a", range(1, 9))])
    for _ in range(2):
        assert len(packing.packed(tmp_path, "pretrain", "train", 4)) == 2
    assert built == ["pretrain-train-T4"]
    write(tmp_path, [example("a", range(1, 9)), example("b", range(1, 6))])
    for _ in range(2):
        assert len(packing.packed(tmp_path, "pretrain", "train", 4)) == 3
    assert built == ["pretrain-train-T4"] * 2
    packing.packed(tmp_path, "pretrain", "train", 4, overlong="drop")
    packing.packed(tmp_path, "pretrain", "train", 8)
    packing.packed(tmp_path, "pretrain", "train", 4)
    assert built[2:] == ["pretrain-train-T4-drop", "pretrain-train-T8"]
    # Rows of another schema, or without a readable description, are made again.
    stats = tmp_path / "packed" / "pretrain-train-T8" / "packed.json"
    for content in (stats.read_text().replace('"schema": 2', '"schema": 1'), "{"):
        stats.write_text(content)
        assert len(packing.packed(tmp_path, "pretrain", "train", 8)) == 2
    assert built[4:] == ["pretrain-train-T8"] * 2


def test_two_that_pack_at_once_end_with_the_same_rows(tmp_path, monkeypatch):
    """As two runs of a sweep do."""
    write(tmp_path, [example("a", range(1, 9))])
    both_build, build = threading.Barrier(2, timeout=30), packing._build
    monkeypatch.setattr(packing, "_build", lambda *args: (both_build.wait(), build(*args)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(packing.packed, tmp_path, "pretrain", "train", 4, overlong="split")
            for _ in range(2)
        ]
        one, other = (future.result().rows([0])["tokens"] for future in futures)
    np.testing.assert_array_equal(one, other)
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["pretrain-train-T4"]


def test_nothing_is_left_of_packing_that_fails(tmp_path, monkeypatch):
    write(tmp_path, [example("a", range(1, 9))])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.files, "atomic_write", fail)
    with pytest.raises(UserError, match="No space left|disk is full"):
        packing.packed(tmp_path, "pretrain", "train", 4)
    assert not list((tmp_path / "packed").iterdir())


def test_nothing_that_fits_is_an_error(tmp_path):
    write(tmp_path, [example("a", range(20))])
    with pytest.raises(UserError, match="fits rows of 4 tokens .1 are longer"):
        packing.packed(tmp_path, "pretrain", "train", 4, overlong="drop")
    with pytest.raises(UserError, match="'split' or 'drop'"):
        packing.packed(tmp_path, "pretrain", "train", 4, overlong="truncate")
    with pytest.raises(UserError, match="no records dialogues-train"):
        packing.packed(tmp_path, "dialogues", "train", 4)


def test_damaged_rows_are_named(tmp_path):
    write(tmp_path, [example("a", np.random.default_rng(0).integers(0, 2**31 - 1, 30_000))])
    directory = packing.packed(tmp_path, "pretrain", "train", 1000).directory
    path = directory / "rows-00000.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9] = b"corrupted"
    path.write_bytes(bytes(data))
    source = packing.packed(tmp_path, "pretrain", "train", 1000)
    with pytest.raises(UserError, match=f"packed rows in {directory} are damaged"):
        source.rows(range(len(source)))
    for break_it in (
        lambda: path.write_bytes(bytes(data[:70_000])),
        lambda: records.write_ordered(path, [b""]),
        path.unlink,
    ):
        break_it()
        with pytest.raises(UserError, match=f"packed rows in {directory} are damaged"):
            packing.packed(tmp_path, "pretrain", "train", 1000)


def test_packing_keeps_up_with_millions_of_tokens():
    """4M tokens take under 10 s (1 s measured); a slow machine gets some slack for a quarter."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 1, 8_000).astype(int) + 2, 5000)
    examples = [example(str(i), np.full(n, 7)) for i, n in enumerate(lengths)]
    begin = time.monotonic()
    rows = pack(examples, 256)
    assert time.monotonic() - begin < 5
    assert lengths.sum() > 1_000_000 * 0.9
    assert (rows["segment_ids"] > 0).mean() > 0.99
