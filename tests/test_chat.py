"""The terminal chat: streaming, context over turns, commands, interruption, errors."""

import io
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from gptlab import chat
from gptlab.data.records import Message
from gptlab.model import decode
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.people import policy as policies
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.train.checkpoint import Checkpoints

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
ROOT = Path(__file__).parents[1]
SAMPLING = decode.Sampling(1.0, 0, 1.0, 12, ())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_corpus, tiny_model):
    """A finished pretraining run with random parameters."""
    directory = tmp_path_factory.mktemp("chat") / "pretrain"
    saving = {"every_steps": 1, "keep": 1, "best_metric": "", "best_mode": "min"}
    config = ConfigDict(
        {"seed": 0, "inputs": {"tokens": str(tiny_corpus)}, "model": tiny_model,
         "checkpoint": saving}
    )  # fmt: skip
    model = LanguageModel(ModelConfig.build(tiny_model, COMPUTE))
    with artifact.open_run(config, directory, "pretrain") as run:
        params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
        with Checkpoints(directory, config.checkpoint) as checkpoints:
            checkpoints.save(1, {"params": params}, {})
        run.complete()
    return directory


@pytest.fixture(scope="module")
def policy(workdir):
    return policies.load(workdir, "float32")


def session(policy, sampling=SAMPLING):
    return chat.Session(policy, sampling, seed=0)


def test_streaming_gives_what_generate_draws(policy):
    prompt, key = [5, 20, 30, 40, 6], jax.random.key(3)
    streamed = list(policy.stream(prompt, key, SAMPLING))
    whole = decode.generate(
        policy.model, policy.params, jnp.array([prompt]), jnp.array([5]), key[None], SAMPLING
    )
    assert streamed == whole.tokens[0].tolist()
    stop = streamed[4]
    stopped = decode.Sampling(1.0, 0, 1.0, 12, (stop,))
    assert list(policy.stream(prompt, key, stopped)) == streamed[: streamed.index(stop)]


def test_context_is_kept_over_turns_and_forgotten_on_reset(policy):
    talk = session(policy)
    first = "".join(talk.reply("how was the film?"))
    assert [m.role for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[1].content == first
    talk.messages.append(Message("user", "and the tea?", None))
    tokenizer = policy.tokenizer
    assert "how was the film?" in tokenizer.decode(talk.prompt())
    talk.reset()
    list(talk.reply("and the tea?"))
    talk.messages.append(Message("user", "why?", None))
    assert "film" not in tokenizer.decode(talk.prompt())


def test_oldest_turns_leave_a_full_window_but_not_the_system_message(policy):
    talk = session(policy)
    talk.system = "be kind"
    for number in range(12):
        list(talk.reply(f"tell me about day {number}"))
        assert len(talk.prompt()) <= policy.model.config.max_len - SAMPLING.max_new_tokens
    text = policy.tokenizer.decode(talk.prompt())
    assert text.startswith("be kind") and "day 11" in text and "day 0" not in text


def test_a_turn_that_leaves_the_window_is_announced_when_it_does(policy, capsys):
    talk = session(ByteByByte(policy, b"ok"))
    announced, missing = [], []
    for number in range(10):
        chat.converse(talk, io.StringIO(f"tell me about day {number}\n"), interactive=False)
        announced.append(capsys.readouterr().err)
        question = talk.messages.pop()  # the prompt was made without the reply
        said = policy.tokenizer.decode(talk.prompt())
        missing.append(sum(m.content not in said for m in talk.messages[::2]))
        talk.messages.append(question)
    fuller = [0 < missing[0], *(a < b for a, b in zip(missing, missing[1:], strict=False))]
    assert any(fuller) and not all(fuller)
    assert [bool(line) for line in announced] == fuller
    first = announced[fuller.index(True)]
    assert first.startswith("(the window of 128 tokens is full: the oldest") and "\x1b" not in first


def test_a_message_of_which_only_a_part_is_read_is_announced(policy, capsys):
    talk = session(ByteByByte(policy, b"ok"))
    chat.converse(talk, io.StringIO("hi\n" + "long " * 200 + "\n"), interactive=False)
    assert "too long for the window of 128 tokens" in capsys.readouterr().err


def test_context_accompanies_one_message(policy):
    talk = session(policy)
    talk.context = "the film was great"
    list(talk.reply("was it?"))
    list(talk.reply("and now?"))
    assert [m.context for m in talk.messages if m.role == "user"] == ["the film was great", None]


class ByteByByte:
    """A stand-in for a policy that says fixed bytes, one token each."""

    def __init__(self, policy, said):
        self.tokenizer, self.model = policy.tokenizer, policy.model
        self._said = [
            next(i for i in range(320) if self.tokenizer.decode_bytes([i]) == bytes([b]))
            for b in said
        ]

    def stream(self, prompt, key, sampling):
        yield from self._said


def test_characters_of_several_bytes_come_out_whole(policy):
    talk = session(ByteByByte(policy, "aé☕b".encode()))
    assert list(talk.reply("hi")) == ["a", "é", "☕", "b"]
    cut = session(ByteByByte(policy, "☕".encode()[:2]))
    assert "".join(cut.reply("hi")) == "\N{REPLACEMENT CHARACTER}"


def test_control_c_stops_the_reply_and_keeps_it(policy, capsys):
    talk = session(policy)

    class Interrupted:
        def __init__(self, pieces):
            self._pieces, self._left = pieces, 3

        def __iter__(self):
            return self

        def __next__(self):
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            return next(self._pieces)

        def close(self):
            self._pieces.close()

    real = talk.reply
    talk.reply = lambda text: Interrupted(real(text))
    chat.converse(talk, io.StringIO("hello\n"), interactive=False)
    assert capsys.readouterr().out.endswith("[stopped]\n")
    assert talk.messages[-1].role == "assistant" and len(talk.messages) == 2
    talk.reply = real
    list(talk.reply("go on"))  # the session still works
    assert len(talk.messages) == 4


def test_commands(policy, capsys):
    talk = session(policy)
    lines = "/system be brief\n/context it rained\n/nonsense\n\nhi\n/reset\n/quit\nnever read\n"
    rest = io.StringIO(lines)
    chat.converse(talk, rest, interactive=False)
    out, err = capsys.readouterr()
    assert talk.system == "be brief" and talk.messages == []
    assert "no command /nonsense" in err and len(out.strip()) > 0
    assert rest.read() == "never read\n"


def test_a_rounds_workdir_leads_to_its_promoted_policy(workdir, tmp_path):
    with artifact.open_run(ConfigDict({"seed": 0, "inputs": {}}), tmp_path / "r", "rounds") as run:
        with pytest.raises(UserError, match="no round has finished"):
            policies.find(tmp_path / "r")
        run.results(policy=str(workdir))
        run.complete()
    assert policies.find(tmp_path / "r") == workdir


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--workdir"),
        (["--workdir=nowhere"], "nowhere has no manifest.json"),
        (["--workdir={clean}"], "holds no model|without a train_tokenizer"),
        (["--workdir={workdir}", "--temperature=-1"], "temperature=-1"),
        (["--workdir={workdir}", "--max_new_tokens=125"], "leaves no room"),
        (["--workdir={workdir}", "--dtype=int8"], "dtype='int8'"),
        (["--workdir={workdir}", "--temprature=1"], "--temprature"),
    ],
)
def test_mistakes_are_one_line(arguments, words, workdir, tiny_clean, capsys):
    arguments = [a.format(workdir=workdir, clean=tiny_clean) for a in arguments]
    assert chat.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and any(word in err for word in words.split("|"))


def test_piped_conversation(workdir, monkeypatch, capsys):
    """The real program: two messages in, two replies out, the same in any process."""
    flags, said = [f"--workdir={workdir}", "--max_new_tokens=8"], "hello\n/reset\nhello again\n"
    done = subprocess.run(
        [sys.executable, "-m", "gptlab.chat", *flags], input=said, text=True,
        capture_output=True, timeout=200, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tensorflow" not in done.stderr.lower()
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert chat.main(flags) == 0
    assert capsys.readouterr().out == done.stdout
