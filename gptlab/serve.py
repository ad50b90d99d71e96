"""Serves models to people and programs: the web app and OpenAI's API, on this machine.

    python -m gptlab.serve --config=configs/serve.py --workdir=runs/serve
    python -m gptlab.serve --config=configs/serve.py:tuned=runs/sft,film=runs/ppo \
        --workdir=runs/serve

A model is a stage's workdir, or that of rounds: then it is the promoted policy, and when a newer
one is promoted, new requests go to it while running ones finish on the old. With
--config.upstream=http://HOST:PORT the same app stands before another server with OpenAI's API; its
key, if it needs one, is in $GPTLAB_UPSTREAM_KEY. While it can't be reached, /healthz says so.

People come in by invitation links. Where no admin is signed in, the start prints a link for one;
with --config.web.open_chat=True anybody who reaches the server may chat. What they say and
judge is kept in config.store.url, a SQLite file in the workdir unless it is set.

Compiling takes some seconds at the first start. SIGTERM and Ctrl-C take no more requests and let
the running ones finish, for config.drain_seconds at most; then the exit code is 0. A second Ctrl-C:
at once.
"""

import ipaddress
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from etils import epath
from ml_collections import ConfigDict

from gptlab.people import api, app, web
from gptlab.people.backend import Backend
from gptlab.people.embedded import Embedded
from gptlab.people.engine import Options
from gptlab.people.moderation import Moderated, Refusal
from gptlab.people.store import Store, resolve_url
from gptlab.people.store.audit import SYSTEM
from gptlab.people.upstream import Upstream
from gptlab.run import lock, processes, program, storage
from gptlab.run.errors import UserError
from gptlab.scorers import registry
from gptlab.train import mesh as mesh_lib

UPSTREAM_KEY = "GPTLAB_UPSTREAM_KEY"
_OPEN_FILES = 65_536  # idle connections are files


def run(config: ConfigDict, workdir: str) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
      UserError: a model, an address or a config value is wrong.
    """
    scorer = check(config)
    directory = storage.resolve(workdir)
    if storage.in_bucket(directory):
        raise UserError(f"--workdir={workdir}: a server keeps its data on a disk, not in a bucket")
    Path(directory).mkdir(parents=True, exist_ok=True)
    held = lock.take(epath.Path(directory))
    listener = _listen(config.host, config.port)
    store = None
    try:
        store = Store.open(_store_url(config, Path(directory)))
        embedded = None if config.upstream else _embedded(config)
        backend = embedded or Upstream(
            config.upstream,
            os.environ.get(UPSTREAM_KEY),
            config.engine.deadline_seconds,
            config.engine.watch_seconds,
            config.upstream_controls,
        )
        served = app.make(
            _moderated(config, scorer, backend, store),
            check_key=store.accounts.check_api_key if config.api.require_keys else None,
            limits=api.Limits(config.api.requests_per_minute, config.api.max_choices),
            max_body_bytes=config.api.max_body_bytes,
            body_seconds=config.api.body_seconds,
            allowed_hosts=config.allowed_hosts,
            drain_seconds=config.drain_seconds,
            stats=None if embedded is None else embedded.stats,
            failures=backend.failures,
        )
        web.add_pages(served, served.state.backend, store, web.Settings(**config.web))
        invitation = web.admin_link(store)
        if invitation is not None:
            # Where people come by https, a session's cookie would not be taken over http.
            origin = "https://NAME-OF-THIS-SERVER" if config.web.secure else _address(listener)
            invitation = f"{origin}{invitation}"
        _serve(served, listener, config.drain_seconds, invitation)
    finally:
        if store is not None:
            store.close()
        listener.close()
        held.close()


def check(config: ConfigDict) -> registry.Scorer | None:
    """The scorer that moderates, if the config names one.

    Raises UserError for a config that could only fail later, or would be open to everybody.
    """
    if processes.count() > 1:
        raise UserError("gptlab.serve runs as one process; start several servers behind a proxy")
    if not config.upstream and not any(config.models.values()):
        raise UserError(
            "nothing to serve: give --config=configs/serve.py:NAME=WORKDIR or --config.upstream=URL"
        )
    positive = {
        "api.max_choices": config.api.max_choices,
        "api.max_body_bytes": config.api.max_body_bytes,
        "api.body_seconds": config.api.body_seconds,
        "engine.deadline_seconds": config.engine.deadline_seconds,
        "engine.watch_seconds": config.engine.watch_seconds,
        "api.requests_per_minute": config.api.requests_per_minute,
        "web.max_tokens": config.web.max_tokens,
        "web.reply_seconds": config.web.reply_seconds,
        "web.replies_at_once": config.web.replies_at_once,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"config.{name}={value} must be positive")
    web_settings = config.web
    if web_settings.temperature < 0 or not 0 < web_settings.top_p <= 1:
        raise UserError(
            f"config.web.temperature={web_settings.temperature} must not be negative, and "
            f"config.web.top_p={web_settings.top_p} must be above 0 and at most 1"
        )
    if web_settings.artifacts is not None and not Path(web_settings.artifacts).is_dir():
        raise UserError(
            f"config.web.artifacts={web_settings.artifacts}: there is no such directory"
        )
    if config.drain_seconds < 0:
        raise UserError(f"config.drain_seconds={config.drain_seconds} must not be negative")
    if not 0 <= config.port < 65536:
        raise UserError(f"config.port={config.port} is not in 0 .. 65535 (0: any that is free)")
    if not _is_loopback(config.host) and not (config.api.require_keys or config.api.open):
        raise UserError(
            f"config.host={config.host} can be reached from elsewhere, and no key is asked for: "
            "set config.api.require_keys=True, or config.api.open=True to let everybody use the API"
        )
    known = [host for host in config.allowed_hosts if not _is_loopback(host)]
    if known and not (config.api.require_keys or config.api.open):
        raise UserError(
            f"config.allowed_hosts has {known[0]}, by which others reach the server, and no key is "
            "asked for: set config.api.require_keys=True, or config.api.open=True to let everybody "
            "use the API"
        )
    if config.web.secure and not (config.api.require_keys or config.api.open):
        raise UserError(
            "config.web.secure=True is for a server that a proxy makes known elsewhere, and no key "
            "is asked for: set config.api.require_keys=True, or config.api.open=True to let "
            "everybody use the API"
        )
    settings = config.moderation
    if settings.scorer.name is None:
        return None
    if not (settings.input or settings.output):
        raise UserError("config.moderation.scorer reads nothing: set its input or output to True")
    return registry.make(settings.scorer)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _store_url(config: ConfigDict, directory: Path) -> str:
    if config.store.url is None and "GPTLAB_STORE" not in os.environ:
        path = directory / "store.sqlite"
        # What people wrote is nobody else's business on this machine; SQLite keeps the mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        return f"sqlite:///{path}"
    return resolve_url(config.store.url)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"config.host={host}, config.port={port}: {error.strerror or error}"
        ) from None


def _embedded(config: ConfigDict) -> Embedded:
    engine = config.engine
    options = Options(engine.slots, engine.chunk, engine.max_len, engine.queue, engine.block)
    models = {name: path for name, path in config.models.items() if path}
    return Embedded(
        models,
        options,
        config.dtype,
        mesh_lib.make_mesh(config.mesh),
        engine.deadline_seconds,
        engine.watch_seconds,
    )


def _moderated(
    config: ConfigDict, scorer: registry.Scorer | None, backend: Backend, store: Store
) -> Backend:
    """The backend behind its moderation, if there is one."""
    if scorer is None:
        return backend
    settings = config.moderation

    def record(refusal: Refusal) -> None:
        # Without the text: the audit is for ever, and what people write has to be deletable.
        detail = {
            "model": refusal.ask.model,
            "scorer": refusal.scorer,
            "score": refusal.score,
            "characters": len(refusal.text),
        }
        with store.database.write() as writer:
            store.audit.append(writer, SYSTEM, "moderation.refuse", refusal.where, detail)

    return Moderated(backend, scorer, settings.least, settings.input, settings.output, record)


def _serve(
    served: object, listener: socket.socket, drain_seconds: float, invitation: str | None
) -> None:
    """Runs uvicorn until a signal; afterwards everything is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    settings = uvicorn.Config(
        served,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    server = _Announced(settings, listener, invitation)
    # At its end uvicorn raises the signals that it took once more, for whoever had them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    server.run(sockets=[listener])
    if not server.started:
        raise RuntimeError("the server did not start")


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Announced(uvicorn.Server):
    """Says where it listens, once it does, and how an admin comes in."""

    def __init__(self, settings: uvicorn.Config, listener: socket.socket, invitation: str | None):
        super().__init__(settings)
        self._listener, self._invitation = listener, invitation

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            at = _address(self._listener)
            print(f"gptlab serve: {at}/v1", file=sys.stderr, flush=True)
            if self._invitation is not None:
                said = f"gptlab serve: an admin comes in by {self._invitation}"
                print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    program.main(run, "serve")
