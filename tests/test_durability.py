"""The server is killed while people label: nothing is lost, nothing counts twice.

Real servers (`python -m gptlab.serve`), ended by SIGKILL at random moments and started again;
simulated labellers who go on through it all by the web app's own routes.
"""

import collections
import contextlib
import http.server
import json
import os
import random
import socket
import threading
import time

import pytest
from ml_collections import ConfigDict

from configs import export as export_config
from gptlab import export
from gptlab.data.records import Comparison
from gptlab.people import http_labeller
from gptlab.people.labellers import SimulatedLabeller
from gptlab.people.store import Store
from gptlab.people.store.campaigns import Settings
from gptlab.run import artifact
from gptlab.scorers import registry
from tests import serving
from tests.databases import new_database
from tests.fixtures import read_records
from tests.people.campaigns import candidate_set

PATIENCE = 240.0  # seconds in which a server is back on a busy machine
SEED = int(os.environ.get("GPTLAB_KILL_SEEDS", "0").split(",")[0])


class Models(http.server.BaseHTTPRequestHandler):
    """Stands for the server with the models: labellers ask for none, and no model is loaded."""

    def do_GET(self):
        body = json.dumps({"data": [{"id": "m", "created": 0}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def upstream():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def label_all(url, token, campaign, people, answers):
    """Threads of labellers, begun; each puts its answers into `answers`, or what went wrong."""
    scorer = registry.make(ConfigDict({"name": "vader"}))
    joined = threading.Barrier(people + 1)

    def labeller(number):
        judge = SimulatedLabeller(scorer, noise=1.0, tie_margin=0.0, seed=number)
        try:
            with http_labeller.join(url, token, f"bot {number}") as client:
                joined.wait()
                for answer in http_labeller.work(client, campaign, judge, PATIENCE):
                    answers.append(answer)
        except BaseException as error:
            answers.append(error)
            joined.abort()

    threads = [threading.Thread(target=labeller, args=(i,)) for i in range(people)]
    for thread in threads:
        thread.start()
    joined.wait()
    return threads


def kill_and_start(tmp_path, flags, campaign, token, people, moments, rng):
    """All confirmed answers; the server was killed at these numbers of them."""
    answers = []
    threads = None
    for moment in [*moments, None]:
        with serving.program(tmp_path, *flags) as (process, url):
            if threads is None:
                threads = label_all(url, token, campaign, people, answers)
            if moment is None:
                for thread in threads:
                    thread.join()
                break
            while len(answers) < moment and any(thread.is_alive() for thread in threads):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            assert process.poll() is None
            process.kill()  # SIGKILL
            process.wait()
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    assert not failures, failures
    return answers


def prove(tmp_path, url, tasks, kills, people, overlap):
    rng = random.Random(SEED)
    total = tasks * overlap
    moments = sorted(rng.sample(range(1, total - 2 * people), kills))
    sets = {f"s{i}": candidate_set(f"s{i}") for i in range(tasks)}
    with Store.open(url) as store:
        settings = Settings(overlap=overlap, disagreement=1.0)
        made = store.campaigns.create("c", "ranking", settings, "system")
        store.campaigns.queue(made.id, sets.values(), "system", "train")
        _, token = store.accounts.invite(
            "labeller", "system", people, simulated=True, campaign=made.id
        )
    with upstream() as models:
        flags = (f"--config.upstream={models}", f"--config.port={free_port()}")
        if url.startswith("postgresql"):
            flags += (f"--config.store.url={url}",)
        answers = kill_and_start(tmp_path, flags, made.id, token, people, moments, rng)

    with Store.open(url) as store:
        assert store.audit.verify() is None
        assert store.figures.progress(made.id).complete
        assert store.figures.progress(made.id).held == 0
        content = store.content()
    # Every answer that was confirmed is there, once, as it was given; and there is nothing else.
    assert len(answers) == total == len(content.judgements), f"seed {SEED}, killed at {moments}"
    by_id = {judgement.id: judgement for judgement in content.judgements}
    assert len({answer.judgement for answer in answers}) == total
    for answer in answers:
        kept = by_id[answer.judgement]
        task = content.tasks[kept.task]
        own = dict(zip((c.content for c in task.candidates), kept.ranks, strict=True))
        assert own == dict(zip(answer.replies, answer.ranks, strict=True))
    pairs = collections.Counter((j.task, j.person) for j in content.judgements)
    assert max(pairs.values()) == 1
    assert set(collections.Counter(j.task for j in content.judgements).values()) == {overlap}

    # The export holds exactly that, and is the same when it is made again.
    config = export_config.get_config()
    config.store.url = url
    config.filters.max_disagreement = 1.0
    for name in ("a", "b"):
        export.run(config, tmp_path / name)
    digests = {artifact.read_manifest(tmp_path / name)["digest"] for name in "ab"}
    assert len(digests) == 1
    exported = read_records(tmp_path / "a", "comparisons", "train", Comparison)
    expected = {
        f"{content.tasks[j.task].source}:{j.id}": (
            sets[content.tasks[j.task].source].candidates, j.ranks,
        )
        for j in content.judgements
    }  # fmt: skip
    assert {c.id: (c.candidates, c.ranks) for c in exported} == expected
    assert len(exported) == total and all(c.simulated for c in exported)


def test_a_killed_server_loses_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'serve' / 'store.sqlite'}"
    prove(tmp_path, url, tasks=30, kills=1, people=4, overlap=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20_kills_among_10000_tasks_lose_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'serve' / 'store.sqlite'}"
    prove(tmp_path, url, tasks=10_000, kills=20, people=8, overlap=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_servers_before_postgresql_lose_nothing(tmp_path, postgresql):
    prove(tmp_path, new_database(postgresql), tasks=500, kills=5, people=8, overlap=2)
