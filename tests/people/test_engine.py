"""Continuous batching: a request's reply never depends on who else is there, and none is lost."""

import asyncio
import copy
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.measure import CompileCounter
from gptlab.model import decode
from gptlab.model.sharding import MESH_AXES
from gptlab.people import policy as policies
from gptlab.people import slots as device
from gptlab.people.backend import Busy, Unavailable
from gptlab.people.engine import Engine, Options, Token
from gptlab.run.errors import UserError
from tests import serving
from tests.serving import OPTIONS, answer, request, run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model, tiny_vocabulary):
    return serving.write_model(
        tmp_path_factory.mktemp("engine") / "model", tiny_model, tiny_vocabulary
    )


@pytest.fixture(scope="module")
def policy(workdir):
    return policies.load(workdir, "float32")


@pytest.fixture(scope="module")
def endless(policy):
    """The same, and no token ends a reply."""
    other = copy.copy(policy)
    other.end_tokens = ()
    return other


@pytest.fixture
def make(policy):
    """Makes engines, and stops them."""
    engines = []

    def build(options=OPTIONS, of=policy, mesh=None):
        engines.append(Engine(of, options, mesh or serving.one_device()))
        return engines[-1]

    yield build
    for engine in engines:
        engine.stop(0)


@pytest.fixture
def held(make, endless, monkeypatch):
    """Makes an engine whose replies don't end, and the gate that lets its steps through.

    With two steps the first tokens come. However slow a test, the engine is not ahead of it.
    """
    gate, step = threading.Semaphore(0), device.step

    def gated(*arguments):
        assert gate.acquire(timeout=60)
        return step(*arguments)

    def build(options=OPTIONS):
        engine = make(options, endless)
        monkeypatch.setattr(device, "step", gated)
        return engine, gate

    yield build
    gate.release(FREELY)  # before `make` stops the engine


FREELY = 1_000_000  # steps
ONE = Options(slots=1, chunk=8, max_len=None, queue=2)
# The cache is read in steps that don't divide the window of 128; else all at once.
BLOCKS = Options(slots=4, chunk=8, max_len=None, queue=4, block=12)


def prompts(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(9, 320, rng.integers(1, longest)).tolist() for _ in range(count)]


def mixed(count):
    """Requests of all kinds of sampling."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 5, "alternatives": 3},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.5},
        {"temperature": 0.0, "alternatives": 20},
    ]
    return [
        request(ids, seed=i // 2, max_tokens=3 + 5 * (i % 5), **kinds[i % len(kinds)])
        for i, ids in enumerate(prompts(count))
    ]


async def in_turn(engine, asked):
    return [await answer(engine, one) for one in asked]


async def at_once(engine, asked, clients=6):
    """As many at the same time as clients, each asking for its next when it has its last."""
    answers = [None] * len(asked)

    async def client(first):
        for i in range(first, len(asked), clients):
            answers[i] = await answer(engine, asked[i])

    await asyncio.gather(*map(client, range(clients)))
    return answers


@pytest.mark.parametrize("options", [OPTIONS, BLOCKS])
def test_replies_are_the_same_alone_and_in_a_crowd(make, options):
    asked = mixed(24)
    alone = run(in_turn(make(options), asked))
    assert len({tuple(a[0]) for a in alone}) > 20 and {a[3] for a in alone} == {"stop", "length"}
    engine, compiled = make(options), CompileCounter()
    crowd = run(at_once(engine, asked))
    assert [a[:4] for a in crowd] == [a[:4] for a in alone]  # log-probabilities bit for bit
    assert compiled.count == 0
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.steps < sum(len(a[0]) for a in alone)  # they did share steps


@pytest.mark.parametrize(
    ("temperature", "options"),
    [pytest.param(0.0, OPTIONS, marks=pytest.mark.slow), (1.0, OPTIONS), (1.0, BLOCKS)],
)
def test_replies_are_what_generate_draws(make, policy, temperature, options):
    ids = prompts(1, seed=3)[0]
    key = jax.random.fold_in(jax.random.key(7), 0)
    sampling = decode.Sampling(temperature, 0, 1.0, 16, policy.end_tokens)
    whole = decode.generate(
        policy.model, policy.params, jnp.array([ids]), jnp.array([len(ids)]), key[None], sampling
    )
    drawn, logprobs, _, reason, _ = run(
        answer(make(options), request(ids, temperature=temperature))
    )
    length = int(whole.lengths[0]) - bool(whole.finished[0])
    assert drawn == whole.tokens[0, :length].tolist() and len(drawn) > 2
    np.testing.assert_allclose(logprobs, whole.logprobs[0, :length], atol=1e-4)
    assert (reason == "stop") == bool(whole.finished[0])


def test_a_conversation_that_goes_on_computes_only_what_is_new(make):
    first = prompts(1, seed=5, longest=60)[0] + [50] * 30
    fresh = make()
    reply = run(answer(fresh, request(first)))[0]
    longer = first + reply + [60] * 20
    expected = run(answer(make(), request(longer)))
    for _ in range(3):  # others come in between
        run(answer(fresh, request(prompts(1, seed=9)[0])))
    again = run(answer(fresh, request(longer)))
    assert again[:4] == expected[:4]
    assert expected[4] == 0 and again[4] == len(first) // 8 * 8 > 0
    stats = fresh.stats()
    assert stats.cached_tokens >= again[4] and stats.prompt_tokens > stats.cached_tokens


def test_positions_that_steps_wrote_are_never_a_prefix(make):
    """A reply's tokens are prefilled again, so that a prefix is the same however it came about."""
    engine, ids = make(), [30] * 7
    reply = run(answer(engine, request(ids, max_tokens=30)))[0]
    assert len(reply) > 9
    assert run(answer(engine, request(ids + reply)))[4] == 0


def test_several_replies_share_their_prompt(make):
    ids = prompts(1, seed=2)[0] + [40] * 30
    asked = [request(ids, index=i, max_tokens=30) for i in range(4)]
    alone = [run(answer(make(), one)) for one in asked[:2]]

    async def together(engine):
        return await asyncio.gather(*(answer(engine, one) for one in asked))

    found = run(together(make()))
    assert [a[:4] for a in found[:2]] == [a[:4] for a in alone]
    assert len({tuple(a[0]) for a in found}) == 4
    assert [a[4] for a in found] == [0] + [(len(ids) - 1) // 8 * 8] * 3  # from a slot in use


def test_a_long_prompt_does_not_stop_the_others(held):
    engine, gate = held()

    async def race():
        first = engine.submit(request([20, 30], max_tokens=100))
        second = engine.submit(request([40] * 100, max_tokens=1))
        second.events = first.events  # one queue: whose come first?
        gate.release(FREELY)
        seen = 0
        while isinstance(event := await first.events.get(), Token):
            seen += 1
        engine.cancel(first)
        return seen, event

    seen, event = run(race())
    assert event == "length" and 100 // 8 < seen < 100  # a step between any two chunks


def test_cancelling_makes_room(make, endless, held):
    engine, gate = held(ONE)

    async def scene():
        running = engine.submit(request([20], max_tokens=120))
        waiting = engine.submit(request([21], max_tokens=120))
        gate.release(2)
        await running.events.get()
        third = asyncio.create_task(answer(engine, request([22], max_tokens=2)))
        await asyncio.sleep(0)
        assert engine.stats().waiting == 2
        for ticket in (waiting, running, running):
            engine.cancel(ticket)
        gate.release(FREELY)
        await third
        return running.events.qsize(), engine.stats()

    left, stats = run(scene())
    assert left < 5 and (stats.running, stats.waiting) == (0, 0)
    expected = run(answer(make(of=endless), request([22], max_tokens=2)))
    assert run(answer(engine, request([22], max_tokens=2)))[:4] == expected[:4]


def test_a_deadline_cuts_off_what_runs_and_what_waits(held, monkeypatch):
    engine, gate = held(ONE)
    now = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("gptlab.people.engine.time", clock)

    async def scene():
        nonlocal now
        asked = (request([20], max_tokens=120, deadline=1.0), request([21], deadline=1.0))
        answers = asyncio.gather(*(answer(engine, one) for one in asked))
        await asyncio.sleep(0)
        gate.release(2)
        serving.wait_for(lambda: engine.stats().steps == 2)
        now = 1.0
        gate.release(FREELY)
        return await answers

    first, second = run(scene())
    assert first[3] == "deadline" and 0 < len(first[0]) < 5
    assert second[3] == "deadline" and second[0] == []
    assert run(answer(engine, request([22], max_tokens=2)))[3] == "length"


def test_a_full_queue_refuses(held):
    engine, gate = held(ONE)

    async def scene():
        tickets = [engine.submit(request([20], max_tokens=120))]
        gate.release(2)
        await tickets[0].events.get()
        tickets += [engine.submit(request([21])) for _ in range(2)]
        with pytest.raises(Busy) as refused:
            engine.submit(request([22]))
        for ticket in tickets:
            engine.cancel(ticket)
        gate.release(FREELY)
        serving.wait_for(lambda: engine.stats().waiting == 0)
        return refused.value, await answer(engine, request([22], max_tokens=2))

    refused, later = run(scene())
    assert refused.retry_after >= 1 and not refused.draining and later[0]


def test_the_end_waits_for_what_runs_and_refuses_the_rest(held):
    engine, gate = held()

    async def scene():
        tickets = [engine.submit(request([i + 20], max_tokens=20)) for i in range(6)]
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60))
        while not engine._stopping:
            await asyncio.sleep(0.001)
        with pytest.raises(Busy) as refused:
            engine.submit(request([22]))
        gate.release(FREELY)
        await stopping
        return refused.value, [[t.events.get_nowait() for _ in range(t.events.qsize())]
                               for t in tickets]  # fmt: skip

    refused, events = run(scene())
    assert refused.draining
    assert [(len(row), row[-1]) for row in events] == [(21, "length")] * 6


def test_the_end_does_not_wait_for_ever(held):
    engine, gate = held()

    async def scene():
        ticket = engine.submit(request([20], max_tokens=120))
        gate.release(2)
        await ticket.events.get()
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 0))
        while not engine._cut:
            await asyncio.sleep(0.001)
        gate.release(FREELY)
        await stopping
        return [ticket.events.get_nowait() for _ in range(ticket.events.qsize())]

    assert run(scene())[-1] == "deadline"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_says_so_to_everyone(held, monkeypatch):
    engine, gate = held()

    def fail(*arguments):
        raise RuntimeError("out of memory")

    async def scene():
        ticket = engine.submit(request([20], max_tokens=120))
        gate.release(2)
        await ticket.events.get()
        monkeypatch.setattr(device, "step", fail)
        gate.release(FREELY)
        while isinstance(event := await ticket.events.get(), Token):
            pass
        with pytest.raises(Unavailable):
            engine.submit(request([20]))
        return event

    assert "out of memory" in str(run(scene())) and "out of memory" in str(engine.failure)


def test_a_mesh_of_devices_gives_the_same_replies(make, workdir):
    sizes = (1, 1, 2, 2, 2)  # fsdp, context, tensor
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=serving.AUTO)
    split = make(BLOCKS, policies.load(workdir, "float32", mesh), mesh)
    keys = split._slots.cache[0][0]
    assert keys.sharding.shard_shape(keys.shape) == (1, keys.shape[1] // 2, *keys.shape[2:])
    asked = mixed(6)
    expected, found = run(at_once(make(), asked)), run(at_once(split, asked))
    assert [a[0] for a in found] == [a[0] for a in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[1], other[1], atol=1e-4)
    assert run(at_once(split, asked)) == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": 0}, "slots=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"queue": -1}, "queue=-1"),
        ({"block": 0}, "block=0"),
        ({"max_len": 1}, "max_len=1"),
        ({"chunk": 500}, "chunk=500 does not fit the window of 128"),
    ],
)
def test_wrong_options_are_refused(make, changes, words):
    values = {"slots": 4, "chunk": 8, "max_len": None, "queue": 4}
    with pytest.raises(UserError, match=words):
        make(Options(**{**values, **changes}))
