"""Conversations are trees that only grow; feedback supersedes; deletion removes, provably."""

import json
import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa

from gptlab.people.store import Forbidden, Invalid, NotFound, Store
from gptlab.people.store.schema import feedback, messages, metadata, tasks
from gptlab.run.errors import UserError
from tests.databases import new_database
from tests.people.campaigns import (
    answer,
    best_first,
    campaign,
    candidate_set,
    chat,
    dump,
    person,
    work_off,
)


def test_a_conversation_is_a_tree(store, clock):
    ann = person(store, "Ann", "user")
    conversation = store.conversations.create(ann.id, " About   tea ", "Be kind.")
    first = store.conversations.say(ann.id, conversation.id, None, "Tea?", "a note")
    one, two = (answer(store, ann, first.id, text) for text in ("Green.", "Black."))
    then = store.conversations.say(ann.id, conversation.id, two.id, "Why?")
    edited = store.conversations.say(ann.id, conversation.id, first.parent, "Coffee?")
    tree = store.conversations.messages(ann.id, conversation.id)
    assert [m.content for m in tree] == ["Be kind.", "Tea?", "Green.", "Black.", "Why?", "Coffee?"]
    assert {one.parent, two.parent} == {first.id} and edited.parent == first.parent == tree[0].id
    path = store.conversations.path(ann.id, then.id)
    assert [m.content for m in path] == ["Be kind.", "Tea?", "Black.", "Why?"]
    assert path[1].record().context == "a note" and two.settings == {"seed": 1}
    assert store.conversations.get(ann.id, conversation.id).title == "About tea"
    clock.now += 1
    other = store.conversations.create(ann.id)
    assert [c.id for c in store.conversations.of(ann.id)] == [other.id, conversation.id]
    assert store.conversations.of(ann.id, before=clock.now) == [
        store.conversations.get(ann.id, conversation.id)
    ]
    assert store.conversations.rename(ann.id, other.id, "New").title == "New"


def test_turns_alternate_and_have_a_length(store):
    ann = person(store, "Ann", "user")
    conversation, turn, (reply,) = chat(store, ann)
    for parent, text, message in (
        (turn.id, "again", "follows a reply"), (reply.id, " ", "empty"),
        (reply.id, "x" * 200_001, "200,001 characters"), (reply.id, "\0", "no text"),
    ):  # fmt: skip
        with pytest.raises(Invalid, match=message):
            store.conversations.say(ann.id, conversation.id, parent, text)
    with pytest.raises(Invalid, match="follows a person's turn"):
        answer(store, ann, reply.id, "more")
    odd = answer(store, ann, turn.id, "what a model says: \0 \ud800")
    assert odd.content == "what a model says: \ufffd \ufffd"


def test_nobody_sees_or_changes_another_ones_chat(store):
    ann, bo = person(store, "Ann", "user"), person(store, "Bo", "admin")
    conversation, turn, (reply,) = chat(store, ann)
    before = dump(store)
    for call in (
        lambda: store.conversations.get(bo.id, conversation.id),
        lambda: store.conversations.messages(bo.id, conversation.id),
        lambda: store.conversations.path(bo.id, reply.id),
        lambda: store.conversations.say(bo.id, conversation.id, None, "x"),
        lambda: store.conversations.say(bo.id, conversation.id, reply.id, "x"),
        lambda: answer(store, bo, turn.id, "x"),
        lambda: store.conversations.rename(bo.id, conversation.id, "x"),
        lambda: store.conversations.delete(bo.id, conversation.id),
        lambda: store.feedback.thumb(bo.id, reply.id, True),
        lambda: store.feedback.improve(bo.id, reply.id, "x"),
    ):
        with pytest.raises(NotFound):
            call()
    assert store.conversations.of(bo.id) == []
    assert store.feedback.of(bo.id, conversation.id) == []
    assert dump(store) == before


def test_the_newest_thumb_counts_and_all_are_kept(store):
    ann = person(store, "Ann", "user")
    conversation, turn, (one, two) = chat(store, ann, replies=("a", "b"))
    store.feedback.thumb(ann.id, one.id, True)
    down = store.feedback.thumb(ann.id, one.id, False, ["biased", "other"], "hm", severity=3)
    up = store.feedback.thumb(ann.id, two.id, True)
    first = store.feedback.choose(ann.id, one.id, two.id, 1)
    choice = store.feedback.choose(ann.id, two.id, one.id, 1)
    assert store.feedback.of(ann.id, conversation.id) == [down, up, choice]
    assert (down.reasons, down.severity, up.severity) == (("biased", "other"), 3, 0)
    with store.database.read() as reader:
        kept = reader.execute(sa.select(feedback).order_by(feedback.c.row)).all()
    assert len(kept) == 5 and kept[4].supersedes == first.id
    given, better = store.feedback.improve(ann.id, one.id, "c")
    assert better.improves == one.id and better.policy is None and better.parent == turn.id
    assert store.feedback.of(ann.id, conversation.id)[-1] == given


def test_feedback_that_makes_no_sense_is_refused(store):
    ann = person(store, "Ann", "user")
    _, turn, (one, two) = chat(store, ann, replies=("a", "b"))
    _, _, (other,) = chat(store, ann)
    for call, message in (
        (lambda: store.feedback.thumb(ann.id, turn.id, True), "about a reply"),
        (lambda: store.feedback.thumb(ann.id, one.id, False, ["ugly"]), "reasons are some of"),
        (lambda: store.feedback.thumb(ann.id, one.id, True, ["untrue"]), "no reasons"),
        (lambda: store.feedback.thumb(ann.id, one.id, False, ["other"], "", 2), "severity"),
        (lambda: store.feedback.choose(ann.id, one.id, other.id, 1), "same turn"),
        (lambda: store.feedback.choose(ann.id, one.id, one.id, 1), "same turn"),
        (lambda: store.feedback.choose(ann.id, one.id, two.id, 2), "1, 0 or -1"),
        (lambda: store.feedback.improve(ann.id, one.id, " "), "empty"),
    ):
        with pytest.raises(Invalid, match=message):
            call()


def test_replies_are_picked_from_chats_with_consent(store):
    ann, bo = person(store, "Ann", "user"), person(store, "Bo", "user")
    _, turn, (one, two) = chat(store, ann, "Tea?", ("Green.", "Black."))
    chat(store, bo, "Coffee?")
    store.accounts.consent(bo.id, "training", False, "v1")
    made = campaign(store, tasks=0)
    picked = store.campaigns.pick(made.id, 10, seed=0)
    assert {p.message for p in picked} == {one.id, two.id}
    assert picked == store.campaigns.pick(made.id, 10, seed=0)
    assert picked[0].prompt.messages[-1].content == "Tea?" and picked[0].model == "chat"
    others = candidate_set("alternatives").candidates
    assert store.campaigns.queue_picked(made.id, picked[0], others, "system") == 1
    assert store.campaigns.queue_picked(made.id, picked[0], others, "system") == 0
    assert [p.message for p in store.campaigns.pick(made.id, 10, seed=0)] == [picked[1].message]
    (task,) = store.campaigns.tasks(made.id)
    assert task.person == ann.id and len(task.candidates) == 4


def test_deleting_a_person_removes_what_is_theirs_and_nothing_else(store, store_url):
    admin, ann = person(store, "Ada Admin", "admin"), person(store, "Ann Secret", "reviewer")
    bo = person(store, "Bo")
    conversation, turn, (reply,) = chat(store, ann, "my secret question", ("secret reply",))
    store.feedback.thumb(ann.id, reply.id, False, ["untrue"], "secret note")
    store.feedback.improve(ann.id, reply.id, "secret better reply")
    chat(store, bo, "an open question")
    made = campaign(store, tasks=2, overlap=1)
    picked = next(p for p in store.campaigns.pick(made.id, 9, seed=0) if p.message == reply.id)
    store.campaigns.queue_picked(made.id, picked, candidate_set("x").candidates, "system")
    # By way of an export, its prompt has come back in a candidate set.
    again = candidate_set("again")
    source = f"{picked.prompt.id}:0123456789ab"
    again = type(again)(source, picked.prompt, again.candidates)
    store.campaigns.queue(made.id, [again], "system")
    lease = store.work.lease(made.id, ann.id)
    store.work.judge(lease.token, ann.id, best_first(lease) if len(lease.replies) == 3 else [1] * 4)
    judged_by_bo = work_off(store, made, bo, lambda lease: [1] * len(lease.replies))
    assert judged_by_bo == 3
    store.accounts.create_api_key(ann.id, "secret key", ann.id)
    store.accounts.open_session(ann.id)
    store.accounts.sign_in_link(ann.id, admin.id)
    state = store.state()
    row = ("messages", reply.id, ann.id)
    for identity, workdir, rows in (
        ("0123456789ab", "runs/export", [row, ("x", "y", bo.id)]),
        ("ba9876543210", "runs/other", [("x", "y", bo.id)]),
    ):
        store.exports.register(identity, workdir, state, rows, "training")

    affected = store.delete_person(ann.id, admin.id)
    assert [(export.workdir, export.rows) for export in affected] == [("runs/export", 1)]
    assert store.exports.containing(ann.id) == affected and len(store.exports.all()) == 2
    everything = dump(store)
    assert "ecret" not in everything and "an open question" in everything
    with pytest.raises(NotFound):
        store.accounts.person(ann.id)
    assert store.audit.verify() is None
    (entry,) = store.audit.entries(object=f"people:{ann.id}", limit=100)[-1:]
    assert entry.action == "person.delete" and entry.actor == admin.id
    # What she judged is to be judged again, what showed her text is gone.
    with store.database.read() as reader:
        states = sorted(reader.execute(sa.select(tasks.c.state)).scalars())
    assert states.count("deleted") == 2
    progress = store.figures.progress(made.id)
    assert progress.tasks == 2 and progress.done + work_off(store, made, bo) == 2
    with pytest.raises(Invalid, match="has changed"):
        store.exports.register("aaaaaaaaaaaa", "runs/late", state, [row], "training")
    if store_url.startswith("sqlite"):
        store.close()
        path = Path(store_url.removeprefix("sqlite:///"))
        for file in path.parent.glob(f"{path.name}*"):
            assert b"ecret" not in file.read_bytes(), file


def test_people_delete_themselves_and_their_conversations(store):
    person(store, "Ada", "admin")
    ann, bo = person(store, "Ann", "user"), person(store, "Bo", "user")
    first, _, (reply,) = chat(store, ann, "first words")
    chat(store, ann, "other words")
    store.feedback.thumb(ann.id, reply.id, True)
    store.conversations.delete(ann.id, first.id)
    assert "first words" not in dump(store) and "other words" in dump(store)
    with pytest.raises(Forbidden):
        store.delete_person(ann.id, bo.id)
    store.delete_person(ann.id, ann.id)
    assert "other words" not in dump(store)


def test_the_last_admin_stays(store):
    ada = person(store, "Ada", "admin")
    with pytest.raises(Invalid, match="only admin"):
        store.delete_person(ada.id, ada.id)


def test_a_new_store_is_made_and_opened_again(request, tmp_path):
    urls = [f"sqlite:///{tmp_path}/new/store.sqlite"]
    if request.config.pluginmanager and shutil.which("setpriv"):
        urls.append(new_database(request.getfixturevalue("postgresql")))
    for url in urls:
        with Store.open(url) as made:
            ann = made.accounts.add_person("Ann", "user", "system")
            first = made.state().store
        with Store.open(url, create=False) as again:
            assert again.accounts.people() == [ann] and again.state().store == first


def test_the_migrations_make_the_tables_of_the_code(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.database.read() as reader:
        context = MigrationContext.configure(reader, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_what_can_not_be_opened_is_said_in_one_line(tmp_path):
    (tmp_path / "text").write_text("this is no database at all, but a text of some length" * 9)
    (tmp_path / "closed").mkdir(mode=0o500)
    for url, message in (
        ("mysql://here/there", "sqlite:///PATH or postgresql.*'mysql://here/there'"),
        ("nonsense", "sqlite:///PATH or postgresql"),
        ("sqlite://", "sqlite:///PATH"),
        ("sqlite:///:memory:", "would be lost"),
        (f"sqlite:///{tmp_path}", "is a directory"),
        (f"sqlite:///{tmp_path}/text", "no SQLite database"),
        (f"sqlite:///{tmp_path}/text/deeper/store", "cannot make"),
        ("postgresql+psycopg://u:pass@localhost:1/x", r"postgresql\+psycopg://u:\*\*\*@.*:1/x: "),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Store.open(url)
        assert "\n" not in str(caught.value) and "pass@" not in str(caught.value)
    with pytest.raises(UserError, match="there is no store"):
        Store.open(f"sqlite:///{tmp_path}/none", create=False)


def test_a_newer_store_asks_for_an_update(store, store_url):
    def become(version):
        with store.database.write() as writer:
            writer.execute(sa.text(f"UPDATE alembic_version SET version_num = '{version}'"))

    become("9999")
    try:
        with pytest.raises(UserError, match="schema 9999, this gptlab knows up to 0002.*update"):
            Store.open(store_url)
    finally:
        become("0002")  # on PostgreSQL, the next test has the same tables


def test_a_failed_change_leaves_nothing(store):
    ann = person(store, "Ann", "user")
    before = dump(store)
    with pytest.raises(ZeroDivisionError), store.database.write() as writer:
        store.audit.append(writer, ann.id, "x", "y")
        writer.execute(messages.delete())
        json.dumps(1 / 0)
    assert dump(store) == before and store.audit.verify() is None
