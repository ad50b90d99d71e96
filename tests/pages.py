"""The web app on a real server, and Chromium to look at it with."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from gptlab.people.store import Store
from gptlab.people.store.person import Person
from gptlab.people.web import Settings, add_pages
from tests import serving

SETTINGS = Settings(
    name="gptlab", open_chat=False, secure=False, artifacts=None, temperature=1.0, top_p=1.0,
    max_tokens=16, reply_seconds=60.0, replies_at_once=2,
)  # fmt: skip
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-site-isolation-trials", "--renderer-process-limit=1",
)  # fmt: skip


@dataclasses.dataclass
class Served:
    """A running app. `change` sets other settings."""

    url: str
    store: Store
    app: object

    def change(self, **settings):
        site = self.app.state.site
        changed = dataclasses.replace(site.settings, **settings)
        self.app.state.site = dataclasses.replace(site, settings=changed)

    def person(self, role="user", name="Ada", consent=True) -> tuple[Person, dict]:
        """Somebody new, and the cookie of their session."""
        person = self.store.accounts.add_person(name, role, "system")
        if consent:
            self.store.accounts.consent(person.id, "training", True, "test")
        _, token = self.store.accounts.open_session(person.id)
        return person, {"name": "gptlab", "value": token, "url": self.url}


@contextlib.contextmanager
def served(directory: Path, backend, **settings):
    """A server with pages and a store of its own."""
    with Store.open(f"sqlite:///{directory / 'store.sqlite'}") as store:
        apps = []

        def extend(app):
            apps.append(app)
            changed = dataclasses.replace(SETTINGS, **settings)
            add_pages(app, app.state.backend, store, changed)

        check = store.accounts.check_api_key
        with serving.serving(backend, check_key=check, extend=extend) as url:
            yield Served(url, store, apps[0])


@contextlib.contextmanager
def chromium():
    """The browser; skips where it isn't installed."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser, site: Served, role="user", viewport=WIDE, consent=True, errors=(), **options):
    """(a page signed in as somebody new, who that is).

    Errors of scripts, dialogs and breaches of the policy fail the test, but for messages with one
    of the words in `errors`.
    """
    person, cookie = site.person(role, consent=consent)
    context = browser.new_context(
        viewport=viewport, base_url=site.url, reduced_motion="reduce", **options
    )
    context.add_cookies([cookie])
    context.set_default_timeout(30_000)
    wrong = watch_policy(context)
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    yield page, person
    context.close()
    assert not [said for said in wrong if not any(word in said for word in errors)]


def csrf(page) -> str:
    """The token of a page's session."""
    return page.locator('meta[name="csrf-token"]').get_attribute("content")


def watch_policy(context) -> list[str]:
    """What the pages of a context try from now on against their Content-Security-Policy."""
    violations = []
    context.expose_binding("broken", lambda _, what: violations.append(what))
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (event) =>"
        " broken(`${event.effectiveDirective} ${event.blockedURI} on ${location.pathname}`))"
    )
    return violations


def serious_findings(page) -> list[str]:
    """What axe finds serious or critical on a page."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
