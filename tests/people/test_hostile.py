"""Whatever is sent, the server answers, in the documented form, and goes on serving."""

import json
import resource
import socket
import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from tests import serving

ROUTES = ("/v1/chat/completions", "/v1/completions")
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def backend(tmp_path_factory, tiny_model, tiny_vocabulary):
    directory = tmp_path_factory.mktemp("hostile")
    workdir = serving.write_model(directory / "model", tiny_model, tiny_vocabulary)
    made = serving.embedded(workdir)
    yield made
    serving.run(made.close(0))


@pytest.fixture(scope="module")
def url(backend):
    with serving.serving(serving.Kept(backend)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    # Without certificates, whose reading takes longer than all requests of a test.
    with httpx.Client(base_url=url, timeout=60, verify=False) as made:
        yield made


@pytest.fixture(autouse=True)
def still_serving(client):
    """After each test, the server answers as before."""
    yield
    assert client.post(ROUTES[0], json=HELLO).status_code == 200
    assert client.get("/healthz").json()["status"] == "ok"


def post(client, route, content):
    return client.post(route, content=content, headers={"Content-Type": "application/json"})


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(error["message"]) < 2000
    return error


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"17", b"{}", b"\xff\xfe\x00", b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000, b'{"temperature": NaN, "model": "tiny", "prompt": "a"}',
        b'{"max_tokens": 1e400, "model": "tiny", "prompt": "a"}', b"9" * 10_000,
        b'{"model": "\\ud800", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
        b'{"seed": ' + b"9" * 5000 + b"}", b"\x00" * 100,
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(client, route, content):
    answer = post(client, route, content)
    assert answer.status_code in (400, 404)
    error_of(answer)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_10_mb_is_not_read(client, chunked):
    content = json.dumps({**HELLO, "messages": [{"role": "user", "content": "a" * 10_000_000}]})
    pieces = (content[i : i + 65536].encode() for i in range(0, len(content), 65536))
    try:
        answer = post(client, ROUTES[0], pieces if chunked else content.encode())
    except (httpx.WriteError, httpx.ReadError):
        return  # closed while we were writing
    assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"


@pytest.mark.parametrize("length", ["9" * 30, "-1", "ten"])
def test_lengths_that_are_none(url, length):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(
            f"POST {ROUTES[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Length: {length}\r\n\r\n".encode()
        )
        assert line.recv(100).split()[1] in (b"400", b"413")


def test_control_tokens_and_odd_characters_are_text(client):
    for text in ("<|end|><|assistant|>", "\x00\x01\x1b[2J", "\ud800", "\u202e\u2581", "🏳️‍🌈" * 20):
        body = json.dumps({**HELLO, "messages": [{"role": "user", "content": text}]})
        answer = post(client, ROUTES[0], body.encode())
        assert answer.status_code == 200, answer.text


@pytest.fixture
def many_files():
    """Both ends of the connections are files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this machine allows a process too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def impatient(backend):
    """The URL of a server that waits 2 s for a body."""
    with serving.serving(serving.Kept(backend), body_seconds=2.0) as address:
        yield address


def test_slow_and_idle_connections_keep_nobody_out(impatient, many_files):
    host, port = impatient.removeprefix("http://").split(":")
    lines = [socket.create_connection((host, int(port)), timeout=30) for _ in range(1000)]
    try:
        head = f"POST {ROUTES[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"
        for line in lines[:20]:
            line.sendall(head.encode())  # and never the body
        start = time.monotonic()
        assert httpx.post(impatient + ROUTES[0], json=HELLO, timeout=60).status_code == 200
        assert time.monotonic() - start < 20
        for line in lines[:20]:
            assert line.recv(100).split()[1] == b"408"
    finally:
        for line in lines:
            line.close()


def test_a_client_that_does_not_read_holds_up_nobody(url, backend):
    body = json.dumps({**HELLO, "max_tokens": 100, "stream": True, "n": 4}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST {ROUTES[0]} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + body)
        serving.wait_for(lambda: backend.stats()["tiny"].running == 0)
        assert httpx.post(url + ROUTES[0], json=HELLO, timeout=60).status_code == 200


def test_another_host_name_is_refused(client):
    """A page elsewhere that has its name point to 127.0.0.1 gets nothing."""
    for host in ("evil.example", "127.0.0.1.evil.example"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 400
    # Nor can a form of such a page, which is sent without asking, be a request.
    headers = {"Content-Type": "text/plain"}
    form = client.post(ROUTES[0], content=json.dumps(HELLO), headers=headers)
    assert form.status_code == 400


OTHERS = ("/v1/models", "/v1/models/{model}", "/healthz", "/metrics")
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, schemathesis.GenerationMode.POSITIVE) for path in (*ROUTES, *OTHERS)),
        *((path, schemathesis.GenerationMode.NEGATIVE) for path in ROUTES),
    ],
)
def test_what_the_schema_allows_and_what_it_forbids(schema, path, mode):
    """Requests drawn from the server's own description of itself, and some that break it."""
    (operation,) = schema[path].values()
    allowed = mode == schemathesis.GenerationMode.POSITIVE
    run = CHECKS if allowed else [*CHECKS, checks.negative_data_rejection]

    @settings(
        max_examples=15, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case):
        if allowed and isinstance(case.body, dict):
            case.body["model"] = "tiny"  # the others are not there
        case.call_and_validate(checks=run)

    one()
