"""What cleaning did: counts by source and reason with examples, the quarantine, and report.md."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from gptlab.data import dedup, readers
from gptlab.data.records import Comparison, Document
from gptlab.run import files
from gptlab.run.errors import UserError

EXAMPLES = 3
STATISTICS, QUARANTINE = "statistics.json", "quarantine.jsonl"


class Statistics:
    """Counts by (source, kind, split, outcome) with a few examples each, and the quarantine."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str, str]] = Counter()
        self.examples: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
        self.bad: list[tuple[str, int, str]] = []

    def keep(self, record: Any, split: str) -> None:
        """Counts a record that is written."""
        self._count(record, split, "kept")

    def drop(self, record: Any, split: str, reason: str, remark: str = "") -> None:
        """Counts a record that is left out, and may show it."""
        key = self._count(record, split, reason)
        self._show(key, record.id, " ".join(_text(record)[:160].split()) + remark)

    def quarantine(self, bad: readers.Bad) -> None:
        """Notes what could not be read."""
        self.bad.append((bad.file, bad.line, bad.reason))

    def merge(self, dumped: bytes) -> None:
        """Adds what dump() of another one returned."""
        counts, sizes, examples, bad = pickle.loads(dumped)
        self.counts.update(counts)
        self.bytes.update(sizes)
        for key, shown in examples.items():
            for record_id, text in shown:
                self._show(key, record_id, text)
        self.bad += bad

    def dump(self) -> bytes:
        """For another process."""
        return pickle.dumps((self.counts, self.bytes, self.examples, self.bad))

    def _count(self, record: Any, split: str, outcome: str) -> tuple[str, str, str, str]:
        source = record.prompt.source if isinstance(record, Comparison) else record.source
        key = (source, kind_of(record), split, outcome)
        self.counts[key] += 1
        self.bytes[key] += len(_text(record).encode("utf-8", "replace"))
        return key

    def _show(self, key: tuple[str, str, str, str], record_id: str, text: str) -> None:
        # The smallest ids: the same examples whatever the order of the blocks.
        shown = self.examples.setdefault(key, [])
        shown.append((record_id, text))
        shown.sort()
        del shown[EXAMPLES:]


def kind_of(record: Any) -> str:
    """The name of the record sets of its kind: 'documents' of a Document."""
    return type(record).__name__.lower() + "s"


def _text(record: Any) -> str:
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Comparison):
        return "\n".join(c.content for c in record.candidates)
    return "\n".join(m.content for m in record.messages)


def write_statistics(group: tuple[int, Iterable[bytes]], directory: str) -> None:
    """Merges all statistics; writes them and the quarantine."""
    total = Statistics()
    for dumped in group[1]:
        total.merge(dumped)
    rows = [
        {
            "source": key[0], "kind": key[1], "split": key[2], "outcome": key[3],
            "count": count, "bytes": total.bytes[key], "examples": total.examples.get(key, []),
        }
        for key, count in sorted(total.counts.items())
    ]  # fmt: skip
    bad = [{"file": f, "line": n, "reason": r} for f, n, r in sorted(total.bad)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    files.atomic_write(epath.Path(directory) / QUARANTINE, lines.encode("utf-8", "replace"))
    content = json.dumps({"rows": rows, "quarantined": len(bad), "reasons": _reasons(bad)})
    files.atomic_write(epath.Path(directory) / STATISTICS, content)


def _reasons(bad: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """(reason, how often, up to three places) of the quarantine."""
    places: dict[str, list[str]] = {}
    for row in bad:
        places.setdefault(row["reason"], []).append(f"{row['file']}:{row['line']}")
    return [(reason, len(found), found[:EXAMPLES]) for reason, found in sorted(places.items())]


def check_quality(statistics: dict[str, Any], config: ConfigDict, workdir: epath.Path) -> None:
    """UserError when too much is bad, or nothing is left to train on or to validate with."""
    kept: Counter[tuple[str, str]] = Counter()
    read = 0
    for row in statistics["rows"]:
        if row["kind"] != "prompts":
            read += row["count"]
        if row["outcome"] == "kept":
            kept[row["kind"], row["split"]] += row["count"]
    bad = statistics["quarantined"]
    if bad > config.max_bad_fraction * (bad + read):
        reasons = ", ".join(f"{reason} ({n})" for reason, n, _ in statistics["reasons"][:3])
        raise UserError(
            f"{bad} of {bad + read} inputs could not be read: {reasons}; see "
            f"{workdir / QUARANTINE}, mend them or raise config.max_bad_fraction "
            f"({config.max_bad_fraction})"
        )
    trained = [kind for kind in ("documents", "conversations") if kept[kind, "train"]]
    if not trained:
        raise UserError(
            f"no document is left for training: config.clean and config.split dropped all {read}"
        )
    for kind in trained:
        if not kept[kind, "validation"]:
            raise UserError(
                f"none of the {kept[kind, 'train']} {kind} fell into validation; raise "
                f"config.split.validation_fraction ({config.split.validation_fraction}) "
                "or give more data"
            )


def results(statistics: dict[str, Any]) -> dict[str, Any]:
    """Figures for the manifest: kept counts and bytes per record set, dropped counts per reason."""
    kept: Counter[str] = Counter()
    size: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for row in statistics["rows"]:
        if row["outcome"] == "kept":
            kept[f"{row['kind']}-{row['split']}"] += row["count"]
            size[f"{row['kind']}-{row['split']}"] += row["bytes"]
        else:
            dropped[f"{row['kind']}: {row['outcome']}"] += row["count"]
    return {
        "records": dict(kept), "bytes": dict(size), "dropped": dict(dropped),
        "quarantined": statistics["quarantined"],
    }  # fmt: skip


def report(statistics: dict[str, Any], identity: str) -> str:
    """report.md: what is kept by source and split, what was dropped and why, with examples."""
    splits = dedup.SPLITS
    table: dict[tuple[str, str], Counter[str]] = {}
    lines = []
    for row in statistics["rows"]:
        cell = table.setdefault((row["source"], row["kind"]), Counter())
        if row["outcome"] == "kept":
            cell[row["split"]] += row["count"]
            cell["bytes"] += row["bytes"]
        else:
            cell["dropped"] += row["count"]
    out = [f"# Corpus {identity}", "", "## Kept", ""]
    out += [
        f"| source | kind | {' | '.join(splits)} | bytes kept | dropped |",
        "|---|---|" + "---:|" * 5,
    ]
    for (source, kind), cell in sorted(table.items()):
        counts = " | ".join(f"{cell[s]:,}" for s in splits)
        out.append(f"| {source} | {kind} | {counts} | {cell['bytes']:,} | {cell['dropped']:,} |")
    out += [
        "",
        "## Dropped",
        "",
        "| source | kind | split | reason | count |",
        "|---|---|---|---|---:|",
    ]
    for row in statistics["rows"]:
        if row["outcome"] != "kept":
            out.append("| {source} | {kind} | {split} | {outcome} | {count:,} |".format(**row))
            head = f"- {row['source']}, {row['kind']}, {row['split']}, {row['outcome']}:"
            lines += [head] + [f"  - `{key}`: {_code(text)}" for key, text in row["examples"]]
    out += ["", "Examples:", "", *lines, "", f"## Quarantined: {statistics['quarantined']:,}", ""]
    for reason, count, places in statistics["reasons"]:
        out.append(f"- {reason}: {count:,} ({', '.join(f'`{p}`' for p in places)})")
    return "\n".join(out) + "\n"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"
