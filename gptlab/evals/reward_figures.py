"""What a reward model is worth on held-out comparisons: figures, tables and their report.

Everything here is of scores [n, N] of n comparisons with up to N candidates, NaN where one is
absent; who computed them does not matter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from gptlab.data.records import Comparison
from gptlab.evals import preference, report
from gptlab.run import files
from gptlab.scorers import classifiers

_BOOTSTRAP = preference.Bootstrap()
_DIFFERENCES = (0.0, 0.25, 0.5)  # of clean scores: the more, the surer a simulated labeller


def measure(
    scores: np.ndarray,
    gain: float,
    comparisons: Sequence[Comparison],
    train_comparisons: Sequence[Comparison],
    expected_agreement: Callable[[Sequence[Comparison]], float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and tables on held-out comparisons, of normalised scores.

    Beside them, a linear model on TF-IDF features that was fitted on the same labels. Pairs of
    identical texts, of which a labeller's noise may well prefer one, say nothing and are left out.
    `accuracy` and `clean_accuracy` are Intervals over prompts, the others numbers; a figure without
    anything to be measured on is None.

    Args:
      scores: float64 [n, N], normalised.
      gain: by which the raw rewards were multiplied.
      comparisons: n held-out ones.
      train_comparisons: those that the reward model was trained on.
      expected_agreement: of pairs that two labellers of simulated comparisons rank strictly, how
        many they rank alike (people.labellers).
    """
    linear = classifiers.fit_comparisons(train_comparisons)
    lengths = per_candidate(comparisons, lambda c: [len(x.content) for x in c.candidates], scores)
    baseline = per_candidate(
        comparisons,
        lambda c: linear([c.prompt] * len(c.candidates), [x.content for x in c.candidates]),
        scores,
    )
    ranks = ranks_of(comparisons, scores)
    prompts = np.asarray([c.prompt.id for c in comparisons])  # [n]
    pairs, of_pairs = distinct_pairs(comparisons, ranks)
    margins = pairs.margins(scores)
    # Margins as trained: the loss knows no gain, and calibration belongs to what was trained.
    table = preference.reliability(margins / gain)
    present = ~np.isnan(scores)
    figures = {
        "accuracy": preference.accuracy_interval(margins, prompts[pairs.row], _BOOTSTRAP),
        "pairs": len(margins),
        **of_pairs,
        "longer_wins_accuracy": preference.strict_accuracy(pairs.margins(lengths)),
        "linear_accuracy": preference.strict_accuracy(pairs.margins(baseline)),
        "length_correlation": correlation(scores[present], lengths[present]),
        "calibration_error": preference.expected_calibration_error(table),
        "score_mean": float(scores[present].mean()),
        "score_std": float(scores[present].std()),
    }
    tables = {}
    if any(c.scores is not None for c in comparisons):
        clean = per_candidate(comparisons, lambda c: c.scores or (), scores)
        clean = np.where(np.isnan(scores), np.nan, clean)  # NaN too for what people ranked
        figures |= simulated_figures(comparisons, prompts, scores, clean, lengths, baseline, pairs)
        figures["labellers_agreement"] = expected_agreement(comparisons)
        tables["accuracy_by_score_difference"] = accuracy_by_difference(
            np.abs(pairs.margins(clean)), margins
        )
    candidates = np.asarray([len(c.candidates) for c in comparisons])
    who = np.asarray([c.labeller for c in comparisons])
    tables |= {
        "reliability": table,
        "accuracy_by_labeller": accuracy_by(who[pairs.row], margins),
        "accuracy_by_candidates": accuracy_by(candidates[pairs.row], margins),
    }

    def known(value: Any) -> bool:
        return not np.isnan(value.mean if isinstance(value, preference.Interval) else value)

    return {name: value if known(value) else None for name, value in figures.items()}, tables


def simulated_figures(
    comparisons: Sequence[Comparison],
    prompts: np.ndarray,
    scores: np.ndarray,
    clean: np.ndarray,
    lengths: np.ndarray,
    baseline: np.ndarray,
    pairs: preference.Pairs,
) -> dict[str, Any]:
    """What only simulated labels can tell, as their clean scores are known.

    clean_accuracy, and of both rivals: on all pairs with unequal clean scores, ordered by these.
      Noise has no part in them: their ceiling is 1.
    on_policy_clean_accuracy: the same on the replies of the newest policy only, which is the one
      that wrote the last comparison. Labels of rounds are pooled, each of another policy.
    unequal_accuracy, unequal_pairs: as `accuracy`, on the labelled pairs with unequal clean scores.
    ceiling_accuracy: what the clean order itself gets on those very pairs, the best that anything
      can expect there. On labelled pairs of *equal* clean scores nothing beats a coin.
    """
    order = preference.ranked_pairs(ranks_from_scores(clean))
    labelled = pairs.margins(clean)  # NaN for what people ranked
    unequal = np.isfinite(labelled) & (labelled != 0)
    margins = order.margins(scores)
    authors = [{x.policy for x in c.candidates} for c in comparisons]
    newest = np.asarray([who == authors[-1] for who in authors])[order.row]
    accuracy = preference.accuracy_interval
    return {
        "clean_accuracy": accuracy(margins, prompts[order.row], _BOOTSTRAP),
        "clean_pairs": len(order.row),
        "on_policy_clean_accuracy": accuracy(
            margins[newest], prompts[order.row[newest]], _BOOTSTRAP
        ),
        "on_policy_clean_pairs": int(newest.sum()),
        "clean_longer_wins_accuracy": preference.strict_accuracy(order.margins(lengths)),
        "clean_linear_accuracy": preference.strict_accuracy(order.margins(baseline)),
        "unequal_accuracy": preference.strict_accuracy(pairs.margins(scores)[unequal]),
        "unequal_pairs": int(unequal.sum()),
        "ceiling_accuracy": preference.strict_accuracy(labelled[unequal]),
    }


def distinct_pairs(
    comparisons: Sequence[Comparison], ranks: np.ndarray
) -> tuple[preference.Pairs, dict[str, float]]:
    """Strictly ranked pairs of different texts; shares of all pairs that are ties, or identical."""
    texts: dict[str, int] = {}
    names = per_candidate(
        comparisons,
        lambda c: [texts.setdefault(x.content, len(texts)) for x in c.candidates],
        ranks,
    )
    present = np.where(ranks > 0, np.arange(1, ranks.shape[1] + 1), 0)
    every = preference.ranked_pairs(present)
    pairs = preference.ranked_pairs(ranks)
    figures = {
        "tie_rate": share(every.margins(ranks) == 0),
        "identical_share": share(every.margins(names) == 0),
    }
    different = pairs.margins(names) != 0
    kept = preference.Pairs(pairs.row[different], pairs.better[different], pairs.worse[different])
    return kept, figures


def share(true: np.ndarray) -> float:
    """Share of what is true; not a number of nothing."""
    return float(true.mean()) if true.size else float("nan")


def per_candidate(
    comparisons: Sequence[Comparison],
    of: Callable[[Comparison], Any],
    like: np.ndarray,
) -> np.ndarray:
    """float64 [n, N] of one value a candidate, NaN where there is none; N as in `like` [*, N]."""
    out = np.full((len(comparisons), like.shape[1]), np.nan)
    for row, comparison in enumerate(comparisons):
        values = of(comparison)
        out[row, : len(values)] = values
    return out


def ranks_of(comparisons: Sequence[Comparison], scores: np.ndarray) -> np.ndarray:
    """int [n, N]: the labels, 0 for candidates that were not scored."""
    ranks = per_candidate(comparisons, lambda c: c.ranks, scores)
    return np.where(np.isnan(scores) | np.isnan(ranks), 0, ranks).astype(np.int64)


def ranks_from_scores(scores: np.ndarray) -> np.ndarray:
    """int [n, N]: dense ranks of clean scores, equal scores tied; 0 where NaN."""
    better = np.nan_to_num(scores, nan=-np.inf)[:, None, :] > scores[:, :, None]
    return np.where(np.isnan(scores), 0, 1 + better.sum(axis=2))


def accuracy_by(groups: np.ndarray, margins: np.ndarray) -> list[dict[str, Any]]:
    """Strict accuracy of the pairs of each group."""
    return [
        {
            "group": str(group),
            "pairs": int((groups == group).sum()),
            "accuracy": preference.strict_accuracy(margins[groups == group]),
        }
        for group in np.unique(groups)
    ]


def accuracy_by_difference(differences: np.ndarray, margins: np.ndarray) -> list[dict[str, Any]]:
    """Strict accuracy on labels by how far apart clean scores are, [M] each; NaN is left out."""
    known = ~np.isnan(differences)
    place = np.searchsorted(_DIFFERENCES, differences[known])  # of the first that is not below
    names = ["0", *(f"up to {edge}" for edge in _DIFFERENCES[1:]), f"above {_DIFFERENCES[-1]}"]
    rows = accuracy_by(place, margins[known])
    return [{**row, "group": names[int(row["group"])]} for row in rows]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if either is constant."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def write_report(
    workdir: epath.Path,
    figures: dict[str, Any],
    tables: dict[str, Any],
    reported_on: str,
) -> None:
    """report.md and calibration.png."""
    method = (
        f"Measured on the comparisons of: {reported_on}. They chose no checkpoint. `accuracy` is "
        "of all pairs that a labeller told apart, pairs of identical texts left out; an equal "
        "score is a mistake. Intervals are bootstraps over prompts."
    )
    if "clean_accuracy" in figures:
        method += (
            " `ceiling_accuracy` is the ceiling of `unequal_accuracy`: both are of the labelled "
            "pairs whose clean scores differ. `accuracy` also counts labels that are noise alone, "
            "so its ceiling is lower. `clean_accuracy` is against the clean scores, without any "
            "noise: its ceiling is 1. `on_policy_clean_accuracy` is of the newest policy's replies "
            "alone, where those of earlier rounds are held out too."
        )
    table = report.markdown_table(("figure", "value"), [*figures.items()])
    sections = {"Held-out comparisons": f"{method}\n\n{table}"}
    for name, rows in tables.items():
        if rows:
            header = tuple(rows[0])
            body = [tuple(row[key] for key in header) for row in rows]
            sections[name.replace("_", " ").capitalize()] = report.markdown_table(header, body)
    files.atomic_write(workdir / "report.md", report.document("Reward model", sections))
    report.plot_calibration(workdir / "calibration.png", {reported_on: tables["reliability"]})
