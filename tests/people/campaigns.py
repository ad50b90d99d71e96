"""Campaigns and chats in a store, and people to work on them."""

import dataclasses
from collections.abc import Sequence

import sqlalchemy as sa

from gptlab.data.records import Candidate, CandidateSet, Message, Prompt
from gptlab.people.store import Store
from gptlab.people.store.campaigns import Campaign, Settings
from gptlab.people.store.judgements import Judgement
from gptlab.people.store.person import Person
from gptlab.people.store.schema import metadata


def candidate_set(name: str, replies: int = 3) -> CandidateSet:
    """A set whose replies say their own number."""
    prompt = Prompt(f"{name}:0", (Message("user", f"What about {name}?"),), "test")
    candidates = tuple(
        Candidate(f"{name}-{i}", f"reply {i} to {name}", "0123456789ab", True)
        for i in range(replies)
    )
    return CandidateSet(name, prompt, candidates)


def person(store: Store, name: str = "Lee", role: str = "labeller", **kwargs) -> Person:
    """Somebody who has consented to training."""
    added = store.accounts.add_person(name, role, "system", **kwargs)
    if not added.simulated:
        store.accounts.consent(added.id, "training", True, "v1")
    return added


def campaign(store: Store, tasks: int = 3, replies: int = 3, **settings) -> Campaign:
    """An open ranking campaign with tasks s0, s1, ..."""
    made = store.campaigns.create("c", "ranking", Settings(**settings), "system")
    sets = [candidate_set(f"s{i}", replies) for i in range(tasks)]
    assert store.campaigns.queue(made.id, sets, "system", "train") == tasks
    return made


def number(reply: str) -> int:
    """Which reply of its set this is."""
    return int(reply.split()[1])


def best_first(lease) -> list[int]:
    """Ranks, in the order shown, of somebody who likes reply 0 best, then 1, ..."""
    return [number(reply) + 1 for reply in lease.replies]


def set_name(lease) -> str:
    """Which set a lease shows."""
    return lease.replies[0].split()[-1]


def work_off(store: Store, where: Campaign, who: Person, judge=None) -> int:
    """Judges until there is nothing left; returns how many."""
    count = 0
    while (lease := store.work.lease(where.id, who.id)) is not None:
        store.work.judge(lease.token, who.id, (judge or best_first)(lease))
        count += 1
    return count


def answers(store: Store, where: Campaign, who: Person) -> list[Judgement]:
    """What a person has answered in a campaign, oldest first."""
    own = (where.id, who.id)
    return [one for one in store.content().judgements if (one.campaign, one.person) == own]


def plain(judgement):
    """A judgement without what differs between two equal ones."""
    return dataclasses.replace(judgement, id="", created_at=0.0)


def chat(store: Store, who: Person, text: str = "Hello?", replies: Sequence[str] = ("Hi.",)):
    """(a conversation, its one turn, the replies to it)."""
    conversation = store.conversations.create(who.id, "About " + text)
    turn = store.conversations.say(who.id, conversation.id, None, text)
    return conversation, turn, [answer(store, who, turn.id, reply) for reply in replies]


def answer(store: Store, who: Person, turn: str, text: str):
    """A model's reply."""
    return store.conversations.reply(who.id, turn, text, "chat", "0123456789ab", True, {"seed": 1})


def dump(store: Store) -> str:
    """Every value of every table."""
    with store.database.read() as reader:
        return "\n".join(
            repr(tuple(row))
            for table in metadata.sorted_tables
            for row in reader.execute(sa.select(table))
        )
