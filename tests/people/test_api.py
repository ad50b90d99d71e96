"""OpenAI's API, by OpenAI's own client, against a real server on loopback."""

import json
import socket
import time

import httpx
import jax.numpy as jnp
import openai
import pytest

from gptlab.people import api
from gptlab.people import slots as device
from gptlab.people.backend import Caller
from tests import serving

HELLO = [{"role": "user", "content": "how was the film?"}]


@pytest.fixture(scope="module")
def backend(tmp_path_factory, tiny_model, tiny_vocabulary):
    directory = tmp_path_factory.mktemp("api")
    workdir = serving.write_model(directory / "model", tiny_model, tiny_vocabulary)
    made = serving.embedded(workdir)
    yield made
    serving.run(made.close(0))


@pytest.fixture(scope="module")
def url(backend):
    keep = serving.Kept(backend)
    with serving.serving(keep) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, **changes):
    values = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 20}
    return client.chat.completions.create(**{**values, **changes})


def test_models(client, backend):
    (model,) = client.models.list().data
    assert (model.id, model.policy, model.window) == ("tiny", backend.models()[0].policy, 128)
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("nobody/nothing")
    assert found.value.code == "model_not_found"


def test_chat_streamed_is_chat(client):
    whole = chat(client, temperature=0.9, top_p=0.95)
    assert whole.choices[0].message.content and whole.choices[0].message.role == "assistant"
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(
        chat(client, temperature=0.9, top_p=0.95, stream=True,
             stream_options={"include_usage": True})
    )  # fmt: skip
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == usage.total_tokens
    assert len({c.id for c in chunks}) == 1
    assert {c.system_fingerprint for c in chunks} == {whole.system_fingerprint}
    assert all(c.usage is None for c in chat(client, stream=True))


def test_several_choices_are_those_of_one_by_one(client):
    three = chat(client, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == chat(client).choices[0].message.content
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    one = chat(client).usage
    assert three.usage.prompt_tokens == one.prompt_tokens


def test_log_probabilities(client):
    found = chat(client, logprobs=True, top_logprobs=3, temperature=0)
    entries = found.choices[0].logprobs.content
    assert len(entries) == found.usage.completion_tokens
    text = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert text == found.choices[0].message.content
    for entry in entries:
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0], abs=1e-5)  # temperature 0
    chunks = chat(client, logprobs=True, temperature=0, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.logprob for e in streamed] == [e.logprob for e in entries]
    assert all(e.top_logprobs == [] for e in streamed)
    assert chat(client).choices[0].logprobs is None


def test_completions(client):
    values = {"model": "tiny", "prompt": "the film was", "seed": 3, "max_tokens": 12}
    whole = client.completions.create(**values, logprobs=2)
    choice = whole.choices[0]
    assert choice.text and len(choice.logprobs.tokens) == whole.usage.completion_tokens <= 12
    assert [choice.text[at:] == "" or at <= len(choice.text) for at in choice.logprobs.text_offset]
    chunks = list(client.completions.create(**values, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    two = client.completions.create(**{**values, "prompt": ["the film was", "the tea"]}, n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == choice.text
    assert two.usage.prompt_tokens > whole.usage.prompt_tokens
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens <= 16


def test_an_answer_can_be_sent_back(client):
    answer = chat(client).choices[0].message
    messages = [*HELLO, answer, {"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    assert chat(client, messages=messages).usage.prompt_tokens > 20
    with_system = [{"role": "developer", "content": "be kind"}, *HELLO]
    assert chat(client, messages=with_system).choices[0].message.content is not None


def test_a_name_stands_before_its_text(client):
    """Not ignored: the same prompt as with the name written by hand, and another one without."""

    def prompt(*messages):
        found = chat(client, messages=messages, temperature=0, logprobs=True)
        return found.choices[0].message.content, found.usage.prompt_tokens

    content = HELLO[0]["content"]
    parts = [{"type": "text", "text": content}]
    named = prompt({"role": "user", "name": "ann_B-2", "content": parts})
    assert named == prompt({"role": "user", "content": f"ann_B-2: {content}"})
    assert named != prompt(*HELLO) == prompt({**HELLO[0], "name": None})


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"max_tokens": 1000}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": "1"}, "seed", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{**HELLO[0], "name": "a b"}]}, "messages.0.name", "invalid_value"),
        ({"messages": [{**HELLO[0], "name": "a" * 65}]}, "messages.0.name", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"extra_body": {"top_k": -1}}, "top_k", "invalid_value"),
    ],
)
def test_what_is_wrong_is_said_in_openais_words(client, changes, param, code):
    kind = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
    with pytest.raises(kind) as found:
        chat(client, **changes)
    body = found.value.body
    assert (body["param"] or "").startswith(param) and body["code"].startswith(code)
    assert body["type"] == "invalid_request_error" and body["message"]


def test_fields_that_ask_for_nothing_are_taken(client):
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "logit_bias": {},
        "user": "me", "response_format": {"type": "text"}, "metadata": {"a": "b"},
        "store": False,
    }  # fmt: skip
    assert chat(client, extra_body=neutral).choices == chat(client).choices


def test_top_k_is_taken(client):
    greedy = chat(client, temperature=0).choices[0].message.content
    assert chat(client, extra_body={"top_k": 1}).choices[0].message.content == greedy


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/models", 405)],
)
def test_other_addresses_have_errors_of_the_same_form(url, method, path, status):
    answer = httpx.request(method, url + path)
    assert answer.status_code == status and set(answer.json()["error"]) == {
        "message", "type", "param", "code",
    }  # fmt: skip


def test_keys_and_rates(backend):
    keys = {"alice": Caller("alice", 2), "bob": Caller("bob")}
    limits = api.Limits(3, 16)
    with serving.serving(serving.Kept(backend), check_key=keys.get, limits=limits) as address:

        def asked(key, **changes):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as one:
                return chat(one, max_tokens=1, **changes)

        with pytest.raises(openai.AuthenticationError) as found:
            asked("mallory")
        assert found.value.code == "invalid_api_key"
        assert httpx.get(f"{address}/v1/models").status_code == 401
        for key, allowed in (("alice", 2), ("bob", 3)):  # bob has the server's own limit
            for _ in range(allowed):
                asked(key)
            with pytest.raises(openai.RateLimitError) as found:
                asked(key)
            assert int(found.value.response.headers["retry-after"]) > 1
            assert found.value.code == "rate_limit_exceeded"
        headers = {"Authorization": "Bearer alice"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200


def test_a_full_queue_is_429_with_a_time_to_come_back(backend):
    with serving.serving(serving.Kept(backend)) as address:
        body = {"model": "tiny", "messages": HELLO, "n": 16, "max_tokens": 100}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        serving.wait_for(lambda: backend.stats()["tiny"].running == 0)  # all of them are given up


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_written_for(backend, url, stream, monkeypatch):
    engine, step = backend._served["tiny"].engine, device.step
    monkeypatch.setattr(engine, "_ends", jnp.zeros_like(engine._ends))  # nothing ends a reply
    monkeypatch.setattr(engine, "_is_end", [False] * len(engine._is_end))
    monkeypatch.setattr(device, "step", lambda *given: time.sleep(0.05) or step(*given))
    body = {"model": "tiny", "prompt": "a", "max_tokens": 110, "stream": stream, "n": 4}
    before = engine.stats().steps

    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(head.encode() + content)
        if stream:
            with line.makefile("rb") as answer:
                assert next(row for row in answer if row.startswith(b"data: "))
        else:
            serving.wait_for(lambda: engine.stats().running > 0)
    serving.wait_for(lambda: engine.stats().running == 0)
    assert 0 < engine.stats().steps - before < 100


def test_health_and_metrics(url, client, backend):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "failures": []}
    with serving.serving(
        serving.Kept(backend), stats=backend.stats, failures=lambda: ["tiny: out of memory"]
    ) as address:
        assert httpx.get(f"{address}/healthz").status_code == 503
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as one:
            usage = chat(one).usage
        httpx.get(f"{address}/a/scanner")
        page = httpx.get(f"{address}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    assert lines['gptlab_requests_total{route="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['gptlab_requests_total{route="other",status="404"}'] == "1.0"
    assert float(lines['gptlab_tokens_total{kind="completion",model="tiny"}']) == (
        usage.completion_tokens
    )
    assert lines['gptlab_time_to_first_token_seconds_count{model="tiny"}'] == "1.0"
    assert float(lines['gptlab_engine_slots{model="tiny"}']) == 4
    assert "scanner" not in page
