"""Continuous batching: a request's reply never depends on who else is there, and none is lost."""

import asyncio
import copy
import time

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
def slow(monkeypatch):
    """Steps that take their time."""
    step = device.step

    def slowly(*arguments):
        time.sleep(0.005)
        return step(*arguments)

    monkeypatch.setattr(device, "step", slowly)


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


def test_a_long_prompt_does_not_stop_the_others(make, endless):
    engine = make(of=endless)

    async def race():
        first = engine.submit(request([20, 30], max_tokens=100))
        assert isinstance(await first.events.get(), Token)
        second = engine.submit(request([40] * 100, max_tokens=1))
        seen = 0
        while second.events.empty():
            event = await first.events.get()
            assert isinstance(event, Token)
            seen += 1
        engine.cancel(first)
        return seen

    assert run(race()) >= 100 // 8  # a step between any two chunks


def test_cancelling_makes_room(make, endless, slow):
    engine = make(ONE, endless)

    async def scene():
        running = engine.submit(request([20], max_tokens=120))
        waiting = engine.submit(request([21], max_tokens=120))
        await running.events.get()
        third = asyncio.create_task(answer(engine, request([22], max_tokens=2)))
        await asyncio.sleep(0)
        assert engine.stats().waiting == 2
        for ticket in (waiting, running, running):
            engine.cancel(ticket)
        await third
        return running.events.qsize(), engine.stats()

    left, stats = run(scene())
    assert left < 60 and (stats.running, stats.waiting) == (0, 0)
    expected = run(answer(make(of=endless), request([22], max_tokens=2)))
    assert run(answer(engine, request([22], max_tokens=2)))[:4] == expected[:4]


def test_a_deadline_cuts_off_what_runs_and_what_waits(make, endless, slow):
    engine = make(ONE, endless)

    async def scene():
        soon = time.monotonic() + 0.1
        asked = (request([20], max_tokens=120, deadline=soon), request([21], deadline=soon))
        return await asyncio.gather(*(answer(engine, one) for one in asked))

    first, second = run(scene())
    assert first[3] == "deadline" and 0 < len(first[0]) < 60
    assert second[3] == "deadline" and second[0] == []
    assert run(answer(engine, request([22], max_tokens=2)))[3] == "length"


def test_a_full_queue_refuses(make, endless, slow):
    engine = make(ONE, endless)

    async def scene():
        tickets = [engine.submit(request([20], max_tokens=120))]
        await tickets[0].events.get()
        tickets += [engine.submit(request([21])) for _ in range(2)]
        with pytest.raises(Busy) as refused:
            engine.submit(request([22]))
        for ticket in tickets:
            engine.cancel(ticket)
        serving.wait_for(lambda: engine.stats().waiting == 0)
        return refused.value, await answer(engine, request([22], max_tokens=2))

    refused, later = run(scene())
    assert refused.retry_after >= 1 and not refused.draining and later[0]


def test_the_end_waits_for_what_runs_and_refuses_the_rest(make, endless, slow):
    engine = make(of=endless)

    async def scene():
        tickets = [engine.submit(request([i + 20], max_tokens=20)) for i in range(6)]
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 60))
        await asyncio.sleep(0.02)
        with pytest.raises(Busy) as refused:
            engine.submit(request([22]))
        await stopping
        return refused.value, [[t.events.get_nowait() for _ in range(t.events.qsize())]
                               for t in tickets]  # fmt: skip

    refused, events = run(scene())
    assert refused.draining
    assert [(len(row), row[-1]) for row in events] == [(21, "length")] * 6


def test_the_end_does_not_wait_for_ever(make, endless, slow):
    engine = make(of=endless)

    async def scene():
        ticket = engine.submit(request([20], max_tokens=120))
        await ticket.events.get()
        await asyncio.to_thread(engine.stop, 0)
        return [ticket.events.get_nowait() for _ in range(ticket.events.qsize())]

    assert run(scene())[-1] == "deadline"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_says_so_to_everyone(make, endless, slow, monkeypatch):
    engine = make(of=endless)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    async def scene():
        ticket = engine.submit(request([20], max_tokens=120))
        await ticket.events.get()
        monkeypatch.setattr(device, "step", fail)
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
