"""Chat formats of imported models: a Jinja template, rendered so that no content can forge it.

Messages' texts are not given to the template: it is rendered with placeholders, and cut there. Only
what the template itself writes between them is searched for special tokens; texts then take their
places and are encoded with the template's words around them, as one text, special tokens switched
off. So ids are those of transformers' apply_chat_template, for texts that spell no special token.

A template decides by roles and their order, not by what texts say (Qwen3's looks for '</think>' in
them). Blanks at a text's ends do reach it, so that it can trim them. A user's context stands after
the content, with an empty line between.

The loss mask is 1 on all that the model has to write itself: from the assistant's text (with
blanks that the template puts before it: a blank belongs to the word that follows) up to and with
the special token that ends the turn, not the line break after it. Earlier turns may look different
once another follows (Qwen3 takes their empty thoughts away), so only then is a prefix of messages
not always a prefix of tokens; a prompt and its reply are, always, those of the conversation.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from gptlab.data.hf_tokenizer import HFTokenizer
from gptlab.data.records import Message
from gptlab.run.errors import UserError

# What templates take for today, where they tell the model: a rendering must be the same tomorrow.
# It is the date that Llama 3.1's template itself falls back to.
TODAY = datetime.datetime(2024, 7, 26)

# For vocabularies without a template: ChatML where its tokens are there, else the speaker's name
# after the one token that no text can forge.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
    "{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

Part = tuple[str, int | None]  # text, and the number of the message it is of; None: the template's
Run = str | int  # a stretch of text without special tokens, or a special token


class Refused(UserError):
    """A template that doesn't take this conversation (roles that don't alternate, say)."""


class Asked(NamedTuple):
    """A prompt that fits its room, and what it took."""

    ids: list[int]
    turns: int  # the newest, which are in it
    trimmed: bool  # the one turn in it is not whole


class _Generation(jinja2.ext.Extension):
    """{% generation %}, which marks what the assistant says: the mask is made without it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders messages in the environment that Hugging Face gives chat templates."""

    def __init__(self, source: str, names: Mapping[str, str]):
        """`names` are the texts of bos_token, eos_token, ...; UserError for a broken template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise, strftime_now=lambda layout: TODAY.strftime(layout)
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is broken: {_first_line(error)}") from None
        # Replies carry no thoughts, and hybrid models are told so.
        self._variables = {**names, "tools": None, "documents": None, "enable_thinking": False}

    def render(self, messages: Sequence[Message]) -> list[Part]:
        """The conversation's text in parts. Raises Refused if the template won't or can't."""
        open_, close = _placeholder(messages)
        parts: list[Part] = []  # those of the messages
        shown = []
        for number, message in enumerate(messages):
            marked = []
            for text in (message.content, *([] if message.context is None else [message.context])):
                core = text.strip()
                before, after = text.split(core, 1) if core else (text, "")
                marked.append(f"{before}{open_}{len(parts)}{close}{after}")
                parts.append((core, number))
            shown.append({"role": message.role, "content": "\n\n".join(marked)})
        try:
            text = self._template.render(
                **self._variables, messages=shown, add_generation_prompt=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise Refused(
                f"the chat template refuses a conversation of {_roles(messages)}: "
                f"{_first_line(error)}"
            ) from None
        found: list[Part] = []
        pieces = re.split(f"{re.escape(open_)}(\\d+){close}", text)
        for i, piece in enumerate(pieces):
            found.append(parts[int(piece)] if i % 2 else (piece, None))
        if left_out := set(range(len(messages))) - {number for _, number in found}:
            number = min(left_out)
            raise Refused(
                f"the chat template leaves out message {number + 1} of a conversation of "
                f"{_roles(messages)}"
            )
        return found


class TemplateFormat:
    """The chat format of a Hugging Face vocabulary.

    Attributes:
      source: the template: the vocabulary's own, or what stands in for one.
      end_id: the special token that ends the assistant's turn.
      stop_ids: all that end a reply, end_id first.
      before: blanks that the template puts before a reply; the model writes them.
    """

    def __init__(self, tokenizer: HFTokenizer):
        """UserError if the template is broken, or ends the assistant's turn with no special token:
        a model could not learn to stop.
        """
        self._tokenizer = tokenizer
        names = {"eos_token": tokenizer.piece(tokenizer.eos_id), **tokenizer.names}
        own = tokenizer.chat_template
        self.source = _stand_in(tokenizer, names) if own is None else own
        self._template = ChatTemplate(self.source, names)
        longest_first = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        runs, starts = self._runs((Message("user", "a"), Message("assistant", "\0")))
        last = max(starts)
        self.before, self._after = str(runs[last]).split("\0")
        self.end_id = int(runs[last + 1])
        stops = dict.fromkeys((self.end_id, *tokenizer.end_ids))
        self.stop_ids: tuple[int, ...] = tuple(stops)

    def conversation(
        self, messages: Sequence[Message], learnt: Collection[int] | None
    ) -> tuple[list[int], list[int]]:
        """Tokens and loss mask (0/1), two lists of equal length."""
        runs, starts = self._runs(messages)
        tokens: list[int] = []
        mask: list[int] = []
        end = -1
        for i, run in enumerate(runs):
            if i in starts and (learnt is None or starts[i] in learnt):
                end = next(k for k in range(i, len(runs)) if isinstance(runs[k], int))
            ids = self._ids([run])
            tokens += ids
            mask += [int(i <= end)] * len(ids)
        return tokens, mask

    def prompt(self, messages: Sequence[Message], max_tokens: int) -> Asked:
        """Ids, at most max_tokens, that ask for the assistant's next message.

        What fits is chosen as by the built-in format: see chat.encode_prompt.
        """
        has_system = messages[0].role == "system" and len(messages) > 1
        system, turns = messages[:has_system], messages[has_system:]
        whole = self._prompt(messages)
        if len(whole) <= max_tokens:
            return Asked(whole, len(turns), False)
        best = None
        for count in range(1, len(turns)):
            kept = turns[-count:]
            if kept[0].role == "user":
                ids = self._prompt((*system, *kept))
                if len(ids) > max_tokens:
                    break
                best = Asked(ids, count, False)
        return best or Asked(self._trimmed(system, turns[-1], max_tokens), 1, True)

    def reply(self, text: str, finished: bool) -> list[int]:
        """Ids of a reply, to follow a prompt."""
        runs, starts = self._runs((Message("user", "a"), Message("assistant", text)))
        first = runs[max(starts)]
        said = first if isinstance(first, str) else ""  # an empty reply begins with its end
        if not finished:
            return self._ids([said.removesuffix(self._after)])
        return [*self._ids([said]), self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """The reply that these ids are: the inverse of `reply`."""
        text = self._tokenizer.decode(ids).removeprefix(self.before)
        finished = len(ids) > 0 and ids[-1] in self.stop_ids
        return text.removesuffix(self._after) if finished else text

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        runs, starts = self._runs((*messages, Message("assistant", "\0")))
        return self._ids(runs[: max(starts)])

    def _trimmed(self, system: Sequence[Message], message: Message, max_tokens: int) -> list[int]:
        """One message, less the end of its context, then less the beginning of its content."""
        encode, decode_bytes = self._tokenizer.encode, self._tokenizer.decode_bytes
        content, context = encode(message.content), encode(message.context or "")
        while True:
            # Never half a character.
            shorter = decode_bytes(content).decode("utf-8", "ignore")
            with_ = decode_bytes(context).decode("utf-8", "ignore") or None
            ids = self._prompt((*system, Message(message.role, shorter, with_)))
            excess = len(ids) - max_tokens
            if excess <= 0:
                return ids
            if context:
                context = context[: max(0, len(context) - excess)]
            elif len(content) > 1:
                content = content[min(excess, len(content) - 1) :]
            else:
                raise UserError(
                    f"a prompt of at most {max_tokens} tokens has no room for a message beside "
                    "the system message and what the chat template says"
                )

    def _ids(self, runs: Sequence[Run]) -> list[int]:
        ids: list[int] = []
        for run in runs:
            ids += [run] if isinstance(run, int) else self._tokenizer.encode(run)
        return ids

    def _runs(self, messages: Sequence[Message]) -> tuple[list[Run], dict[int, int]]:
        """Stretches of text and the special tokens between them, in order, and which of them begin
        what the assistant says: their places, and the numbers of the messages.
        """
        runs: list[Run] = []
        starts: dict[int, int] = {}
        text, speaking = "", False

        def close() -> None:
            nonlocal text
            if not runs or isinstance(runs[-1], int):
                text = self._tokenizer.blank_before(text, first=not runs) + text
            if text:
                runs.append(text)
            text = ""

        parts = self._template.render(messages)
        own = self._leading(messages, parts)
        for i, (part, number) in enumerate(parts):
            if number is None:
                at = 0
                for match in self._special.finditer(part):
                    text += part[at : match.start()]
                    close()
                    runs.append(self._tokenizer.special[match[0]])
                    at, speaking = match.end(), False
                text += part[at:]
                continue
            if speaking:
                raise UserError(
                    "the chat template ends the assistant's turn with no special token, so a model "
                    "could not learn to stop"
                )
            if messages[number].role == "assistant":
                header = text[: len(text) - own[i]].rstrip(" ")
                text, said = header, text[len(header) :]
                close()
                starts[len(runs)] = number
                text, speaking = said, True
            text += part
        close()
        if speaking:
            raise UserError("the chat template ends the assistant's turn with no special token")
        return runs, starts

    def _leading(self, messages: Sequence[Message], parts: Sequence[Part]) -> dict[int, int]:
        """By part: how much of the text before it is blanks that begin an assistant's message.

        Templates trim these, or some, or none. They are what is there in addition to a rendering
        without them.
        """
        said = [m.content if m.role == "assistant" else "" for m in messages]
        bare = parts
        if any(text[:1].isspace() for text in said):
            bare = self._template.render(
                [
                    dataclasses.replace(m, content=m.content.lstrip()) if text else m
                    for m, text in zip(messages, said, strict=True)
                ]
            )
        return {i: len(parts[i - 1][0]) - len(bare[i - 1][0]) for i in range(1, len(parts))}


def _stand_in(tokenizer: HFTokenizer, names: Mapping[str, str]) -> str:
    """The template of a vocabulary that brings none. It names no token by its role: an exported
    one is rendered with names that transformers' class gives them (GPT-2's has a bos_token).
    """
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        return CHATML

    def text(name: re.Match[str]) -> str:
        return json.dumps(names.get(name[0], ""), ensure_ascii=False)

    return re.sub("bos_token|eos_token", text, PLAIN)


def _placeholder(messages: Sequence[Message]) -> tuple[str, str]:
    """Marks, of characters for private use, around a number; no message holds the first."""
    texts = [text for m in messages for text in (m.content, m.context or "")]
    number = 0
    while any(f"\ue000{number}:" in text for text in texts):
        number += 1
    return f"\ue000{number}:", "\ue001"


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages[:8]) + (", ..." * (len(messages) > 8))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON as text: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
