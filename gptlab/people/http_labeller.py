"""Simulated labellers that work through the web app, by the same requests as people's browsers.

    with http_labeller.join(url, token, "bot") as client:  # an invitation's token
        for answer in http_labeller.work(client, campaign, labeller):
            ...

They join by an invitation that says that they are simulated, keep their session's cookie, send its
CSRF token, and lease and rank one task after another. A server that is busy, restarts or was killed
is asked again: a lease's token makes an answer count once, however often it is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx

from gptlab.data.records import Candidate, CandidateSet, Message, Prompt
from gptlab.people.labellers import SimulatedLabeller
from gptlab.run.errors import UserError

_AGAIN = (429, 502, 503, 504)  # what a server says that can be asked later
# What it says of a lease: its task's text was deleted, or the task is somebody else's by now.
_GONE = (404, 409)
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0  # seconds before a request is sent again
_ERROR_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Answer:
    """A judgement that the server has confirmed.

    `ranks` belong to `replies`, in the order that was shown. `lease_seconds` and `judge_seconds`
    are what the requests took that were answered, from sending to having the answer.
    """

    judgement: str
    lease: str
    replies: tuple[str, ...]
    ranks: tuple[int, ...]
    lease_seconds: float
    judge_seconds: float


@contextlib.contextmanager
def join(url: str, token: str, name: str) -> Iterator[httpx.Client]:
    """A client with a session, as a new person. Raises UserError: the link is not valid.

    Unlike answers, joining counts each time: where the server's answer was lost, the invitation is
    used once more, and a person stays behind who does nothing.
    """
    with httpx.Client(base_url=url, timeout=60.0) as client:
        me, _ = send(client, "POST", "/api/join", {"token": token, "name": name})
        client.headers["X-CSRF-Token"] = me["csrf"]
        yield client


def work(
    client: httpx.Client,
    campaign: str,
    labeller: SimulatedLabeller,
    patience_seconds: float = 60.0,
) -> Iterator[Answer]:
    """Ranks tasks until there are none for this person; yields each answer once it is confirmed.

    Args:
      client: of `join`.
      campaign: its id.
      labeller: whose scorer and noise make the rankings.
      patience_seconds: how long a server may be away.
    """
    while True:
        path = f"/api/campaigns/{campaign}/lease"
        leased, lease_seconds = send(client, "POST", path, None, patience_seconds)
        task = leased["task"]
        if task is None:
            return
        replies = tuple(reply["content"] for reply in task["replies"])
        ranks = _rank(labeller, task, replies)
        path, body = f"/api/leases/{task['lease']}/judge", {"ranks": ranks}
        answered, seconds = send(client, "POST", path, body, patience_seconds, lost=_GONE)
        if answered is not None:
            yield Answer(
                answered["judgement"], task["lease"], replies, tuple(ranks), lease_seconds, seconds
            )  # fmt: skip


def send(
    client: httpx.Client,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    patience_seconds: float = 60.0,
    lost: Collection[int] = (),
) -> tuple[Any, float]:
    """(the answer's JSON, seconds that its request took), asked again while the server is away.

    Returns None as JSON for a status in `lost`. Raises UserError for any other refusal, or when
    patience ends.
    """
    end, wait = time.monotonic() + patience_seconds, _FIRST_WAIT
    while True:
        start = time.perf_counter()
        try:
            response = client.request(method, path, json=body)
            seconds = time.perf_counter() - start
            problem = f"{response.status_code} {response.text[:_ERROR_CHARACTERS]}"
            if response.status_code in lost:
                return None, seconds
            if response.is_success:
                return response.json(), seconds
            if response.status_code not in _AGAIN:
                raise UserError(f"{method} {client.base_url}{path}: {problem}")
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() > end:
            raise UserError(
                f"{method} {client.base_url}{path}: no answer in {patience_seconds:g} s: {problem}"
            )
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


def _rank(
    labeller: SimulatedLabeller, task: Mapping[str, Any], replies: tuple[str, ...]
) -> list[int]:
    """The labeller's ranks, in the order shown; the same for the same texts in the same order."""
    messages = tuple(
        Message(turn["role"], turn["content"], turn["context"]) for turn in task["prompt"]
    )
    digest = hashlib.sha256(repr((messages, replies)).encode("utf-8", "surrogatepass"))
    key = digest.hexdigest()[:16]
    candidates = tuple(Candidate(f"{key}-{i}", r, "hidden", True) for i, r in enumerate(replies))
    (ranked,) = labeller.compare([CandidateSet(key, Prompt(key, messages, "web"), candidates)])
    return list(ranked.ranks)
