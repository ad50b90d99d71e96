"""The export program: the store in, versioned data sets out, with what went in and what didn't."""

import sqlite3

import pytest

from configs import export as export_config
from gptlab import export
from gptlab.data.records import Comparison, Conversation, Prompt, record_sets
from gptlab.people.store.schema import audit
from gptlab.run import artifact
from gptlab.run.errors import UserError
from tests.fixtures import read_records
from tests.people.campaigns import campaign, chat, person, work_off


def config_of(url, **changes):
    config = export_config.get_config()
    config.store.url = url
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def people(store):
    """Two have chatted and said something about it, a third has ranked."""
    ann, bo, lee = person(store, "Annabel", "user"), person(store, "Bertram", "user"), person(store)
    for who in (ann, bo):
        for i in range(4):
            text = f"{who.name}'s question {i}, to {who.name.lower()}@example.org"
            _, _, (one, two) = chat(store, who, text, ("Yes.", "No."))
            store.feedback.choose(who.id, one.id, two.id, 1)
            store.feedback.improve(who.id, two.id, f"{who.name} says no.")
            if i == 0:
                store.feedback.thumb(who.id, two.id, False, ["harmful"], severity=3)
    work_off(store, campaign(store, tasks=2), lee)
    return ann, bo, lee


SETS = {"conversations": Conversation, "comparisons": Comparison, "prompts": Prompt}


def exported(workdir):
    """All text of an artifact's records."""
    texts = []
    for found in record_sets(workdir / "records"):
        name, _, split = found.partition("-")
        texts += [record.to_json() for record in read_records(workdir, name, split, SETS[name])]
    return "\n".join(texts)


def data(workdir):
    return {
        path.name: path.read_bytes() for path in (workdir / "records").iterdir() if path.is_file()
    }


def test_the_same_content_is_exported_once_and_as_the_same_bytes(
    store, store_url, people, tmp_path, capsys
):
    config = config_of(store_url)
    export.run(config, tmp_path / "a")
    assert "comparisons-train" in capsys.readouterr().out
    export.run(config, tmp_path / "a")
    assert "has nothing new" in capsys.readouterr().out
    export.run(config, tmp_path / "b")
    assert data(tmp_path / "a") == data(tmp_path / "b") != {}
    first, second = (artifact.read_manifest(tmp_path / name) for name in "ab")
    assert first["identity"] == second["identity"] and first["digest"] == second["digest"]
    assert [e.workdir for e in store.exports.all()] == [str(tmp_path / name) for name in "ba"]
    # Lineage: which store, up to which row, and what its audit said then.
    results = first["results"]
    head = (results["audit_row"], results["audit_hash"])
    entry = store.audit.entries(after=head[0] - 1, limit=1)[0]
    assert (entry.row, entry.hash) == head
    assert results["until"] == store.state().until <= head[0]
    assert store.state().digest in first["files"]["store"]["digest"]
    # Whatever is said later is another input: the old workdir stays what it is.
    chat(store, people[0], "one more")
    with pytest.raises(UserError, match="store"):
        export.run(config, tmp_path / "a")
    # As of then, it is the same still.
    export.run(config_of(store_url, **{"store.until": results["until"]}), tmp_path / "c")
    assert data(tmp_path / "c") == data(tmp_path / "a")


def test_the_report_says_what_went_in_and_what_did_not(store, store_url, people, tmp_path):
    ann, bo, _ = people
    store.accounts.consent(bo.id, "training", False, "v1")
    export.run(config_of(store_url), tmp_path / "a")
    report = (tmp_path / "a" / "report.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    went_in = {
        tuple(line[:3]): int(line[3]) for line in lines if len(line) == 5 and line[3].isdigit()
    }
    assert went_in["ranking", "Comparison", "train"] == 2
    results = artifact.read_manifest(tmp_path / "a")["results"]
    for name, cls in SETS.items():
        for split in export.SPLITS:
            count = sum(n for (_, c, s), n in went_in.items() if (c, s) == (cls.__name__, split))
            written = read_records(tmp_path / "a", name, split, cls)
            assert count == len(written) == results.get(f"{name}-{split}", 0)
    assert ["choice", "no consent to training", "4"] in lines
    assert ["harmful", "3", "1"] in lines  # the flag, its severity, prompts
    text = exported(tmp_path / "a")
    assert "Bertram" not in text and "@" not in text and text.count("[e-mail]") > 4
    assert f"e-mail {text.count('[e-mail]')}" in report
    export.run(config_of(store_url, scrub=False), tmp_path / "b")
    assert "annabel@example.org" in exported(tmp_path / "b")
    assert "Nothing was replaced" in (tmp_path / "b" / "report.md").read_text()


def test_a_deleted_person_is_in_no_later_export_and_earlier_ones_are_listed(
    store, store_url, people, tmp_path
):
    ann, bo, lee = people
    export.run(config_of(store_url), tmp_path / "before")
    assert "Annabel says" in exported(tmp_path / "before")
    export.run(config_of(store_url, **{"filters.roles": ("labeller",)}), tmp_path / "rankings")
    assert "Annabel says" not in exported(tmp_path / "rankings")
    until = store.state().until

    affected = store.delete_person(ann.id, ann.id)
    assert [e.workdir for e in affected] == [str(tmp_path / "before")]
    assert affected[0].identity == artifact.read_manifest(tmp_path / "before")["identity"]
    export.run(config_of(store_url), tmp_path / "after")
    # Not by asking for an earlier state either.
    export.run(config_of(store_url, **{"store.until": until}), tmp_path / "as_of_then")
    for name in ("after", "as_of_then"):
        assert "Annabel" not in exported(tmp_path / name) and ann.id not in exported(
            tmp_path / name
        )
        assert "Bertram says" in exported(tmp_path / name)
    # A labeller's judgements go with them too.
    assert f"person:{lee.id}" in exported(tmp_path / "after")
    named = {e.workdir for e in store.delete_person(lee.id, "system")}
    assert named == {str(tmp_path / n) for n in ("before", "rankings", "after", "as_of_then")}
    export.run(config_of(store_url), tmp_path / "last")
    assert lee.id not in exported(tmp_path / "last")


def test_an_export_is_stale_once_somebody_withdraws_what_it_asked_for(
    store, store_url, people, tmp_path
):
    for who in people:
        store.accounts.consent(who.id, "publication", True, "v1")
    for scope in ("training", "publication"):
        export.run(config_of(store_url, **{"filters.consent": scope}), tmp_path / scope)
    assert not any(e.stale for e in store.exports.all())
    store.accounts.consent(people[0].id, "publication", False, "v1")
    stale = {e.workdir: e.stale for e in store.exports.all()}
    assert stale == {str(tmp_path / "training"): False, str(tmp_path / "publication"): True}


def test_who_is_deleted_while_the_store_is_read_is_not_exported(
    store, store_url, people, tmp_path, monkeypatch
):
    real = export.feedback.harvest

    def harvest(*args):
        found = real(*args)
        store.delete_person(people[0].id, "system")
        return found

    monkeypatch.setattr(export.feedback, "harvest", harvest)
    with pytest.raises(UserError, match="has changed while it was read"):
        export.run(config_of(store_url), tmp_path / "a")
    assert not (tmp_path / "a" / "records").exists() and not store.exports.all()


def test_a_store_that_was_tampered_with_is_not_exported(store, store_url, people, tmp_path):
    with store.database.write() as writer:
        writer.execute(audit.update().where(audit.c.id == 3).values(actor="somebody else"))
    with pytest.raises(UserError, match="tampered with: row 3 of the audit"):
        export.run(config_of(store_url), tmp_path / "a")


def test_a_store_without_feedback_is_said_to_have_none(store, store_url, tmp_path):
    with pytest.raises(UserError, match="it holds no feedback"):
        export.run(config_of(store_url), tmp_path / "a")
    ann = store.accounts.add_person("Ann", "user", "system")
    _, _, (one, two) = chat(store, ann, replies=("Yes.", "No."))
    store.feedback.choose(ann.id, one.id, two.id, 1)
    with pytest.raises(UserError, match="1 x choice: no consent to training"):
        export.run(config_of(store_url), tmp_path / "b")


def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTLAB_STORE", raising=False)

    def error(url=f"sqlite:///{tmp_path}/none.sqlite", **changes):
        with pytest.raises(UserError) as caught:
            export.run(config_of(url, **changes), tmp_path / "x")
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()
        return str(caught.value)

    assert "there is no store" in error()
    assert "config.store.url is not set" in error(None)
    assert "not 'mysql://a/b'" in error("mysql://a/b")
    assert "not 'runs/store.sqlite'" in error("runs/store.sqlite")
    assert "secret" not in error("me:secret@host")
    assert "GPTLAB_STORE" in error("postgresql+psycopg://me:secret@host/db")
    assert "secret" not in error("postgresql+psycopg://me:secret@host/db")
    assert "is a directory" in error(f"sqlite:///{tmp_path}")
    (tmp_path / "text").write_text("no database, but long enough to be read as one" * 30)
    assert "no SQLite database" in error(f"sqlite:///{tmp_path}/text")
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE people (x)")
    assert "other.sqlite" in error(f"sqlite:///{tmp_path}/other.sqlite")
    assert "validation_fraction=0" in error(validation_fraction=0.0)
    assert "config.weights" in error(**{"weights.thumb": -1.0})
    assert "config.filters.roles" in error(**{"filters.roles": ("boss",)})


def test_a_database_that_is_not_there_is_named(postgresql, tmp_path):
    url = f"postgresql+psycopg://postgres@/nowhere?host={postgresql}"
    with pytest.raises(UserError, match='"nowhere" does not exist'):
        export.run(config_of(url), tmp_path / "x")
    with pytest.raises(UserError, match="the store postgresql"):
        export.run(config_of("postgresql+psycopg://127.0.0.1:1/x"), tmp_path / "x")


def test_a_workdir_in_use_is_left_alone(store, store_url, people, tmp_path):
    (tmp_path / "a").mkdir()
    with artifact.locked(tmp_path / "a"):
        with pytest.raises(UserError, match="is in use by another run"):
            export.run(config_of(store_url), tmp_path / "a")
    assert not store.exports.all()
