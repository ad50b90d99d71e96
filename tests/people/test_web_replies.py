"""Replies in the chat: streamed, refused, failed, left, too many; their Markdown as it grows."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data.records import Message
from gptlab.people.backend import Ask, Model, Piece, Refused, Unavailable
from gptlab.people.moderation import Moderated
from gptlab.people.web import markdown, replies
from tests import pages, serving


class Told:
    """A backend that does what the prompt's last message says; some of it once `go` is set."""

    def __init__(self):
        self.go = threading.Event()

    def models(self):
        return [Model("m", "policy", 0, None)]

    async def reply(self, ask, deadline=None):
        what = ask.prompt[-1].content
        if what == "refuse the message":
            raise Refused()
        if what == "fail at once":
            raise Unavailable("the model can't be reached: it is gone")
        if what == "break at once":
            raise ValueError(f"broken by {what!r}")
        if what == "wait":
            await asyncio.sleep(30)
        yield Piece("One ")
        if what == "refuse the reply":
            yield Piece("", finish_reason="content_filter")
            return
        if what == "fail later":
            raise Unavailable("gone")
        if what == "break later":
            await asyncio.to_thread(self.go.wait, 60)
            raise ValueError(f"broken by {what!r}")
        if what == "go on":
            while True:
                await asyncio.sleep(0.01)
                yield Piece("more ")
        yield Piece("*two*.", finish_reason="stop", policy="newer")

    async def close(self, drain_seconds):
        pass


@pytest.fixture(scope="module")
def told():
    return Told()


@pytest.fixture(scope="module")
def site(tmp_path_factory, told):
    with pages.served(tmp_path_factory.mktemp("replies"), told) as made:
        yield made


@contextlib.contextmanager
def somebody(site):
    """A program that acts for somebody new."""
    person, _ = site.person()
    _, key = site.store.accounts.create_api_key(person.id, "test", "system")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=site.url, headers=headers, timeout=30, verify=False) as made:
        yield made


@pytest.fixture
def client(site):
    with somebody(site) as made:
        yield made


def begin(client, text):
    """(conversation, turn) of a new chat."""
    made = client.post("/api/conversations", json={"content": text}).json()
    return made["conversation"]["id"], made["message"]["id"]


def events(answer):
    blocks = [block.split("\ndata: ") for block in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data)) for name, data in blocks]


def kept(client, conversation):
    found = client.get(f"/api/conversations/{conversation}").json()["messages"]
    return [message for message in found if message["role"] == "assistant"]


def test_a_reply_is_streamed_and_kept_with_its_policy(site, client):
    conversation, turn = begin(client, "hello")
    told = events(client.post(f"/api/messages/{turn}/reply", json={}))
    assert [name for name, _ in told][0] == "start" and told[-1][0] == "done"
    assert "".join(data["text"] for name, data in told if name == "text") == "One *two*."
    (reply,) = kept(client, conversation)
    assert reply == told[-1][1]["message"]
    assert reply["html"] == "<p>One <em>two</em>.</p>\n" and reply["finished"]
    person = client.get("/api/me").json()["id"]
    stored = site.store.conversations.messages(person, conversation)[-1]
    assert (stored.policy, stored.model) == ("newer", "m")


@pytest.mark.parametrize(
    "body", [{"content": "a" * 200_001}, {"content": "a", "context": "a" * 200_001}]
)
def test_a_turn_that_is_refused_leaves_no_conversation(client, body):
    answer = client.post("/api/conversations", json=body)
    assert answer.status_code == 400 and "200,000 are allowed" in answer.text
    assert client.get("/api/conversations").json() == []


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("refuse the message", "moderation refused the message"),
        ("refuse the reply", "moderation refused the reply"),
    ],
)
def test_a_refusal_is_recorded(client, text, refusal):
    conversation, turn = begin(client, text)
    (*_, (name, data)) = events(client.post(f"/api/messages/{turn}/reply", json={}))
    assert (name, data["message"]["refusal"]) == ("done", refusal)
    (reply,) = kept(client, conversation)
    assert reply["refusal"] == refusal and not reply["finished"]


def test_a_failure_is_told_and_leaves_no_empty_reply(client):
    conversation, turn = begin(client, "fail at once")
    answer = client.post(f"/api/messages/{turn}/reply", json={})
    assert answer.status_code in (502, 503) and "gone" in answer.json()["error"]["message"]
    assert kept(client, conversation) == []
    conversation, turn = begin(client, "fail later")
    (*_, (name, data)) = events(client.post(f"/api/messages/{turn}/reply", json={}))
    assert name == "done" and "failed" in data["notice"]
    (reply,) = kept(client, conversation)
    assert (reply["content"], reply["finished"]) == ("One ", False)


def test_a_defect_is_logged_by_its_type_and_place_without_a_text(told, client, caplog):
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(handler.format(record))
    servers = logging.getLogger("uvicorn.error")  # it propagates nothing
    servers.addHandler(handler)
    try:
        _, turn = begin(client, "break later")
        with client.stream("POST", f"/api/messages/{turn}/reply", json={}) as answer:
            text = ""
            for line in answer.iter_lines():
                text += f"{line}\n"
                if line == "event: start":
                    told.go.set()
        (*_, (name, data)) = events(httpx.Response(200, text=text))
        assert (name, data["message"]) == ("failed", "something went wrong with this reply")
        _, turn = begin(client, "break at once")
        assert client.post(f"/api/messages/{turn}/reply", json={}).status_code == 500
        serving.wait_for(lambda: logged)
        asyncio_log = logging.getLogger("asyncio")
        asyncio_log.error("not retrieved\nfuture: broken", exc_info=ValueError("broken"))
    finally:
        servers.removeHandler(handler)
    own = [record.getMessage() for record in caplog.records if "replies" in record.name]
    assert len(own) == 2 and len(logged) == 1
    for said in own + logged:
        assert "ValueError at " in said and f"{__name__}:" in said
        assert "broken" not in said
    assert "broken" not in caplog.text


def test_what_came_is_kept_when_the_browser_goes_away(site, client):
    conversation, turn = begin(client, "go on")
    with client.stream("POST", f"/api/messages/{turn}/reply", json={}) as answer:
        for line in answer.iter_lines():
            if "more" in line:
                break
    serving.wait_for(lambda: not site.app.state.site.running)
    (reply,) = kept(client, conversation)
    assert "more" in reply["content"] and not reply["finished"]


def test_a_browser_that_leaves_while_its_reply_waits_gives_up_its_place(site, client):
    conversation, turn = begin(client, "wait")
    running = site.app.state.site.running
    with socket.create_connection(httpx.URL(site.url).netloc.decode().split(":")) as line:
        request = client.build_request("POST", f"/api/messages/{turn}/reply", json={})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        line.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        serving.wait_for(lambda: running)
    serving.wait_for(lambda: not running, 20)  # alone it would wait for 30 s
    assert kept(client, conversation) == []


def test_one_person_has_so_many_replies_at_once(site, client):
    _, turn = begin(client, "go on")
    path = f"/api/messages/{turn}/reply"
    with (
        client.stream("POST", path, json={}) as one,
        client.stream("POST", path, json={}) as two,
    ):
        assert one.is_success and two.is_success
        third = client.post(path, json={})
        assert third.status_code == 429 and float(third.headers["Retry-After"]) > 0
        (token, *_) = site.app.state.site.running
        with somebody(site) as other:  # somebody else can't stop it
            assert other.post(f"/api/replies/{token}/stop").status_code == 204
        assert token in site.app.state.site.running
        assert client.post(f"/api/replies/{token}/stop").status_code == 204
        serving.wait_for(lambda: token not in site.app.state.site.running)
    serving.wait_for(lambda: not site.app.state.site.running)


@pytest.mark.parametrize("read", [True, False])
def test_nothing_is_kept_that_moderation_should_have_read(read):
    """A reply that is held back is stopped, or its browser is gone."""

    class Begun(Told):
        async def reply(self, ask, deadline=None):
            yield Piece("unread")
            came.set()
            await asyncio.sleep(30)

    async def stopped():
        moderated = Moderated(Begun(), None, 0.0, False, read, None)
        reply = replies.begin({}, moderated, ask, 60.0, "ann", lambda *given: stored.append(given))
        await came.wait()
        reply.stop()
        await reply.ended()

    came, stored, ask = asyncio.Event(), [], Ask("m", (Message("user", "hello"),))
    asyncio.run(stopped())
    assert stored == ([] if read else [("unread", False, None, None)])


@pytest.mark.parametrize("looked", [False, True], ids=["before the first", "after the first"])
def test_a_reply_that_ends_while_nobody_looks_is_streamed_to_its_end(looked):
    """A busy server follows a short reply only when it is over."""

    async def follow():
        go = asyncio.Event()
        reply = replies.begin({}, Paused(go), ask, 60.0, "ann", lambda *_: {})
        told = []
        if not looked:
            go.set()
            await reply.ended()
        async with contextlib.aclosing(reply.events()) as stream:
            async for event in stream:
                told.append(event)
                if "One" in event:
                    go.set()
                    await reply.ended()
        return told

    class Paused(Told):
        def __init__(self, go):
            self.go = go

        async def reply(self, ask, deadline=None):
            yield Piece("One ")
            await self.go.wait()
            yield Piece("*two*.", finish_reason="stop")

    ask = Ask("m", (Message("user", "hello"),))
    told = events(httpx.Response(200, text="".join(asyncio.run(follow()))))
    assert "".join(data["text"] for name, data in told if name == "text") == "One *two*."
    assert told[-1][0] == "done"


def test_a_reply_that_takes_long_to_render_leaves_time_for_others(monkeypatch):
    spent = []

    class Slow(markdown.Streamed):
        def add(self, text):
            begin = time.monotonic()
            time.sleep(0.03)
            shown = super().add(text)
            spent.append(time.monotonic() - begin)
            return shown

    async def follow():
        reply = replies.begin({}, Told(), ask, 60.0, "ann", lambda *_: {})
        begin = time.monotonic()
        async with contextlib.aclosing(reply.events()) as stream:
            async for _ in stream:
                if len(spent) == 4:
                    break
        return time.monotonic() - begin

    monkeypatch.setattr(replies, "Streamed", Slow)
    ask = Ask("m", (Message("user", "go on"),))
    # Of each but the last, after which nothing is waited for.
    assert asyncio.run(follow()) > 5 * sum(spent[:-1])


LINES = st.sampled_from(
    ["", "a", "**b", "c**", "- d", "  - e", "1. f", "```", "> g", "# h", "| i | j |", "|---|---|",
     "***", "<b>", "    k", "\\", "`l`", "\t", "<script>alert(1)</script>", "[m](http://n.o)"]
)  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=12), st.integers(1, 7), st.sampled_from(["\n", "\r\n"]))
def test_markdown_that_grows_ends_as_the_whole(lines, step, newline):
    """Blocks that were settled stay as they are; the last one completes the text."""
    text, growing, settled, tail = newline.join(lines), markdown.Streamed(), "", ""
    for begin_at in range(0, len(text), step):
        done, tail = growing.add(text[begin_at : begin_at + step])
        settled += done
        assert "<script" not in settled + tail
    assert settled + tail == markdown.render(text) or not text
