"""What the database behind the store keeps to itself."""

import traceback

import pytest
import sqlalchemy as sa

from gptlab.people.store.schema import people
from tests.people.campaigns import person


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
