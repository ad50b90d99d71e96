"""Personal data is found by its form, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab.people.scrubbing import scrub


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("Mail ann.lee+x@mail.example.co.uk!", "Mail [e-mail]!"),
        ("<bo@example.org>", "<[e-mail]>"),
        ("call +49 (0)30 901820-12 now", "call [phone] now"),
        ("0171 1234567 or (030) 901820 12", "[phone] or [phone]"),
        ("555-123-4567, 0049 30 901820", "[phone], [phone]"),
        ("4111 1111 1111 1111 and 4111-1111-1111-1111", "[card] and [card]"),
        ("DE89 3704 0044 0532 0130 00 thanks", "[IBAN] thanks"),
        ("GB82WEST12345698765432 AND SO ON", "[IBAN] AND SO ON"),
        ("from 192.168.0.1, 2001:db8::1", "from [IP], [IP]"),
    ],
)
def test_what_is_found(text, cleaned):
    assert scrub(text)[0] == cleaned
    assert sum(scrub(text)[1].values()) == cleaned.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn
        "at 12:30:45 on 2023-11-01, 2026-11-23 09:15:13",
        "version 1.2.3.4.5, pi 3.14159265358979, 1,234,567 of 10000000000",
        "300.1.2.3 and ratio 1:2:3, a::b, std::vector",
        "1990-1995, 1024 768, room 0815",
        "me @ home, @handle, a@b",
    ],
)
def test_what_is_none_stays(text):
    assert scrub(text) == (text, {})


@given(st.text(alphabet=st.characters(exclude_categories=("Nd",), exclude_characters="@:")))
def test_text_without_digits_is_not_touched(text):
    assert scrub(text) == (text, {})


def test_long_hostile_text_takes_no_time():
    for text in ("a." * 50_000 + "@", "1 " * 50_000, "a@" + "b." * 50_000, ":" * 100_000):
        scrub(text)
