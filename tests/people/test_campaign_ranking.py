"""rank with config.backend='store': queued, waited for, stopped, gone on with, read back."""

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
import time

import pytest

from configs import rank as rank_config
from gptlab import rank
from gptlab.data.records import Comparison
from gptlab.people.store.campaigns import Settings
from gptlab.run import artifact
from gptlab.run.errors import Interrupted, UserError
from tests.fixtures import read_records, write_artifact
from tests.people.campaigns import best_first, candidate_set, chat, number, person, work_off

SETS = {"train": 4, "validation": 2}


@pytest.fixture
def candidates(tmp_path):
    """A collect artifact; sets have the names that `number` reads."""
    sets = {
        ("candidates", split): [candidate_set(f"{split}{i}") for i in range(count)]
        for split, count in SETS.items()
    }
    return write_artifact(tmp_path / "collect", "collect", sets)


@pytest.fixture
def config(candidates, store_url):
    config = rank_config.get_config("people")
    config.inputs.candidates = str(candidates)
    config.store.url = store_url
    config.store.poll_seconds = 0.05
    config.campaign.name = "first"
    config.campaign.gold_rate = 0.0
    return config


@contextlib.contextmanager
def meanwhile(act):
    """Does something in a thread while the body runs; what fails there fails here."""
    failures = []

    def run():
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failures, failures


def queued(store, count=6):
    """The campaign, once the program has queued everything."""
    for _ in range(1200):
        for found in store.campaigns.all():
            if len(store.campaigns.tasks(found.id)) >= count:
                return found
        time.sleep(0.05)
    raise AssertionError("nothing was queued")


def status(workdir):
    return artifact.read_manifest(workdir, allow_unfinished=True)["status"]


def test_what_people_rank_becomes_comparisons(store, config, tmp_path, capsys):
    lee, kim = person(store), person(store, "Kim")

    def label():
        where = queued(store)
        work_off(store, where, lee)
        work_off(store, where, kim)

    with meanwhile(label):
        rank.run(config, tmp_path / "run")
    assert "8 rankings of 4 sets" in capsys.readouterr().out
    for split, count in SETS.items():
        found = read_records(tmp_path / "run", "comparisons", split, Comparison)
        assert len(found) == 2 * count
        for comparison in found:
            assert comparison.prompt.id.startswith(split) and not comparison.simulated
            assert comparison.ranks == tuple(number(c.content) + 1 for c in comparison.candidates)
            assert comparison.weight == 0.5 and comparison.scores is None
        assert {c.labeller for c in found} == {f"person:{lee.id}", f"person:{kim.id}"}
    results = artifact.read_manifest(tmp_path / "run")["results"]
    assert results["train/agreement"] == 1 and results["train/labellers"] == 2
    assert results["store"] == store.state().store and results["left_out"] == 0
    assert store.audit.entries(after=results["audit_row"] - 1)[0].hash == results["audit_hash"]
    (noted,) = store.exports.containing(lee.id)
    assert noted.workdir == str(tmp_path / "run")
    rank.run(config, tmp_path / "run")
    assert "is done" in capsys.readouterr().out


def test_it_is_stopped_and_goes_on_where_people_stand(store, config, tmp_path, monkeypatch):
    config.campaign.overlap = 1
    lee = person(store)

    def half():
        where = queued(store)
        for _ in range(3):
            lease = store.work.lease(where.id, lee.id)
            store.work.judge(lease.token, lee.id, best_first(lease))
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(half), pytest.raises(Interrupted, match=r"\d of 6 sets are ranked"):
        rank.run(config, tmp_path / "run")
    assert status(tmp_path / "run") == "interrupted" and not store.exports.all()
    (where,) = store.campaigns.all()
    assert work_off(store, where, lee) == 3  # nobody waits for them to wait for it
    with monkeypatch.context() as patch:  # killed before the end
        patch.setattr(rank.records, "digest", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank.run(config, tmp_path / "run")
    rank.run(config, tmp_path / "run")
    rank.run(config, tmp_path / "other")
    digests = {artifact.read_manifest(tmp_path / name)["digest"] for name in ("run", "other")}
    assert len(digests) == 1 and len(store.campaigns.tasks(where.id)) == 6
    assert len(read_records(tmp_path / "run", "comparisons", "train", Comparison)) == 4
    assert len(store.exports.all()) == 2  # a workdir each, however often it was begun


def test_closing_the_campaign_ends_the_waiting(store, config, tmp_path):
    config.campaign.overlap = 1
    lee, admin = person(store), person(store, "Ada", "admin")

    def some():
        where = queued(store)
        while {t.split for t in store.campaigns.tasks(where.id, "done")} != set(SETS):
            lease = store.work.lease(where.id, lee.id)
            store.work.judge(lease.token, lee.id, best_first(lease))
        store.campaigns.set_state(where.id, "closed", admin.id)

    with meanwhile(some):
        rank.run(config, tmp_path / "run")
    results = artifact.read_manifest(tmp_path / "run")["results"]
    ranked = results["train/ranked_sets"] + results["validation/ranked_sets"]
    assert 2 <= ranked < 6 and results["train/sets"] == 4
    # A later run finds it closed: what is new can't be ranked by anybody.
    fresh = write_artifact(
        tmp_path / "more", "collect", {("candidates", "train"): [candidate_set("new")]}
    )
    config.inputs.candidates = str(fresh)
    with pytest.raises(UserError, match="'first' is closed"):
        rank.run(config, tmp_path / "later")


def test_what_may_not_be_used_is_said(store, config, tmp_path):
    config.campaign.overlap = 1
    silent = store.accounts.add_person("Sil", "labeller", "system")
    with meanwhile(lambda: work_off(store, queued(store), silent)):
        with pytest.raises(UserError, match="4 x no consent to training|6 x no consent"):
            rank.run(config, tmp_path / "run")
    store.accounts.consent(silent.id, "training", True, "v1")
    rank.run(config, tmp_path / "run")  # the same command, once they have agreed


def test_finished_rankings_of_who_was_deleted_are_refused_and_made_again(
    store, config, tmp_path, capsys
):
    config.campaign.overlap = 2
    lee, kim, kay = person(store), person(store, "Kim"), person(store, "Kay")

    def label(*people):
        def act():
            where = queued(store)
            for who in people:
                work_off(store, where, who)

        return meanwhile(act)

    with label(lee, kim):
        rank.run(config, tmp_path / "run")
    store.delete_person(kay.id, "system")  # of whom nothing is in it
    rank.run(config, tmp_path / "run")
    assert "is done" in capsys.readouterr().out
    store.delete_person(lee.id, "system")
    with pytest.raises(UserError, match="run holds data of people who were deleted or have with"):
        rank.run(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")  # it holds them wherever it is
    with pytest.raises(UserError, match="moved holds data of people who were deleted or have with"):
        rank.run(config, tmp_path / "moved")
    # Elsewhere, or once it is removed: of those who are left, and somebody new.
    with label(person(store, "Kit")):
        rank.run(config, tmp_path / "again")
    rank.run(config, tmp_path / "again")
    found = read_records(tmp_path / "again", "comparisons", "train", Comparison)
    assert len(found) == 8 and lee.id not in {c.labeller.partition(":")[2] for c in found}
    for _ in range(2):
        rank.run(config, tmp_path / "run")
    assert "is done" in capsys.readouterr().out
    # What was there before stays listed: models may have been made of it.
    stale = [(e.workdir, e.stale) for e in store.exports.all()]
    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    assert stale == [(run, False), (again, False), (run, True)]


@pytest.mark.parametrize("role", ["labeller", "author"])
def test_finished_rankings_of_who_has_withdrawn_are_refused_until_they_agree(
    store, config, tmp_path, capsys, role
):
    config.campaign.overlap = 1
    ann, lee = person(store, "Ann", "user"), person(store)
    conversation, turn, _ = chat(store, ann, "words of hers")
    hers = dataclasses.replace(candidate_set("x"), id=f"{conversation.id}:{turn.row}:0123456789ab")
    sets = {("candidates", "train"): [hers, candidate_set("other")]}
    config.inputs.candidates = str(write_artifact(tmp_path / "mixed", "collect", sets))
    with meanwhile(lambda: work_off(store, queued(store, 2), lee)):
        rank.run(config, tmp_path / "run")
    assert len(read_records(tmp_path / "run", "comparisons", "train", Comparison)) == 2
    who = lee if role == "labeller" else ann
    store.accounts.consent(who.id, "publication", False, "v1")  # nobody has asked for that
    rank.run(config, tmp_path / "run")
    assert "is done" in capsys.readouterr().out
    store.accounts.consent(who.id, "training", False, "v1")
    with pytest.raises(UserError, match="have withdrawn their consent since"):
        rank.run(config, tmp_path / "run")
    store.accounts.consent(who.id, "training", True, "v1")
    rank.run(config, tmp_path / "run")
    assert "is done" in capsys.readouterr().out
    if role == "author":  # and without her, once it is made again
        store.accounts.consent(ann.id, "training", False, "v1")
        shutil.rmtree(tmp_path / "run")
        rank.run(config, tmp_path / "run")
        rank.run(config, tmp_path / "run")
        (only,) = read_records(tmp_path / "run", "comparisons", "train", Comparison)
        assert only.prompt.id == "other:0"


def test_sets_of_a_deleted_chat_are_not_waited_for(store, config, tmp_path):
    config.campaign.overlap = 1
    ann, lee = person(store, "Ann", "user"), person(store)
    conversation, turn, _ = chat(store, ann, "a secret")
    store.conversations.delete(ann.id, conversation.id)
    gone = dataclasses.replace(candidate_set("x"), id=f"{conversation.id}:{turn.row}:0123456789ab")
    sets = {("candidates", "train"): [gone, candidate_set("other")]}
    config.inputs.candidates = str(write_artifact(tmp_path / "mixed", "collect", sets))
    with meanwhile(lambda: work_off(store, queued(store, 2), lee)):
        rank.run(config, tmp_path / "run")
    (only,) = read_records(tmp_path / "run", "comparisons", "train", Comparison)
    assert only.prompt.id == "other:0"


def test_what_is_wrong_is_said_in_one_line(store, config, tmp_path):
    def error(**changes):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict(changes)
        with pytest.raises(UserError) as caught:
            rank.run(wrong, tmp_path / f"x{len(list(tmp_path.iterdir()))}")
        return str(caught.value)

    assert "config.campaign.name is not set" in error(**{"campaign.name": ""})
    assert "config.campaign: overlap is 1 to 100, not 0" in error(**{"campaign.overlap": 0})
    assert "config.filters.roles" in error(**{"filters.roles": ("boss",)})
    assert "not 'mysql" in error(**{"store.url": "mysql://a/b"})
    store.campaigns.create("talk", "demonstration", Settings(), "system")
    assert "campaign of demonstrations" in error(**{"campaign.name": "talk"})
    assert "poll_seconds=0" in error(**{"store.poll_seconds": 0.0})
