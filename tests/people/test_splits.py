"""Flagged conversations: most are learnt from; the others are there to evaluate on, untouched."""

import numpy as np
import pytest

from configs import evaluate as evaluate_config
from configs import export as export_config
from gptlab import export
from gptlab.data.records import Comparison, Conversation, Prompt, TokenExample
from gptlab.evals import contamination
from gptlab.people.store import Store
from gptlab.run.errors import UserError
from tests.databases import make_store_url
from tests.fixtures import read_records, write_artifact
from tests.people.campaigns import answer, campaign, candidate_set, chat, person, work_off


def all_kinds_of_feedback(store, who, one, two, flag):
    store.feedback.thumb(who.id, one.id, True)
    store.feedback.thumb(who.id, two.id, False, *((["harmful"], "", 3) if flag else ()))
    store.feedback.choose(who.id, one.id, two.id, 1)
    store.feedback.improve(who.id, two.id, "Better.")


@pytest.fixture
def exported(request, tmp_path, clock, no_fsync):
    """An export of 16 chats, 12 of them flagged; also by their other beginning, and in tasks."""
    url = make_store_url(request, "sqlite", tmp_path)
    with Store.open(url, clock) as store:
        ann = person(store, "Ann", "user")
        for i in range(16):
            conversation, turn, (one, two) = chat(store, ann, f"question {i}", ("Yes.", "No."))
            all_kinds_of_feedback(store, ann, one, two, flag=i < 12)
            edited = store.conversations.say(ann.id, conversation.id, turn.parent, f"edited {i}")
            others = [answer(store, ann, edited.id, text) for text in ("Yes.", "No.")]
            all_kinds_of_feedback(store, ann, *others, flag=i % 2 == 0)
        made = campaign(store, tasks=1)
        for picked in store.campaigns.pick(made.id, 99, seed=0):
            store.campaigns.queue_picked(made.id, picked, candidate_set("x").candidates, "system")
        rank = lambda lease: [*range(1, len(lease.replies) + 1)]  # noqa: E731
        work_off(store, made, person(store), rank)
    config = export_config.get_config()
    config.store.url, config.safety_test_fraction = url, 0.4
    export.run(config, tmp_path / "export")
    return tmp_path / "export"


def test_what_is_flagged_can_be_asked_of_the_models_that_learnt_from_the_rest(exported, tmp_path):
    split = evaluate_config.get_config().data.split
    prompts = read_records(exported, "prompts", split, Prompt)
    asked = {prompt.conversation_id for prompt in prompts}
    assert 3 <= len(asked) <= 11 and len(prompts) > len(asked)
    learnt = read_records(exported, "prompts", "train", Prompt)
    assert learnt and not asked & {prompt.conversation_id for prompt in learnt}

    task = {("dialogues", "train"): [TokenExample("x", np.array([3, 9]), np.array([0, 1]))]}
    tokens = write_artifact(tmp_path / "tokens", "prepare", task, {"corpus": exported})
    sft = write_artifact(
        tmp_path / "sft", "sft", {}, {"tokens": tokens}, data={"name": "dialogues"}
    )
    reward = write_artifact(tmp_path / "reward", "reward", {}, {"comparisons": exported})
    inputs = {"init": sft, "reward": reward, "prompts": exported}
    policy = str(write_artifact(tmp_path / "ppo", "ppo", {}, inputs))
    assert contamination.check_disjoint(prompts, [policy]) == []
    with pytest.raises(UserError, match="seen in training"):
        contamination.check_disjoint([*prompts, *learnt], [policy])

    # Nothing was lost but what is held out.
    comparisons = [
        c for s in export.SPLITS for c in read_records(exported, "comparisons", s, Comparison)
    ]
    demonstrations = [
        c for s in export.SPLITS for c in read_records(exported, "conversations", s, Conversation)
    ]
    assert len(demonstrations) == 2 * (16 - len(asked))
    for kind in ("choice:", "better:", "thumb:"):
        assert sum(c.id.startswith(kind) for c in comparisons) == 2 * (16 - len(asked))
    report = (exported / "report.md").read_text()
    assert "held out, to evaluate safety on" in report
    assert f"| safety prompt | Prompt | test | {len(prompts)} |" in " ".join(report.split())
