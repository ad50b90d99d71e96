"""Who gets where: every route for every role, without a CSRF token, from another site, by key."""

import contextlib
import shutil
import types

import httpx
import pytest

from gptlab.data.records import Message
from gptlab.people.backend import Model, Piece
from gptlab.people.store.campaigns import Settings
from gptlab.people.store.judgements import Turn
from gptlab.people.store.person import ROLES
from gptlab.people.web import pages as web_pages
from gptlab.people.web.security import HEADERS, SESSION_SECONDS
from tests import pages
from tests.people.campaigns import candidate_set
from tests.run.test_descendants import made

# The least role of every route; None: it is for strangers, too.
LEAST = {
    "GET /": None,
    "POST /start": None,
    "GET /join/{token}": None,
    "POST /join/{token}": None,
    "POST /api/join": None,
    "GET /api/me": "user",
    "POST /signout": "user",
    "GET /you": "user",
    "POST /you/consent": "user",
    "POST /you/delete": "user",
    "POST /api/consent": "user",
    "GET /chat": "user",
    "GET /chat/{conversation}": "user",
    "GET /api/conversations": "user",
    "POST /api/conversations": "user",
    "GET /api/conversations/{conversation}": "user",
    "PATCH /api/conversations/{conversation}": "user",
    "DELETE /api/conversations/{conversation}": "user",
    "POST /api/conversations/{conversation}/messages": "user",
    "POST /api/messages/{message}/reply": "user",
    "POST /api/messages/{message}/thumb": "user",
    "POST /api/messages/{message}/choose": "user",
    "POST /api/messages/{message}/improve": "user",
    "POST /api/replies/{token}/stop": "user",
    "GET /label": "labeller",
    "GET /label/{campaign}": "labeller",
    "GET /label/{campaign}/instructions": "labeller",
    "GET /api/campaigns": "labeller",
    "POST /api/campaigns/{campaign}/lease": "labeller",
    "POST /api/leases/{lease}/judge": "labeller",
    "POST /api/leases/{lease}/demonstrate": "labeller",
    "POST /api/leases/{lease}/skip": "labeller",
    "POST /api/leases/{lease}/release": "labeller",
    "POST /api/leases/{lease}/renew": "labeller",
    "POST /api/leases/{lease}/suggest": "labeller",
    "GET /review": "reviewer",
    "GET /review/{campaign}/{task}": "reviewer",
    "POST /review/{campaign}/{task}": "reviewer",
    "GET /campaigns": "admin",
    "POST /campaigns": "admin",
    "GET /campaigns/{campaign}": "admin",
    "GET /campaigns/{campaign}/progress": "admin",
    "POST /campaigns/{campaign}/settings": "admin",
    "POST /campaigns/{campaign}/state": "admin",
    "POST /campaigns/{campaign}/tasks/artifact": "admin",
    "POST /campaigns/{campaign}/tasks/chats": "admin",
    "POST /campaigns/{campaign}/tasks/texts": "admin",
    "POST /campaigns/{campaign}/tasks/gold": "admin",
    "GET /people": "admin",
    "POST /people/invite": "admin",
    "POST /people/{person}/link": "admin",
    "POST /people/{person}/role": "admin",
    "POST /people/{person}/signout": "admin",
    "POST /people/{person}/delete": "admin",
    "GET /people/{person}/exports": "admin",
    "POST /invitations/{invitation}/revoke": "admin",
    "GET /keys": "admin",
    "POST /keys": "admin",
    "POST /keys/{key}/revoke": "admin",
    "GET /audit": "admin",
}
CHANGES = [route for route in LEAST if not route.startswith("GET") and LEAST[route]]


class Short:
    """A backend of one word."""

    def models(self):
        return [Model("m", "policy", 0, None)]

    async def reply(self, ask, deadline=None):
        yield Piece("Yes.", finish_reason="stop", policy="policy")

    async def close(self, drain_seconds):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pages.served(tmp_path_factory.mktemp("access"), Short()) as made:
        yield made


@contextlib.contextmanager
def browser(site, role=None, csrf=True):
    """A client with the session of somebody new, and their CSRF token."""
    # Without certificates, whose reading takes longer than all requests of a test.
    with httpx.Client(base_url=site.url, timeout=30, verify=False) as client:
        if role is not None:
            _, cookie = site.person(role)
            client.cookies.set(cookie["name"], cookie["value"])
            if csrf:
                client.headers["X-CSRF-Token"] = client.get("/api/me").json()["csrf"]
        yield client


def ask(client, route, **headers):
    """A request to a route, with names that nothing has."""
    method, path = route.split()
    for name in ("token", "conversation", "message", "campaign", "lease", "task", "person"):
        path = path.replace(f"{{{name}}}", "nothing")
    path = path.replace("{invitation}", "nothing").replace("{key}", "nothing")
    return client.request(method, path, headers=headers)


def refused(answer):
    """Whether it was the person that was refused, and not what they asked for."""
    return answer.status_code in (401, 403) or (
        answer.status_code == 303 and answer.headers["location"] == "/"
    )


def test_the_table_of_routes_is_whole():
    parts = [part for part in vars(web_pages).values() if isinstance(part, types.ModuleType)]
    served = {
        f"{method} {route.path}"
        for part in parts
        if hasattr(part, "router")
        for route in part.router.routes
        for method in route.methods
    }
    assert served == set(LEAST)


@pytest.mark.parametrize("role", [None, *ROLES])
def test_every_route_is_for_its_role_and_those_above(site, role):
    with browser(site, role) as client:
        for route, least in LEAST.items():
            if least is None or route == "POST /signout":
                continue
            answer = ask(client, route)
            may = role is not None and ROLES.index(role) >= ROLES.index(least)
            assert refused(answer) == (not may), f"{route} for {role}: {answer.status_code}"
            assert answer.status_code < 500


def test_nothing_changes_without_the_sessions_own_csrf_token(site):
    with browser(site, "admin", csrf=False) as client, browser(site, "admin") as other:
        for token in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": other.headers["X-CSRF-Token"]}):
            for route in CHANGES:
                answer = ask(client, route, **token)
                assert answer.status_code == 403 and "reload" in answer.text, route
        form = client.post("/you/consent", data={"csrf": "wrong", "training": "yes"})
        assert form.status_code == 403


def test_nothing_changes_for_a_page_of_another_site(site):
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        with browser(site, "admin") as client:
            for route in [*CHANGES, "POST /start", "POST /join/{token}"]:
                answer = ask(client, route, **headers)
                assert answer.status_code == 403 and "another site" in answer.text, route
    with browser(site) as client:
        body = {"token": "x", "name": "y"}
        answer = client.post("/api/join", json=body, headers={"Origin": "https://evil.example"})
        assert answer.status_code == 403


def test_ones_conversations_are_nobody_elses(site):
    with browser(site, "user") as client, browser(site, "admin") as other:
        made = client.post("/api/conversations", json={"content": "a secret"}).json()
        conversation, turn = made["conversation"]["id"], made["message"]["id"]
        client.post(f"/api/messages/{turn}/reply", json={})
        messages = client.get(f"/api/conversations/{conversation}").json()["messages"]
        reply = messages[-1]["id"]
        assert messages[-1]["content"] == "Yes."
        for method, path, body in (
            ("GET", f"/chat/{conversation}", None),
            ("GET", f"/api/conversations/{conversation}", None),
            ("PATCH", f"/api/conversations/{conversation}", {"title": "mine"}),
            ("DELETE", f"/api/conversations/{conversation}", None),
            ("POST", f"/api/conversations/{conversation}/messages", {"content": "a"}),
            ("POST", f"/api/messages/{turn}/reply", {}),
            ("POST", f"/api/messages/{reply}/thumb", {"up": True}),
            ("POST", f"/api/messages/{reply}/choose", {"other": reply, "value": 1}),
            ("POST", f"/api/messages/{reply}/improve", {"content": "a"}),
        ):
            answer = other.request(method, path, json=body)
            assert answer.status_code == 404 and "secret" not in answer.text, (method, path)
        assert other.get("/api/conversations").json() == []
        assert client.get(f"/api/conversations/{conversation}").json()["feedback"] == []


def test_a_lease_is_nobody_elses(site):
    made = site.store.campaigns.create("leases", "ranking", Settings(), "system")
    site.store.campaigns.queue(made.id, [candidate_set("a")], "system", "train")
    with browser(site, "labeller") as client, browser(site, "labeller") as other:
        lease = client.post(f"/api/campaigns/{made.id}/lease").json()["task"]["lease"]
        for what, body in (
            ("judge", {"ranks": [1, 2, 3]}), ("skip", {"reason": "unclear"}),
            ("release", None), ("renew", None), ("suggest", {"turns": []}),
        ):  # fmt: skip
            answer = other.post(f"/api/leases/{lease}/{what}", json=body)
            assert answer.status_code in (404, 409), what
        assert client.post(f"/api/leases/{lease}/judge", json={"ranks": [1, 2, 3]}).is_success


def test_a_reviewer_reads_what_was_demonstrated(site):
    store = site.store
    made = store.campaigns.create("d", "demonstration", Settings(overlap=2, max_skips=1), "system")
    store.campaigns.queue_topics(made.id, ["tea"], "system")
    one, two = (store.accounts.add_person(name, "labeller", "system") for name in ("Lee", "Kim"))
    turns = [
        Turn(Message("user", "<b>Tea?</b>")),
        Turn(Message("assistant", "*Yes*."), "edited", "0123456789ab"),
    ]
    store.work.demonstrate(store.work.lease(made.id, one.id).token, one.id, turns)
    store.work.skip(store.work.lease(made.id, two.id).token, two.id, "unclear")
    (task,) = store.campaigns.tasks(made.id, "review")
    with browser(site, "reviewer") as client:
        page = client.get(f"/review/{made.id}/{task.id}").text
    assert "What Lee wrote" in page and "suggestion edited" in page
    assert "&lt;b&gt;Tea?&lt;/b&gt;" in page and "<em>Yes</em>" in page


def test_a_key_takes_the_place_of_a_session_and_needs_no_csrf_token(site):
    person, _ = site.person("labeller", "Program")
    _, key = site.store.accounts.create_api_key(person.id, "test", "system")
    with browser(site) as client:
        bearer = {"Authorization": f"Bearer {key}"}
        assert client.get("/api/me", headers=bearer).json()["csrf"] is None
        began = client.post("/api/conversations", json={"content": "hi"}, headers=bearer)
        assert began.is_success and "set-cookie" not in began.headers
        assert client.get("/people", headers=bearer).status_code == 403
        wrong = client.get("/api/me", headers={"Authorization": f"Bearer {key}x"})
        assert wrong.status_code == 401


def test_a_session_ends_where_its_person_wants_it(site):
    with browser(site, "user") as client:
        token = client.cookies["gptlab"]
        assert client.post("/signout").headers["location"] == "/"
        client.cookies.clear()
        client.cookies.set("gptlab", token)  # as somebody would who had copied it
        assert client.get("/api/me").status_code == 401


@pytest.mark.parametrize("secure", [False, True])
def test_the_cookie_and_the_headers(site, secure):
    before = site.app.state.site
    site.change(open_chat=True, secure=secure)
    try:
        with browser(site) as client:
            (cookie,) = client.post("/start").headers.get_list("set-cookie")
    finally:
        site.app.state.site = before
    parts = [part.strip().lower() for part in cookie.split(";")]
    assert {"httponly", "samesite=lax", "path=/"} <= set(parts)
    assert ("secure" in parts, parts[0].startswith("__host-gptlab=")) == (secure, secure)
    assert not any(part.startswith("domain") for part in parts)


def test_every_answer_has_the_headers(site):
    with browser(site) as client:
        for path, status in (
            ("/", 200), ("/nothing", 404), ("/chat", 303), ("/static/app.css", 200),
            ("/static/%2e%2e/site.py", 404), ("/healthz", 200), ("/api/me", 401),
            ("/v1/models", 401), ("/join/wrong", 404),
        ):  # fmt: skip
            answer = client.get(path)
            assert answer.status_code == status, path
            assert HEADERS.items() <= {name: answer.headers.get(name) for name in HEADERS}.items()
            assert (answer.headers.get("cache-control") == "no-store") != path.startswith(
                "/static/"
            )
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


def test_what_answers_to_a_defect_has_the_headers_too(site, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("a secret")

    monkeypatch.setattr(type(site.store.accounts), "invitation", fails)
    monkeypatch.setattr(type(site.store.accounts), "accept", fails)
    with browser(site) as client, browser(site) as other:  # the server closes the connection
        page = client.get("/join/wrong")
        told = other.post("/api/join", json={"token": "a", "name": "b"})
    assert "<h1" in page.text and told.json()["error"]["code"] == "internal_error"
    for answer in (page, told):
        assert answer.status_code == 500 and "secret" not in answer.text
        assert HEADERS.items() <= {name: answer.headers.get(name) for name in HEADERS}.items()
        assert answer.headers["cache-control"] == "no-store"


def test_nobody_joins_by_a_link_that_is_used_up_or_lets_strangers_start(site):
    with browser(site) as client:
        assert client.post("/start").status_code == 403
        _, token = site.store.accounts.invite("labeller", "system")
        looked = client.get(f"/join/{token}")  # as a messenger's preview does
        assert looked.status_code == 200 and "set-cookie" not in looked.headers
        joined = client.post("/api/join", json={"token": token, "name": "Cy"})
        assert (joined.json()["role"], joined.json()["name"]) == ("labeller", "Cy")
        assert client.post("/api/join", json={"token": token, "name": "Di"}).status_code == 404


def test_admins_see_which_exports_hold_data_of_who_was_deleted_or_withdrew(site):
    (ann, _), (lee, _) = site.person("user"), site.person("labeller")
    mark = "Some exports hold data of people who were deleted or have withdrawn"
    rows = [("messages", "a", ann.id), ("messages", "b", ann.id), ("judgements", "c", lee.id)]
    state = site.store.state()
    site.store.exports.register("0123", "runs/holds-ann", state, rows, "training")
    site.store.exports.register("4567", "runs/holds-lee", state, rows[2:], "training")
    with browser(site, "admin") as client:
        assert mark not in client.get("/audit").text
        site.store.delete_person(ann.id, "system")
        page = client.get("/audit").text
        assert mark in page
        row_of = lambda name: next(r for r in page.split("<tr>") if f"runs/{name}" in r)  # noqa: E731
        assert "severity-3" in row_of("holds-ann") and ">2</span>" in row_of("holds-ann")
        assert "severity-3" not in row_of("holds-lee")
        site.store.accounts.consent(lee.id, "training", False, "v1")
        page = client.get("/audit").text
        assert ">1</span>" in row_of("holds-lee") and ">1</span>" in row_of("holds-ann")
        # And what deleting doesn't take, they are told before.
        assert "What you wrote for campaigns stays" in client.get("/you").text
    with browser(site, "user") as client:
        assert "What you wrote for campaigns stays" not in client.get("/you").text


def test_an_admin_who_deletes_somebody_sees_what_holds_their_data_and_learnt_from_it(
    site, tmp_path
):
    ann, _ = site.person("user")
    export = made(tmp_path / "export", "export")
    model = made(tmp_path / "sft", "sft", comparisons="export")
    made(tmp_path / "other", "sft", seed=1)
    rows = [("messages", "a", ann.id)]
    state, where = site.store.state(), str(tmp_path / "export")
    site.store.exports.register(export, where, state, rows, "training")
    with browser(site, "admin") as client:
        # Only what the server was told of is looked through.
        assert "name the directory" in client.get(f"/people/{ann.id}/exports").text
        site.change(artifacts=str(tmp_path))
        try:
            before = client.get(f"/people/{ann.id}/exports").text
            assert where in before and model in before and "was deleted" not in before
            assert str(tmp_path / "sft") not in client.get("/audit").text  # it may be there
            answer = client.post(f"/people/{ann.id}/delete", data={"confirm": "delete"})
            assert answer.headers["location"] == f"/people/{ann.id}/exports"
            after = client.get(answer.headers["location"]).text
            for page in (after, client.get("/audit").text):
                for shown in (export, where, model, str(tmp_path / "sft")):
                    assert shown in page
                assert str(tmp_path / "other") not in page and "can't be told" not in page
            assert "somebody who was deleted" in after
            shutil.rmtree(tmp_path / "export")
            made(tmp_path / "ppo", "ppo", init="sft")
            shutil.rmtree(tmp_path / "sft")
            page = client.get("/audit").text
            assert "can't be told" in page and f"of sft {model}" in page
        finally:
            site.change(artifacts=None)
        assert client.get("/people/nobody/exports").status_code == 404
        # In the audit, her row leads there.
        assert f'href="/people/{ann.id}/exports"' in client.get("/audit").text


def test_an_admin_can_always_come_in(store, clock):
    """The first by an invitation, and the only one again when the session has ended."""

    def accept(link):
        person = store.accounts.accept(link.removeprefix("/join/"), "Ann")
        store.accounts.open_session(person.id, SESSION_SECONDS)
        return person

    lost, link = web_pages.admin_link(store), web_pages.admin_link(store)
    assert store.accounts.invitation(lost.removeprefix("/join/")) is None
    admin = accept(link)
    assert admin.role == "admin" and web_pages.admin_link(store) is None
    clock.now += SESSION_SECONDS - 1
    assert web_pages.admin_link(store) is None
    clock.now += 2
    lost, link = web_pages.admin_link(store), web_pages.admin_link(store)
    assert len(store.accounts.invitations()) == 1 and lost != link
    assert accept(link) == admin and web_pages.admin_link(store) is None
    _, newer = store.accounts.open_session(admin.id)
    store.accounts.close_session(newer)  # one browser of two
    assert web_pages.admin_link(store) is None
    store.accounts.close_sessions(admin.id, admin.id)
    assert accept(web_pages.admin_link(store)) == admin
