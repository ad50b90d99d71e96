"""A simulated labeller at a real server: what is taken out of its hands doesn't stop it."""

import numpy as np

from gptlab.data.records import Candidate
from gptlab.people import http_labeller
from gptlab.people.labellers import SimulatedLabeller
from gptlab.people.store.campaigns import Settings
from tests import pages
from tests.people.campaigns import chat, person
from tests.people.test_access import Short


class Interrupted:
    """Scores by length; something happens while it reads its first task."""

    name = "interrupted"

    def __init__(self, happens):
        self.happens = [happens]

    def __call__(self, prompts, replies):
        if self.happens:
            self.happens.pop()(replies)
        return np.array([len(reply) for reply in replies], np.float32)


def test_a_text_that_is_deleted_while_it_is_judged_costs_one_task(tmp_path):
    with pages.served(tmp_path, Short()) as site:
        store, chats = site.store, {}
        ann = person(store, "Ann", "user")
        made = store.campaigns.create("c", "ranking", Settings(), "system")
        for text in ("One.", "Two.", "Three."):
            conversation, _, _ = chat(store, ann, f"{text}?", (text,))
            chats[text] = conversation.id
        for picked in store.campaigns.pick(made.id, 9, seed=0):
            others = [Candidate("other", "Ho.", "0123456789ab", True)]
            store.campaigns.queue_picked(made.id, picked, others, "system")
        _, token = store.accounts.invite("labeller", "system", simulated=True)

        def delete(replies):
            (text,) = chats.keys() & set(replies)
            store.conversations.delete(ann.id, chats.pop(text))

        labeller = SimulatedLabeller(Interrupted(delete), noise=0.0, tie_margin=0.0, seed=0)
        with http_labeller.join(site.url, token, "bot") as client:
            answers = list(http_labeller.work(client, made.id, labeller, 5))
    assert len(answers) == len(chats) == 2
    assert {text for one in answers for text in one.replies} == {*chats, "Ho."}
