"""The baseline that PPO has to beat: the best of n replies of the SFT model, by PPO's reward model.

It needs no training, and its KL to the SFT model is at most log n - (n - 1) / n, so it says what
the same reward model buys at each KL. Where a policy of larger KL gains no more, PPO has only found
an expensive way to rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.evals import preference, report
from gptlab.evals.preference import Bootstrap, Interval


@dataclasses.dataclass(frozen=True)
class Draws:
    """N replies of the SFT model to each of the first P of all prompts."""

    reward: np.ndarray  # float64 [P, N], by the reward model that PPO maximised
    gold: np.ndarray  # float64 [P, N]


def summarise(
    draws: Draws,
    sizes: Sequence[int],
    gold: np.ndarray,
    baseline_gold: np.ndarray,
    log_ratio: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Best of n for each n, beside the policy on the same prompts.

    Every n uses all N draws of a prompt: the mean over all subsets of n. The policy's gain at the
    KL of best of n is that of the mixture with the SFT model that `kl_matched_difference` describes
    (and best of n is mixed where the policy's KL is the smaller one). As the bound is taken for
    best of n's KL, the policy may spend a little more: the comparison favours the policy.

    Args:
      draws: of the SFT model.
      sizes: the ns, each at most N.
      gold: [P' >= P], gold score of the policy's reply to each prompt.
      baseline_gold: [P'], of the SFT model's own reply, which is none of the draws.
      log_ratio: [P'], log policy - log SFT of the policy's replies.
      bootstrap: how intervals are made.
    """
    prompts, samples = draws.gold.shape
    gold, baseline_gold, log_ratio = (x[:prompts] for x in (gold, baseline_gold, log_ratio))
    single = draws.gold.mean(1)  # best of one: the SFT model, with less noise than by one reply
    figures: dict[str, Any] = {
        "num_prompts": prompts,
        "samples": samples,
        "sft_gold": preference.mean_interval(single, bootstrap),
        "policy": {
            "kl": preference.mean_interval(log_ratio, bootstrap),
            "gold": preference.mean_interval(gold, bootstrap),
            "gold_difference": preference.mean_interval(gold - single, bootstrap),
            "win_rate": preference.win_rate(gold, baseline_gold, bootstrap),
        },
    }
    outcomes = preference.wins(draws.gold, baseline_gold[:, None])  # [P, N]
    for n in sizes:
        best = preference.best_of_n(draws.reward, draws.gold, n)
        bound = preference.best_of_n_kl_bound(n)
        figures[str(n)] = {
            "kl": bound,
            "reward_model": preference.mean_interval(
                preference.best_of_n(draws.reward, draws.reward, n), bootstrap
            ),
            "gold": preference.mean_interval(best, bootstrap),
            "gold_difference": preference.mean_interval(best - single, bootstrap),
            "win_rate": preference.mean_interval(
                preference.best_of_n(draws.reward, outcomes, n), bootstrap
            ),
            "policy_difference": preference.paired_difference(gold, best, bootstrap),
            "policy_difference_kl_matched": preference.kl_matched_difference(
                gold - single, log_ratio, best - single, np.full(prompts, bound), bootstrap
            ),
        }
    return figures


def sizes_of(figures: Mapping[str, Any]) -> list[int]:
    """The ns that were measured, ascending."""
    return sorted(int(name) for name in figures if name.isdigit())


def nearest(figures: Mapping[str, Any], kl: float) -> int:
    """The n whose KL is the nearest to a policy's: least is left to the mixture there."""
    return min(sizes_of(figures), key=lambda n: abs(preference.best_of_n_kl_bound(n) - kl))


def ahead(policy_kl: float, best: Mapping[str, Any]) -> str:
    """Which of the two is surely better at equal KL: 'policy', 'best of n', or 'open'.

    The one with the smaller KL is, if its gold score is higher even so. The other one is, if it
    stays higher when it is mixed down; if it doesn't, nothing follows, as that is a lower bound.
    """
    plain: Interval = best["policy_difference"]
    matched: Interval = best["policy_difference_kl_matched"]
    further = policy_kl > best["kl"]
    policy_wins, best_wins = (matched, plain) if further else (plain, matched)
    if policy_wins.low > 0:
        return "policy"
    return "best of n" if best_wins.high < 0 else "open"


def table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """SFT, each n and the policy: KL, gold score, and which of the two is ahead at equal KL."""
    header = [
        "", "KL to SFT, nats a reply", "gold score", "gold score over SFT", "win rate over SFT",
        "policy minus this, gold score", "the same, mixed down to equal KL", "surely ahead",
    ]  # fmt: skip
    rows: list[list[Any]] = [["SFT", 0.0, figures["sft_gold"], 0.0, 0.5, None, None, None]]
    for n in sizes_of(figures):
        best = figures[str(n)]
        rows.append(
            [
                f"best of {n}", f"at most {best['kl']:.3f}", best["gold"],
                best["gold_difference"], best["win_rate"], best["policy_difference"],
                best["policy_difference_kl_matched"], ahead(figures["policy"]["kl"].mean, best),
            ]
        )  # fmt: skip
    policy = figures["policy"]
    rows.append(
        [
            "policy", policy["kl"], policy["gold"], policy["gold_difference"], policy["win_rate"],
            None, None, None,
        ]
    )  # fmt: skip
    return header, rows


def curve(figures: Mapping[str, Any]) -> report.Curve:
    """Gold score against KL: SFT, then each n."""
    sizes = sizes_of(figures)
    return (
        [0.0, *(figures[str(n)]["kl"] for n in sizes)],
        [figures["sft_gold"], *(figures[str(n)]["gold"] for n in sizes)],
    )
