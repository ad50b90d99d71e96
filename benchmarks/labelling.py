"""Simulated labellers at work on a campaign, while the same server's engine answers chats.

    python -m benchmarks.labelling --model=runs/quickstart

Starts `python -m gptlab.serve` with a store of its own. --chats clients ask for one reply after
another over /v1; then --labellers simulated labellers join by an invitation's link and, at the same
time, rank --tasks tasks with VADER over the web app's own routes, with pauses of --think seconds on
average, far faster than people. With --think=0 they never pause: that shows what the server can do
at most, and the times are those of 20 requests waiting for each other.

Reported are the milliseconds of judgements and of leases (from sending a request to having its
answer, as the client sees it), judgements a second, and tokens a second of the chats alone and
meanwhile. Clients run on the same cores. Prints a table, then the figures as one line of JSON.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from ml_collections import ConfigDict

from benchmarks import measure
from gptlab.data.records import Candidate, CandidateSet, Message, Prompt
from gptlab.people import http_labeller
from gptlab.people.labellers import SimulatedLabeller
from gptlab.people.store import Store
from gptlab.people.store.campaigns import Settings
from gptlab.run import program
from gptlab.scorers import registry

TEXT = Path(__file__).parents[1] / "README.md"  # what prompts and replies are made of
_REPLIES = 4


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a workdir with a model and a vocabulary")
    parser.add_argument("--labellers", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds between two tasks")
    parser.add_argument("--chats", type=int, default=4, help="clients that the engine answers")
    parser.add_argument("--new", type=int, default=48, help="tokens of a reply at most")
    parser.add_argument("--alone", type=float, default=10.0, help="seconds of chats alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.labellers, args.tasks, args.chats, args.new) < 1 or args.think < 0:
        parser.error("--labellers, --tasks, --chats and --new are at least 1, --think at least 0")
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "shape": {k: v for k, v in vars(args).items() if k not in ("alone", "seed")},
    }
    with tempfile.TemporaryDirectory() as place, serving(args.model, place) as url:
        with Store.open(f"sqlite:///{place}/serve/store.sqlite") as store:
            campaign, token = prepare(store, args)
        with chatting(url, args) as tokens:
            figures["chats_alone"] = {"tokens_per_sec": rate(tokens, args.alone)}
            figures["labelling"] = label(url, campaign, token, tokens, args)
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


@contextlib.contextmanager
def serving(model: str, place: str) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [
        sys.executable, "-m", "gptlab.serve", f"--config=configs/serve.py:model={model}",
        f"--workdir={place}/serve", "--config.port=0",
    ]  # fmt: skip
    kept = {name: str(value) for name, (_, value) in program.KEPT_MEMORY.items()}
    process = subprocess.Popen(
        command, env={**os.environ, **kept}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = ""
        while "http://" not in said:
            if not (line := process.stderr.readline()):
                raise SystemExit(f"gptlab.serve ended before it served: {said}")
            said += line
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield "http://" + said.split("http://")[1].split("/v1")[0]
    finally:
        process.kill()
        process.wait()


def prepare(store: Store, args: argparse.Namespace) -> tuple[str, str]:
    """(a campaign's id with its tasks queued, the token of an invitation to it)."""
    campaign = store.campaigns.create("benchmark", "ranking", Settings(seed=args.seed), "system")
    lines = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = random.Random(args.seed)

    def candidate_set(number: int) -> CandidateSet:
        prompt = Prompt(f"p{number}", (Message("user", rng.choice(lines)),), "README")
        replies = (" ".join(rng.sample(lines, 3)) for _ in range(_REPLIES))
        candidates = (
            Candidate(f"p{number}-{i}", text, "benchmark", True) for i, text in enumerate(replies)
        )
        return CandidateSet(f"set{number}", prompt, tuple(candidates))

    store.campaigns.queue(campaign.id, map(candidate_set, range(args.tasks)), "system")
    _, token = store.accounts.invite(
        "labeller", "system", args.labellers, simulated=True, campaign=campaign.id
    )
    return campaign.id, token


@contextlib.contextmanager
def chatting(url: str, args: argparse.Namespace) -> Iterator[list[tuple[float, int]]]:
    """(when, how many tokens) of every reply so far, while clients ask for one after another."""
    finished: list[tuple[float, int]] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def client(number: int) -> None:
        body = {
            "model": "model", "max_tokens": args.new, "temperature": 0.7, "seed": number,
            "messages": [{"role": "user", "content": f"What is {number}?"}],
        }  # fmt: skip
        try:
            with httpx.Client(base_url=url, timeout=120.0) as http:
                while not stop.is_set():
                    answer = http.post("/v1/chat/completions", json=body)
                    assert answer.is_success, f"{answer.status_code}: {answer.text}"
                    used = answer.json()["usage"]["completion_tokens"]
                    finished.append((time.perf_counter(), used))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(args.chats)]
    for thread in threads:
        thread.start()
    while len(finished) < args.chats and not failures:  # compiled, and under way
        time.sleep(0.01)
    try:
        yield finished
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def rate(tokens: list[tuple[float, int]], seconds: float) -> float:
    """Tokens a second over the next so many seconds."""
    start = time.perf_counter()
    time.sleep(seconds)
    return between(tokens, start, time.perf_counter())


def between(tokens: list[tuple[float, int]], start: float, end: float) -> float:
    """Tokens a second of the replies that ended then."""
    return round(sum(n for at, n in tokens if start <= at <= end) / (end - start), 1)


def label(
    url: str, campaign: str, token: str, tokens: list[tuple[float, int]], args: argparse.Namespace
) -> dict[str, Any]:
    """All labellers at once, until every task is ranked."""
    answers: list[http_labeller.Answer] = []
    failures: list[BaseException] = []
    scorer = registry.make(ConfigDict({"name": "vader"}))

    def labeller(number: int) -> None:
        rng = random.Random(f"{args.seed}:{number}")

        def think() -> None:
            time.sleep(rng.expovariate(1 / args.think) if args.think else 0.0)

        judge = SimulatedLabeller(scorer, noise=0.25, tie_margin=0.05, seed=number)
        try:
            with http_labeller.join(url, token, f"bot {number}") as client:
                think()
                for answer in http_labeller.work(client, campaign, judge):
                    answers.append(answer)
                    think()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=labeller, args=(i,)) for i in range(args.labellers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = time.perf_counter()
    if failures:
        raise failures[0]
    assert len({answer.judgement for answer in answers}) == args.tasks, "not every task is ranked"
    return {
        "judge_ms": percentiles([answer.judge_seconds for answer in answers]),
        "lease_ms": percentiles([answer.lease_seconds for answer in answers]),
        "judgements_per_sec": round(len(answers) / (end - start), 1),
        "tokens_per_sec": between(tokens, start, end),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    values = 1e3 * np.array(seconds)
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 95, 99)}


if __name__ == "__main__":
    main()
