"""Every flow of the web app in Chromium, on a real server with a tiny real model."""

import asyncio
import contextlib
import dataclasses
import re
import threading

import pytest

from gptlab.data.records import Candidate
from gptlab.people.store.campaigns import Settings
from tests import pages, serving
from tests.people import campaigns
from tests.people.campaigns import candidate_set


@pytest.fixture(scope="module")
def backend(tmp_path_factory, tiny_model, tiny_vocabulary):
    model = {**tiny_model, "max_len": 512}  # long enough a reply to be stopped
    workdir = tmp_path_factory.mktemp("served") / "model"
    return Paced(serving.embedded(serving.write_model(workdir, model, tiny_vocabulary)))


@pytest.fixture(scope="module")
def site(tmp_path_factory, backend):
    with pages.served(tmp_path_factory.mktemp("pages"), backend) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    with pages.chromium() as running:
        yield running


class Paced:
    """A backend under two names, `pause` seconds between two pieces: time to press a key.

    While `go` is not set, no reply begins, as when all slots are taken.
    Its replies to a prompt, the first, the second and so on, are the same in every run: what a
    random model says may be blank.
    """

    def __init__(self, backend):
        self.backend, self.close, self.pause, self.asked = backend, backend.close, 0.0, []
        self.go = threading.Event()
        self.go.set()

    def models(self):
        (model,) = self.backend.models()
        return [model, dataclasses.replace(model, name="other")]

    async def reply(self, ask, deadline=None):
        seed = [prompt for _, prompt in self.asked].count(ask.prompt)
        self.asked.append((ask.model, ask.prompt))
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        ask = dataclasses.replace(ask, model=self.backend.models()[0].name, seed=seed)
        async with contextlib.aclosing(self.backend.reply(ask, deadline)) as pieces:
            async for piece in pieces:
                await asyncio.sleep(self.pause)
                yield piece


@contextlib.contextmanager
def slowly(site, backend):
    """Replies are slow, and as long as the window."""
    before, backend.pause = site.app.state.site, 0.1
    site.change(max_tokens=None)
    yield
    site.app.state.site, backend.pause = before, 0.0
    assert before.running == {}


def ask(page, text):
    page.fill("#message", text)
    page.keyboard.press("Enter")


def wait_for_replies(page, count):
    page.locator(".turn.assistant .actions").nth(count - 1).wait_for()
    page.locator("#send:visible").wait_for()


def conversation_of(site, person):
    (found,) = site.store.conversations.of(person.id)
    return found, site.store.conversations.messages(person.id, found.id)


def test_an_invitation_leads_to_the_chat_and_consent_is_a_choice(site, browser):
    _, token = site.store.accounts.invite("user", "system")
    page = browser.new_page(base_url=site.url)
    page.goto("/chat")
    assert page.url == f"{site.url}/" and "need an invitation" in page.text_content("main")
    page.goto(f"/join/{token}")
    page.fill("[name=name]", "Bo")
    page.click("text=Join")
    page.wait_for_url("**/chat")
    page.click("text=No, only keep it for me")
    page.locator("#consent-banner").wait_for(state="detached")
    (person,) = [p for p in site.store.accounts.people() if p.name == "Bo"]
    assert not site.store.accounts.consents(person.id)["training"].given
    page.goto("/you")
    page.check("[name=training]")
    page.click("text=Save")
    page.wait_for_url("**/you?saved=1")
    assert site.store.accounts.consents(person.id)["training"].given
    page.goto(f"/join/{token}")
    assert "not valid" in page.text_content("main")
    page.close()


@pytest.mark.slow
def test_a_guest_chats_where_anybody_may(site, browser):
    before = site.app.state.site
    site.change(open_chat=True)
    page = browser.new_page(base_url=site.url)
    page.goto("/")
    page.click("text=Start chatting")
    page.locator("#consent-banner").wait_for()
    ask(page, "hello")
    wait_for_replies(page, 1)
    page.close()
    site.app.state.site = before


def test_chat_with_context_edit_branch_and_another_try(site, browser):
    with pages.visit(browser, site) as (page, person):
        page.goto("/chat")
        page.click("#system-toggle")
        page.fill("#system", "be kind")
        page.click("#context-toggle")
        page.fill("#context", "the film was good")
        ask(page, "how was the film?")
        wait_for_replies(page, 1)
        page.reload()
        wait_for_replies(page, 1)
        conversation, messages = conversation_of(site, person)
        assert conversation.title == "how was the film?"
        roles = [(m.role, m.context) for m in messages]
        assert roles == [("system", None), ("user", "the film was good"), ("assistant", None)]
        assert messages[2].parent == messages[1].id and messages[2].policy

        page.click("[aria-label='Another try']")
        page.locator(".switcher:has-text('2/2')").wait_for()
        page.click("[aria-label='Previous version']")
        page.locator(".switcher:has-text('1/2')").wait_for()
        page.keyboard.press("Alt+ArrowUp")
        page.fill(".editor textarea[name=text]", "how was the tea?")
        page.keyboard.press("Control+Enter")
        page.locator(".turn.user:has-text('tea')").wait_for()
        wait_for_replies(page, 1)
        assert page.locator(".turn.user .switcher").text_content() == "2/2"
        _, messages = conversation_of(site, person)
        edited = [m for m in messages if m.content == "how was the tea?"]
        assert edited[0].parent == messages[0].id and edited[0].context == "the film was good"

        page.click("[aria-label^='Rename']")
        page.fill("#ask [name=title]", "Tea")
        page.keyboard.press("Enter")
        page.locator("#conversations a:has-text('Tea')").wait_for()
        page.click("[aria-label^='Delete: Tea']")
        page.click("#ask .danger")
        page.locator("#conversations li").wait_for(state="detached")
        assert page.url.endswith("/chat") and site.store.conversations.of(person.id) == []


def test_older_chats_are_listed_by_keyboard_and_stay(site, browser):
    with pages.visit(browser, site) as (page, person):
        for number in range(103):
            site.store.conversations.create(person.id, f"chat {number}")
        page.goto("/chat")
        links, older = page.locator("#conversations a"), page.locator("#older")
        older.wait_for()
        assert links.count() == 50 and links.nth(0).text_content() == "chat 102"
        older.focus()
        page.keyboard.press("Enter")
        page.locator("#conversations a:text-is('chat 52'):focus").wait_for()
        older.focus()
        page.keyboard.press("Enter")
        page.locator("#conversations a:text-is('chat 2'):focus").wait_for()
        older.wait_for(state="hidden")
        numbers = [int(text.split()[1]) for text in links.all_text_contents()]
        assert numbers == list(reversed(range(103)))
        page.click("[aria-label='Rename: chat 0']")  # and the list is as long afterwards
        page.fill("#ask [name=title]", "The first")
        page.keyboard.press("Enter")
        page.locator("#conversations a:text-is('The first')").wait_for()
        assert links.count() == 103
        page.keyboard.press("Alt+n")
        page.click("#conversations a:text-is('The first')")
        page.locator("#conversations a:text-is('The first')[aria-current]").wait_for()
        assert links.count() == 103


def test_stop_keeps_what_came(site, backend, browser):
    with slowly(site, backend), pages.visit(browser, site) as (page, person):
        page.goto("/chat")
        for number in range(10):  # a reply may be over before the key is pressed
            ask(page, f"tell me about day {number}.")
            reply = page.locator(".turn.assistant").nth(number)
            reply.locator(".prose > div:not(:empty), .actions").first.wait_for(state="attached")
            if number:
                page.keyboard.press("Escape")
            else:
                page.locator("#stop").dispatch_event("click")
            page.locator("#send").wait_for()
            page.locator(".turn.assistant[aria-busy]").wait_for(state="detached")
            _, messages = conversation_of(site, person)
            if number and not messages[-1].finished:
                break
        assert messages[-1].role == "assistant" and not messages[-1].finished
        assert messages[-1].content
        page.locator("text=Stopped or cut off here").last.wait_for()


def test_what_waits_for_its_first_piece_is_stopped(site, backend, browser):
    """By its button, by a key, and by whoever opens another chat."""
    running = site.app.state.site.running
    with pages.visit(browser, site) as (page, person):
        page.goto("/chat")
        backend.go.clear()
        try:
            ask(page, "how was the film?")
            for stop in (
                lambda: page.click("#stop"),
                lambda: page.keyboard.press("Escape"),
                lambda: page.keyboard.press("Alt+n"),
            ):
                serving.wait_for(lambda: running)
                stop()
                serving.wait_for(lambda: not running)
                page.locator("#send:visible").wait_for()
                if page.locator(".bubble").count():
                    page.locator(".note:has-text('No reply was written')").wait_for()
                    page.click("text=Try again")
        finally:
            backend.go.set()
        assert [m.role for m in conversation_of(site, person)[1]] == ["user"]
        page.locator("text=What can I help with?").wait_for()
        ask(page, "how was the tea?")
        wait_for_replies(page, 1)
        assert page.text_content(".bubble") == "how was the tea?"


@pytest.mark.slow
def test_the_model_the_theme_the_list_and_the_keyboard(site, backend, browser):
    with pages.visit(browser, site, color_scheme="light") as (page, person):
        page.goto("/chat")
        page.select_option("#model", "other")
        ask(page, "how was the film?")
        wait_for_replies(page, 1)
        assert backend.asked[-1][0] == "other"
        messages = conversation_of(site, person)[1]
        assert messages[-1].model == "other"
        page.keyboard.press("Alt+r")
        page.locator(".switcher:has-text('2/2')").wait_for()
        page.keyboard.press("Alt+n")
        page.locator("text=What can I help with?").wait_for()
        page.fill("#message", "one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.locator(".bubble:has-text('one')").wait_for()
        assert page.text_content(".bubble") == "one\ntwo"
        wait_for_replies(page, 1)
        assert page.locator("#conversations li").count() == 2
        page.click("#conversations a:has-text('film')")
        page.locator(".bubble:has-text('film')").wait_for()
        page.go_back()
        page.locator(".bubble:has-text('one')").wait_for()
        page.reload()
        page.locator(".bubble:has-text('one')").wait_for()
        assert page.locator("#conversations [aria-current]").text_content() == "one two"
        page.keyboard.press("Alt+/")
        page.locator("#help h2").wait_for()
        page.keyboard.press("Escape")
        page.locator("#help").wait_for(state="hidden")

        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        page.click("[data-theme-toggle]")
        dark = page.evaluate(ground)
        assert light != dark
        page.reload()  # what was chosen stays
        assert page.evaluate(ground) == dark


def test_feedback_another_reply_and_a_better_one(site, browser):
    with pages.visit(browser, site, viewport=pages.PHONE, has_touch=True) as (page, person):
        page.goto("/chat")
        page.fill("#message", "did you like the song?")
        page.tap("#send")
        wait_for_replies(page, 1)
        conversation, messages = conversation_of(site, person)
        first = messages[-1]
        page.tap("[aria-label='Bad reply']")
        page.check("[value=untrue]")
        page.select_option("[name=severity]", "3")
        page.fill("[name=note]", "it was not a song")
        page.tap(".reasons .primary")
        page.locator(".reasons").wait_for(state="detached")
        page.tap("text=Show me another")
        page.tap("text=Second is better")
        page.locator(".switcher:has-text('2/2')").wait_for()
        page.tap("text=Write a better reply")
        page.fill(".editor textarea", "I *liked* the song.")
        page.tap(".editor .primary")
        page.locator(".badge:has-text('your version')").wait_for()
        assert page.locator(".prose em").text_content() == "liked"
        page.fill("#message", "why?")
        page.tap("#send")
        wait_for_replies(page, 2)
        given = site.store.feedback.of(person.id, conversation.id)
        thumb, choice, better = given
        assert (thumb.kind, thumb.value, thumb.reasons) == ("thumb", -1, ("untrue",))
        assert (thumb.severity, thumb.note) == (3, "it was not a song")
        assert (choice.kind, choice.message, choice.value) == ("choice", first.id, -1)
        assert better.kind == "better" and better.message == choice.other
        _, messages = conversation_of(site, person)
        assert messages[-2].parent == better.other  # the chat goes on from the person's version
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def ranking(site, name, **settings):
    made = site.store.campaigns.create(name, "ranking", Settings(**settings), "system")
    sets = [candidate_set(f"{name}{i}") for i in range(2)]
    site.store.campaigns.queue(made.id, sets, "system", "train")
    return made


def lane(page, rank):
    return page.locator(f".lane[data-rank='{rank}']")


def drag(page, chip, onto):
    chip.hover()
    page.mouse.down()
    box = onto.bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()


def test_ranking_by_mouse_with_a_tie_a_rating_and_a_flag(site, browser):
    campaign = ranking(site, "mouse", instructions="Prefer what is **true**.")
    with pages.visit(browser, site, role="labeller") as (page, person):
        page.goto("/label")
        page.click("text=Instructions of mouse")
        assert page.locator(".prose strong").text_content() == "true"
        page.click("text=Back to the tasks")
        page.locator(".board").wait_for()
        shown = page.locator(".reply .prose").all_text_contents()
        chips = [page.locator(f"[data-chip='{i}']") for i in range(3)]
        page.click("#submit")
        page.locator(".toast.bad:has-text('no rank yet')").wait_for()
        drag(page, chips[0], lane(page, 2))
        drag(page, chips[1], lane(page, 1))
        drag(page, chips[2], lane(page, 1))
        assert lane(page, 1).locator(".rank-chip").count() == 2
        assert page.locator("[data-reply='1'] .tie").text_content() == "tied with C"
        page.locator("[data-reply='0'] input[name=rating-0][value='3']").check()
        page.locator("[data-reply='0'] input[value=biased]").check()
        page.locator("[data-reply='0'] .flag select:visible").select_option("1")
        page.click("#submit")
        page.locator("#progress:has-text('1 of 2')").wait_for()
        (made,) = campaigns.answers(site.store, campaign, person)
        task = site.store.content().tasks[made.task]
        place = [shown.index(f"{c.content}\n") for c in task.candidates]
        assert made.ranks == tuple((2, 1, 1)[i] for i in place)
        assert made.ratings == tuple((3, None, None)[i] for i in place)
        ((flag,)) = made.flags
        assert (flag.kind, flag.severity, place[flag.reply]) == ("biased", 1, 0)
        assert 0 < made.seconds < 60

        page.click("button:text-is('Skip')")
        page.check("[value=too_hard]")
        page.fill("#skip-form [name=note]", "no idea")
        page.click("text=Skip the task")
        page.locator("text=There is no task for you now").wait_for()
        *_, made = campaigns.answers(site.store, campaign, person)
        assert (made.kind, made.note) == ("skip", "too_hard: no idea")


def test_a_deleted_text_leaves_the_screen(site, browser):
    store = site.store
    owner = campaigns.person(store, "Ann")
    talk, _, (said,) = campaigns.chat(store, owner, "A secret?")
    campaign = store.campaigns.create("gone", "ranking", Settings(), "system")
    (picked,) = (p for p in store.campaigns.pick(campaign.id, 99, 0) if p.message == said.id)
    store.campaigns.queue_picked(campaign.id, picked, [Candidate("b", "Ho.", "b", True)], "system")
    with pages.visit(browser, site, role="labeller", errors=("404",)) as (page, _):
        page.goto(f"/label/{campaign.id}")
        page.locator("text=A secret?").wait_for()
        store.conversations.delete(owner.id, talk.id)
        page.click("button:text-is('Skip')")
        page.check("[value=too_hard]")
        page.click("text=Skip the task")
        page.locator("text=There is no task for you now").wait_for()
        assert page.locator("text=A secret?").count() == 0


def test_ranking_by_keyboard_alone(site, browser):
    campaign = ranking(site, "keyboard")
    with pages.visit(browser, site, role="labeller") as (page, person):
        page.goto(f"/label/{campaign.id}")
        page.locator(".board").wait_for()
        press = page.keyboard.press
        page.focus("#main")  # where the consent banner leaves it
        press("j")
        for key in ("3", "j", "2", "j", "Alt+ArrowUp", "Alt+ArrowUp", "Alt+ArrowUp"):
            press(key)
        assert page.locator("#announce").text_content() == "Reply C: rank 1"
        for _ in range(2):  # from the card to its rank, to its rating
            press("Tab")
        press("7")
        assert page.locator("[name=rating-2][value='7']").is_checked()
        shown = page.locator(".reply .prose").all_text_contents()
        press("Control+Enter")
        page.locator("#progress:has-text('1 of 2')").wait_for()
        (made,) = campaigns.answers(site.store, campaign, person)
        task = site.store.content().tasks[made.task]
        ranks = {f"{c.content}\n": rank for c, rank in zip(task.candidates, made.ranks)}
        assert [ranks[text] for text in shown] == [3, 2, 1]
        assert sorted(made.ratings, key=str) == [7, None, None]


def touch_drag(client, start, end):
    x, y = start["x"] + 30, start["y"] + 20
    to = end["x"] + 90, end["y"] + end["height"] / 2
    for kind, at in (
        ("touchStart", (x, y)), ("touchMove", (x, (y + to[1]) / 2)), ("touchMove", to),
        ("touchEnd", None),
    ):  # fmt: skip
        points = [] if at is None else [{"x": at[0], "y": at[1]}]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.slow
def test_ranking_by_touch(site, browser):
    campaign = ranking(site, "touch")
    with pages.visit(browser, site, "labeller", pages.PHONE, has_touch=True) as (page, person):
        page.goto(f"/label/{campaign.id}")
        page.locator(".board").wait_for()
        client = page.context.new_cdp_session(page)
        for chip, rank in ((0, 1), (1, 2), (2, 2)):
            own, onto = page.locator(f"[data-chip='{chip}']"), lane(page, rank)
            page.locator(".board").evaluate("board => board.scrollIntoView()")
            for _ in range(3):  # a busy machine may take a quick drag for something else
                touch_drag(client, own.bounding_box(), onto.bounding_box())
                if onto.locator(f"[data-chip='{chip}']").count():
                    break
            assert onto.locator(f"[data-chip='{chip}']").count() == 1
        page.tap("#submit")
        page.locator("#progress:has-text('1 of 2')").wait_for()
        (made,) = campaigns.answers(site.store, campaign, person)
        assert sorted(made.ranks) == [1, 2, 2]


@pytest.mark.slow
def test_a_demonstration_with_a_suggestion_taken_and_one_edited(site, browser):
    campaign = site.store.campaigns.create("writing", "demonstration", Settings(), "system")
    site.store.campaigns.queue_topics(campaign.id, ["the sea"], "system")
    with pages.visit(browser, site, role="labeller") as (page, person):
        page.goto(f"/label/{campaign.id}")
        page.fill("#turn", "did you like the trip?")
        page.click("text=Add the turn")
        page.click("text=Suggest a reply")
        page.click("text=Take as it is")
        page.locator(".badge:has-text('suggestion')").wait_for()
        page.click("text=Change this turn")  # and leave it: it is the model's all the same
        page.click("text=Add the turn")
        page.locator(".badge:text-is('suggestion')").wait_for()
        page.fill("#turn", "and the sea?")
        page.keyboard.press("Control+Enter")
        page.reload()  # what was written is still there
        page.locator(".turn.user:has-text('and the sea?')").wait_for()
        page.click("text=Suggest a reply")
        page.click("button:text-is('Edit')")
        page.fill("#turn", "the sea was lovely, I think.")
        page.click("text=Add the turn")
        page.click("text=Change this turn")
        page.fill("#turn", "the sea was lovely.")
        page.click("text=Add the turn")
        page.click("#submit")
        page.locator("text=There is no task for you now").wait_for()
        (made,) = campaigns.answers(site.store, campaign, person)
        assert [turn.origin for turn in made.turns] == ["written", "taken", "written", "edited"]
        assert made.turns[1].policy and made.turns[3].message.content == "the sea was lovely."


@pytest.mark.slow
def test_a_campaign_from_set_up_to_statistics(site, browser):
    with pages.visit(browser, site, role="admin") as (page, person):
        page.goto("/chat")
        ask(page, "how was the game?")
        wait_for_replies(page, 1)
        page.goto("/campaigns")
        page.fill("[name=name]", "games")
        page.fill("[name=instructions]", "Rank them.")
        page.fill("[name=gold_percent]", "10")
        page.click("text=Make the campaign")
        page.wait_for_url(re.compile("/campaigns/[^/]+$"))
        page.fill("[name=count]", "2")
        page.fill("[name=alternatives]", "2")
        page.click("text=Pick and sample")
        page.locator("text=picked replies queued").wait_for()
        campaign = site.store.campaigns.get("games")
        serving.wait_for(lambda: not site.app.state.site.sampling[campaign.id].running)
        tasks = site.store.campaigns.tasks(campaign.id)
        assert tasks and all(len(task.candidates) == 3 for task in tasks)
        page.goto(f"/campaigns/{campaign.id}")
        page.click("summary:has-text('A gold check')")
        page.fill("[name=question]", "What is 2 + 2?")
        page.fill("[name=replies]", "4\n---\n5")
        page.click("text=Queue the check")
        page.locator(".badge:has-text('gold check')").wait_for()
        assert site.store.campaigns.get(campaign.id).settings.gold_rate == 0.1
        page.fill("[name=gold_percent]", "0")  # whether the first task is a check is chance
        page.click("button:text-is('Save')")
        page.locator("text=Saved.").wait_for()
        page.click("text=Make a link")
        link = page.locator("[data-copied]").input_value()

        labeller = browser.new_page()
        labeller.goto(link)
        labeller.fill("[name=name]", "Cy")
        labeller.click("text=Join")
        labeller.wait_for_url(f"**/label/{campaign.id}")
        labeller.locator(".board").wait_for()
        labeller.keyboard.press("j")
        for key in ("1", "j", "2", "j", "3"):
            labeller.keyboard.press(key)
        labeller.locator("[data-reply='0'] input[value=harmful]").check()
        labeller.click("#submit")
        labeller.locator(f"#progress:has-text('1 of {len(tasks)}')").wait_for()
        assert labeller.goto(f"{site.url}/campaigns").status == 403
        labeller.close()

        page.goto(f"/campaigns/{campaign.id}")
        assert page.locator("tbody th:has-text('Cy')").count() == 1
        page.goto("/review")
        page.click("tbody a")
        for i in range(3):
            page.locator(f"[name=rank-{i}][value='{i + 1}']").check()
        page.click("text=This ranking counts")
        page.locator("text=Nothing waits for a decision").wait_for()
        decided = [t for t in site.store.campaigns.tasks(campaign.id) if t.state == "done"]
        assert len(decided) == 1
        page.goto("/audit?check=1")
        page.locator("text=The chain is whole").wait_for()


def test_deleting_ones_data(site, browser):
    with pages.visit(browser, site) as (page, person):
        page.goto("/chat")
        ask(page, "my name is Ada")
        wait_for_replies(page, 1)
        page.goto("/you")
        page.fill("[name=confirm]", "delete")
        page.click("button:text-is('Delete my data')")
        page.locator("h1:text-is('Deleted')").wait_for()
        assert person.id not in [p.id for p in site.store.accounts.people()]
        assert site.store.conversations.of(person.id) == []
        page.goto("/chat")
        assert page.url == f"{site.url}/"
