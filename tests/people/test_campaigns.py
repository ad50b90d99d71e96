"""Campaigns: what is queued, who gets what, what is judged, decided and counted."""

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time

import pytest
import sqlalchemy as sa

from gptlab.data.records import Message, Prompt
from gptlab.people.store import Forbidden, Invalid, LeaseLost, NotFound, figures
from gptlab.people.store.campaigns import Settings
from gptlab.people.store.judgements import Flag, Turn
from gptlab.people.store.schema import judgements, leases
from tests.people.campaigns import (
    answers,
    best_first,
    campaign,
    candidate_set,
    chat,
    number,
    person,
    set_name,
    work_off,
)


def rows(store, table):
    with store.database.read() as reader:
        return reader.execute(sa.select(table)).all()


def test_queueing_twice_queues_once(store):
    made = campaign(store, tasks=3)
    sets = [candidate_set(f"s{i}") for i in range(5)]
    assert store.campaigns.queue("c", sets + sets[:1], "system", "train") == 2
    tasks = store.campaigns.tasks(made.id)
    assert {task.source for task in tasks} == {f"s{i}" for i in range(5)}
    assert tasks[0].candidates == candidate_set(tasks[0].source).candidates
    assert store.campaigns.states("c")["s4"][1] == "open"
    with pytest.raises(Invalid, match="campaign of rankings, not of demonstrations"):
        store.campaigns.queue_topics("c", ["tea"], "system")
    with pytest.raises(Invalid, match="has 1 replies"):
        store.campaigns.queue("c", [candidate_set("x", 1)], "system")
    with pytest.raises(NotFound):
        store.campaigns.queue("other", sets, "system")


def test_replies_that_say_nothing_are_not_picked(store):
    made, ann = campaign(store, tasks=0), person(store, "Ann", "user")
    blank = ("", " ", "\n\t\r\n", "\u00a0\u2003\u3000", "\x1c\x85")
    _, turn, replies = chat(store, ann, replies=(*blank, "\u3000Hi. "))
    store.conversations.reply(
        ann.id, turn.id, "I can't.", "chat", "0123456789ab", True, refusal="moderation"
    )
    assert not any(text.strip() for text in blank)
    assert [p.message for p in store.campaigns.pick(made.id, 9, seed=0)] == [replies[-1].id]


def test_only_admins_run_campaigns(store):
    made, reviewer = campaign(store), person(store, role="reviewer")
    for call in (
        lambda: store.campaigns.create("d", "ranking", Settings(), reviewer.id),
        lambda: store.campaigns.configure(made.id, Settings(overlap=2), reviewer.id),
        lambda: store.campaigns.set_state(made.id, "closed", reviewer.id),
        lambda: store.campaigns.queue(made.id, [candidate_set("x")], reviewer.id),
    ):
        with pytest.raises(Forbidden):
            call()
    user = person(store, "U", "user")
    with pytest.raises(Forbidden, match="labeller"):
        store.work.lease(made.id, user.id)
    with pytest.raises(Forbidden, match="reviewer"):
        store.review.queue(made.id, person(store, "L").id)


@pytest.mark.parametrize(
    "settings",
    [{"overlap": 0}, {"gold_rate": 1.0}, {"lease_seconds": math.nan}, {"seed": -1}],
)
def test_settings_that_make_no_sense_are_refused(store, settings):
    with pytest.raises(Invalid, match=next(iter(settings))):
        store.campaigns.create("c", "ranking", Settings(**settings), "system")


def test_a_ranking_is_kept_in_the_candidates_own_order(store, clock):
    made, lee = campaign(store, tasks=1, replies=4), person(store)
    lease = store.work.lease(made.id, lee.id)
    assert sorted(number(reply) for reply in lease.replies) == [0, 1, 2, 3]
    assert "0123456789ab" not in repr(lease)  # which model wrote what is not told
    clock.now += 30
    worst = [number(reply) for reply in lease.replies].index(3)
    judgement = store.work.judge(
        lease.token,
        lee.id,
        [10 * rank for rank in best_first(lease)],
        [1 if number(reply) == 2 else None for reply in lease.replies],
        [Flag(worst, "untrue", 1)],
        "note",
    )
    assert judgement.ranks == (1, 2, 3, 4) and judgement.ratings == (None, None, 1, None)
    assert judgement.flags == (Flag(3, "untrue", 1),)
    assert (judgement.seconds, judgement.note) == (30.0, "note")
    assert answers(store, made, lee) == [judgement]


def test_a_request_that_is_sent_twice_counts_once(store):
    made, lee = campaign(store, tasks=2), person(store)
    lease = store.work.lease(made.id, lee.id)
    first = store.work.judge(lease.token, lee.id, [1, 2, 3])
    head = store.audit.head()
    assert store.work.judge(lease.token, lee.id, [3, 2, 1]) == first
    assert store.work.skip(lease.token, lee.id, "unclear") == first
    assert len(rows(store, judgements)) == 1 and store.audit.head() == head


def test_a_page_that_is_loaded_again_shows_the_same(store, clock):
    made, lee = campaign(store, tasks=5), person(store)
    lease = store.work.lease(made.id, lee.id)
    clock.now += 10
    assert store.work.lease(made.id, lee.id) == lease
    assert len(rows(store, leases)) == 1


def test_a_task_has_no_more_people_than_wanted(store, clock):
    made = campaign(store, tasks=1, overlap=2, lease_seconds=60)
    ann, bo, cy = (person(store, name) for name in ("Ann", "Bo", "Cy"))
    first, second = (store.work.lease(made.id, who.id) for who in (ann, bo))
    assert first.token != second.token
    assert store.work.lease(made.id, cy.id) is None
    clock.now += 61  # both have run out, and Cy takes a place
    third = store.work.lease(made.id, cy.id)
    store.work.judge(second.token, bo.id, best_first(second))  # late, but there was room
    with pytest.raises(LeaseLost):
        store.work.judge(first.token, ann.id, [1, 2, 3])
    assert store.work.lease(made.id, ann.id) is None
    store.work.judge(third.token, cy.id, best_first(third))
    assert store.figures.progress(made.id).complete
    with pytest.raises(LeaseLost):
        store.work.renew(first.token, ann.id)


def test_a_lease_is_renewed_released_and_belongs_to_its_person(store, clock):
    made = campaign(store, tasks=1, lease_seconds=60)
    ann, bo = person(store, "Ann"), person(store, "Bo")
    lease = store.work.lease(made.id, ann.id)
    clock.now += 50
    assert store.work.renew(lease.token, ann.id).expires_at == clock.now + 60
    clock.now += 50
    assert store.work.lease(made.id, bo.id) is None
    for call in (store.work.renew, store.work.release):
        with pytest.raises(NotFound):
            call(lease.token, bo.id)
    with pytest.raises(NotFound):
        store.work.judge(lease.token, bo.id, [1, 2, 3])
    store.work.release(lease.token, ann.id)
    taken = store.work.lease(made.id, bo.id)
    with pytest.raises(LeaseLost):
        store.work.judge(lease.token, ann.id, [1, 2, 3])
    store.work.release(taken.token, bo.id)
    assert store.work.lease(made.id, ann.id).token != lease.token


def test_nobody_gets_a_task_twice(store):
    made = campaign(store, tasks=6, overlap=2)
    ann, bo = person(store, "Ann"), person(store, "Bo")
    assert work_off(store, made, ann) == 6
    assert not store.figures.progress(made.id).complete
    assert work_off(store, made, bo) == 6 and work_off(store, made, ann) == 0
    pairs = [(row.task_id, row.person_id) for row in rows(store, judgements)]
    assert len(pairs) == len(set(pairs)) == 12
    assert store.figures.progress(made.id).complete


def test_paused_and_closed_campaigns_give_nothing_out(store):
    made, lee = campaign(store), person(store)
    lease = store.work.lease(made.id, lee.id)
    for state in ("paused", "closed"):
        store.campaigns.set_state(made.id, state, "system")
        assert store.work.lease(made.id, lee.id) is None
    store.work.judge(lease.token, lee.id, [1, 2, 3])  # what was given out may come back
    store.campaigns.set_state(made.id, "open", "system")
    assert store.work.lease(made.id, lee.id) is not None


def test_the_order_shown_is_drawn_for_each_lease(store):
    """Of 30 leases, no place belongs to one reply; and the same seed draws the same."""
    made = campaign(store, tasks=30, replies=3)
    lee, first = person(store), collections.Counter()
    while (lease := store.work.lease(made.id, lee.id)) is not None:
        first[number(lease.replies[0])] += 1
        store.work.judge(lease.token, lee.id, best_first(lease))
    assert set(first) == {0, 1, 2} and max(first.values()) < 21
    assert all(judgement.ranks == (1, 2, 3) for judgement in answers(store, made, lee))


@pytest.mark.parametrize(
    "ranks, ratings, flags, message",
    [
        ([1, 2], None, (), "each of the 3 replies"),
        ([0, 1, 2], None, (), "from 1 on"),
        ([1, True, 2], None, (), "whole number"),
        ([1, 2, 3], [1, 2, 8], (), "a rating is 1 to 7"),
        ([1, 2, 3], None, (Flag(3, "untrue", 1),), "no reply 3"),
        ([1, 2, 3], None, (Flag(0, "ugly", 1),), "a flag is one of"),
        ([1, 2, 3], None, (Flag(0, "untrue", 4),), "severity"),
        ([1, 2, 3], None, (Flag(0, "untrue", 1),) * 2, "once for each reason"),
    ],
)
def test_an_answer_that_is_none_is_refused(store, ranks, ratings, flags, message):
    made, lee = campaign(store), person(store)
    lease = store.work.lease(made.id, lee.id)
    with pytest.raises(Invalid, match=message):
        store.work.judge(lease.token, lee.id, ranks, ratings, flags)
    assert rows(store, judgements) == [] and store.work.lease(made.id, lee.id) == lease


def test_gold_checks_come_at_their_rate_and_are_marked(store):
    made = campaign(store, tasks=40, gold_rate=0.3)
    for i in range(30):
        store.campaigns.queue_gold(made.id, candidate_set(f"g{i}"), [1, 2, 2], "system")
    assert store.campaigns.queue_gold(made.id, candidate_set("g0"), [1, 2, 3], "system") == 0
    good, bad = person(store, "Good"), person(store, "Bad")
    seen = collections.Counter()
    for who, sign in ((good, 1), (bad, -1)):
        for _ in range(20):
            lease = store.work.lease(made.id, who.id)
            seen[set_name(lease)[0]] += 1
            store.work.judge(lease.token, who.id, [4 + sign * r for r in best_first(lease)])
    assert 4 <= seen["g"] <= 24 and seen["s"] == 40 - seen["g"]
    by_name = {one.name: one for one in store.figures.statistics(made.id).labellers}
    assert by_name["Good"].gold.mean == 1.0 and by_name["Bad"].gold.mean == 0.0
    assert by_name["Good"].gold_checks + by_name["Bad"].gold_checks == seen["g"]
    assert store.figures.progress(made.id).tasks == 40  # gold checks are no work to be done


def test_disagreement_goes_to_a_reviewer_whose_decision_stands(store):
    made = campaign(store, tasks=2, overlap=2, disagreement=0.4)
    ann, bo, rae = (
        person(store, "Ann"), person(store, "Bo"), person(store, "Rae", "reviewer"),
    )  # fmt: skip
    work_off(store, made, ann)
    odd = "s0"

    def judge(lease):
        ranks = best_first(lease)
        return [4 - rank for rank in ranks] if set_name(lease) == odd else ranks

    work_off(store, made, bo, judge)
    progress = store.figures.progress(made.id)
    assert (progress.done, progress.review, progress.judged) == (1, 1, 4)
    (case,) = store.review.queue(made.id, rae.id)
    assert case.task.source == odd and case.disagreement == 1.0 and len(case.judgements) == 2
    decision = store.review.decide(case.task.id, rae.id, [1, 1, 2], (Flag(2, "biased", 3),))
    assert store.review.decide(case.task.id, rae.id, [1, 1, 2], (Flag(2, "biased", 3),)) == decision
    assert decision.ranks == (1, 1, 2) and decision.kind == "decision"
    assert store.figures.progress(made.id).complete and store.review.queue(made.id, rae.id) == []
    again = store.review.decide(case.task.id, rae.id, [2, 1, 3])
    assert again.supersedes == decision.id and len(rows(store, judgements)) == 6
    other = next(t for t in store.campaigns.tasks(made.id) if t.source != odd)
    assert store.review.drop(other.id, rae.id, "spam").kind == "drop"


def test_flags_and_skips_go_to_a_reviewer(store):
    made = campaign(store, tasks=3, max_skips=2)
    people = [person(store, name) for name in ("Ann", "Bo")]
    rae = person(store, "Rae", "reviewer")
    mild, bad = (store.work.lease(made.id, who.id) for who in people)
    store.work.judge(mild.token, people[0].id, [1, 2, 3], flags=[Flag(0, "off_topic", 1)])
    store.work.judge(bad.token, people[1].id, [1, 2, 3], flags=[Flag(0, "harmful", 3)])
    for who in people:
        lease = store.work.lease(made.id, who.id)
        with pytest.raises(Invalid, match="reason is one of"):
            store.work.skip(lease.token, who.id, "bored")
        store.work.skip(lease.token, who.id, "too_hard", "what?")
        assert store.work.lease(made.id, who.id) is None
    cases = store.review.queue(made.id, rae.id)
    assert [case.severity for case in cases] == [3, 0] and cases[1].skips == 2
    assert store.review.queue(made.id, rae.id, limit=1) == cases[:1]
    assert store.figures.statistics(made.id).skips == {"too_hard": 2}
    with pytest.raises(Invalid, match="still at this task"):
        campaign_open = store.campaigns.create("d", "ranking", Settings(), "system")
        store.campaigns.queue("d", [candidate_set("z")], "system")
        store.review.drop(store.campaigns.tasks(campaign_open.id)[0].id, rae.id, "")


def test_a_case_is_read_by_whoever_may_decide_it(store):
    made = campaign(store, tasks=2, max_skips=1)
    store.campaigns.create("other", "ranking", Settings(), "system")
    ann, rae, ada = (person(store, role, role) for role in ("labeller", "reviewer", "admin"))
    for who in (ann, rae):  # each skips the other task
        lease = store.work.lease(made.id, who.id)
        store.work.skip(lease.token, who.id, "unclear")
    (case,) = store.review.queue(made.id, rae.id)
    assert store.review.case(made.id, case.task.id, rae.id) == case
    assert [j.person for j in case.judgements] == [ann.id]
    (own,) = (t for t in store.campaigns.tasks(made.id) if t.id != case.task.id)
    assert store.review.case("c", own.id, ada.id).task == own
    store.review.drop(case.task.id, rae.id, "")
    for campaign_, task, who in (
        (made.id, own.id, rae), (made.id, case.task.id, ada), ("other", own.id, ada),
    ):  # fmt: skip
        with pytest.raises(NotFound):
            store.review.case(campaign_, task, who.id)
    with pytest.raises(Forbidden):
        store.review.case(made.id, own.id, ann.id)


def test_more_overlap_opens_tasks_again(store):
    made, lee = campaign(store, tasks=4), person(store)
    work_off(store, made, lee)
    assert store.figures.progress(made.id).complete
    settings = dataclasses.replace(made.settings, overlap=2)
    store.campaigns.configure(made.id, settings, "system")
    progress = store.figures.progress(made.id)
    assert (progress.done, progress.judged, progress.wanted) == (0, 4, 8)
    assert work_off(store, made, person(store, "Bo")) == 4
    assert store.figures.progress(made.id).complete


def test_demonstrations_go_on_from_a_prompt_or_a_topic(store):
    made = store.campaigns.create("d", "demonstration", Settings(), "system")
    prompt = Prompt("p:0", (Message("user", "Hi?"),), "test")
    assert store.campaigns.queue_prompts("d", [prompt, prompt], "system", "validation") == 1
    assert store.campaigns.queue_topics("d", ["tea"], "system") == 1
    lee, given = person(store), {}
    reply = Turn(Message("assistant", "Hello."), "edited", "0123456789ab")
    question = Turn(Message("user", "Why?"))
    while (lease := store.work.lease(made.id, lee.id)) is not None:
        turns = [reply] if lease.prompt else [question, reply]
        for wrong, message in (
            (turns + [question], "ends with a reply"),
            (turns + [reply], "take turns"),
            ([*turns[:-1], Turn(Message("assistant", " "))], "empty"),
            ([*turns[:-1], Turn(Message("assistant", "x"), "taken")], "a model that is named"),
        ):
            with pytest.raises(Invalid, match=message):
                store.work.demonstrate(lease.token, lee.id, wrong)
        with pytest.raises(Invalid, match="asks for a conversation"):
            store.work.judge(lease.token, lee.id, [1, 2])
        given[lease.topic] = store.work.demonstrate(lease.token, lee.id, turns)
    assert set(given) == {"", "tea"} and given["tea"].turns == (question, reply)
    assert store.figures.progress(made.id).complete


def test_statistics_are_those_of_the_judgements(store, clock):
    """Ann and Bo order 4 of 6 tasks alike; the reply shown first always wins with Cy."""
    made = campaign(store, tasks=6, replies=2, overlap=3, disagreement=1.0)
    ann, bo, cy = (person(store, name) for name in ("Ann", "Bo", "Cy"))

    def judged(who, judge, seconds):
        while (lease := store.work.lease(made.id, who.id)) is not None:
            clock.now += seconds
            ratings = [7 if rank == 1 else 2 for rank in judge(lease)]
            store.work.judge(lease.token, who.id, judge(lease), ratings)

    def sometimes(lease):
        ranks = best_first(lease)
        return [3 - rank for rank in ranks] if set_name(lease) < "s2" else ranks

    judged(ann, best_first, 10)
    judged(bo, sometimes, 20)
    judged(cy, lambda lease: [1, 1], 60)
    statistics = store.figures.statistics(made.id)
    assert (statistics.median_seconds, statistics.mean_seconds) == (20.0, 30.0)
    assert statistics.agreement.mean == pytest.approx(4 / 6) and statistics.agreement_pairs == 6
    assert statistics.agreement.low < 4 / 6 < statistics.agreement.high
    assert statistics.tie_rate == pytest.approx(6 / 18)
    assert statistics.ratings == {7: 24, 2: 12}
    assert statistics.position_pairs == 12 and abs(statistics.position_bias.mean) <= 0.5
    assert statistics.alpha.mean < 1 and not math.isnan(statistics.alpha.low)
    labellers = {one.name: one for one in statistics.labellers}
    assert labellers["Ann"].median_seconds == 10.0 and labellers["Ann"].judged == 6
    assert labellers["Cy"].agreement_pairs == 0 and math.isnan(labellers["Cy"].agreement.mean)


def test_statistics_are_computed_once_for_the_same_judgements(store, monkeypatch):
    made, computed, compute = campaign(store, tasks=3), [], figures._statistics
    ann, bo = person(store, "Ann"), person(store, "Bo")

    def slow(given):
        time.sleep(0.05)  # all who ask are there by then
        computed.append(len(given.rows))
        return compute(given)

    monkeypatch.setattr(figures, "_statistics", slow)

    def asked():
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: store.figures.statistics(made.id), range(4)))
        assert all(one is found[0] for one in found)
        return found[0]

    def judged(who, **kwargs):
        lease = store.work.lease(made.id, who.id)
        store.work.judge(lease.token, who.id, best_first(lease), **kwargs)

    assert asked().labellers == ()
    judged(ann, ratings=[7, None, 1])
    judged(bo)
    assert asked().ratings == {1: 1, 7: 1}
    store.delete_person(bo.id, "system")
    assert [one.name for one in asked().labellers] == ["Ann"]
    judged(ann, flags=[Flag(0, "untrue", 1)])
    assert asked().flags == {"untrue": 1}
    assert computed == [0, 2, 1, 2]


def test_a_campaign_without_answers_has_figures(store):
    statistics = store.figures.statistics(campaign(store).id)
    assert math.isnan(statistics.agreement.mean) and statistics.labellers == ()
    progress = store.figures.progress("c")
    assert (progress.tasks, progress.wanted, progress.judged, progress.held) == (3, 3, 0, 0)
    assert not progress.complete


def test_many_labellers_at_once(store_url):
    """Threads with stores of their own: every task has exactly its judgements."""
    from gptlab.people.store import Store

    with Store.open(store_url) as store:
        made = campaign(store, tasks=20, overlap=2)
        people = [person(store, f"p{i}") for i in range(6)]
        errors = []

        def work(who):
            try:
                with Store.open(store_url) as own:
                    work_off(own, made, who)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(who,)) for who in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        pairs = [(row.task_id, row.person_id) for row in rows(store, judgements)]
        assert len(set(pairs)) == len(pairs) == 40
        assert set(collections.Counter(task for task, _ in pairs).values()) == {2}
        assert store.figures.progress(made.id).complete and store.audit.verify() is None
