"""The embedded backend: text in, text out; new policies come while people talk."""

import asyncio
import contextlib
import threading
import weakref

import numpy as np
import pytest
from ml_collections import ConfigDict

from gptlab.data.records import Message
from gptlab.people import embedded as embedded_lib
from gptlab.people import policy as policies
from gptlab.people.backend import Ask, Invalid, Refused, UnknownModel
from gptlab.people.moderation import Moderated
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.scorers import registry
from tests import serving
from tests.serving import run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model, tiny_vocabulary):
    directory = tmp_path_factory.mktemp("embedded")
    return serving.write_model(directory / "model", tiny_model, tiny_vocabulary)


@pytest.fixture(scope="module")
def backend(workdir):
    made = serving.embedded(workdir)
    yield made
    run(made.close(0))


def ask(*texts, **changes):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    values = {"model": "tiny", "prompt": messages, "seed": 1, "max_tokens": 20}
    return Ask(**{**values, **changes})


async def reply(backend, asked, deadline=None):
    """(text, the last piece)."""
    text, last = "", None
    async for piece in backend.reply(asked, deadline):
        text, last = text + piece.text, piece
    return text, last


def test_a_reply_is_a_function_of_the_seed(backend):
    first, last = run(reply(backend, ask("how was the film?")))
    assert first and run(reply(backend, ask("how was the film?")))[0] == first
    assert last.finish_reason in ("stop", "length") and last.policy == backend.models()[0].policy
    assert 0 < last.usage.completion_tokens <= 20 and last.usage.prompt_tokens > 5
    different = {run(reply(backend, ask("how was the film?", seed=None)))[0] for _ in range(4)}
    assert len(different) > 1
    others = {run(reply(backend, ask("how was the film?", index=i)))[0] for i in range(4)}
    assert len(others) == 4 and first in others


def test_stop_strings_end_a_reply_and_are_no_part_of_it(backend):
    whole, _ = run(reply(backend, ask("hello", max_tokens=60, temperature=0.8)))
    assert len(whole) > 8
    stop = whole[4:7]
    cut, last = run(reply(backend, ask("hello", max_tokens=60, temperature=0.8, stop=(stop,))))
    assert cut == whole[: whole.index(stop)] and last.finish_reason == "stop"


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(backend):
    texts = [f"tell me about day {i}, please, and more of it" for i in range(9)]
    _, last = run(reply(backend, ask(*texts)))
    assert "the oldest" in last.notice and "of 9 messages" in last.notice
    assert last.usage.prompt_tokens <= 128 - 20
    _, last = run(reply(backend, ask("long " * 300)))
    assert "a part is read" in last.notice
    assert run(reply(backend, ask("hi")))[1].notice is None


def test_what_a_model_can_not_do_is_said(backend):
    for wrong, param in (
        (ask("hi", max_tokens=125), "max_tokens"),
        (ask("hi", prompt="word " * 300), "prompt"),
        (ask("hi", prompt=()), "messages"),
        (ask("hi", logprobs=21), "logprobs"),
        (ask("hi", prompt=(Message("system", "long " * 300), Message("user", "hi"))), "messages"),
    ):
        with pytest.raises(Invalid) as found:
            run(reply(backend, wrong))
        assert found.value.param == param
    with pytest.raises(UnknownModel, match="there are tiny"):
        run(reply(backend, ask("hi", model="gpt-9")))
    assert run(reply(backend, ask("hi", max_tokens=None)))[1].usage.completion_tokens <= 128


def test_text_never_becomes_a_control_token(backend):
    engine = backend._served["tiny"].engine
    tokenizer = engine.policy.tokenizer
    spelt = "\ud800" + "".join(tokenizer.piece(i) for i in range(9))
    assert "<|end|>" in spelt and "<|assistant|>" in spelt
    for prompt in ((Message("user", spelt),), spelt):
        asked, _ = embedded_lib.prepare(engine, ask(prompt=prompt), 0.0)
        controls = [i for i in asked.ids if tokenizer.token_bytes[i] == 0]
        whole = [tokenizer.user_id, tokenizer.end_id, tokenizer.assistant_id]
        assert controls == (whole if isinstance(prompt, tuple) else [tokenizer.bos_id])
    assert run(reply(backend, ask(spelt)))[1].finish_reason


def test_a_reply_that_nobody_reads_on_frees_its_slot(backend):
    async def leave():
        async with contextlib.aclosing(backend.reply(ask("hi", max_tokens=100))) as pieces:
            await anext(pieces)

    run(leave())
    serving.wait_for(lambda: backend.stats()["tiny"].running == 0)


def rounds(directory, policy):
    """A workdir of rounds whose promoted policy is `policy`."""
    config = ConfigDict({"seed": 0, "inputs": {}})
    with artifact.open_run(config, directory, "rounds") as made:
        made.results(policy=str(policy))
    return directory


def test_a_promoted_policy_takes_over_without_a_lost_request(
    tmp_path, workdir, tiny_model, tiny_vocabulary
):
    newer = serving.write_model(tmp_path / "newer", tiny_model, tiny_vocabulary, seed=5)
    directory = rounds(tmp_path / "rounds", workdir)
    backend = serving.embedded(directory, watch_seconds=0.02)
    old, engine = backend.models()[0].policy, weakref.ref(backend._served["tiny"].engine)
    asked = ask("how was the film?", max_tokens=60)

    async def talk():
        expected = {old: await reply(backend, asked)}
        first = backend.reply(ask("and the tea?", max_tokens=100, seed=4))
        pieces = [await anext(first)]
        rounds(directory, newer)
        answers = []
        while backend.models()[0].policy == old or len(answers) < 4:
            answers.append(await reply(backend, asked))
        pieces += [piece async for piece in first]
        answers += await asyncio.gather(*(reply(backend, asked) for _ in range(8)))
        return expected, answers, pieces

    expected, answers, pieces = run(talk())
    assert pieces[-1].policy == old and pieces[-1].finish_reason in ("stop", "length")
    new = backend.models()[0].policy
    assert new != old and {last.policy for _, last in answers} == {old, new}
    texts = {last.policy: text for text, last in answers}
    assert texts[old] == expected[old][0] != texts[new]
    assert all(text == texts[last.policy] for text, last in answers)
    serving.wait_for(lambda: engine() is None, 10)  # its memory is free
    run(backend.close(5))
    with pytest.raises(Exception, match="shutting down"):
        run(reply(backend, asked))


def test_a_long_reply_ends_on_the_old_policy(tmp_path, workdir, tiny_model, tiny_vocabulary):
    """Its own deadline counts, not the one of requests without."""
    newer = serving.write_model(tmp_path / "newer", tiny_model, tiny_vocabulary, seed=5)
    directory = rounds(tmp_path / "rounds", workdir)
    backend = serving.embedded(directory, watch_seconds=0.02, deadline_seconds=0.05)
    old = backend._served["tiny"].engine
    call, go, calls = old._call, threading.Event(), []

    def held(*arguments):
        calls.append(arguments)
        if len(calls) > 10:
            go.wait(100)
        return call(*arguments)

    old._call = held

    async def talk():
        pieces = backend.reply(ask("how was the film?", max_tokens=90, temperature=0.5), 300.0)
        found = [await anext(pieces)]
        rounds(directory, newer)
        while backend._served["tiny"].engine is old:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.4)
        go.set()
        return found + [piece async for piece in pieces]

    assert run(talk())[-1].finish_reason in ("stop", "length")
    run(backend.close(0))


def test_a_policy_that_is_compiled_at_the_end_is_stopped(
    tmp_path, workdir, tiny_model, tiny_vocabulary, monkeypatch
):
    newer = serving.write_model(tmp_path / "newer", tiny_model, tiny_vocabulary, seed=5)
    directory = rounds(tmp_path / "rounds", workdir)
    engines, begun, go = [], threading.Event(), threading.Event()

    def made(*arguments):
        engines.append(real(*arguments))
        return engines[-1]

    def load(path, dtype, mesh):
        if engines:
            begun.set()
            go.wait(100)
        return policies.load(path, dtype, mesh)

    real = embedded_lib.Engine
    monkeypatch.setattr(embedded_lib, "Engine", made)
    backend = embedded_lib.Embedded(
        {"tiny": str(directory)}, serving.OPTIONS, "float32", serving.one_device(), 60.0, 0.02, load
    )
    rounds(directory, newer)
    assert begun.wait(60)

    async def close():
        closing = asyncio.create_task(backend.close(60))
        while not backend._closed.is_set():
            await asyncio.sleep(0.01)
        go.set()
        await closing

    run(close())
    assert len(engines) == 2 and not any(engine._thread.is_alive() for engine in engines)


def test_a_policy_that_can_not_be_loaded_leaves_the_old_one(tmp_path, workdir, capsys):
    directory = rounds(tmp_path / "rounds", workdir)
    backend = serving.embedded(directory, watch_seconds=0.02)
    (tmp_path / "broken").mkdir()
    rounds(directory, tmp_path / "broken")
    said = []
    serving.wait_for(lambda: said.append(capsys.readouterr().err) or "stays at" in "".join(said))
    assert run(reply(backend, ask("hi")))[0]
    run(backend.close(0))
    assert "".join(said).count("stays at") == 1


@pytest.mark.parametrize("where", ["input", "output"])
def test_moderation_refuses_and_records(backend, where):
    refusals = []
    scorer = registry.make({"name": "word_fraction", "words": ("film",)})

    class Opposite:
        name = "no_films"

        def __call__(self, prompts, replies):
            return -scorer(prompts, replies)

    moderated = Moderated(backend, Opposite(), 0.0, True, False, refusals.append)
    if where == "input":
        with pytest.raises(Refused):
            run(reply(moderated, ask("the film")))
        assert run(reply(moderated, ask("the tea")))[0] == run(reply(backend, ask("the tea")))[0]
        assert [(r.where, r.text, r.scorer) for r in refusals] == [
            ("input", "the film", "no_films")
        ]
        return

    class Nothing:
        name = "nothing"

        def __call__(self, prompts, replies):
            return np.array([-1.0 for _ in replies], np.float32)

    moderated = Moderated(backend, Nothing(), 0.0, False, True, refusals.append)
    text, last = run(reply(moderated, ask("the film")))
    assert (text, last.finish_reason) == ("", "content_filter") and last.usage is not None
    assert refusals[0].where == "output"
    assert refusals[0].text == run(reply(backend, ask("the film")))[0]


def test_no_model_is_an_error(workdir):
    with pytest.raises(UserError, match="nowhere"):
        serving.embedded("nowhere")
