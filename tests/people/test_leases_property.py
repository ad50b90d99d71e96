"""Whatever labellers do, in whatever order: no task is lost, none is judged more than wanted."""

import collections

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import stateful
from hypothesis import strategies as st

from gptlab.people.store import LeaseLost, Store
from gptlab.people.store.campaigns import Settings
from gptlab.people.store.schema import judgements, leases
from tests.databases import BACKENDS, Clock, make_store_url
from tests.people.campaigns import best_first, candidate_set, person, plain

TASKS, PEOPLE, SECONDS = 4, 3, 60.0


class Labelling(stateful.RuleBasedStateMachine):
    """People take leases, answer in time or late, once or twice, skip, give back and vanish."""

    url = ""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.store = Store.open(self.url, self.clock)
        self.answers = {}  # token -> (person, judgement)
        self.leases = {}  # token -> (person, lease)
        self.given = collections.Counter()

    def teardown(self):
        self.store.close()

    @stateful.initialize(overlap=st.integers(1, 3), max_skips=st.integers(2, 3))
    def begin(self, overlap, max_skips):
        name = f"c{self.store.audit.head().row}"  # several runs share a database
        settings = Settings(
            overlap=overlap, max_skips=max_skips, lease_seconds=SECONDS, disagreement=1.0
        )
        self.campaign = self.store.campaigns.create(name, "ranking", settings, "system")
        sets = [candidate_set(f"s{i}") for i in range(TASKS)]
        self.store.campaigns.queue(name, sets, "system")
        self.people = [person(self.store, f"p{i}").id for i in range(PEOPLE)]
        self.overlap = overlap

    @stateful.rule(who=st.integers(0, PEOPLE - 1))
    def take(self, who):
        lease = self.store.work.lease(self.campaign.id, self.people[who])
        if lease is not None:
            assert lease.expires_at > self.clock.now
            self.leases[lease.token] = (self.people[who], lease)

    @stateful.rule(seconds=st.sampled_from([1.0, 30.0, SECONDS + 1]))
    def wait(self, seconds):
        self.clock.now += seconds

    def some_lease(self, data):
        """Any that was ever given out, of whoever."""
        tokens = list(self.leases)  # tokens are random, so one is drawn by its number
        token = tokens[data.draw(st.integers(0, len(tokens) - 1))]
        return token, *self.leases[token]

    @stateful.precondition(lambda self: self.leases)
    @stateful.rule(data=st.data())
    def judge(self, data):
        token, who, lease = self.some_lease(data)
        self.answer(token, who, lambda: self.store.work.judge(token, who, best_first(lease)))

    @stateful.precondition(lambda self: self.leases)
    @stateful.rule(data=st.data())
    def skip(self, data):
        token, who, _ = self.some_lease(data)
        self.answer(token, who, lambda: self.store.work.skip(token, who, "unclear"))

    def answer(self, token, who, call):
        head = self.store.audit.head()
        try:
            made = call()
        except LeaseLost:
            assert token not in self.answers and self.store.audit.head() == head
            return
        if token in self.answers:
            assert plain(made) == plain(self.answers[token]) and made.id == self.answers[token].id
            assert self.store.audit.head() == head
        self.answers.setdefault(token, made)

    @stateful.precondition(lambda self: self.leases)
    @stateful.rule(data=st.data())
    def give_back(self, data):
        token, who, _ = self.some_lease(data)
        self.store.work.release(token, who)

    @stateful.precondition(lambda self: self.leases)
    @stateful.rule(data=st.data())
    def renew(self, data):
        token, who, _ = self.some_lease(data)
        try:
            assert self.store.work.renew(token, who).expires_at == self.clock.now + SECONDS
        except LeaseLost:
            pass

    @stateful.invariant()
    def nothing_is_lost_or_doubled(self):
        if not hasattr(self, "campaign"):
            return
        own = judgements.c.campaign_id == self.campaign.id
        with self.store.database.read() as reader:
            rows = reader.execute(sa.select(judgements).where(own)).all()
            held = reader.execute(
                sa.select(leases.c.task_id, leases.c.person_id).where(
                    leases.c.campaign_id == self.campaign.id,
                    leases.c.state == "held",
                    leases.c.expires_at > self.clock.now,
                )
            ).all()
        assert {row.id for row in rows} == {made.id for made in self.answers.values()}
        pairs = [(row.task_id, row.person_id) for row in rows]
        assert len(set(pairs)) == len(pairs), "somebody has answered a task twice"
        judged = collections.Counter(row.task_id for row in rows if row.kind == "ranking")
        busy = judged + collections.Counter(task for task, _ in held)
        assert max(busy.values(), default=0) <= self.overlap, "more people than wanted"
        people = [who for _, who in held]
        assert len(set(people)) == len(people), "somebody holds two tasks"

    @stateful.rule()
    def finish(self):
        """New people can always finish what is left, however it was left behind."""
        self.clock.now += SECONDS + 1
        for i in range(self.overlap + 3):
            who = person(self.store, f"helper {i}").id
            while (lease := self.store.work.lease(self.campaign.id, who)) is not None:
                self.leases[lease.token] = (who, lease)
                made = self.store.work.judge(lease.token, who, best_first(lease))
                self.answers[lease.token] = made
        progress = self.store.figures.progress(self.campaign.id)
        assert progress.done + progress.review == TASKS
        ranked = collections.Counter(a.task for a in self.answers.values() if a.kind == "ranking")
        full = sum(count == self.overlap for count in ranked.values())
        assert full >= progress.done


@pytest.mark.parametrize("backend", BACKENDS)
def test_labelling(backend, request, tmp_path):
    class OnThis(Labelling):
        url = make_store_url(request, backend, tmp_path)

    examples = {"sqlite": 6, "postgresql": 2}[backend]
    if request.config.getoption("-m") == "slow":
        examples = 200
    stateful.run_state_machine_as_test(
        OnThis,
        settings=hypothesis.settings(
            max_examples=examples, stateful_step_count=25, deadline=None,
            phases=[hypothesis.Phase.generate],  # to shrink a failure takes minutes here
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )  # fmt: skip


def test_the_machine_would_notice(request, tmp_path, monkeypatch):
    """With places that are never taken, the same demands fail."""
    from gptlab.people.store import leases

    monkeypatch.setattr(leases, "_FREE", leases._OPEN)
    monkeypatch.setattr(Labelling, "url", make_store_url(request, "sqlite", tmp_path))
    machine = Labelling()
    machine.begin(overlap=1, max_skips=2)
    machine.take(0)
    machine.nothing_is_lost_or_doubled()
    machine.take(1)
    with pytest.raises(AssertionError, match="more people than wanted"):
        machine.nothing_is_lost_or_doubled()
    machine.teardown()
