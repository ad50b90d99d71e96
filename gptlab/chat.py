"""Talk to a trained model in the terminal.

    python -m gptlab.chat --workdir=runs/sft           # any stage that trained a language model
    python -m gptlab.chat --workdir=runs/quickstart    # a rounds workdir: the promoted policy

Replies appear token by token. The conversation is kept over turns; when the context window is full,
the oldest turns are left out, and a line says so. Commands: /reset, /system TEXT, /context TEXT
(accompanies the next message), /help, /quit. Ctrl-C stops a reply, not the program. Piped input:
one message a line.

The first reply takes some seconds for compiling, later starts take them from the cache.
"""

import argparse
import sys
from collections.abc import Generator, Sequence
from typing import Any, TextIO

import jax

from gptlab.data import chat
from gptlab.data.records import Message
from gptlab.model import decode
from gptlab.people import policy as policies
from gptlab.run import program
from gptlab.run.errors import EXIT_USER_ERROR, UserError

HELP = "/reset forgets the conversation; /system TEXT; /context TEXT for the next message; /quit"


class Session:
    """One conversation with a policy."""

    def __init__(self, policy: policies.Policy, sampling: decode.Sampling, seed: int):
        self._policy, self._sampling = policy, sampling
        self._key, self._turn = jax.random.key(seed), 0
        self.system: str | None = None
        self.context: str | None = None
        self.messages: list[Message] = []
        self.notice: str | None = None  # what the user should know of the prompt of this reply
        self._left_out = 0  # messages that the last prompt had no room for
        room = policy.model.config.max_len - sampling.max_new_tokens
        if room < 8:
            raise UserError(
                f"--max_new_tokens={sampling.max_new_tokens} leaves no room for a message in the "
                f"context window of {policy.model.config.max_len} tokens"
            )
        self._room = room

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self.messages, self.context, self._left_out = [], None, 0

    def prompt(self) -> list[int]:
        """Ids that ask for the next reply: the system message and the turns that fit."""
        return self._ask().ids

    def _ask(self) -> chat.Asked:
        system = [] if self.system is None else [Message("system", self.system, None)]
        return chat.ask(self._policy.tokenizer, [*system, *self.messages], self._room)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Takes the user's message; yields the reply piece by piece, whole characters only.

        What was yielded is kept as the assistant's turn, however the iteration ends. `notice` says
        so if turns have just left the window.

        Raises:
            UserError: the system message leaves no room for the message, which is then forgotten.
        """
        self.messages.append(Message("user", text, self.context))
        try:
            asked = self._ask()
        except UserError:
            self.messages.pop()
            raise
        self.context = None
        self.notice = self._look_at(asked)
        key = jax.random.fold_in(self._key, self._turn)
        self._turn += 1
        tokenizer = self._policy.tokenizer
        reader = chat.ReplyText(tokenizer, chat.blanks_before_reply(tokenizer))
        said: list[str] = []
        try:
            for token in self._policy.stream(asked.ids, key, self._sampling):
                if piece := reader.feed(token):
                    said.append(piece)
                    yield piece
            if rest := reader.end():
                said.append(rest)
                yield rest
        finally:
            self.messages.append(Message("assistant", "".join(said), None))

    def _look_at(self, asked: chat.Asked) -> str | None:
        """What of the conversation is newly missing in a prompt, in words."""
        before, self._left_out = self._left_out, len(self.messages) - asked.turns
        if not asked.trimmed and self._left_out <= before:
            return None
        return chat.left_out(asked, len(self.messages), self._policy.model.config.max_len)


def converse(session: Session, lines: TextIO, interactive: bool) -> None:
    """Answers line after line until /quit or the end of input."""
    while True:
        try:
            line = _read(lines, interactive)
            if line is None or line == "/quit":
                return
            if not line:
                continue
            if line.startswith("/"):
                _command(session, line)
                continue
            _answer(session, line)
        except KeyboardInterrupt:
            print("\n(/quit to leave)", file=sys.stderr, flush=True)
        except UserError as error:
            print(f"gptlab chat: {error}", file=sys.stderr, flush=True)


def _read(lines: TextIO, interactive: bool) -> str | None:
    """The next line without surrounding space; None at the end."""
    if not interactive:
        line = lines.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _answer(session: Session, text: str) -> None:
    """Prints the reply as it comes; Ctrl-C ends it and keeps what was said."""
    pieces = session.reply(text)
    try:
        for piece in pieces:
            _notify(session)
            print(piece, end="", flush=True)
        _notify(session)
        print(flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]", flush=True)


def _notify(session: Session) -> None:
    """Prints the session's notice, once; dim where that is possible."""
    if session.notice is not None:
        line = f"({session.notice})"
        shown = f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line
        print(shown, file=sys.stderr, flush=True)
        session.notice = None


def _command(session: Session, line: str) -> None:
    name, _, text = line.partition(" ")
    text = text.strip()
    if name == "/reset":
        session.reset()
        said = "the conversation starts anew"
    elif name == "/system":
        session.system = text or None
        said = "the system message is set" if text else "there is no system message any more"
    elif name == "/context":
        session.context = text or None
        said = "the next message has this context" if text else "the next message has no context"
    elif name == "/help":
        said = HELP
    else:
        raise UserError(f"there is no command {name}: {HELP}")
    print(f"({said})", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, like every other error."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m gptlab.chat", description="Talk to a trained model.")
    parser.add_argument("--workdir", required=True, help="of a training stage or of rounds")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="0: off")
    parser.add_argument("--top_p", type=float, default=0.95, help="1: off")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--system", default=None, help="a system message")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = _arguments(argv)
        program.keep_freed_memory()
        program.enable_compilation_cache()
        policy = policies.load(args.workdir, args.dtype)
        sampling = decode.Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            stop_tokens=policy.end_tokens,
        )
        session = Session(policy, sampling, args.seed)
        session.system = args.system
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  (line editing and history for input())

            config = policy.model.config
            print(f"{config.num_params():,} parameters, window {config.max_len} tokens. {HELP}")
        converse(session, sys.stdin, interactive)
    except UserError as error:
        print(f"gptlab chat: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
