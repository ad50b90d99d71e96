"""What a campaign's page shows an admin: its tasks, page by page, and nobody's withdrawn text."""

import re

import pytest

from gptlab.data.records import Candidate
from gptlab.people.store.campaigns import Settings
from tests import pages
from tests.people.campaigns import candidate_set, chat, person
from tests.people.test_access import Short, browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pages.served(tmp_path_factory.mktemp("campaigns"), Short()) as made:
        yield made


@pytest.fixture(scope="module")
def admin(site):
    with browser(site, "admin") as client:
        yield client


def test_every_task_is_on_one_page(site, admin):
    made = site.store.campaigns.create("many", "ranking", Settings(), "system")
    sets = [candidate_set(f"s{i}.") for i in range(103)]
    site.store.campaigns.queue(made.id, sets, "system", "train")
    path, shown = f"/campaigns/{made.id}", []
    for after, earlier, later in ((0, None, 50), (50, 0, 100), (100, 50, None), (150, 100, None)):
        text = admin.get(f"{path}?after={after}").text
        assert ("Earlier tasks" in text, "Later tasks" in text) == (bool(after), later is not None)
        if after:
            assert f'href="?after={earlier}#tasks-title"' in text
        if later:
            assert f'href="?after={later}#tasks-title"' in text
        shown.append([i for i in range(103) if f"about s{i}.?" in text])
    assert [len(one) for one in shown] == [50, 50, 3, 0]
    assert sorted(sum(shown, [])) == list(range(103))
    for wrong in ("-1", "nan", "9" * 30):
        assert admin.get(f"{path}?after={wrong}").status_code == 400


def test_text_that_is_withheld_or_deleted_is_not_shown(site, admin):
    store = site.store
    made = store.campaigns.create("chats", "ranking", Settings(), "system")
    ann, bo = person(store, "Ann", "user"), person(store, "Bo", "user")
    for who, text in ((ann, "the secret of Ann"), (bo, "the secret of Bo")):
        _, _, (said,) = chat(store, who, text)
        picked = next(p for p in store.campaigns.pick(made.id, 99, 0) if p.message == said.id)
        others = [Candidate("b", "Ho.", "b", True)]
        store.campaigns.queue_picked(made.id, picked, others, "system")
    path = f"/campaigns/{made.id}"
    text = admin.get(path).text
    assert "the secret of Ann" in text and "the secret of Bo" in text
    store.accounts.consent(ann.id, "training", False, "test")
    store.delete_person(bo.id, "system")
    text = admin.get(path).text
    assert "secret" not in text
    assert text.count("Not shown: its author") == 1 == text.count("Deleted with the chat")
    store.accounts.consent(ann.id, "training", True, "test")
    assert "the secret of Ann" in admin.get(path).text


def test_times_and_ratings_are_shown(site, admin):
    store = site.store
    made = store.campaigns.create("rated", "ranking", Settings(), "system")
    store.campaigns.queue(made.id, [candidate_set("r")], "system", "train")
    assert 'aria-label="Ratings"' not in admin.get(f"/campaigns/{made.id}").text
    lee = person(store, "Lee")
    lease = store.work.lease(made.id, lee.id)
    store.work.judge(lease.token, lee.id, [1, 2, 3], [6, 6, None])
    text = admin.get(f"/campaigns/{made.id}").text
    table = text.split('aria-label="Ratings"')[1].split("</table>")[0]
    assert [cell.split("<")[0] for cell in table.split("<td>")[1:]] == list("0000020")
    for name in ("median", "mean"):
        assert re.search(rf"Time for a task, {name}</dt><dd>\d+\.\d s</dd>", text)


def test_a_number_of_thousands_of_digits_is_none(site, admin):
    store, digits = site.store, "1" * 5000
    made = store.campaigns.create("digits", "ranking", Settings(max_skips=1), "system")
    store.campaigns.queue(made.id, [candidate_set("d")], "system", "train")
    path = f"/campaigns/{made.id}?said=queued-"
    assert "12 new tasks queued." in admin.get(f"{path}12").text
    answer = admin.get(path + digits)
    assert answer.status_code == 200 and "queued." not in answer.text

    lee = person(store, "Lee")
    store.work.skip(store.work.lease(made.id, lee.id).token, lee.id, "unclear")
    (task,) = store.campaigns.tasks(made.id, "review")
    ranks = {"action": "decide", "rank-0": "1", "rank-1": "2"}
    for wrong in (digits, "", "a", "0", "1001", "+2", " 2", "1_0"):
        answer = admin.post(f"/review/{made.id}/{task.id}", data={**ranks, "rank-2": wrong})
        assert answer.status_code == 400 and "rank" in answer.text
    answer = admin.post(f"/review/{made.id}/{task.id}", data={**ranks, "rank-2": "2"})
    assert answer.status_code == 303
    assert [t.state for t in store.campaigns.tasks(made.id)] == ["done"]
