"""Alternatives to picked replies: what goes wrong with one leaves the others."""

import asyncio

import pytest

from gptlab.people.backend import Busy, Model, Piece, Unavailable
from gptlab.people.store.campaigns import Settings
from gptlab.people.web import sampling
from gptlab.people.web.site import Site
from tests import pages
from tests.people.campaigns import chat, person


class Told:
    """A backend that does what the prompt says; it is busy ten times first."""

    def __init__(self, delete):
        self.busy, self.asked, self._delete = 10, [], delete

    def models(self):
        return [Model("m", "policy", 0, None)]

    async def reply(self, ask, deadline=None):
        what = ask.prompt[-1].content
        if self.busy:
            self.busy -= 1
            raise Busy(0.0)
        self.asked.append(what)
        if what.startswith("fail"):
            raise Unavailable("gone")
        if what == "break":
            raise ValueError(f"broken by {what!r}")
        if what == "delete":
            await asyncio.to_thread(self._delete)
        yield Piece(f"another {ask.index}", finish_reason="stop")


@pytest.fixture
def sample(store):
    """Runs a sampling for chats of these texts."""

    def run(*texts):
        ann = person(store, "Ann")
        chats = {text: chat(store, ann, text)[0].id for text in texts}
        made = store.campaigns.create("c", "ranking", Settings(), "system")
        backend = Told(lambda: store.conversations.delete(ann.id, chats["delete"]))

        async def go():
            site = Site(backend, store, pages.SETTINGS, None, {}, {})
            running = sampling.begin(site, made.id, "system", len(texts), 2)
            await running.ended()
            return running

        return asyncio.run(go()), backend, store.campaigns.tasks(made.id)

    return run


def test_what_goes_wrong_with_one_leaves_the_others(sample):
    run, _, tasks = sample("one", "fail", "delete", "two")
    assert (run.queued, run.left_out, run.error) == (2, 2, "")
    assert {task.prompt.messages[-1].content for task in tasks} == {"one", "two"}
    assert all(len(task.candidates) == 3 for task in tasks)


def test_a_model_that_is_gone_ends_it(sample):
    run, backend, _ = sample(*(f"fail {i}" for i in range(6)))
    assert run.error == "gone" and len(backend.asked) == 3


def test_a_defect_ends_it_and_no_text_is_told(sample, caplog):
    run, _, _ = sample("break")
    assert run.error == "ValueError"
    (said,) = (record.getMessage() for record in caplog.records if "sampling" in record.name)
    assert "ValueError at " in said and f"{__name__}:" in said
    assert "broken" not in caplog.text
