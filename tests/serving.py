"""What tests of the server share: a model to serve, engines, a real server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import uvicorn

from gptlab.model.sharding import MESH_AXES
from gptlab.people import api, app
from gptlab.people.embedded import Embedded
from gptlab.people.engine import Options, Request, Token
from tests import compiling
from tests.rl import artifacts

ROOT = Path(__file__).parents[1]
OPTIONS = Options(slots=4, chunk=8, max_len=None, queue=4)
AUTO = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)


def one_device():
    return jax.make_mesh((1,) * 5, MESH_AXES, axis_types=AUTO, devices=jax.devices()[:1])


def write_model(workdir, tiny_model, vocabulary, seed=0):
    """A finished run with a language model of random parameters, and its vocabulary."""
    artifacts.write_policy(workdir, dict(tiny_model), contrast=6.0, seed=seed)
    shutil.copy(Path(vocabulary) / "vocabulary.model", workdir)
    return workdir


def embedded(workdir, options=OPTIONS, watch_seconds=None, deadline_seconds=60.0, name="tiny"):
    return Embedded(
        {name: str(workdir)}, options, "float32", one_device(), deadline_seconds, watch_seconds
    )


def request(ids, **changes):
    values = {
        "ids": tuple(ids), "max_tokens": 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "seed": 7, "index": 0, "alternatives": 0, "deadline": None,
    }  # fmt: skip
    return Request(**{**values, **changes})


async def answer(engine, asked):
    """(ids, log-probabilities, alternatives, finish_reason, cached tokens) of one request."""
    ticket = engine.submit(asked)
    tokens = []
    while isinstance(event := await ticket.events.get(), Token):
        tokens.append(event)
    if isinstance(event, Exception):
        raise event
    logprobs, tops = [t.logprob for t in tokens], [t.top for t in tokens]
    return [t.id for t in tokens], logprobs, tops, event, ticket.cached_tokens


class Kept:
    """A backend that outlives the server around it."""

    def __init__(self, backend):
        self.models, self.reply = backend.models, backend.reply

    async def close(self, drain_seconds):
        pass


@contextlib.contextmanager
def serving(backend, check_key=None, drain_seconds=5.0, extend=None, port=0, **changes):
    """The URL of a real server around a backend, in a thread; `extend` may add to its app."""
    settings = {
        "limits": api.Limits(None, 16), "max_body_bytes": 1 << 20, "body_seconds": 5.0,
        "allowed_hosts": ("127.0.0.1",),
    }  # fmt: skip
    made = app.make(
        backend, check_key=check_key, drain_seconds=drain_seconds, **{**settings, **changes}
    )
    if extend is not None:
        extend(made)
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(made, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def program(tmp_path, *flags, config="configs/serve.py"):
    """(the process of gptlab.serve, its URL); killed at the end if it still runs."""
    tmp_path.mkdir(exist_ok=True)
    log = tmp_path / "serve.log"
    command = [
        sys.executable, "-m", "gptlab.serve", f"--config={config}",
        f"--workdir={tmp_path / 'serve'}", "--config.port=0", "--config.engine.slots=4",
        "--config.engine.chunk=8", *flags,
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=out, stdout=out, env=compiling.environment()
        )
    try:
        wait_for(lambda: process.poll() is not None or "http://" in log.read_text(), 120)
        said = log.read_text()
        assert process.poll() is None, said
        yield process, "http://" + said.split("http://")[1].split("/v1")[0]
    finally:
        process.kill()
        process.wait()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))
