"""What each stage of the rounds shows: its figures, what stands beside them, and what is asked.

Everything is read from the stages' own manifests. A figure that a manifest does not hold is None:
it is reported as not measured, and no demand on it is met.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from gptlab.data.dedup import SPLITS
from gptlab.evals import best_of_n, preference, report, suite
from gptlab.evals.preference import Interval
from gptlab.run import artifact

# What the loop is asked to show. A single seed can't show more than that of itself. What a config's
# gate asks before it promotes a policy is its own choice (configs/common.py), and may differ.
MIN_END_RATE = 0.95
MIN_ON_POLICY_ACCURACY = 0.70
MIN_REVIEWS_ACCURACY = 0.65
MIN_GOLD_GAIN = 0.25
MIN_WIN_RATE_LOW = 0.5
MAX_MOST_COMMON = 0.05
MIN_DISTINCT_RATIO = 0.5

Record = Mapping[str, Any]  # as in rounds_report


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the report.

    value: a number, an Interval, or None where nothing was measured.
    beside: what it is to be compared with, by name.
    demand: in words; empty if there is none.
    met: None without a demand.
    main: whether a terminal shows it.
    """

    stage: str
    name: str
    value: Any
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    demand: str = ""
    met: bool | None = None
    main: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields, an interval as its three numbers."""
        value = self.value.to_json() if isinstance(self.value, Interval) else self.value
        return {**dataclasses.asdict(self), "value": value}


def collect(root: epath.Path, preparation: Record, rounds: Iterable[Record]) -> list[Figure]:
    """The figures of all stages, in the order in which they ran.

    Args:
      root: what the records' artifact paths are relative to.
      preparation: the record of what is done once.
      rounds: one record a round, at least one.
    """
    rounds = list(rounds)
    once = {name: _results(root, preparation, name) for name in preparation["steps"]}
    figures = [
        *of_clean(once.get("clean", {})),
        *of_vocabulary(once.get("vocabulary", {})),
        *of_pretrain(once.get("pretrain", {})),
        *of_sft(once.get("sft", {}), rounds[0]["figures"]["baseline"], _reply_tokens(root, rounds)),
    ]
    if "reviews" in once:
        figures += of_reward("reviews", once["reviews"], "accuracy", MIN_REVIEWS_ACCURACY)
    for record in rounds:
        number = record["round"]
        for name, demand in (("reward", MIN_ON_POLICY_ACCURACY), ("judge", None)):
            results = _results(root, record, name)
            figures += of_reward(
                f"round {number}: {name}", results, "on_policy_clean_accuracy", demand
            )
        figures += of_policy(f"round {number}: ppo", record["figures"])
    return figures


def of_clean(results: Mapping[str, Any]) -> list[Figure]:
    """Kept and dropped records."""
    kept, dropped = results.get("records", {}), results.get("dropped", {})
    return [
        Figure("clean", "records kept", sum(kept.values()) if kept else None, kept),
        Figure("clean", "records dropped", sum(dropped.values()) if kept else None, dropped),
        Figure("clean", "unreadable records", _number(results.get("quarantined"))),
    ]


def of_vocabulary(results: Mapping[str, Any]) -> list[Figure]:
    """Compression, and what came back byte for byte."""
    # A corpus of few documents may have no test split.
    counts = {s: _number(results.get(f"{s}/round_tripped_texts")) for s in SPLITS}
    tripped = [n for s, n in counts.items() if n is not None or s != "test"]
    done = all(tripped)
    return [
        Figure(
            "vocabulary", "bytes a token, held out",
            _number(results.get("validation/bytes_per_token")),
            {"on training text": _number(results.get("train/bytes_per_token"))},
            main=True,
        ),
        Figure(
            "vocabulary", "texts that round-trip",
            sum(n for n in tripped if n is not None) if done else None,
            # The stage stops at the first that doesn't.
            demand="every text, byte for byte", met=done,
        ),
    ]  # fmt: skip


def of_pretrain(results: Mapping[str, Any]) -> list[Figure]:
    """Bits a byte of held-out text, beside n-gram models of the same tokens."""
    bits = _number(results.get("validation/bits_per_byte"))
    ngrams = {n: _number(results.get(f"ngram/{n}")) for n in ("unigram", "bigram", "trigram")}
    bigram = ngrams["bigram"]
    return [
        Figure(
            "pretrain", "held-out bits a byte", bits, ngrams,
            f"below the bigram's {report.show(bigram)}", _less(bits, bigram), main=True,
        )
    ]  # fmt: skip


def of_sft(
    results: Mapping[str, Any], baseline: Mapping[str, Any], reply_tokens: int | None
) -> list[Figure]:
    """Perplexity of held-out replies before and after, and whether replies end."""
    after = _number(results.get("sft/reply_perplexity"))
    before = _number(results.get("pretrained/reply_perplexity"))
    ends = _number(baseline.get("end_rate"))
    within = "" if reply_tokens is None else f" within {reply_tokens} tokens"
    return [
        Figure(
            "sft", "perplexity of held-out replies", after, {"pretrained": before},
            f"below the pretrained {report.show(before)}", _less(after, before), main=True,
        ),
        Figure(
            "sft", f"replies that end{within}", ends, {},
            f"at least {MIN_END_RATE}", _at_least(ends, MIN_END_RATE), main=True,
        ),
    ]  # fmt: skip


def of_reward(
    stage: str, results: Mapping[str, Any], key: str, demand: float | None
) -> list[Figure]:
    """A reward model's accuracy beside its ceiling and two cheap rivals; ties and calibration.

    Args:
      stage: what the lines are called.
      results: of its manifest.
      key: 'on_policy_clean_accuracy' or 'accuracy', what the demand is about.
      demand: the least of it, or None.
    """
    known = {name: _figure(value) for name, value in preference.from_json(results).items()}
    clean = key == "on_policy_clean_accuracy"
    rivals = {
        "longer wins": known.get("longer_wins_accuracy"),
        "linear TF-IDF": known.get("linear_accuracy"),
    }
    main = Figure(
        stage,
        "accuracy on the newest policy's pairs" if clean else "accuracy on human pairs",
        known.get(key),
        {"pairs": known.get("on_policy_clean_pairs"), "ceiling": 1.0}
        if clean
        else {"pairs": known.get("pairs"), **rivals},
        "" if demand is None else f"at least {demand}",
        None if demand is None else _at_least(_mean(known.get(key)), demand),
        main=demand is not None,
    )
    lines = [main]
    if clean:
        lines += [
            Figure(
                stage, "accuracy against clean scores, all rounds", known.get("clean_accuracy"),
                {
                    "pairs": known.get("clean_pairs"),
                    "ceiling": 1.0,
                    "longer wins": known.get("clean_longer_wins_accuracy"),
                    "linear TF-IDF": known.get("clean_linear_accuracy"),
                },
            ),
            Figure(stage, "accuracy on labels", known.get("accuracy"), rivals),
            Figure(
                stage, "accuracy on labels, clean scores unequal", known.get("unequal_accuracy"),
                {
                    "pairs": known.get("unequal_pairs"),
                    "ceiling": known.get("ceiling_accuracy"),
                    "two labellers agree": known.get("labellers_agreement"),
                },
            ),
        ]  # fmt: skip
    lines += [
        Figure(
            stage, "pairs", known.get("pairs"),
            {
                "of": results.get("reported_on"),
                "ties": known.get("tie_rate"),
                "identical texts": known.get("identical_share"),
            },
        ),
        Figure(stage, "expected calibration error", known.get("calibration_error")),
    ]  # fmt: skip
    return lines


def of_policy(stage: str, figures: Mapping[str, Any]) -> list[Figure]:
    """What a policy gained over SFT, the price in variety, and the round before beside it."""
    figures = preference.from_json(figures)
    policy, baseline = figures["policy"], figures["baseline"]
    over, previous = figures["over_baseline"], figures.get("over_previous", {})
    gain, wins = _figure(over.get("gold_difference")), _figure(over.get("win_rate"))
    common = _number(policy.get("most_common_share"))
    distinct = [_number(system.get("distinct_2")) for system in (policy, baseline)]
    ratio = distinct[0] / distinct[1] if distinct[0] is not None and distinct[1] else None
    low = wins.low if isinstance(wins, Interval) else None
    lines = [
        Figure(
            stage, "gold score over SFT", gain, {"KL to SFT": _figure(policy.get("kl"))},
            f"at least {MIN_GOLD_GAIN}", _at_least(_mean(gain), MIN_GOLD_GAIN), main=True,
        ),
        Figure(
            stage, "win rate over SFT", wins,
            {"ties": _figure(over.get("tie_rate")),
             "length-controlled": _figure(over.get("win_rate_length_controlled"))},
            f"interval above {MIN_WIN_RATE_LOW}", _less(MIN_WIN_RATE_LOW, low), main=True,
        ),
        Figure(
            stage, "share of the most common reply", common,
            {"SFT": _number(baseline.get("most_common_share"))},
            f"at most {MAX_MOST_COMMON}", common is not None and common <= MAX_MOST_COMMON,
            main=True,
        ),
        Figure(
            stage, "distinct-2 as a share of SFT's", ratio, {},
            f"at least {MIN_DISTINCT_RATIO}", _at_least(ratio, MIN_DISTINCT_RATIO), main=True,
        ),
    ]  # fmt: skip
    if "best_of_n" in figures:
        lines.append(of_best_of_n(stage, figures["best_of_n"]))
    if previous:
        keys = ("gold_difference", "gold_difference_kl_matched", "win_rate")
        lines += [
            Figure(stage, f"{suite.LABELS[key]}, over the round before", _figure(previous.get(key)))
            for key in keys
        ]
    return lines


def of_best_of_n(stage: str, figures: Mapping[str, Any]) -> Figure:
    """The policy beside best of n at the n whose KL is nearest to its own."""
    policy = figures["policy"]
    kl = _figure(policy["kl"])
    n = best_of_n.nearest(figures, kl.mean)
    best = {name: _figure(value) for name, value in figures[str(n)].items()}
    return Figure(
        stage,
        f"gold score minus best of {n}'s, mixed down to equal KL",
        best["policy_difference_kl_matched"],
        {
            "KL": kl,
            f"best of {n}'s KL at most": best["kl"],
            "gold over SFT": _figure(policy["gold_difference"]),
            f"best of {n}'s": best["gold_difference"],
            "surely ahead": best_of_n.ahead(kl.mean, best),
        },
        main=True,
    )


def table(figures: Iterable[Figure]) -> tuple[list[str], list[list[Any]]]:
    """All lines with what stands beside them."""
    rows = [[f.stage, f.name, f.value, _listed(f.beside), f.demand, _said(f.met)] for f in figures]
    return ["stage", "figure", "value", "beside it", "demand", "met"], rows


def unmet(figures: Iterable[Figure]) -> list[Figure]:
    """What was asked for and not shown."""
    return [figure for figure in figures if figure.met is False]


def short_table(figures: Iterable[Figure]) -> tuple[list[str], list[list[Any]]]:
    """The main lines, for a terminal."""
    rows = [[f"{f.stage}: {f.name}", f.value, f.demand, _said(f.met)] for f in figures if f.main]
    return ["", "value", "demand", "met"], rows


def _results(root: epath.Path, record: Record, name: str) -> Mapping[str, Any]:
    return artifact.read_manifest(root / record["steps"][name]["artifact"])["results"]


def _reply_tokens(root: epath.Path, rounds: list[Record]) -> int | None:
    """The length that replies of the evaluation may have."""
    directory = root / rounds[0]["steps"]["evaluate"]["artifact"]
    config = json.loads((directory / artifact.CONFIG_FILE).read_text())
    return config["sampling"]["max_new_tokens"]


def _figure(value: Any) -> Any:
    return value if isinstance(value, Interval) else _number(value)


def _mean(value: Any) -> float | None:
    return value.mean if isinstance(value, Interval) else value


def _number(value: Any) -> float | int | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _less(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit


def _at_least(value: float | None, limit: float) -> bool:
    return value is not None and value >= limit


def _listed(beside: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {report.show(value)}" for name, value in beside.items())


def _said(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "NO"
