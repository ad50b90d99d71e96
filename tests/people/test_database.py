"""What the database behind the store keeps to itself."""

import sqlite3
import traceback

import pytest
import sqlalchemy as sa

from gptlab.people.store import NotFound, Store, database
from gptlab.people.store.schema import people
from gptlab.run.errors import UserError
from tests.people.campaigns import chat, person


def test_a_statement_that_fails_does_not_tell_its_text(store):
    # A server logs the traceback of an error that it didn't expect.
    ann = person(store, "Ann", "user")
    whole = {
        "id": "0123456789abcdef", "name": "a secret", "role": "user", "simulated": False,
        "created_at": 1.0, "deleted_at": None,
    }  # fmt: skip
    for wrong in ({"id": ann.id}, {"role": None}):
        with pytest.raises(sa.exc.IntegrityError) as caught, store.database.write() as writer:
            writer.execute(people.insert(), whole | wrong)
        said = "".join(traceback.format_exception(caught.value))
        assert "INSERT INTO people" in said and "a secret" not in said


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_nothing_has_an_id_that_is_no_text(store, name):
    with pytest.raises(NotFound):
        store.campaigns.get(name)
    with pytest.raises(NotFound):
        store.conversations.path(person(store, "Ann", "user").id, name)


def test_a_store_of_the_first_schema_is_brought_up_to_date(store_url):
    """As it was before exports said which consent they had asked for."""
    with Store.open(store_url) as store:
        ann = person(store, "Ann")
        rows = [("messages", "a", ann.id)]
        before = store.exports.register("01", "runs/x", store.state(), rows, "training")
        with store.database.write() as writer:
            writer.execute(sa.text("ALTER TABLE exports DROP COLUMN consent"))
            writer.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    with Store.open(store_url) as store:
        assert store.exports.all() == [before] and store.accounts.people() == [ann]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://ann:SECRET@127.0.0.1:9/db",
        "postgresql+psycopg:///db?host=127.0.0.1:9&password=SECRET",
        "postgresql+psycopg://127.0.0.1:9/db?sslmode=prefer&sslpassword=SECRET",
    ],
)
def test_a_password_is_in_no_config_and_in_no_message(url, monkeypatch):
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg: the extra 'postgres'")
    with pytest.raises(UserError, match="has a password") as refused:
        database.resolve_url(url)
    monkeypatch.setenv("GPTLAB_STORE", url)
    assert database.resolve_url(None) == url
    with pytest.raises(UserError, match="the store postgresql.*127.0.0.1") as gone:
        Store.open(url)
    _, _, rest = url.partition("?")
    for wrong in (
        url.replace("psycopg", "other"),
        f"postgresql+psycopg://a:SECRET@h:nine/db?{rest}",
    ):
        with pytest.raises(UserError, match="the store's URL is") as odd:
            Store.open(wrong)
        assert "SECRET" not in f"{refused.value} {gone.value} {odd.value}"


def test_a_store_is_named_by_its_place_alone(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/store.sqlite?cached_statements=9") as store:
        assert store.database.where == f"sqlite:///{tmp_path}/store.sqlite"


def test_a_log_that_cannot_forget_yet_is_told_and_forgets_later(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.1)
    path = tmp_path / "store.sqlite"

    def told():
        return any(b"a secret" in file.read_bytes() for file in tmp_path.iterdir())

    with Store.open(f"sqlite:///{path}") as store:
        ann = person(store, "Ann", "user")
        conversation, _, _ = chat(store, ann, "a secret")
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        store.conversations.delete(ann.id, conversation.id)
        assert told() and "still holds the text" in caplog.text
        store.conversations.create(ann.id)  # no change waits for the reader
        assert told()
        reader.close()
        store.conversations.create(ann.id)
        assert not told()
