"""The report of a whole run of rounds: what each stage shows, round by round, and four plots."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gptlab.evals import best_of_n, preference, report, stage_figures, suite
from gptlab.run import artifact, files
from gptlab.run.metrics import read_metrics

# A record as rounds/<r>.json holds it: {"steps": {name: {"artifact", "seconds", ...}}, and for a
# round also "round", "promoted", "failures", "figures"}.
Record = Mapping[str, Any]

_HOW_TO_READ = (
    "The gold score is a program, not a person, and the labellers of the rounds are simulated. "
    "Intervals are bootstraps over prompts. Each round's own report stands in its evaluate "
    "artifact, with replies side by side."
)

_WHAT_IS_ASKED = (
    "Read from the stages' manifests; a dash is a figure that was not measured, and meets no "
    "demand. Demands are those of the quickstart, for each of three seeds: one run shows one. "
    "Accuracy against clean scores has a ceiling of 1, as the labellers' noise has no part in it; "
    "accuracy on labels has the ceiling beside it on pairs with unequal clean scores."
)


def write(
    root: epath.Path, preparation: Record, rounds: Sequence[Record]
) -> tuple[str, list[epath.Path]]:
    """Writes report.md, report.json (the same for programs) and the plots into `root`.

    Args:
      root: what the records' artifact paths are relative to.
      preparation: the record of what is done once.
      rounds: one record a round, at least one.

    Returns:
      The main results as a table for a terminal, and the plots' paths.
    """
    header, rows = rounds_table(rounds)
    plots = write_plots(root, preparation, rounds)
    gate = [[r["round"], r["promoted"], "; ".join(r["failures"])] for r in rounds]
    figures = stage_figures.collect(root, preparation, rounds)
    unmet = stage_figures.unmet(figures)
    sections = {
        "Demands": demands(figures, unmet),
        "What each stage shows": report.markdown_table(*stage_figures.table(figures))
        + "\n\n"
        + _WHAT_IS_ASKED,
        "Rounds": report.markdown_table(header, rows) + "\n\n" + _HOW_TO_READ,
        **best_of_n_sections(rounds),
        "Promotion": report.markdown_table(["round", "promoted", "because"], gate),
        "Stages": report.markdown_table(*stages_table(preparation, rounds)),
        "Plots": "\n\n".join(f"![{plot.stem}]({plot.name})" for plot in plots),
    }
    text = report.document("From documents to a chat model", sections)
    files.atomic_write(root / "report.md", text)
    files.atomic_write(root / "report.json", machine_readable(figures, preparation, rounds))
    shown = report.text_table(*stage_figures.short_table(figures))
    return shown + (f"\n\nUnmet demands: {len(unmet)}" if unmet else ""), plots


def demands(figures: Sequence[stage_figures.Figure], unmet: Sequence[stage_figures.Figure]) -> str:
    """Which demands are not met, a line each, with what was measured."""
    asked = sum(figure.met is not None for figure in figures)
    if not unmet:
        return f"All {asked} are met."
    lines = [
        f"- **{figure.stage}: {figure.name}** is {report.show(figure.value)}; asked: "
        f"{figure.demand}"
        for figure in unmet
    ]
    return f"{len(unmet)} of {asked} are **not met**:\n\n" + "\n".join(lines)


def best_of_n_sections(rounds: Sequence[Record]) -> dict[str, str]:
    """Each round's policy beside best of n replies of SFT, where that was measured."""
    sections = {}
    for record in rounds:
        figures = preference.from_json(record["figures"].get("best_of_n", {}))
        if figures:
            title = f"Round {record['round']}: the policy beside best of n replies of SFT"
            sections[title] = report.markdown_table(*best_of_n.table(figures))
    return sections


def machine_readable(
    figures: Sequence[stage_figures.Figure], preparation: Record, rounds: Sequence[Record]
) -> str:
    """report.json: the stages' figures with their demands, and the records of all rounds."""
    content = {
        "stages": [figure.to_json() for figure in figures],
        "unmet": [f"{f.stage}: {f.name}" for f in stage_figures.unmet(figures)],
        "preparation": preparation,
        "rounds": rounds,
    }
    return files.to_json(content, indent=1) + "\n"


def rounds_table(rounds: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """The SFT model beside the policy of each round, figures by row."""
    rows = []
    figures = [preference.from_json(record["figures"]) for record in rounds]
    for block, prefix in (
        ("policy", ""),
        ("over_baseline", "over SFT: "),
        ("over_previous", "over the round before: "),
    ):
        for key, label in suite.LABELS.items():
            cells = [own.get(block, {}).get(key) for own in figures]
            if all(cell is None for cell in cells):
                continue
            sft = figures[0]["baseline"].get(key) if block == "policy" else None
            rows.append([prefix + label, sft, *cells])
    return ["", "SFT", *(f"round {record['round']}" for record in rounds)], rows


def stages_table(
    preparation: Record, rounds: Sequence[Record]
) -> tuple[list[str], list[list[Any]]]:
    """Every step with its artifact and its time."""
    rows = []
    for record in (preparation, *rounds):
        prefix = f"round {record['round']}: " if "round" in record else ""
        for name, made in record["steps"].items():
            rows.append([prefix + name, made["artifact"], round(made["seconds"])])
    return ["stage", "artifact", "seconds"], rows


def write_plots(
    root: epath.Path, preparation: Record, rounds: Sequence[Record]
) -> list[epath.Path]:
    """Losses, reward against KL, gold score against KL, calibration; returns the paths."""
    report.plot_curves(
        root / "losses.png", losses(root, preparation),
        title="Loss", x_label="share of the stage's steps", y_label="nats a token",
    )  # fmt: skip
    proxy: dict[str, report.Curve] = {}
    chosen: dict[str, report.Curve] = {}
    gold, calibration = {}, {}
    for record in rounds:
        name = f"round {record['round']}"
        figures = preference.from_json(record["figures"])
        policy, baseline = figures["policy"], figures["baseline"]
        proxy[f"{name}, training"] = reward_against_kl(root / record["steps"]["ppo"]["artifact"])
        proxy[f"{name}, held out: SFT and policy"] = (
            [0.0, policy["kl"].mean], [baseline["reward_model"], policy["reward_model"]],
        )  # fmt: skip
        gold[f"{name}, PPO"] = (policy["kl"], policy["gold"])
        if "best_of_n" in figures:
            chosen[f"{name}, best of n (KL: upper bound)"] = best_of_n_against_kl(record)
        manifest = artifact.read_manifest(root / record["steps"]["reward"]["artifact"])
        calibration[name] = manifest["results"]["reliability"]
    report.plot_curves(
        root / "reward_kl.png", proxy, title="Score of each round's own reward model",
        x_label="KL to SFT, nats a reply", y_label="score, unfinished replies as they are",
    )  # fmt: skip
    sft = preference.from_json(rounds[0]["figures"]["baseline"])["gold"]
    report.plot_curves(
        root / "gold_kl.png", chosen, markers={**gold, "SFT": (0.0, sft)},
        title="Gold score of held-out replies",
        x_label="KL to SFT, nats a reply", y_label="gold score",
    )  # fmt: skip
    report.plot_calibration(root / "calibration.png", calibration)
    return [root / f"{name}.png" for name in ("losses", "reward_kl", "gold_kl", "calibration")]


def losses(root: epath.Path, preparation: Record) -> dict[str, report.Curve]:
    """Training and held-out loss of pretraining and SFT, by share of each stage's steps."""
    curves: dict[str, report.Curve] = {}
    for name in ("pretrain", "sft"):
        lines = read_metrics(root / preparation["steps"][name]["artifact"])
        total = max((line["step"] for line in lines), default=0) or 1
        for key, label in (("train/loss", "train"), ("eval/validation/loss", "held out")):
            x = [line["step"] / total for line in lines if key in line]
            curves[f"{name}, {label}"] = (x, [line[key] for line in lines if key in line])
    return curves


def best_of_n_against_kl(record: Record) -> report.Curve:
    """KL bound and gold score of SFT, and of the best of n of its replies for each n."""
    return best_of_n.curve(preference.from_json(record["figures"]["best_of_n"]))


def reward_against_kl(ppo: epath.Path) -> report.Curve:
    """KL and score over a PPO run: means over tenths of its steps, as one rollout is noise.

    The score is the reward model's own, as it is of held-out replies: what unfinished replies were
    paid instead is on no scale but PPO's.
    """
    lines = [line for line in read_metrics(ppo) if "ppo/raw_score" in line]
    tenths = [tenth for tenth in np.array_split(np.arange(len(lines)), 10) if tenth.size]
    x, y = (
        [float(np.mean([lines[i][key] for i in tenth])) for tenth in tenths]
        for key in ("ppo/kl", "ppo/raw_score")
    )
    return x, y
