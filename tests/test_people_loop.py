"""The whole loop with people in it: chat, feedback, export, SFT, reward, PPO, and chat again."""

import json
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
from ml_collections import ConfigDict

from configs import collect as collect_config
from configs import export as export_config
from gptlab import collect, export
from gptlab.data.records import CandidateSet, Comparison, Conversation, Prompt
from gptlab.people import http_labeller
from gptlab.people.labellers import SimulatedLabeller
from gptlab.people.store import NotFound, Store
from gptlab.people.store.campaigns import Settings
from gptlab.run import artifact, descendants
from gptlab.run.errors import EXIT_INTERRUPTED, UserError
from gptlab.scorers import registry
from tests import compiling, serving
from tests.fixtures import read_records, run_smoke
from tests.people.campaigns import person

CHATS = 40
BETTER = "that is a good and lovely day!"


def sign_in(store, url):
    """A client as a browser has it, of somebody who consents by its own request."""
    _, token = store.accounts.invite("user", "system")
    client = httpx.Client(base_url=url, timeout=120)
    me = client.post("/api/join", json={"token": token, "name": "Ann"}).raise_for_status().json()
    client.headers["X-CSRF-Token"] = me["csrf"]
    post(client, "/api/consent", scope="training", given=True)
    return client, me["id"]


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
    return answer.json()


def reply(client, turn):
    """A reply as the page gets it: the message of the stream's last event."""
    event = None
    with client.stream("POST", f"/api/messages/{turn}/reply", json={}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event == "done":
                return json.loads(line.removeprefix("data: "))["message"]
    raise AssertionError(f"the stream ended with {event}")


def chat_and_judge(client, number):
    """One chat: two replies side by side, a choice, thumbs, a flag, a better one."""
    begun = post(client, "/api/conversations", content=f"how was the film number {number}?")
    turn = begun["message"]["id"]
    one, two = (reply(client, turn) for _ in range(2))
    longer = len(one["content"]) >= len(two["content"])
    post(client, f"/api/messages/{one['id']}/choose", other=two["id"], value=1 if longer else -1)
    best, worst = (one, two) if longer else (two, one)
    post(client, f"/api/messages/{best['id']}/thumb", up=True)
    flag = {"reasons": ["harmful"], "severity": 1 + number % 3}
    post(client, f"/api/messages/{worst['id']}/thumb", up=False, **flag)
    post(client, f"/api/messages/{worst['id']}/improve", content=f"{BETTER} {number}")


def new_replies(workdir, policy, prompts, vocabulary):
    """Candidate sets of what was flagged, in train."""
    config = collect_config.get_config()
    config.inputs.update(policy=str(policy), prompts=str(prompts), vocabulary=str(vocabulary))
    config.data.prompt_len, config.sampling.max_new_tokens = 40, 8
    config.batch_size, config.num_replies = 8, 3
    config.num_prompts.train = config.num_prompts.validation = None
    collect.run(config, workdir)
    return read_records(workdir, "candidates", "train", CandidateSet)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_people_say_in_the_chat_changes_the_model_that_answers(tmp_path, smoke_run):
    """Two rounds, a chat with their policy, a third round with its feedback, and the chat again."""
    root = tmp_path / "run"
    shutil.copytree(smoke_run, root)
    url_of_store = f"sqlite:///{tmp_path / 'serve' / 'store.sqlite'}"
    flags = (
        f"--config.models.gptlab={root}", "--config.engine.watch_seconds=0.2",
        "--config.web.max_tokens=12",
    )  # fmt: skip
    with serving.program(tmp_path, *flags) as (_, url), Store.open(url_of_store) as store:
        client, ann = sign_in(store, url)
        silent = person(store, "Sil", "user")  # who says nothing is in nothing
        for number in range(CHATS):
            chat_and_judge(client, number)
        before = json.loads((root / "rounds" / "2.json").read_text())["policy_after"]
        assert {m.policy for m in store.content().messages.values() if m.policy} == {before}

        config = export_config.get_config()
        config.store.url, config.validation_fraction = url_of_store, 0.4
        export.run(config, tmp_path / "export")
        found = {
            split: read_records(tmp_path / "export", "comparisons", split, Comparison)
            for split in export.SPLITS
        }
        comparisons = [*found["train"], *found["validation"]]
        kinds = {c.id.split(":")[0] for c in comparisons}
        assert kinds == {"choice", "thumb", "flag", "better"}
        assert {c.weight for c in comparisons} == {0.25, 0.5, 1.0} and found["validation"]
        assert {c.labeller for c in comparisons} == {f"person:{ann}"}
        assert silent.id not in str(comparisons)
        prompts = read_records(tmp_path / "export", "prompts", "train", Prompt)
        assert prompts and all("flag:harmful:severity=" in p.source for p in prompts)
        demonstrations = read_records(tmp_path / "export", "conversations", "train", Conversation)
        assert all(BETTER in c.messages[-1].content for c in demonstrations)

        feedback = f"--config.inputs.feedback_3={tmp_path / 'export'}"
        run_smoke(root, "--config.num_rounds=3", feedback)
        third = json.loads((root / "rounds" / "3.json").read_text())
        assert third["promoted"] and third["policy_after"] == third["policy"] != before
        # One can walk back from the policy to what was said.
        exported = artifact.read_manifest(tmp_path / "export")
        assert third["feedback"] == exported["identity"]
        made_of = artifact.lineage(root / third["steps"]["ppo"]["artifact"])["inputs"]
        learnt_from = [
            made_of["reward"]["inputs"]["comparisons_feedback"],
            made_of["init"]["inputs"]["tokens"]["inputs"]["corpus"],
        ]
        assert [node["manifest"]["identity"] for node in learnt_from] == [third["feedback"]] * 2
        assert exported["files"]["store"]["digest"].startswith(store.state().store)
        # And the other way, to all that learnt from it.
        found = descendants.find({exported["identity"]}, [tmp_path])
        own = {name: root / step["artifact"] for name, step in third["steps"].items()}
        learnt = {str(path) for name, path in own.items() if name not in ("collect", "rank")}
        assert {one.path for one in found if one.of} == {str(root), *learnt} and len(learnt) == 6

        models = lambda: httpx.get(f"{url}/v1/models").json()["data"]  # noqa: E731
        serving.wait_for(lambda: models()[0]["policy"] == third["policy"])
        begun = post(client, "/api/conversations", content="and how was the tea?")
        answer = reply(client, begun["message"]["id"])
        kept = store.conversations.path(ann, answer["id"])[-1]
        assert kept.policy == third["policy"]
        client.close()

        # What was flagged is asked again, for people to rank; and it goes when its author goes.
        policy, vocabulary = made_of["init"]["path"], made_of["vocabulary"]["path"]
        collected = new_replies(tmp_path / "collect", policy, tmp_path / "export", vocabulary)
        again = store.campaigns.create("flagged", "ranking", Settings(), "system")
        assert store.campaigns.queue(again.id, collected, "system", "train") == len(prompts)
        assert {task.person for task in store.campaigns.tasks(again.id)} == {ann}
        assert [e.workdir for e in store.delete_person(ann, "system")] == [str(tmp_path / "export")]
        assert {task.state for task in store.campaigns.tasks(again.id)} == {"deleted"}
        with pytest.raises(UserError, match="it holds no feedback"):
            export.run(config, tmp_path / "later")


def start_rounds(root, url, log):
    """`gptlab.rounds` with people as its labellers, in a process of its own."""
    command = [
        sys.executable, "-m", "gptlab.rounds", "--config=configs/quickstart.py:smoke,people",
        f"--workdir={root}", f"--config.stages.rank.store.url={url}",
        "--config.stages.rank.store.poll_seconds=0.2", "--config.stages.rank.campaign.overlap=1",
        "--config.stages.rank.campaign.gold_rate=0.0",
    ]  # fmt: skip
    with open(log, "a") as out:
        return subprocess.Popen(
            command, cwd=serving.ROOT, env=compiling.environment(), stdout=out, stderr=out
        )


def waiting_tasks(url):
    """How many tasks wait to be ranked; 0 as long as there is no campaign."""
    try:
        with Store.open(url, create=False) as store:
            progress = store.figures.progress("quickstart")
            return progress.tasks - progress.done
    except (UserError, NotFound):
        return 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rounds_wait_for_people_and_go_on(tmp_path):
    root, log = tmp_path / "run", tmp_path / "rounds.log"
    (tmp_path / "serve").mkdir()
    url = f"sqlite:///{tmp_path / 'serve' / 'store.sqlite'}"
    process = start_rounds(root, url, log)
    try:
        # It queues what it has collected, waits, and is stopped while it does.
        serving.wait_for(lambda: process.poll() is not None or waiting_tasks(url) == 80, 1800)
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == EXIT_INTERRUPTED, log.read_text()
        assert "0 of 80 sets are ranked" in log.read_text()

        (fine_tuned,) = root.glob("artifacts/sft-*")
        with serving.program(tmp_path, f"--config.models.gptlab={fine_tuned}") as (_, served):
            with Store.open(url) as store:
                campaign = store.campaigns.get("quickstart").id
                _, token = store.accounts.invite("labeller", "system", simulated=True)
            judge = SimulatedLabeller(registry.make(ConfigDict({"name": "vader"})), 0.1, 0.05, 0)
            with http_labeller.join(served, token, "bot") as client:
                work = http_labeller.work(client, campaign, judge, 240)
                first = [next(work) for _ in range(30)]  # while no program waits for them
                process = start_rounds(root, url, log)
                ranked = [*first, *work]
                while process.poll() is None:  # the second round's, as soon as they are there
                    ranked += http_labeller.work(client, campaign, judge, 240)
                    time.sleep(0.2)
        assert process.returncode == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert len(ranked) == 160 and len({answer.judgement for answer in ranked}) == 160
    rounds = [json.loads((root / "rounds" / f"{r}.json").read_text()) for r in (1, 2)]
    for record in rounds:
        workdir = root / "artifacts" / f"rank-{record['steps']['rank']['identity']}"
        for split, count in (("train", 64), ("validation", 16)):
            found = read_records(workdir, "comparisons", split, Comparison)
            assert len(found) == count
            assert {(c.labeller, c.simulated) for c in found} == {("simulated:bot", True)}
    with Store.open(url) as store:
        assert store.audit.verify() is None and len(store.exports.all()) == 2

    with serving.program(tmp_path, f"--config.models.gptlab={root}") as (_, served):
        body = {"model": "gptlab", "messages": [{"role": "user", "content": "hello!"}]}
        answer = httpx.post(f"{served}/v1/chat/completions", json=body, timeout=120).json()
        assert answer["choices"][0]["message"]["content"] is not None
        assert answer["system_fingerprint"] == rounds[1]["policy"]
