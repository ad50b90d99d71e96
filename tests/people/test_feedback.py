"""What people said becomes records, and only what may become one."""

import collections
import dataclasses
import math

import pytest

from configs import export as export_config
from gptlab.data.records import Candidate, Comparison, Conversation, Message, Prompt
from gptlab.people import feedback
from gptlab.people.feedback import Weights
from gptlab.people.sieve import filters_of
from gptlab.people.splits import Shares
from gptlab.people.store import Store
from gptlab.people.store.campaigns import Settings
from gptlab.people.store.judgements import Flag, Turn
from gptlab.run.errors import UserError
from tests.databases import make_store_url
from tests.people.campaigns import answer, best_first, campaign, chat, number, person, work_off

CONFIG = export_config.get_config()


@pytest.fixture
def own_store(request, tmp_path, clock):
    """An empty store in a file: for what no database does in its own way."""
    with Store.open(make_store_url(request, "sqlite", tmp_path), clock) as opened:
        yield opened


def harvest(store, weights=None, safety_test=0.0, **filters):
    settings = filters_of(CONFIG.filters)
    own = Weights(**{**CONFIG.weights.to_dict(), **(weights or {})})
    settings = dataclasses.replace(settings, **filters)
    return feedback.harvest(store.content(), settings, own, Shares(0.1, safety_test, 0))


def of_kind(harvested, kind, cls):
    return [i for i in harvested.items if i.kind == kind and isinstance(i.record, cls)]


def order(item):
    """{reply: rank} of a comparison."""
    record = item.record
    return {c.content: r for c, r in zip(record.candidates, record.ranks, strict=True)}


def test_every_source_becomes_its_record(store):
    ann, lee, kim = person(store, "Ann", "user"), person(store, "Lee"), person(store, "Kim")
    _, turn, (one, two, three) = chat(store, ann, "Tea?", ("Green.", "Black.", "None."))
    store.feedback.thumb(ann.id, one.id, True)
    store.feedback.thumb(ann.id, two.id, False, ["untrue", "unhelpful"], severity=3)
    chosen = store.feedback.choose(ann.id, one.id, three.id, -1)
    given, better = store.feedback.improve(ann.id, two.id, "Black, with milk.")
    made = campaign(store, tasks=2, overlap=2)
    work_off(store, made, lee)
    lease = store.work.lease(made.id, kim.id)
    worst = next(i for i, reply in enumerate(lease.replies) if number(reply) == 2)
    store.work.judge(lease.token, kim.id, best_first(lease), flags=[Flag(worst, "harmful", 1)])
    writing = store.campaigns.create("d", "demonstration", Settings(), "system")
    store.campaigns.queue_topics(writing.id, ["a discovery"], "system")
    lease = store.work.lease(writing.id, lee.id)
    turns = [Turn(Message("user", "Hi?")), Turn(Message("assistant", "Hello."), "edited", "0123")]
    store.work.demonstrate(lease.token, lee.id, turns)

    found = harvest(store)
    kinds = collections.Counter((i.kind, type(i.record).__name__) for i in found.items)
    assert kinds == {
        ("ranking", "Comparison"): 3, ("demonstration", "Conversation"): 1,
        ("better", "Conversation"): 1, ("better", "Comparison"): 1, ("choice", "Comparison"): 1,
        ("thumb", "Comparison"): 1, ("flag", "Comparison"): 2, ("safety prompt", "Prompt"): 2,
    }  # fmt: skip
    assert found.left_out == {}

    (wrote,) = of_kind(found, "demonstration", Conversation)
    assert wrote.record.messages == tuple(turn.message for turn in turns)
    assert wrote.record.source == "people:demonstration" and not wrote.simulated
    assert wrote.record.learnt is None  # all that is the assistant's
    (improved,) = of_kind(found, "better", Conversation)
    assert [m.content for m in improved.record.messages] == ["Tea?", "Black, with milk."]
    (above,) = of_kind(found, "better", Comparison)
    assert order(above) == {"Black, with milk.": 1, "Black.": 2} and above.record.weight == 1
    assert above.record.candidates[0].policy == "human"
    assert {("feedback", given.id, ann.id), ("messages", better.id, ann.id)} <= set(above.rows)

    (choice,) = of_kind(found, "choice", Comparison)
    assert order(choice) == {"Green.": 2, "None.": 1} and choice.record.weight == 1
    assert ("feedback", chosen.id, ann.id) in choice.rows
    (thumbs,) = of_kind(found, "thumb", Comparison)
    assert order(thumbs) == {"Green.": 1, "Black.": 2} and thumbs.record.weight == 0.25
    assert thumbs.record.labeller == f"person:{ann.id}" and not thumbs.record.simulated

    ranked = of_kind(found, "ranking", Comparison)
    for item in ranked:
        assert order(item) == {c.content: number(c.content) + 1 for c in item.record.candidates}
        assert item.split == "train" and item.rows[0][0] == "judgements"
    # A task's rankings share its weight: the first has two labellers, the second one.
    assert sorted(item.record.weight for item in ranked) == [0.5, 0.5, 1.0]

    by_severity = {i.record.weight: order(i) for i in of_kind(found, "flag", Comparison)}
    # Not below the reply with a thumb up alone: below all that weren't flagged or turned down.
    assert by_severity[1.0] == {"Green.": 1, "None.": 1, "Black, with milk.": 1, "Black.": 2}
    assert sorted(by_severity[0.25].values()) == [1, 1, 2]
    sources = {i.record.source: i for i in of_kind(found, "safety prompt", Prompt)}
    assert set(sources) == {
        "people:flag:harmful:severity=1", "people:flag:untrue,unhelpful:severity=3",
    }  # fmt: skip
    asked = sources["people:flag:untrue,unhelpful:severity=3"]
    assert asked.record.messages == (Message("user", "Tea?"),) and asked.severity == 3
    assert asked.record.id.startswith(turn.conversation) and asked.split == improved.split


def test_only_what_people_wrote_or_took_is_to_be_learnt(own_store):
    store = own_store
    ann, lee = person(store, "Ann", "user"), person(store, "Lee")
    conversation, _, (first,) = chat(store, ann, "Tea?", ("Grean.",))
    then = store.conversations.say(ann.id, conversation.id, first.id, "Which?")
    second = answer(store, ann, then.id, "Any.")
    _, better = store.feedback.improve(ann.id, second.id, "Sencha.")
    last = store.conversations.say(ann.id, conversation.id, better.id, "How hot?")
    third = answer(store, ann, last.id, "Hot.")
    store.feedback.improve(ann.id, third.id, "70 degrees.")
    writing = store.campaigns.create("d", "demonstration", Settings(), "system")
    prompt = Prompt("q:2", (Message("user", "Hi?"), Message("assistant", "Hm."),
                            Message("user", "Well?")), "chat")  # fmt: skip
    store.campaigns.queue_prompts(writing.id, [prompt], "system", "train")
    turns = [
        Turn(Message("assistant", "Good."), "taken", "0123"), Turn(Message("user", "And?")),
        Turn(Message("assistant", "Bye."), "edited", "0123"),
    ]  # fmt: skip
    lease = store.work.lease(writing.id, lee.id)
    store.work.demonstrate(lease.token, lee.id, turns)

    records = [i.record for i in harvest(store).items if isinstance(i.record, Conversation)]
    said = {r: tuple(message.content for message in r.messages) for r in records}
    learnt = {said[r]: [said[r][number] for number in r.learnt] for r in records}
    assert learnt == {
        ("Tea?", "Grean.", "Which?", "Sencha."): ["Sencha."],
        ("Tea?", "Grean.", "Which?", "Sencha.", "How hot?", "70 degrees."): ["70 degrees."],
        ("Hi?", "Hm.", "Well?", "Good.", "And?", "Bye."): ["Good.", "Bye."],
    }  # fmt: skip
    cleaned, _ = feedback.scrubbed(next(i for i in harvest(store).items if i.kind == "better"))
    assert cleaned.record.learnt == (3,)


def test_no_answer_is_used_without_consent_of_all_whose_words_it_holds(own_store):
    store = own_store
    ann, lee = person(store, "Ann", "user"), person(store, "Lee")
    _, _, (one, two) = chat(store, ann, replies=("Yes.", "No."))
    store.feedback.choose(ann.id, one.id, two.id, 1)
    made = campaign(store, tasks=1)
    (picked, _) = store.campaigns.pick(made.id, 9, seed=0)
    store.campaigns.queue_picked(made.id, picked, [picked.reply], "system")
    work_off(store, made, lee, lambda lease: [*range(1, len(lease.replies) + 1)])
    assert collections.Counter(i.kind for i in harvest(store).items) == {"ranking": 2, "choice": 1}
    assert not harvest(store, consent="publication").items  # nobody has agreed to that

    store.accounts.consent(ann.id, "training", False, "v1")
    without = harvest(store)  # what Lee said of her chat goes too
    assert [i.kind for i in without.items] == ["ranking"]
    assert without.left_out == {
        ("ranking", "no consent to training"): 1, ("choice", "no consent to training"): 1,
    }  # fmt: skip
    store.accounts.consent(ann.id, "training", True, "v1")
    store.accounts.consent(lee.id, "training", False, "v1")
    assert [i.kind for i in harvest(store).items] == ["choice"]


def test_roles_and_simulated_people_are_filtered(own_store):
    store = own_store
    ann, bot = person(store, "Ann", "user"), person(store, "bot", simulated=True)
    _, _, (one, two) = chat(store, ann, replies=("Yes.", "No."))
    store.feedback.choose(ann.id, one.id, two.id, 1)
    made = campaign(store, tasks=1)
    work_off(store, made, bot)
    ranking, choice = harvest(store).items
    assert ranking.record.labeller == "simulated:bot" and ranking.record.simulated
    assert not choice.record.simulated
    people_only = harvest(store, simulated=False)
    assert [i.kind for i in people_only.items] == ["choice"]
    assert people_only.left_out == {("ranking", "simulated"): 1}
    labellers = harvest(store, roles=("labeller",))
    assert [i.kind for i in labellers.items] == ["ranking"]
    assert labellers.left_out == {("choice", "role user"): 1}


def test_who_fails_gold_checks_is_left_out_and_spoils_nothing(own_store):
    store = own_store
    lee, bad = person(store), person(store, "Bad")
    made = campaign(store, tasks=8, overlap=2, gold_rate=0.5, disagreement=1.0)
    sets = [task for task in store.campaigns.tasks(made.id)]
    from gptlab.data.records import CandidateSet

    for i, task in enumerate(sets[:5]):
        item = CandidateSet(f"g{i}", task.prompt, task.candidates)
        store.campaigns.queue_gold(made.id, item, [1, 2, 3], "system")
    work_off(store, made, lee)
    work_off(store, made, bad, lambda lease: [4 - rank for rank in best_first(lease)])
    found = harvest(store, gold_checks=2, max_disagreement=0.1)
    assert len(found.items) == 8 and {i.record.weight for i in found.items} == {1.0}
    assert {i.record.labeller for i in found.items} == {f"person:{lee.id}"}
    assert found.left_out == {("ranking", "failed gold checks"): 8}
    # Who had too few of them isn't judged by them; then the two disagree.
    strict = harvest(store, gold_checks=100, max_disagreement=0.1)
    assert not strict.items and strict.left_out == {("ranking", "labellers disagree"): 16}
    lenient = harvest(store, gold_checks=100, max_disagreement=1.0)
    assert len(lenient.items) == 16 and math.isclose(sum(i.record.weight for i in lenient.items), 8)


def test_a_reviewers_decision_stands_in_the_labellers_place(own_store):
    store = own_store
    ray = person(store, "Ray", "reviewer")
    lee, kim = person(store), person(store, "Kim")
    made = campaign(store, tasks=2, overlap=2, disagreement=0.2)
    work_off(store, made, lee)
    work_off(store, made, kim, lambda lease: [4 - rank for rank in best_first(lease)])
    waiting = harvest(store)
    assert not waiting.items
    assert waiting.left_out == {("ranking", "to be decided by a reviewer"): 4}
    first, second = store.campaigns.tasks(made.id)
    store.review.decide(first.id, ray.id, [3, 1, 1])
    store.review.drop(second.id, ray.id, "unclear")
    (decided,) = harvest(store).items
    assert decided.record.ranks == (2, 1, 1) and decided.record.labeller == f"person:{ray.id}"
    assert harvest(store).left_out == {("ranking", "a reviewer decided"): 4}


def test_flags_wait_for_the_reviewer_as_rankings_do_and_share_their_weight(own_store):
    store = own_store
    ray = person(store, "Ray", "reviewer")
    made = campaign(store, tasks=2, overlap=2)
    for who in (person(store), person(store, "Kim")):
        for severity in (1, 3):
            lease = store.work.lease(made.id, who.id)
            worst = next(i for i, reply in enumerate(lease.replies) if number(reply) == 2)
            flags = [Flag(worst, "harmful", severity)]
            store.work.judge(lease.token, who.id, best_first(lease), flags=flags)
    serious = next(t for t in store.campaigns.tasks(made.id) if t.state == "review")
    found = harvest(store)
    assert found.left_out["flag", "to be decided by a reviewer"] == 2
    assert [i.record.weight for i in of_kind(found, "flag", Comparison)] == [0.125, 0.125]
    (prompt,) = of_kind(found, "safety prompt", Prompt)
    assert prompt.severity == 1 and prompt.record.id != serious.prompt.id
    store.review.decide(serious.id, ray.id, [1, 2, 3], [Flag(2, "harmful", 3)])
    weights = sorted(i.record.weight for i in of_kind(harvest(store), "flag", Comparison))
    assert weights == [0.125, 0.125, 1.0]


def test_flags_compare_with_what_may_be_better(own_store):
    store = own_store
    ann = person(store, "Ann", "user")
    _, turn, (alone,) = chat(store, ann, "Bad?", ("bad",))
    store.feedback.thumb(ann.id, alone.id, False, ["harmful"])
    only = harvest(store)
    assert [i.kind for i in only.items] == ["safety prompt"]  # to evaluate on, all the same
    assert only.left_out[("flag", "nothing to compare with")] == 1
    answer(store, ann, turn.id, "bad")  # the same again is no alternative, nor is nothing
    answer(store, ann, turn.id, "")
    refused = store.conversations.reply(
        ann.id, turn.id, "I can't.", "chat", "0123456789ab", True, refusal="moderation"
    )
    store.feedback.thumb(ann.id, refused.id, False, ["biased"], severity=1)
    unlike = harvest(store)
    assert not of_kind(unlike, "flag", Comparison)
    assert unlike.left_out[("flag", "a blank or refused reply")] == 1
    answer(store, ann, turn.id, "good")
    flags = of_kind(harvest(store), "flag", Comparison)
    assert sorted((order(i), i.record.weight) for i in flags if "bad" in order(i)) == [
        ({"good": 1, "bad": 2}, 0.5)
    ]
    # One prompt, by its worst flag.
    (prompt,) = of_kind(harvest(store), "safety prompt", Prompt)
    assert prompt.severity == 2 and prompt.record.source.endswith("harmful:severity=2")


def test_nothing_is_compared_with_a_blank_or_refused_reply(own_store):
    store = own_store
    ann = person(store, "Ann", "user")
    _, turn, (good, bad, blank) = chat(store, ann, "Tea?", ("Green.", "Black.", " \n"))
    refused = store.conversations.reply(
        ann.id, turn.id, "I can't.", "chat", "0123456789ab", True, refusal="moderation"
    )
    for reply, up in ((good, True), (bad, False), (blank, False), (refused, True)):
        store.feedback.thumb(ann.id, reply.id, up)
    for other in (bad, blank, refused):
        store.feedback.choose(ann.id, good.id, other.id, 1)
    for reply in (bad, blank, refused):
        store.feedback.improve(ann.id, reply.id, f"Better than {reply.content!r}.")
    found = harvest(store)
    compared = {i.kind: order(i) for i in found.items if isinstance(i.record, Comparison)}
    assert compared == {
        "thumb": {"Green.": 1, "Black.": 2}, "choice": {"Green.": 1, "Black.": 2},
        "better": {"Better than 'Black.'.": 1, "Black.": 2},
    }  # fmt: skip
    kinds = collections.Counter((i.kind, type(i.record).__name__) for i in found.items)
    assert kinds.pop(("better", "Conversation")) == 3  # what a person wrote is learnt all the same
    assert set(kinds.values()) == {1}
    assert found.left_out == {
        (kind, "a blank or refused reply"): 2 for kind in ("thumb", "choice", "better")
    }


@pytest.mark.parametrize("simulated", [False, True], ids=["a person", "a program"])
def test_a_flag_is_of_who_flags_whosever_chat_it_is(own_store, simulated):
    store = own_store
    owner = person(store, "Ann", "user", simulated=not simulated)
    judge = person(store, "Lee", simulated=simulated)
    chat(store, owner, "Bad?", ("bad",))
    made = campaign(store, tasks=0)
    (picked,) = store.campaigns.pick(made.id, 1, seed=0)
    other = Candidate("other", "good", "0123456789ab", True)
    store.campaigns.queue_picked(made.id, picked, [other], "system")
    lease = store.work.lease(made.id, judge.id)
    flags = [Flag(lease.replies.index("bad"), "harmful", 1)]
    store.work.judge(lease.token, judge.id, [1, 1], flags=flags)
    found = harvest(store)
    (compared,) = of_kind(found, "flag", Comparison)
    (prompt,) = of_kind(found, "safety prompt", Prompt)
    assert compared.record.simulated is compared.simulated is prompt.simulated is simulated
    whose = "simulated" if simulated else "people"
    assert prompt.record.source == f"{whose}:flag:harmful:severity=1"
    assert {row[2] for row in prompt.rows} == {owner.id, judge.id}


def test_a_turn_with_many_replies_makes_no_wider_comparison(own_store):
    store = own_store
    ann = person(store, "Ann", "user")
    _, _, replies = chat(store, ann, replies=[f"reply {i}" for i in range(9)])
    for i, reply in enumerate(replies[:8]):
        store.feedback.thumb(ann.id, reply.id, i % 2 == 0, ["biased"] if i == 7 else ())
    found = harvest(store)
    (thumbs,) = of_kind(found, "thumb", Comparison)
    assert order(thumbs) == {"reply 4": 1, "reply 6": 1, "reply 5": 2, "reply 7": 2}
    (flag,) = of_kind(found, "flag", Comparison)
    assert order(flag) == {"reply 4": 1, "reply 6": 1, "reply 8": 1, "reply 7": 2}


def test_a_weight_of_nothing_leaves_a_kind_out(own_store):
    store = own_store
    ann = person(store, "Ann", "user")
    _, _, (one, two) = chat(store, ann, replies=("Yes.", "No."))
    store.feedback.choose(ann.id, one.id, two.id, 1)
    store.feedback.thumb(ann.id, one.id, True)
    store.feedback.thumb(ann.id, two.id, False, ["harmful"])
    store.feedback.improve(ann.id, two.id, "Perhaps.")
    work_off(store, campaign(store, tasks=1), person(store))
    nothing = dict.fromkeys(("ranking", "choice", "better", "thumb"), 0.0)
    found = harvest(store, {**nothing, "flag": (0.0, 0.0, 0.0)})
    assert sorted(i.kind for i in found.items) == ["better", "safety prompt"]
    assert not of_kind(found, "better", Comparison)


def test_conversations_that_begin_alike_are_on_one_side(own_store):
    store = own_store
    ann = person(store, "Ann", "user")
    sides = collections.defaultdict(set)
    for i in range(25):
        for text in (f"Question {i}?", f"question  {i}?"):
            conversation, _, (reply,) = chat(store, ann, text)
            then = store.conversations.say(ann.id, conversation.id, reply.id, "And?")
            later = answer(store, ann, then.id, "So.")
            store.feedback.improve(ann.id, later.id, "Well.")
    for item in of_kind(harvest(store), "better", Conversation):
        sides[item.record.messages[0].content.casefold().split()[1]].add(item.split)
    assert len(sides) == 25 and all(len(own) == 1 for own in sides.values())
    counted = collections.Counter(side for own in sides.values() for side in own)
    assert 1 <= counted["validation"] <= 10


def test_personal_data_is_scrubbed_wherever_it_stands(own_store):
    store = own_store
    ann, lee = person(store, "Ann", "user"), person(store)
    mail = "write to ann@example.org"
    conversation = store.conversations.create(ann.id, "", f"system {mail}")
    turn = store.conversations.say(ann.id, conversation.id, None, f"I {mail}", f"context {mail}")
    one, two = (answer(store, ann, turn.id, f"{text} {mail}") for text in ("Yes", "No"))
    store.feedback.choose(ann.id, one.id, two.id, 1)
    store.feedback.thumb(ann.id, two.id, False, ["harmful"])
    store.feedback.improve(ann.id, two.id, f"Never {mail}")
    made = campaign(store, tasks=0)
    for picked in store.campaigns.pick(made.id, 2, seed=0):
        store.campaigns.queue_picked(made.id, picked, [picked.reply], "system")
    work_off(store, made, lee, lambda lease: [1, 2])
    items = harvest(store).items
    assert {i.kind for i in items} == {"ranking", "choice", "better", "flag", "safety prompt"}
    for item in items:
        cleaned, found = feedback.scrubbed(item)
        text = cleaned.record.to_json()
        assert "@" not in text and found["e-mail"] == item.record.to_json().count("@")
        assert text.count("[e-mail]") == found["e-mail"] > 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"consent": "everything"}, "config.filters.consent='everything'"),
        ({"roles": ("user", "boss")}, "'boss' is none of user, labeller"),
    ],
)
def test_filters_that_are_none_are_refused(change, message):
    config = export_config.get_config().filters
    with pytest.raises(UserError, match=message):
        filters_of(type(config)({**config.to_dict(), **change}))
