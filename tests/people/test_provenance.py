"""Whose text a task shows: it is withheld, removed, and kept out, by whatever way it came."""

import dataclasses
import stat
from pathlib import Path

import pytest
import sqlalchemy as sa

from gptlab.people.store import Forbidden, LeaseLost, NotFound, leases
from gptlab.people.store.schema import tasks
from tests.people.campaigns import (
    answers,
    best_first,
    campaign,
    candidate_set,
    chat,
    dump,
    person,
    work_off,
)


def sets_of(store, made, who):
    """As `collect` writes them, of the prompts of a chat that were exported."""
    picked = [p for p in store.campaigns.pick(made.id, 9, seed=0)]
    sets = []
    for one in picked:
        source = f"{one.prompt.id}:0123456789ab"
        sets.append(dataclasses.replace(candidate_set("x"), id=source, prompt=one.prompt))
    return sets


def states(store):
    with store.database.read() as reader:
        return sorted(reader.execute(sa.select(tasks.c.state)).scalars())


@pytest.fixture
def used(store, monkeypatch):
    """Ann's chat in a campaign three ways: by an export, as a gold check, picked."""
    monkeypatch.setattr(leases, "_draw", lambda *_: 0.0)  # a check is given as soon as may be
    admin, ann, lee = person(store, "Ada", "admin"), person(store, "Ann", "user"), person(store)
    conversation, _, _ = chat(store, ann, "a secret question", ("a secret reply",))
    made = campaign(store, tasks=1, gold_rate=0.9)
    sets = sets_of(store, made, ann)
    store.campaigns.queue(made.id, sets, "system", "train")
    store.campaigns.queue_gold(made.id, sets[0], [1, 2, 3], "system")
    (picked,) = store.campaigns.pick(made.id, 9, seed=0)
    store.campaigns.queue_picked(made.id, picked, candidate_set("y").candidates, "system")
    return store, admin, ann, lee, conversation, made, sets


def test_text_of_who_withdraws_is_shown_to_nobody(used):
    store, _, ann, lee, _, made, sets = used
    assert {task.person for task in store.campaigns.tasks(made.id)} == {None, ann.id}
    store.accounts.consent(ann.id, "training", False, "v1")
    assert states(store) == ["open", "withheld", "withheld", "withheld"]
    assert store.campaigns.pick(made.id, 9, seed=0) == []
    assert work_off(store, made, lee) == 1 and store.figures.progress(made.id).complete
    # What comes later is withheld from its beginning, and all is given out once she agrees.
    late = dataclasses.replace(sets[0], id=sets[0].id + "-late")
    assert store.campaigns.queue(made.id, [late], "system") == 1
    assert states(store).count("withheld") == 4
    store.accounts.consent(ann.id, "training", True, "v1")
    assert states(store) == ["done", "open", "open", "open", "open"]
    assert work_off(store, made, lee, lambda lease: [*range(1, len(lease.replies) + 1)]) == 4


def test_who_withdraws_takes_their_text_from_who_holds_it(used):
    store, _, ann, lee, _, made, _ = used
    mine = {task.id for task in store.campaigns.tasks(made.id) if task.person == ann.id}
    lease = store.work.lease(made.id, lee.id)
    while "secret" not in repr(lease):  # the campaign's own task may come first
        store.work.judge(lease.token, lee.id, best_first(lease))
        lease = store.work.lease(made.id, lee.id)
    store.accounts.consent(ann.id, "training", False, "v1")
    with pytest.raises(LeaseLost):
        store.work.renew(lease.token, lee.id)
    with pytest.raises(LeaseLost):
        store.work.judge(lease.token, lee.id, [1, 2, 3])
    assert "secret" not in repr(store.work.lease(made.id, lee.id))
    assert not {answer.task for answer in answers(store, made, lee)} & mine
    # She may change her mind: nothing of the task was used up.
    store.accounts.consent(ann.id, "training", True, "v1")
    work_off(store, made, lee, lambda lease: [*range(1, len(lease.replies) + 1)])
    assert mine <= {answer.task for answer in answers(store, made, lee)}


@pytest.mark.parametrize("all_of_it", [False, True], ids=["conversation", "person"])
def test_what_was_deleted_stays_out(used, all_of_it):
    store, admin, ann, lee, conversation, made, sets = used
    if all_of_it:
        store.delete_person(ann.id, admin.id)
    else:
        store.conversations.delete(ann.id, conversation.id)
    assert "secret" not in dump(store)
    assert states(store) == ["deleted", "deleted", "deleted", "open"]
    # An artifact that still has it brings nothing back.
    late = dataclasses.replace(sets[0], id=sets[0].id + "-late")
    store.campaigns.queue(made.id, [late], "system")
    store.campaigns.queue_gold(made.id, late, [1, 2, 3], "system")
    assert "secret" not in dump(store) and states(store).count("deleted") == 5
    assert work_off(store, made, lee) == 1


def test_a_request_that_comes_after_the_deletion_leaves_nothing(store):
    admin, ann = person(store, "Ada", "admin"), person(store, "Ann", "user")
    _, turn, (reply,) = chat(store, ann)
    store.delete_person(ann.id, admin.id)
    for late in (
        lambda: store.conversations.create(ann.id, "late", "secret"),
        lambda: store.conversations.reply(ann.id, turn.id, "secret", "chat", "0123", True),
        lambda: store.feedback.improve(ann.id, reply.id, "secret"),
        lambda: store.accounts.consent(ann.id, "training", True, "secret"),
        lambda: store.accounts.create_api_key(ann.id, "secret", "system"),
    ):
        with pytest.raises(NotFound):
            late()
    assert "secret" not in dump(store)


def test_a_reviewer_does_not_decide_their_own(store):
    ray, rob = person(store, "Ray", "reviewer"), person(store, "Rob", "reviewer")
    made = campaign(store, tasks=1, overlap=2, disagreement=0.2)
    work_off(store, made, ray)
    work_off(store, made, rob, lambda lease: [4 - rank for rank in best_first(lease)])
    (task,) = store.campaigns.tasks(made.id)
    assert store.review.queue(made.id, ray.id) == []
    with pytest.raises(Forbidden, match="judged this task yourself"):
        store.review.decide(task.id, ray.id, [1, 2, 3])
    boss = person(store, "Ada", "admin")
    store.review.decide(task.id, boss.id, [1, 2, 3])
    # What was decided may be decided anew, by the same reviewer too.
    store.review.decide(task.id, boss.id, [2, 1, 3])
    assert store.figures.progress(made.id).complete


def test_an_export_that_was_stopped_is_noted_with_what_it_has_more(store):
    ann = person(store, "Ann", "user")
    chat(store, ann)
    noted = lambda rows: store.exports.register("0123", "runs/x", store.state(), rows, "training")  # noqa: E731
    first = noted([("messages", "a", ann.id)])
    _, _, (reply,) = chat(store, ann)
    rows = [("messages", "a", ann.id), ("messages", reply.id, ann.id)]
    again = noted(rows)
    assert again.id == first.id and (first.rows, again.rows) == (1, 2)
    assert store.exports.containing(ann.id) == [again]
    # With less in it, it is another one, and what the first had may be in something else by now.
    store.conversations.delete(ann.id, reply.conversation)
    less = noted(rows[:1])
    assert store.exports.containing(ann.id) == store.exports.all() == [less, again]
    assert (less.rows, again.rows) == (1, 2)
    with pytest.raises(NotFound):
        store.exports.containing("nobody")


@pytest.mark.parametrize("scope", ["training", "publication"])
def test_an_export_holds_what_was_withdrawn_as_long_as_it_is(store, scope):
    ann, bo = person(store, "Ann", "user"), person(store, "Bo", "user")
    bot = person(store, "bot", simulated=True)
    for who in (ann, bo):
        store.accounts.consent(who.id, "publication", True, "v1")
    rows = [("messages", "a", ann.id), ("messages", "b", bo.id), ("judgements", "c", bot.id)]
    store.exports.register("0123", "runs/x", store.state(), rows, scope)

    def held():
        (export,) = store.exports.all()
        return export.rows, export.deleted, export.withdrawn, export.stale

    other = "publication" if scope == "training" else "training"
    store.accounts.consent(ann.id, other, False, "v1")
    assert held() == (3, 0, 0, False)
    store.accounts.consent(ann.id, scope, False, "v1")
    assert held() == (3, 0, 1, True)
    store.delete_person(bo.id, "system")
    assert held() == (3, 1, 1, True)
    (of_ann,) = store.exports.containing(ann.id)
    assert (of_ann.rows, of_ann.deleted, of_ann.withdrawn) == (1, 0, 1)
    store.accounts.consent(ann.id, scope, True, "v2")
    assert held() == (3, 1, 0, True)
    store.delete_person(ann.id, "system")
    assert held() == (3, 2, 0, True)


def test_nobody_else_on_the_machine_reads_the_file(request, tmp_path, no_fsync):
    from gptlab.people.store import Store

    with Store.open(f"sqlite:///{tmp_path / 'new' / 'store.sqlite'}") as store:
        person(store)
        files = list(Path(tmp_path / "new").iterdir())
        assert len(files) > 1  # its log too
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
