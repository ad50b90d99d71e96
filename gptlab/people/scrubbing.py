"""Personal data in text, found by its form and replaced: '[e-mail]', '[phone]', '[IP]', ...

Found: e-mail addresses, phone numbers (international, or with a trunk 0 or brackets and at least
nine digits), IPv4 and IPv6 addresses, payment card numbers (13 to 19 digits whose Luhn check holds)
and IBANs (whose mod-97 check holds). *Not* found, because no pattern can tell them from other
words: names, postal addresses, dates of birth, user names, numbers of identity documents, and
whatever is written out in words. Read a sample of every export before it leaves the house.

The libraries that find names too (Presidio, scrubadub) bring large language models of their own.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

_EMAIL = re.compile(r"[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IPV6 = re.compile(
    r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|\d{1,3}(?:\.\d{1,3}){3})?(?![\w:])"
)
# With a plus or two zeros; or beginning with 0 or a bracket, in groups.
_PHONE = re.compile(r"(?<![\w.+])(?:\+|00)\d(?:[ ()./-]{0,2}\d){6,14}(?![\w])")
_NATIONAL = re.compile(
    r"(?<![\w.+])(?:0\d|\(\d{2,5}\)[ -]?\d|\d{3}[-. ]\d{3}[-. ]\d)(?:[ ()/.-]{0,2}\d){3,11}(?![\w])"
)


def scrub(text: str) -> tuple[str, Counter[str]]:
    """The text with '[kind]' for what was found, and how often that was, by kind."""
    found: Counter[str] = Counter()
    if not _CANDIDATE.search(text):
        return text, found

    def replace(kind: str, holds: Callable[[str], int]) -> Callable[[re.Match[str]], str]:
        def by(match: re.Match[str]) -> str:
            length = holds(match[0])
            if not length:
                return match[0]
            found[kind] += 1
            return f"[{kind}]{match[0][length:]}"

        return by

    for pattern, kind, holds in _RULES:
        text = pattern.sub(replace(kind, holds), text)
    return text, found


# Each returns how much of a match, from its beginning, is what it looks like; 0: it is not.


def _luhn(text: str) -> int:
    digits = [int(c) for c in text if c.isdigit()][::-1]
    total = sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return len(text) if total % 10 == 0 and any(digits) else 0


def _iban(text: str) -> int:
    for length in range(len(text), 14, -1):  # a word in capitals may follow
        plain = re.sub(r"[ -]", "", text[:length])
        number = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
        if len(plain) >= 15 and text[length - 1].isalnum() and int(number) % 97 == 1:
            return length
    return 0


def _ip(text: str) -> int:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return 0
    groups = sum(bool(group) for group in re.split("[.:]", text))
    return len(text) if groups > 2 else 0  # 'a::b' is a name in a program


def _has_nine_digits(text: str) -> int:
    return len(text) if sum(c.isdigit() for c in text) >= 9 else 0


_CANDIDATE = re.compile(r"@|\d|::|[0-9A-Fa-f]:[0-9A-Fa-f]")
# In this order: an IBAN holds digits that may look like a card's, a card's like a phone's.
_RULES: tuple[tuple[re.Pattern[str], str, Callable[[str], int]], ...] = (
    (_EMAIL, "e-mail", len),
    (_IBAN, "IBAN", _iban),
    (_CARD, "card", _luhn),
    (_IPV4, "IP", _ip),
    (_IPV6, "IP", _ip),
    (_PHONE, "phone", len),
    (_NATIONAL, "phone", _has_nine_digits),
)
