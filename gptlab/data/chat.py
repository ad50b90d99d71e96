"""The chat format: how messages become tokens, and which of them are learnt.

It is the vocabulary's. An imported one brings a template (chat_template.py); gptlab's own has this:

    system     [system] content [end]
    user       [user] content [end]      or, with a context:  [user] content [context] context [end]
    assistant  [assistant] content [end]

Every bracket is one control token that no content can produce (see tokenizer.py). A conversation
is the concatenation of its messages, so a prefix of messages is a prefix of tokens. The loss mask
is 1 on the assistant's content and on its [end], 0 elsewhere: the model learns to reply and to
stop, not to speak for the others. Where a record says which of the assistant's messages are to be
learnt, it is 0 on the others as well.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from gptlab.data.chat_template import Asked, TemplateFormat
from gptlab.data.hf_tokenizer import HFTokenizer
from gptlab.data.records import Message
from gptlab.data.tokenizer import SentencePieceTokenizer, Tokenizer
from gptlab.run.errors import UserError


def encode_conversation(
    tokenizer: Tokenizer, messages: Iterable[Message], learnt: Collection[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and loss mask uint8 [n] of a conversation.

    `learnt` are the numbers of the assistant's messages to be learnt (Conversation.learnt); None:
    all. Raises chat_template.Refused if an imported template does not take these messages.
    """
    tokens, mask = _format(tokenizer).conversation(tuple(messages), learnt)
    return np.array(tokens, np.int32), np.array(mask, np.uint8)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> list[int]:
    """Ids, at most max_tokens, that ask for the assistant's next message: they end with its header.

    To fit, the oldest turns are dropped (the system message never; what is left begins with a
    user's turn where there is one), and only if the last message alone is too long, it is trimmed:
    the end of its context first, then the beginning of its content. UserError when the system
    message leaves it no room.
    """
    return ask(tokenizer, messages, max_tokens).ids


def ask(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> Asked:
    """`encode_prompt`, and how much of the conversation is in it."""
    if not messages:
        raise ValueError("a prompt needs at least one message")
    return _format(tokenizer).prompt(messages, max_tokens)


def encode_reply(tokenizer: Tokenizer, text: str, finished: bool = True) -> list[int]:
    """Ids of a reply, to follow encode_prompt; with its end unless it was cut off unfinished."""
    return _format(tokenizer).reply(text, finished)


def decode_reply(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a reply: what encode_reply was given, without the blanks of a template."""
    return _format(tokenizer).text(ids)


def blanks_before_reply(tokenizer: Tokenizer) -> str:
    """What the ids of a reply spell before its text: '' but with some templates."""
    return _format(tokenizer).before


class ReplyText:
    """A reply's text as its tokens come: whole characters only, without a template's blanks."""

    def __init__(self, tokenizer: Tokenizer, before: str):
        """`before` is what the ids spell before the text: see `blanks_before_reply`."""
        self._decode_bytes, self._before = tokenizer.decode_bytes, before
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """What is new in the text with one token more; may be empty."""
        piece = self._utf8.decode(self._decode_bytes([token]))
        if piece and self._before:
            piece, self._before = piece.removeprefix(self._before), ""
        return piece

    def end(self) -> str:
        """What is left when no token follows: half a character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def left_out(asked: Asked, messages: int, window: int) -> str | None:
    """In words, what of a conversation of so many messages (no system) is not in its prompt."""
    if asked.trimmed:
        return f"your message is too long for the window of {window} tokens: a part is read"
    if asked.turns < messages:
        return (
            f"the window of {window} tokens is full: the oldest {messages - asked.turns} of "
            f"{messages} messages are no longer read"
        )
    return None


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a reply; the first is the one that encode_reply writes."""
    return _format(tokenizer).stop_ids


@functools.lru_cache(maxsize=8)
def _format(tokenizer: Tokenizer) -> ControlTokens | TemplateFormat:
    if isinstance(tokenizer, HFTokenizer):
        return TemplateFormat(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer), type(tokenizer)
    return ControlTokens(tokenizer)


class ControlTokens:
    """The built-in format; see the head of this file."""

    before = ""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self._tokenizer = tokenizer
        self.stop_ids = (tokenizer.end_id,)

    def conversation(
        self, messages: Sequence[Message], learnt: Collection[int] | None
    ) -> tuple[list[int], list[int]]:
        """Message after message."""
        tokens: list[int] = []
        mask: list[int] = []
        for number, message in enumerate(messages):
            message_ids, message_mask = encode_message(self._tokenizer, message)
            tokens += message_ids
            counts = learnt is None or number in learnt
            mask += message_mask if counts else [0] * len(message_mask)
        return tokens, mask

    def prompt(self, messages: Sequence[Message], max_tokens: int) -> Asked:
        """What `encode_prompt` says."""
        tokenizer = self._tokenizer
        has_system = messages[0].role == "system" and len(messages) > 1
        system = encode_message(tokenizer, messages[0])[0] if has_system else []
        turns = list(messages[1:] if has_system else messages)
        room = max_tokens - len(system) - 1  # 1 for the assistant's header
        if room < 3:
            raise UserError(
                f"a prompt of at most {max_tokens} tokens has no room for a message beside the "
                f"system message ({len(system)} tokens)"
            )
        # From the newest turn back, as far as they fit: an old, long conversation is not encoded
        # whole.
        kept: list[list[int]] = []
        for message in reversed(turns):
            ids = encode_message(tokenizer, message)[0]
            if len(ids) > room:
                break
            kept.insert(0, ids)
            room -= len(ids)
        trimmed = not kept
        if trimmed:
            kept = [_trim(tokenizer, turns[-1], room)]
        elif len(kept) < len(turns):
            while len(kept) > 1 and kept[0][0] != tokenizer.user_id:
                kept.pop(0)
        prompt = [*system, *(i for ids in kept for i in ids), tokenizer.assistant_id]
        return Asked(prompt, len(kept), trimmed)

    def reply(self, text: str, finished: bool) -> list[int]:
        """The content, and [end]."""
        ids = self._tokenizer.encode(text)
        return [*ids, self._tokenizer.end_id] if finished else ids

    def text(self, ids: Sequence[int]) -> str:
        """The inverse of `reply`."""
        return self._tokenizer.decode(ids)


def encode_message(
    tokenizer: SentencePieceTokenizer, message: Message
) -> tuple[list[int], list[int]]:
    """Token ids of one message in the built-in format, and their loss mask (0/1), two lists."""
    headers = {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
    }
    ids = [headers[message.role], *tokenizer.encode(message.content)]
    if message.context is not None:
        ids += [tokenizer.context_id, *tokenizer.encode(message.context)]
    ids.append(tokenizer.end_id)
    learnt = int(message.role == "assistant")
    return ids, [0] + [learnt] * (len(ids) - 1)


def _trim(tokenizer: SentencePieceTokenizer, message: Message, room: int) -> list[int]:
    """One message in at most `room` tokens (at least 3), in the message layout."""
    header = encode_message(tokenizer, message)[0][0]
    content = tokenizer.encode(message.content)
    room -= 2  # header and end
    context: list[int] = []
    if message.context is not None and room - len(content) > 1:
        context = [tokenizer.context_id, *tokenizer.encode(message.context)][: room - len(content)]
    content = content[-room:]
    while content and _continues(tokenizer, content[0]):
        content = content[1:]
    return [header, *content, *context, tokenizer.end_id]


def _continues(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token starts in the middle of a UTF-8 character (a byte token 10xxxxxx)."""
    data = tokenizer.decode_bytes([token])
    return bool(data) and data[0] & 0xC0 == 0x80
