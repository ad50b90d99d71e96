"""What an evaluation says of systems that answered the same prompts: figures, gate and tables."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gptlab.evals import diversity, preference
from gptlab.evals.preference import Bootstrap


@dataclasses.dataclass
class Replies:
    """One system's replies to all P prompts, in their order, and what was measured on each."""

    tokens: list[list[int]]  # stop token included
    texts: list[str]
    finished: np.ndarray  # bool [P], ended by itself
    lengths: np.ndarray  # int64 [P], tokens, without the stop token
    log_ratio: np.ndarray  # float64 [P], log policy - log SFT of the whole reply, nats
    reward: np.ndarray  # float64 [P], by the reward model that PPO maximised
    reward_shuffled: np.ndarray  # float64 [P], the same replies under other prompts
    judge: np.ndarray  # float64 [P], by the reward model that PPO never saw
    base_nats: np.ndarray  # float64 [P], surprise of the pretrained model, nats
    base_tokens: np.ndarray  # float64 [P]
    gold: np.ndarray  # float64 [P]
    reviews: np.ndarray | None  # float64 [P], by the classifier of human reviews


def summarise(
    systems: Mapping[str, Replies],
    held_out: Mapping[str, Mapping[str, float]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """All figures: one block for each system, and one for each comparison of two systems."""
    count = diversity.equal_token_count({name: r.tokens for name, r in systems.items()})
    figures: dict[str, Any] = {
        "num_prompts": len(systems["policy"].texts),
        "diversity_tokens": count,
    }
    for name, replies in systems.items():
        figures[name] = describe(replies, count, bootstrap)
        figures[name]["pretraining_loss"] = held_out[name]["loss"]
        figures[name]["pretraining_bits_per_byte"] = held_out[name]["bits_per_byte"]
    figures["base"] = {
        "pretraining_loss": held_out["base"]["loss"],
        "pretraining_bits_per_byte": held_out["base"]["bits_per_byte"],
    }
    figures["over_baseline"] = compare(systems["policy"], systems["baseline"], bootstrap)
    if "previous" in systems:
        figures["over_previous"] = compare(systems["policy"], systems["previous"], bootstrap)
        baseline = systems["baseline"].gold
        figures["over_previous"]["gold_difference_kl_matched"] = preference.kl_matched_difference(
            systems["policy"].gold - baseline, systems["policy"].log_ratio,
            systems["previous"].gold - baseline, systems["previous"].log_ratio, bootstrap,
        )  # fmt: skip
    return figures


def describe(replies: Replies, num_tokens: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """What one system is like; distinct-2 over its first `num_tokens` tokens."""
    reply, share = diversity.most_common_reply(replies.texts)
    judged = {} if replies.reviews is None else {"review_classifier": replies.reviews}
    judged |= {"gold": replies.gold, "reward_model": replies.reward, "judge_model": replies.judge}
    return {
        **{name: preference.mean_interval(values, bootstrap) for name, values in judged.items()},
        "kl": preference.mean_interval(replies.log_ratio, bootstrap),
        "distinct_2": diversity.distinct_ngrams(replies.tokens, 2, num_tokens),
        "most_common_share": share,
        "most_common_reply": reply,
        "shuffled_drop": preference.paired_difference(
            replies.reward, replies.reward_shuffled, bootstrap
        ),
        "base_perplexity": float(np.exp(replies.base_nats.sum() / replies.base_tokens.sum())),
        "end_rate": float(replies.finished.mean()),
        "length": preference.mean_interval(replies.lengths, bootstrap),
    }


def compare(replies: Replies, others: Replies, bootstrap: Bootstrap) -> dict[str, Any]:
    """Two systems on the same prompts, by gold and by every judge."""
    outcomes = preference.wins(replies.gold, others.gold)
    figures: dict[str, Any] = {
        "gold_difference": preference.paired_difference(replies.gold, others.gold, bootstrap),
        "win_rate": preference.mean_interval(outcomes, bootstrap),
        "tie_rate": preference.mean_interval(outcomes == 0.5, bootstrap),
        "win_rate_length_controlled": preference.length_controlled_win_rate(
            outcomes, replies.lengths, others.lengths, bootstrap
        ),
        "win_rate_reward_model": preference.win_rate(replies.reward, others.reward, bootstrap),
        "win_rate_judge_model": preference.win_rate(replies.judge, others.judge, bootstrap),
    }
    if replies.reviews is not None and others.reviews is not None:
        figures["win_rate_review_classifier"] = preference.win_rate(
            replies.reviews, others.reviews, bootstrap
        )
    return figures


def gate(figures: Mapping[str, Any], rules: ConfigDict) -> list[str]:
    """Why the policy may not be promoted, a line for each rule it breaks; empty if it may."""
    policy, baseline, over = figures["policy"], figures["baseline"], figures["over_baseline"]
    checks = {
        "win rate over SFT, lower end": (over["win_rate"].low, ">=", rules.min_win_rate_low),
        "gold score over SFT": (over["gold_difference"].mean, ">=", rules.min_gold_difference),
        "share of the most common reply": (
            policy["most_common_share"], "<=", rules.max_most_common_share,
        ),
        "distinct-2 as a share of SFT's": (
            policy["distinct_2"] / baseline["distinct_2"], ">=", rules.min_distinct_2_ratio,
        ),
    }  # fmt: skip
    failures = []
    for what, (value, sign, limit) in checks.items():
        # Written so that a figure that is not a number fails as well.
        if not (value >= limit if sign == ">=" else value <= limit):
            failures.append(f"{what} is {value:.3f}, must be {sign} {limit}")
    return failures


def flatten(figures: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """('eval/policy/gold/mean', 0.3) for every number in the figures."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)


LABELS = {
    "gold": "gold score",
    "reward_model": "score of PPO's reward model",
    "judge_model": "score of the unseen reward model",
    "review_classifier": "score of the review classifier",
    "base_perplexity": "perplexity under the base model",
    "kl": "KL to SFT, nats a reply",
    "distinct_2": "distinct-2 at equal token count",
    "most_common_share": "share of the most common reply",
    "shuffled_drop": "score lost under another prompt",
    "end_rate": "replies that end by themselves",
    "length": "tokens a reply",
    "pretraining_loss": "held-out pretraining loss",
    "gold_difference": "gold score, difference",
    "gold_difference_kl_matched": "gold score, difference at equal KL",
    "win_rate": "win rate by gold score",
    "tie_rate": "ties by gold score",
    "win_rate_length_controlled": "win rate, length-controlled",
    "win_rate_reward_model": "win rate by PPO's reward model",
    "win_rate_judge_model": "win rate by the unseen reward model",
    "win_rate_review_classifier": "win rate by the review classifier",
}
TITLES = {"policy": "policy", "previous": "previous", "baseline": "SFT"}


def tables(figures: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The figures as tables, (header, rows) by heading."""
    systems = [name for name in ("baseline", "previous", "policy") if name in figures]
    kinds = {"over_baseline": "over SFT", "over_previous": "over the previous policy"}
    kinds = {name: title for name, title in kinds.items() if name in figures}
    alone = [
        [label, *(figures[name].get(key) for name in systems)]
        for key, label in LABELS.items()
        if any(key in figures[name] for name in systems)
    ]
    paired = [
        [label, *(figures[name].get(key) for name in kinds)]
        for key, label in LABELS.items()
        if any(key in figures[name] for name in kinds)
    ]
    return {
        "Systems": (["", *(TITLES[name] for name in systems)], alone),
        "Policy against": (["", *kinds.values()], paired),
    }
