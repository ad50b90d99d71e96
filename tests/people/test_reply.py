"""Text out of tokens: whole characters, and nothing of a stop string, however the pieces fall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab.people.reply import Reader, StopText

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.text("ab\n", max_size=4), max_size=12), STOPS)
def test_text_ends_before_the_first_stop_string(pieces, stops):
    reader, shown, so_far = StopText(stops), "", ""
    for piece in pieces:
        shown += reader.feed(piece)
        so_far += piece
        # Of all that has come, only what may begin a stop string is not yet shown.
        ends = [so_far.find(stop) for stop in stops if stop in so_far]
        if ends:
            assert shown == so_far[: min(ends)] and reader.stopped
            return
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
    assert shown + reader.end() == so_far and not reader.stopped


def byte_ids(tokenizer, text):
    """One token for each byte."""
    table = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    return [table[bytes([byte])] for byte in text.encode()]


def test_characters_come_whole_and_with_their_tokens(tiny_tokenizer):
    reader = Reader(tiny_tokenizer, (), "", True)
    seen = []
    for number, token in enumerate(byte_ids(tiny_tokenizer, "a☕b")):
        reader.feed(token, -float(number), ())
        seen.append(reader.take())
    assert [text for text, _ in seen] == ["a", "", "", "☕", "b"]
    tokens = [token for _, of_piece in seen for token in of_piece]
    assert b"".join(token.data for token in tokens).decode() == "a☕b"
    assert [token.logprob for token in tokens] == [0.0, -1.0, -2.0, -3.0, -4.0]


def test_half_a_character_at_the_end_is_shown_as_such(tiny_tokenizer):
    reader = Reader(tiny_tokenizer, (), "", False)
    for token in byte_ids(tiny_tokenizer, "☕")[:2]:
        reader.feed(token, 0.0, ())
    reader.end()
    assert reader.take() == ("\N{REPLACEMENT CHARACTER}", ())


@pytest.mark.parametrize("logprobs", [True, False])
def test_tokens_of_a_stop_string_are_not_handed_out(tiny_tokenizer, logprobs):
    reader = Reader(tiny_tokenizer, ("cde",), "", logprobs)
    texts, tokens = [], []
    for token in byte_ids(tiny_tokenizer, "abcdcdef"):
        reader.feed(token, 0.0, ())
        text, own = reader.take()
        texts.append(text)
        tokens += own
    reader.end()
    assert reader.stopped and reader.take() == ("", ())
    # 'cd' was held back until the next 'c' showed that it began nothing.
    assert texts == ["a", "b", "", "", "cd", "", "", ""]
    assert b"".join(t.data for t in tokens) == (b"abcd" if logprobs else b"")


def test_what_was_held_back_is_shown_at_the_end(tiny_tokenizer):
    reader = Reader(tiny_tokenizer, ("bc",), "", True)
    for token in byte_ids(tiny_tokenizer, "ab"):
        reader.feed(token, 0.0, ())
    assert reader.take()[0] == "a"
    reader.end()
    text, tokens = reader.take()
    assert (text, [t.data for t in tokens]) == ("b", [b"b"])
