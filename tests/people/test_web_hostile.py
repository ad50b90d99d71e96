"""Whatever is sent to the web app's routes, it answers, and never with an error of its own."""

import re

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from gptlab.people.store.campaigns import Settings
from tests import pages
from tests.people.campaigns import candidate_set
from tests.people.test_access import LEAST, Short

pytestmark = pytest.mark.slow

# Each is tried in every field of every form, beside values that are right.
BAD = (
    "", " ", "nan", "-inf", "1e400", "-1", "0", "0.5", "9" * 400, "true", "nothing", "\x00",
    "a\x00b", "\ufdd0", "\u202e", "../..", "/etc", "' OR 1=1 --", "{{7*7}}", "a" * 300_000,
)  # fmt: skip
FORMS = {
    "/join/nothing": {"name": "Bo"},
    "/you/consent": {"training": "yes"},
    "/campaigns": {
        "name": "c", "kind": "ranking", "overlap": "2", "lease_minutes": "5", "gold_percent": "10",
        "disagreement_percent": "50", "max_skips": "2", "instructions": "a",
    },
    "/campaigns/{campaign}/settings": {
        "overlap": "2", "lease_minutes": "5", "gold_percent": "10", "disagreement_percent": "50",
        "max_skips": "2", "instructions": "a",
    },
    "/campaigns/{campaign}/state": {"state": "open"},
    "/campaigns/{campaign}/tasks/artifact": {"workdir": "a", "split": "train"},
    "/campaigns/{campaign}/tasks/chats": {"count": "1", "alternatives": "1"},
    "/campaigns/{campaign}/tasks/texts": {"kind": "prompts", "texts": "a"},
    "/campaigns/{campaign}/tasks/gold": {"question": "a", "replies": "a\n---\nb"},
    "/people/invite": {"role": "user", "uses": "1", "days": "1", "campaign": "", "simulated": "0"},
    "/people/{person}/role": {"role": "user"},
    "/people/{person}/delete": {"confirm": "no"},
    "/keys": {"person": "{person}", "name": "k", "per_minute": "5", "days": "1"},
    "/review/{campaign}/{task}": {
        "action": "decide", "note": "a", "rank-0": "1", "rank-1": "2", "rank-2": "3",
        "flag-0-harmful": "1",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hostile")
    with pages.served(directory, Short(), artifacts=str(directory)) as made:
        yield made


@pytest.fixture(scope="module")
def key(site):
    person, _ = site.person("admin")
    return site.store.accounts.create_api_key(person.id, "test", "system")[1]


@pytest.fixture(scope="module")
def client(site, key):
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=site.url, headers=headers, timeout=60, verify=False) as made:
        yield made
        assert made.get("/people").status_code == 200


def test_every_form_with_every_bad_value(site, client):
    campaign = site.store.campaigns.create("c", "ranking", Settings(max_skips=1), "system")
    site.store.campaigns.queue(campaign.id, [candidate_set("s")], "system", "train")
    other = site.store.accounts.add_person("Bo", "user", "system")
    skipper = site.store.accounts.add_person("Cy", "labeller", "system")
    lease = site.store.work.lease(campaign.id, skipper.id)
    site.store.work.skip(lease.token, skipper.id, "unclear")
    (task,) = site.store.campaigns.tasks(campaign.id, "review")
    names = {"campaign": campaign.id, "person": other.id, "task": task.id}
    for path, fields in FORMS.items():
        right = {name: value.format(**names) for name, value in fields.items()}
        for field in right:
            for bad in BAD:
                answer = client.post(path.format(**names), data={**right, field: bad})
                assert answer.status_code < 500, (path, field, bad[:20], answer.text)
        raw = {"Content-Type": "application/x-www-form-urlencoded"}
        for body in (b"\xff\xfe=%ff%fe", b"%", b"&" * 100_000, b"name=a&" * 20_000, b""):
            answer = client.post(path.format(**names), content=body, headers=raw)
            assert answer.status_code < 500, (path, body[:20])
        multipart = {"Content-Type": "multipart/form-data; boundary=x"}
        for body in (b"--x", b"--x\r\n\r\n", b"--x\r\n" * 1000, b"\xff" * 1000):
            answer = client.post(path.format(**names), content=body, headers=multipart)
            assert answer.status_code < 500, (path, body[:20])


def test_every_path_with_bad_names(client):
    for route in LEAST:
        method, path = route.split()
        names = ("%00", "..%2f..", "%ff", "a" * 5000, "%F0%9F%8F%B3", "'")
        sent = {re.sub(r"{\w+}", bad, path) for bad in names}
        assert len(sent) == (len(names) if "{" in path else 1)
        for bad in sorted(sent - {"/signout", "/you/delete"}):
            answer = client.request(method, bad, json={} if "/api/" in path else None)
            assert answer.status_code < 500, (method, bad)
        for query in ("?after=nan", "?after=-1", "?after=" + "9" * 30, "?before=nan", "?check=2"):
            if method == "GET":
                asked = re.sub(r"{\w+}", "nothing", path) + query
                assert client.get(asked).status_code < 500, asked


OPERATIONS = [route.split() for route in LEAST if "/api/" in route]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_what_the_schema_allows_and_what_it_forbids(site, key, mode):
    """Requests drawn from the app's own description of its JSON routes, and some that break it."""
    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")

    def raw(method, path):
        return schema.raw_schema["paths"][path][method.lower()]

    described = [(m, path) for m, path in OPERATIONS if m.lower() in schema[path]]
    assert described == [tuple(route) for route in OPERATIONS]
    for method, path in described:
        if mode == schemathesis.GenerationMode.NEGATIVE and "requestBody" not in raw(method, path):
            continue  # any name is a name: there is nothing to break

        @settings(
            max_examples=4, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        def one(case):
            case.call_and_validate(
                checks=[checks.not_a_server_error, checks.response_schema_conformance],
                headers={"Authorization": f"Bearer {key}"},
            )

        one()
