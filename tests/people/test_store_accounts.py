"""Who may come in, and as whom: invitations, sessions, keys, roles, consent; the audit's chain."""

import dataclasses
import hashlib
import threading

import pytest
import sqlalchemy as sa

from gptlab.people.store import Forbidden, Invalid, NotFound, Store
from gptlab.people.store.campaigns import Settings
from tests.people.campaigns import dump


def raw(store: Store, statement: str) -> list:
    """Rows as they are in the database."""
    with store.database.write() as writer:
        result = writer.execute(sa.text(statement))
        return result.all() if result.returns_rows else []


def test_an_invitation_makes_as_many_people_as_it_says(store, clock):
    invitation, token = store.accounts.invite("labeller", "system", uses=2, simulated=True)
    assert store.accounts.invitation(token) == invitation
    first, second = (store.accounts.accept(token, name) for name in ("Ann", "  Bo  B "))
    assert (second.name, second.role, second.simulated) == ("Bo B", "labeller", True)
    assert store.accounts.people() == [first, second] or store.accounts.people() == [second, first]
    with pytest.raises(NotFound, match="not valid"):
        store.accounts.accept(token, "Cy")
    assert store.accounts.invitation(token) is None and store.accounts.invitations() == []


def test_an_invitation_ends_with_time_and_by_hand(store, clock):
    _, old = store.accounts.invite("user", "system", valid_seconds=60)
    revoked, token = store.accounts.invite("user", "system")
    clock.now += 61
    store.accounts.revoke_invitation(revoked.id, "system")
    for wrong in (old, token, "guess", ""):
        with pytest.raises(NotFound):
            store.accounts.accept(wrong, "Ann")


@pytest.mark.parametrize("deleted", [False, True], ids=["demoted", "deleted"])
def test_an_invitation_ends_with_the_admin_who_made_it(store, deleted):
    accounts = store.accounts
    stays, goes = (accounts.add_person(name, "admin", "system") for name in ("Ann", "Bo"))
    kept, valid = accounts.invite("admin", stays.id)
    tokens = [accounts.invite("admin", goes.id)[1], accounts.sign_in_link(stays.id, goes.id)[1]]
    assert len(accounts.invitations()) == 3
    if deleted:
        store.delete_person(goes.id, goes.id)
    else:
        accounts.set_role(goes.id, "reviewer", stays.id)
    assert accounts.invitations() == [kept]
    for token in tokens:
        assert accounts.invitation(token) is None
        with pytest.raises(NotFound, match="not valid"):
            accounts.accept(token, "Cy")
    assert accounts.accept(valid, "Cy").role == "admin"


def test_an_invitation_leads_to_a_campaign_that_there_is(store):
    made = store.campaigns.create("c", "ranking", Settings(), "system")
    before = dump(store)
    for wrong in ("nothing", "", made.name):
        with pytest.raises(NotFound, match=f"no campaign with the id {wrong!r}"):
            store.accounts.invite("labeller", "system", campaign=wrong)
    assert dump(store) == before
    invitation, _ = store.accounts.invite("labeller", "system", campaign=made.id)
    assert invitation.campaign == made.id


def test_a_link_signs_in_once(store):
    ann = store.accounts.add_person("Ann", "reviewer", "system")
    _, token = store.accounts.sign_in_link(ann.id, "system")
    assert store.accounts.accept(token, "ignored") == ann
    with pytest.raises(NotFound):
        store.accounts.accept(token, "ignored")


def test_sessions_last_as_long_as_they_say(store, clock):
    ann = store.accounts.add_person("Ann", "user", "system")
    session, token = store.accounts.open_session(ann.id, valid_seconds=100)
    _, other = store.accounts.open_session(ann.id, valid_seconds=1000)
    assert store.accounts.check_session(token) == session and session.person == ann
    assert len(session.csrf) >= 32 and session.csrf not in token
    clock.now += 100
    assert store.accounts.check_session(token) is None
    assert store.accounts.check_session(other) is not None
    store.accounts.close_session(other)
    assert store.accounts.check_session(other) is None
    _, third = store.accounts.open_session(ann.id)
    assert store.accounts.close_sessions(ann.id, ann.id) == 1
    assert store.accounts.check_session(third) is None


def test_a_role_is_signed_in_as_long_as_one_session_of_it_is(store, clock):
    ann, ada = (store.accounts.add_person("A", role, "system") for role in ("user", "admin"))
    other = store.accounts.add_person("Ida", "admin", "system")
    store.accounts.open_session(ann.id)
    assert store.accounts.signed_in("user") and not store.accounts.signed_in("admin")
    store.accounts.open_session(ada.id, valid_seconds=100)
    _, newer = store.accounts.open_session(ada.id, valid_seconds=200)
    store.accounts.close_session(newer)
    assert store.accounts.signed_in("admin")  # by the older one
    clock.now += 100
    assert not store.accounts.signed_in("admin")
    store.accounts.open_session(ada.id)
    store.accounts.set_role(ada.id, "user", other.id)
    assert not store.accounts.signed_in("admin")
    store.accounts.open_session(other.id)
    store.accounts.set_role(ada.id, "admin", other.id)
    store.delete_person(other.id, other.id)
    assert store.accounts.signed_in("admin")
    store.accounts.close_sessions(ada.id, ada.id)
    assert not store.accounts.signed_in("admin")


def test_api_keys_are_callers_of_their_own(store, clock):
    ann = store.accounts.add_person("Ann", "user", "system")
    key, token = store.accounts.create_api_key(ann.id, "script", ann.id, per_minute=7)
    caller = store.accounts.check_api_key(token)
    assert caller is not None and caller.requests_per_minute == 7
    # Each has its own rate, also beside another key of the same person and name.
    _, twin = store.accounts.create_api_key(ann.id, "script", ann.id, per_minute=1)
    other = store.accounts.check_api_key(twin)
    assert other is not None and other.name != caller.name
    assert store.accounts.check_api_key(token) == caller
    assert store.accounts.api_person(token) == ann
    assert token.startswith("gptlab-") and store.accounts.check_api_key(token + "x") is None
    _, short = store.accounts.create_api_key(ann.id, "short", "system", valid_seconds=10)
    clock.now += 11
    assert store.accounts.check_api_key(short) is None
    store.accounts.revoke_api_key(key.id, ann.id)
    assert store.accounts.check_api_key(token) is None and store.accounts.api_person(token) is None


def test_no_token_is_in_the_database(store):
    ann = store.accounts.add_person("Ann", "user", "system")
    tokens = [
        store.accounts.invite("user", "system")[1],
        store.accounts.open_session(ann.id)[1],
        store.accounts.create_api_key(ann.id, "k", "system")[1],
    ]
    everything = dump(store)
    for token in tokens:
        assert len(token) >= 43  # 256 bits
        assert token not in everything
        assert hashlib.sha256(token.encode()).hexdigest() in everything


def test_only_an_admin_runs_the_accounts(store):
    admin = store.accounts.add_person("Ada", "admin", "system")
    ann = store.accounts.add_person("Ann", "reviewer", admin.id)
    refused = (
        lambda: store.accounts.add_person("Bo", "user", ann.id),
        lambda: store.accounts.invite("admin", ann.id),
        lambda: store.accounts.set_role(ann.id, "admin", ann.id),
        lambda: store.accounts.create_api_key(admin.id, "k", ann.id),
        lambda: store.accounts.sign_in_link(admin.id, ann.id),
        lambda: store.accounts.close_sessions(admin.id, ann.id),
        lambda: store.delete_person(admin.id, ann.id),
    )
    before = dump(store)
    for call in refused:
        with pytest.raises(Forbidden, match="role of admin"):
            call()
    assert dump(store) == before
    with pytest.raises(Invalid, match="only admin"):
        store.accounts.set_role(admin.id, "user", "system")
    assert store.accounts.set_role(ann.id, "admin", admin.id).role == "admin"
    assert store.accounts.set_role(admin.id, "user", ann.id).role == "user"
    assert not store.accounts.person(admin.id).may("labeller")


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "nul\0", "half \ud800"])
def test_a_name_that_is_none_is_refused(store, name):
    with pytest.raises(Invalid, match="name"):
        store.accounts.add_person(name, "user", "system")


def test_the_newest_answer_is_the_consent(store):
    ann = store.accounts.add_person("Ann", "user", "system")
    assert store.accounts.consents(ann.id) == {}
    for given, version in ((True, "v1"), (False, "v1"), (True, "v2")):
        store.accounts.consent(ann.id, "training", given, version)
    answer = store.accounts.consents(ann.id)["training"]
    assert (answer.given, answer.text_version) == (True, "v2")
    assert raw(store, "SELECT count(*) FROM consents")[0][0] == 3
    with pytest.raises(Invalid, match="training, publication"):
        store.accounts.consent(ann.id, "everything", True, "v1")


def test_the_audit_says_who_did_what(store, clock):
    admin = store.accounts.add_person("Ada", "admin", "system")
    clock.now += 5
    ann = store.accounts.add_person("Ann", "user", admin.id)
    entry = store.audit.entries(actor=admin.id)[-1]
    assert (entry.action, entry.object, entry.at) == (
        "person.add", f"people:{ann.id}", clock.now,
    )  # fmt: skip
    assert [e.row for e in store.audit.entries()] == [1, 2]
    assert store.audit.entries(after=1, object=f"people:{ann.id}") == [entry]
    assert "Ann" not in repr(store.audit.entries())


def test_tampering_with_the_audit_shows(store):
    for name in ("Ada", "Bo", "Cy", "Di"):
        store.accounts.add_person(name, "user", "system")
    known = store.audit.head()
    assert store.audit.verify() is None and store.audit.verify(known) is None
    raw(store, "UPDATE audit SET actor = 'nobody' WHERE id = 2")
    assert "row 2" in store.audit.verify()
    raw(store, "UPDATE audit SET actor = 'system' WHERE id = 2")
    assert store.audit.verify() is None
    last = raw(store, "SELECT * FROM audit WHERE id = 4")[0]
    raw(store, "DELETE FROM audit WHERE id = 4")
    assert "ends at row 3" in store.audit.verify()
    # With the head put back as well, only what was kept elsewhere tells.
    raw(store, f"UPDATE head SET row = 3, hash = '{last.previous}'")
    assert store.audit.verify() is None
    assert f"row {known.row}" in store.audit.verify(known)
    store.accounts.add_person("Ed", "user", "system")
    assert f"row {known.row}" in store.audit.verify(known)
    raw(store, "UPDATE audit SET id = 9 WHERE id = 2")
    assert "row 2 of the audit is missing" in store.audit.verify()


def test_many_at_once_make_one_chain(store):
    """Threads that write at once: no row is lost, and the chain has no fork."""
    _, token = store.accounts.invite("user", "system", uses=5)
    accepted, refused = [], []

    def join(number: int) -> None:
        try:
            accepted.append(store.accounts.accept(token, f"person {number}"))
        except NotFound:
            refused.append(number)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(accepted), len(refused)) == (5, 7)
    assert len(store.accounts.people()) == 5
    assert store.audit.verify() is None
    assert store.audit.head().row == len(store.audit.entries(limit=1000)) == 11


def test_what_is_returned_can_not_be_changed(store):
    ann = store.accounts.add_person("Ann", "user", "system")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ann.role = "admin"
