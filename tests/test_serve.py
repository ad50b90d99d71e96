"""The program: it serves, ends as it is asked to, and refuses what can't be served."""

import contextlib
import json
import os
import signal
import threading

import httpx
import pytest
from ml_collections import ConfigDict

from configs import serve as serve_config
from gptlab import serve
from gptlab.people.store import Store
from gptlab.run.errors import UserError
from tests import serving

LONG = {"model": "gptlab", "prompt": "a", "max_tokens": 110, "stream": True, "n": 8}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model, tiny_vocabulary):
    directory = tmp_path_factory.mktemp("serve")
    return serving.write_model(directory / "model", tiny_model, tiny_vocabulary)


def events(url, body, begun=None):
    """The choices' finish reasons of a streamed answer, and whether it came to its end."""
    reasons, ended = [], False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if begun is not None:
                begun.set()
            if line == "data: [DONE]":
                ended = True
            elif line:
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                reasons.append(choice["finish_reason"])
    return [reason for reason in reasons if reason], ended


def test_it_serves_records_refusals_and_finishes_what_runs_when_it_is_stopped(tmp_path, workdir):
    own = f"--config.models.gptlab={workdir}"
    moderated = ("--config.moderation.scorer.name=vader", "--config.moderation.least=-0.3")
    with contextlib.ExitStack() as stack:
        process, url = stack.enter_context(serving.program(tmp_path, own, *moderated))
        flags = (f"--config.upstream={url}", "--config.engine.watch_seconds=0.2")
        _, front = stack.enter_context(serving.program(tmp_path / "front", *flags))
        http = stack.enter_context(httpx.Client(verify=False, timeout=60))
        assert http.get(f"{front}/healthz").json()["status"] == "ok"
        body = {**LONG, "stream": False, "seed": 1, "n": 2}
        answers = [http.post(f"{at}/v1/completions", json=body) for at in (url, front)]
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts[0] == texts[1] != ""

        # One server in a workdir, and on a port.
        with pytest.raises(UserError, match="in use by another"):
            serve.run(config(**{"models.gptlab": str(workdir)}), str(tmp_path / "serve"))
        port = int(url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"config.port={port}: Address already in use"):
            serve.run(config(port=port, **{"models.gptlab": str(workdir)}), str(tmp_path / "b"))
        ask = {"model": "gptlab", "prompt": "this is awful, horrible and bad"}
        answer = http.post(f"{url}/v1/completions", json=ask)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "content_filter"
        assert http.post(f"{url}/v1/completions", json={**ask, "prompt": "hi"}).is_success

        begun, found = threading.Event(), []
        reader = threading.Thread(target=lambda: found.append(events(url, LONG, begun)))
        reader.start()
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        reader.join(60)
        assert process.wait(60) == 0
        ((reasons, ended),) = found
        assert len(reasons) == 8 and set(reasons) <= {"stop", "length"} and ended
        with pytest.raises(httpx.ConnectError):
            http.get(f"{url}/healthz")
        serving.wait_for(lambda: http.get(f"{front}/healthz").status_code == 503)
        (said,) = http.get(f"{front}/healthz").json()["failures"]
        assert said.startswith("upstream: it can't be reached")
    log = (tmp_path / "serve.log").read_text()
    address, invitation = log.splitlines()  # and nothing else: no warnings of libraries
    assert address == f"gptlab serve: {url}/v1" and f"{url}/join/" in invitation

    path = tmp_path / "serve" / "store.sqlite"
    with Store.open(f"sqlite:///{path}") as store:
        (row,) = [row for row in store.audit.entries() if row.action == "moderation.refuse"]
        assert store.audit.verify() is None
    assert (row.object, row.detail["scorer"]) == ("input", "vader")
    assert row.detail["score"] < -0.3 and row.detail["characters"] == len(ask["prompt"])
    assert "awful" not in repr(row)
    assert oct(os.stat(path).st_mode)[-3:] == "600"


def config(**changes):
    made = serve_config.get_config()
    made.port = 0
    with made.unlocked():
        made.update_from_flattened_dict(changes)
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models.gptlab": "nowhere"}, "nowhere has no manifest.json"),
        ({"models.gptlab": None}, "nothing to serve"),
        ({"host": "0.0.0.0"}, "no key is asked for"),
        ({"host": "192.0.2.1", "api.open": True}, "config.host=192.0.2.1"),
        ({"port": 70000}, "config.port=70000"),
        ({"upstream": "http://127.0.0.1:9"}, "config.upstream=http://127.0.0.1:9"),
        ({"engine.slots": 0}, "config.engine.slots=0"),
        ({"engine.chunk": 1000}, "config.engine.chunk=1000 does not fit"),
        ({"engine.deadline_seconds": 0.0}, "config.engine.deadline_seconds=0.0"),
        ({"drain_seconds": -1.0}, "config.drain_seconds"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"mesh.tensor": 3}, "config.mesh"),
        ({"web.replies_at_once": 0}, "config.web.replies_at_once=0"),
        ({"web.top_p": 0.0}, "config.web.top_p=0.0"),
        ({"web.artifacts": "nowhere"}, "config.web.artifacts=nowhere"),
        ({"allowed_hosts": ("127.0.0.1", "chat.example.org")}, "has chat.example.org"),
        ({"allowed_hosts": ("*",)}, "config.allowed_hosts has \\*"),
        ({"web.secure": True}, "config.api.require_keys=True"),
        ({"moderation.scorer.name": "no such"}, "no scorer 'no such'"),
        ({"api.max_body_bytes": 0}, "config.api.max_body_bytes=0"),
    ],
)
def test_mistakes_are_user_errors(tmp_path, workdir, changes, words):
    made = config(**{"models.gptlab": str(workdir), "mesh.fsdp": -1, **changes})
    with pytest.raises(UserError, match=words):
        serve.run(made, str(tmp_path / "serve"))


def test_no_name_of_a_config_is_a_method_of_configs():
    """config.api.keys would be ConfigDict.keys, which is always true."""

    def names(made):
        for name, value in made.items():
            yield name
            if isinstance(value, ConfigDict):
                yield from names(value)

    assert not [name for name in names(serve_config.get_config()) if hasattr(ConfigDict, name)]


@pytest.mark.parametrize("argument", ["runs/sft", "=runs/sft", "a=", "a=runs/sft,,"])
def test_models_are_named_in_the_configs_argument(argument):
    with pytest.raises(ValueError, match="NAME=WORKDIR"):
        serve_config.get_config(argument)
    found = serve_config.get_config("a=runs/sft,b=runs/ppo").models
    assert isinstance(found, ConfigDict) and found.to_dict() == {"a": "runs/sft", "b": "runs/ppo"}
