"""What people said, as training data: the store in, conversations, comparisons and prompts out.

    python -m gptlab.export --config=configs/export.py --workdir=runs/export \
        --config.store.url=sqlite:///runs/serve/store.sqlite

Writes records/conversations-* (demonstrations and better replies, for `prepare:tokenize` and sft),
records/comparisons-* (rankings, choices, thumbs, flags, for reward) and records/prompts-* (what
flagged replies were given to, for collect), each in train and validation; and in prompts-test what
is kept of flagged conversations to evaluate on. people/feedback.py says what becomes what and by
which filters; report.md what went in, what was left out and why.

The input is the store's content up to a row of its audit: the same command on the same content does
nothing twice. The store remembers which rows went into which export, so that it can name those that
hold a person's data. What was changed in the audit by others than gptlab is noticed here, and
nothing is exported then. Takes seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from gptlab.data import records
from gptlab.data.records import Comparison, Conversation
from gptlab.evals.report import markdown_table
from gptlab.people import feedback
from gptlab.people.feedback import Harvest, Weights
from gptlab.people.items import KINDS, Item
from gptlab.people.sieve import filters_of
from gptlab.people.splits import Shares
from gptlab.people.store import Invalid, Store, resolve_url
from gptlab.run import artifact, files, program
from gptlab.run.errors import UserError

SPLITS = ("train", "validation")


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Exports the content of `config.store.url`.

    Raises:
      UserError: a config value is wrong, the store can't be read or was tampered with, or nothing
        in it may be exported.
    """
    check(config)
    with Store.open(resolve_url(config.store.url), create=False) as store:
        state = store.state(config.store.until)
        source = artifact.Known(store.database.where, f"{state.store}:{state.digest}")
        with artifact.open_run(config, workdir, "export", files={"store": source}) as run:
            if run.finished:
                print(f"export: {run.workdir} is done: the store has nothing new")
                return
            if (problem := store.audit.verify()) is not None:
                raise UserError(f"the store {store.database.where} was tampered with: {problem}")
            content = store.content(state.until)
            filters, weights = filters_of(config.filters), Weights(**config.weights)
            shares = Shares(config.validation_fraction, config.safety_test_fraction, config.seed)
            found = feedback.harvest(content, filters, weights, shares)
            if not found.items:
                raise UserError(
                    f"nothing in the store {store.database.where} may be exported: "
                    f"{_reasons(found) or 'it holds no feedback'}"
                )
            items, scrubbed = _scrub(found.items) if config.scrub else (found.items, Counter())
            try:  # before anything is written: a person deleted from now on finds this export
                rows = {row for item in items for row in item.rows}
                noted = (run.identity, str(run.workdir), content.state, rows)
                store.exports.register(*noted, filters.consent)
            except Invalid as error:
                raise UserError(str(error)) from error
            write(run, items)
            head = store.audit.head()
            figures = _counts(items)
            run.results(**figures, until=state.until, audit_row=head.row, audit_hash=head.hash)
            report = render(run.identity, state.until, items, found, scrubbed, config.scrub)
            files.atomic_write(run.workdir / "report.md", report)
            print(f"export: {', '.join(f'{n} {name}' for name, n in figures.items())}")
            run.complete(records.digest(run.workdir / "records"))


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    if not 0 < config.validation_fraction < 1:
        raise UserError(
            f"config.validation_fraction={config.validation_fraction}: a reward model needs "
            "held-out labels, and some to train on; give a share between 0 and 1"
        )
    if not 0 <= config.safety_test_fraction <= 1:
        raise UserError(
            f"config.safety_test_fraction={config.safety_test_fraction}: give the share of flagged "
            "conversations to evaluate on, from 0 to 1"
        )
    weights = config.weights.to_dict()
    flag = weights.pop("flag")
    if len(flag) != 3 or min(*flag, *weights.values()) < 0:
        raise UserError(
            "config.weights can't be negative, and config.weights.flag has three, one for each "
            "severity"
        )
    filters_of(config.filters)


def write(run: artifact.Run, items: Sequence[Item]) -> None:
    """The record sets. Every kind there is has both splits, one of which may be empty."""
    for name, cls in (
        ("conversations", Conversation), ("comparisons", Comparison), ("prompts", records.Prompt),
    ):  # fmt: skip
        own = [item for item in items if isinstance(item.record, cls)]
        splits = {*SPLITS, *(item.split for item in own)} if own else set()
        for split in sorted(splits):
            wanted = [item.record for item in own if item.split == split]
            records.write_shards(run.workdir / "records", name, split, wanted)


def render(
    identity: str, until: int, items: Sequence[Item], found: Harvest, scrubbed: Counter[str],
    scrubs: bool,
) -> str:  # fmt: skip
    """report.md."""
    kinds = Counter((item.kind, type(item.record).__name__, item.split) for item in items)
    simulated = Counter(
        (item.kind, type(item.record).__name__, item.split) for item in items if item.simulated
    )
    rows = [
        [kind, cls, split, count, simulated[kind, cls, split]]
        for (kind, cls, split), count in sorted(kinds.items(), key=_by_kind)
    ]
    flagged = Counter(
        (item.record.source.split(":")[2], item.severity)
        for item in items
        if item.kind == "safety prompt" and isinstance(item.record, records.Prompt)
    )
    lines = [
        f"# Export {identity}",
        "",
        f"The store's content up to row {until} of its audit.",
        "",
        "## What went in",
        "",
        markdown_table(("from", "record", "split", "records", "by simulated people"), rows),
        "",
        "## What was left out",
        "",
        markdown_table(
            ("from", "reason", "how many"),
            [[*key, count] for key, count in sorted(found.left_out.items())],
        )
        if found.left_out
        else "Nothing.",
        "",
        "## Flags",
        "",
        markdown_table(
            ("flag", "severity", "prompts"), [[*key, n] for key, n in sorted(flagged.items())]
        )
        if flagged
        else "None.",
        "",
        "## Personal data",
        "",
        _scrubbing_text(scrubbed) if scrubs else "Nothing was replaced: config.scrub is off.",
        "",
    ]
    return "\n".join(lines)


def _scrub(items: Sequence[Item]) -> tuple[list[Item], Counter[str]]:
    total: Counter[str] = Counter()
    cleaned = []
    for item in items:
        own, found = feedback.scrubbed(item)
        cleaned.append(own)
        total += found
    return cleaned, total


def _scrubbing_text(scrubbed: Counter[str]) -> str:
    found = ", ".join(f"{kind} {count}" for kind, count in sorted(scrubbed.items())) or "nothing"
    return (
        f"Replaced: {found}. Names, postal addresses, dates of birth, user names and numbers of "
        "documents can't be found by a pattern: read a sample before this leaves the house."
    )


def _counts(items: Sequence[Item]) -> dict[str, int]:
    """How many records of each set."""
    names = {Conversation: "conversations", Comparison: "comparisons", records.Prompt: "prompts"}
    counts = Counter(f"{names[type(item.record)]}-{item.split}" for item in items)
    return dict(sorted(counts.items()))


def _reasons(found: Harvest) -> str:
    return ", ".join(
        f"{count} x {kind}: {reason}" for (kind, reason), count in sorted(found.left_out.items())
    )


def _by_kind(entry: tuple[tuple[str, str, str], int]) -> tuple[int, str, str]:
    (kind, cls, split), _ = entry
    return KINDS.index(kind), cls, split


if __name__ == "__main__":
    program.main(run, "export")
