"""Stages 1 and 3, by Apache Beam: documents -> clean text; that and a vocabulary -> tokens.

    python -m gptlab.prepare --config=configs/prepare.py:clean --workdir=runs/clean
    python -m gptlab.prepare --config=configs/prepare.py:tokenize --workdir=runs/tokens \
        --config.inputs.corpus=runs/clean --config.inputs.vocabulary=runs/vocabulary

'clean' reads the sources, assigns every conversation, topic and film to a split before anything
else, repairs and filters the text, removes duplicates (a held-out copy stays, the training copies
go) and writes documents, conversations, prompts and comparisons; what was removed is counted with
examples in report.md, what could not be read is in quarantine.jsonl. 'tokenize' runs seqio Tasks
over them (gptlab/data/tasks.py).

The records are the same bytes whatever the number of workers: a record's shard is a hash of its
id, and a shard is sorted. Blocks of some hundred records are Beam's elements, as its overhead is
per element. Asked to stop (SIGTERM, Ctrl-C), it stops after the blocks in hand, and starts anew
next time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from etils import epath
from ml_collections import ConfigDict

from gptlab.data import clean, cleaning_report, dedup, pipeline, raw, readers, records
from gptlab.data.cleaning_report import STATISTICS, Statistics, kind_of
from gptlab.data.records import Conversation, Document, Prompt
from gptlab.run import artifact, files, program
from gptlab.run.errors import UserError

BLOCK_ITEMS, BLOCK_CHARS = 400, 1 << 19
PARTITIONS = 32  # of the duplicates' hashes: each is resolved in one worker's memory
READ, MADE, CLEANED, RESOLVED, CHOSEN, SLICE, WRITTEN = "rmcusp."  # ticks of the phases
Payload = tuple[str, bytes]  # id, record bytes


def run(config: ConfigDict, workdir: str) -> None:
    """Runs one of the two modes (config.mode)."""
    modes = {"clean": run_clean, "tokenize": run_tokenize}
    if config.mode not in modes:
        raise UserError(f"config.mode is {config.mode!r}; use 'clean' or 'tokenize'")
    modes[config.mode](config, workdir)


# --- clean ---


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """What the workers of 'clean' need to know."""

    limits: readers.Limits
    keep_fraction: float
    rules: clean.Rules
    test_fraction: float
    validation_fraction: float
    seed: int
    prompts_per_conversation: int
    prompt_min_chars: int
    num_shards: int
    workdir: str


def run_clean(config: ConfigDict, workdir: str) -> None:
    """sources -> records/{documents,conversations,prompts,comparisons}-{train,validation,test}."""
    sources = readers.plan(config.data.sources, config.data.documents, config.data.beside)
    inputs = raw.of_sources(sources, config.data.tfds_dir, config.module)
    with artifact.open_run(config, workdir, "prepare", files=inputs) as opened:
        if opened.finished:
            print(f"prepare: {workdir} is done")
            return
        settings = _cleaning(config, opened.workdir)
        phases = [
            pipeline.Phase("reading", "source", READ, len(sources)),
            pipeline.Phase("cleaning", "block", CLEANED, MADE),
            pipeline.Phase("removing duplicates", "part", RESOLVED, PARTITIONS, at_most=True),
            pipeline.Phase("choosing prompts", "part", CHOSEN, PARTITIONS, at_most=True),
            pipeline.Phase("writing", "shard", WRITTEN),
        ]
        with pipeline.watched(opened, "cleaning", phases):
            pipeline.run(config.beam, functools.partial(clean_pipeline, sources, settings))
        _fill_empty_shards(_directory(settings), config.num_shards)
        statistics = json.loads((opened.workdir / STATISTICS).read_text())
        cleaning_report.check_quality(statistics, config, opened.workdir)
        files.atomic_write(
            opened.workdir / "report.md", cleaning_report.report(statistics, opened.identity)
        )
        opened.results(**cleaning_report.results(statistics))
        opened.complete(records.digest(_directory(settings)))


def _cleaning(config: ConfigDict, workdir: epath.Path) -> Cleaning:
    limits = config.data.to_dict() | {"module": config.module}
    for name in ("sources", "documents", "beside", "keep_fraction"):
        del limits[name]
    return Cleaning(
        limits=readers.Limits(**limits),
        keep_fraction=config.data.keep_fraction,
        rules=clean.Rules(**config.clean),
        test_fraction=config.split.test_fraction,
        validation_fraction=config.split.validation_fraction,
        seed=config.split.seed,
        prompts_per_conversation=config.prompts.per_conversation,
        prompt_min_chars=config.prompts.min_chars,
        num_shards=config.num_shards,
        workdir=str(workdir),
    )


def clean_pipeline(sources: list[readers.Source], settings: Cleaning, root: beam.Pipeline) -> None:
    """read -> clean, split -> unique records -> derived records, unique prompts -> shards."""
    outputs = ("statistics", "prompts")
    blocks = (
        root
        | beam.Create(sources)
        | "spread sources" >> beam.Reshuffle()
        | "read" >> beam.FlatMap(read_blocks, settings)
        | "spread blocks" >> beam.Reshuffle()
    )
    cleaned = blocks | "clean" >> beam.FlatMap(clean_block, settings).with_outputs(
        *outputs, main="main"
    )
    kept = (
        cleaned.main
        | "by hash" >> beam.GroupByKey()
        | "unique" >> beam.FlatMap(keep_unique, settings).with_outputs(*outputs, main="main")
    )
    prompts = (
        kept.prompts
        | "by prompt" >> beam.GroupByKey()
        | "unique prompts"
        >> beam.FlatMap(keep_prompts, settings).with_outputs(*outputs, main="main")
    )
    _write(settings, kept.main, prompts.main)
    (
        (cleaned.statistics, kept.statistics, prompts.statistics)
        | "all statistics" >> beam.Flatten()
        | "together" >> beam.GroupByKey()
        | "write statistics" >> beam.Map(cleaning_report.write_statistics, settings.workdir)
    )


def read_blocks(source: readers.Source, settings: Cleaning) -> Iterator[bytes]:
    """A source's items in pickled blocks."""
    block: list[readers.Item | readers.Bad] = []
    chars = 0
    for item in readers.read(source, settings.limits):
        if not block and pipeline.stopping(settings.workdir):
            return
        block.append(item)
        if isinstance(item, readers.Item) and isinstance(item.record, Document):
            chars += len(item.record.text)
        elif isinstance(item, readers.Item):
            chars += 1000
        if len(block) >= BLOCK_ITEMS or chars >= BLOCK_CHARS:
            yield _made(block, settings)
            block, chars = [], 0
    if block:
        yield _made(block, settings)
    pipeline.tick(settings.workdir, READ)


def _made(block: list[readers.Item | readers.Bad], settings: Cleaning) -> bytes:
    pipeline.tick(settings.workdir, MADE)
    return pickle.dumps(block)


def split_of(topic: str | None, unit: str, settings: Cleaning) -> str:
    """An item's split: whole topics (or units without one) are test, whole units validation.

    A function of the names alone, so an item stays where it is when the corpus grows.
    """
    if _share(settings.seed, "test", unit if topic is None else topic) < settings.test_fraction:
        return "test"
    if _share(settings.seed, "validation", unit) < settings.validation_fraction:
        return "validation"
    return "train"


def _share(*names: object) -> float:
    """A hash of the names as a number in [0, 1)."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode("utf-8", "replace"), digest_size=7)
    return int.from_bytes(digest.digest(), "big") / 2**56


def clean_block(block: bytes, settings: Cleaning) -> Iterator[Any]:
    """Pickled items -> (partition, [(hash, split, id, record bytes)]), and statistics."""
    if pipeline.stopping(settings.workdir):
        return
    statistics = Statistics()
    parts: dict[int, list[tuple[bytes, str, str, bytes]]] = {}
    for item in pickle.loads(block):
        if isinstance(item, readers.Bad):
            statistics.quarantine(item)
            continue
        split = split_of(item.topic, item.unit, settings)
        if item.train_only and split != "train":
            statistics.drop(item.record, split, "belongs to a held-out unit")
            continue
        if _share(settings.seed, "keep", item.unit) >= settings.keep_fraction:
            statistics.drop(item.record, split, "not drawn by data.keep_fraction")
            continue
        record, reason = _clean_record(item, settings.rules)
        if reason is not None:
            statistics.drop(record, split, reason)
            continue
        key = dedup.record_hash(record)
        entry = (key, split, record.id, pickle.dumps(record))
        parts.setdefault(key[1] % PARTITIONS, []).append(entry)
    yield from sorted(parts.items())
    yield TaggedOutput("statistics", (0, statistics.dump()))
    pipeline.tick(settings.workdir, CLEANED)


def _clean_record(item: readers.Item, rules: clean.Rules) -> tuple[Any, str | None]:
    if isinstance(item.record, Document):
        return clean.clean_document(item.record, item.html, rules)
    if isinstance(item.record, Conversation):
        return clean.clean_conversation(item.record, rules)
    replies = [clean.clean_text(c.content, rules.straight_quotes) for c in item.record.candidates]
    candidates = tuple(
        dataclasses.replace(c, content=text)
        for c, text in zip(item.record.candidates, replies, strict=True)
    )
    reason = next(
        (
            r
            for r in (clean.reject(t, dataclasses.replace(rules, min_chars=1)) for t in replies)
            if r
        ),
        None,
    )
    return dataclasses.replace(item.record, candidates=candidates), reason


def keep_unique(group: tuple[int, Iterable[list]], settings: Cleaning) -> Iterator[Any]:
    """One partition's records -> those to keep by (set, shard), and prompts by their hash."""
    if pipeline.stopping(settings.workdir):
        return
    statistics = Statistics()
    kept, dropped = dedup.unique(
        (key, split, record_id, (split, data))
        for block in group[1]
        for key, split, record_id, data in block
    )
    for (split, data), keeper in dropped:
        statistics.drop(pickle.loads(data), split, "duplicate", f" (the same as {keeper})")
    shards: dict[tuple[str, int], list[Payload]] = {}
    prompts: dict[int, list[tuple[bytes, str, str, bytes]]] = {}
    for split, data in kept:
        record = pickle.loads(data)
        statistics.keep(record, split)
        _add(shards, record, split, settings.num_shards)
        if isinstance(record, Conversation):
            for entry in _prompts(record, split, settings):
                prompts.setdefault(entry[0][0] % PARTITIONS, []).append(entry)
    yield from sorted(shards.items())
    yield from (TaggedOutput("prompts", part) for part in sorted(prompts.items()))
    yield TaggedOutput("statistics", (0, statistics.dump()))
    pipeline.tick(settings.workdir, RESOLVED)


def _add(shards: dict, record: Any, split: str, num_shards: int) -> None:
    name = f"{kind_of(record)}-{split}"
    shard = records.shard_of(record.id, num_shards)
    shards.setdefault((name, shard), []).append((record.id, record.to_bytes()))


def _prompts(
    record: Conversation, split: str, settings: Cleaning
) -> Iterator[tuple[bytes, str, str, bytes]]:
    """Prefixes of a conversation that end with the user: (hash, split, id, pickled Prompt).

    A few are drawn to be prompts. Of a training conversation *every* such prefix is given, the
    others without a Prompt (b""): a held-out prompt must be none of them.
    """
    hashes = list(dedup.prefix_hashes(record.messages))
    ends = [i for i, m in enumerate(record.messages) if m.role == "user"]
    able = [i for i in ends if len(record.messages[i].content) >= settings.prompt_min_chars]
    drawn = sorted(able, key=lambda i: _share(settings.seed, "prompt", record.id, i))
    chosen = set(drawn[: settings.prompts_per_conversation])
    for i in ends:
        key = f"{record.id}:{i:03d}"
        if i in chosen:
            prompt = Prompt(key, record.messages[: i + 1], record.source)
            yield hashes[i], split, key, pickle.dumps(prompt)
        elif split == "train":
            yield hashes[i], split, key, b""


def keep_prompts(group: tuple[int, Iterable[list]], settings: Cleaning) -> Iterator[Any]:
    """One partition's prompts without duplicates; what occurs in training is no held-out prompt."""
    if pipeline.stopping(settings.workdir):
        return
    statistics = Statistics()
    entries: dict[bytes, list[tuple[str, str, bytes]]] = {}
    for block in group[1]:
        for key, split, prompt_id, data in block:
            entries.setdefault(key, []).append((split, prompt_id, data))
    shards: dict[tuple[str, int], list[Payload]] = {}
    for _, same in sorted(entries.items()):
        seen = any(split == "train" for split, _, _ in same)
        candidates = sorted((e for e in same if e[2]), key=lambda e: dedup.keep_order(e[0], e[1]))
        allowed = [e for e in candidates if not seen or e[0] == "train"]
        for entry in candidates:
            split, _, data = entry
            prompt = pickle.loads(data)
            if entry not in allowed:
                statistics.drop(prompt, split, "occurs in a training conversation")
            elif entry is not allowed[0]:
                statistics.drop(prompt, split, "duplicate")
            else:
                statistics.keep(prompt, split)
                _add(shards, prompt, split, settings.num_shards)
    yield from sorted(shards.items())
    yield TaggedOutput("statistics", (0, statistics.dump()))
    pipeline.tick(settings.workdir, CHOSEN)


def _write(settings: Cleaning | Tokenizing, *collections: beam.PCollection) -> None:
    """Collections of ((set, shard), payloads) -> shards of records."""
    (
        collections
        | "all records" >> beam.Flatten()
        | "by shard" >> beam.GroupByKey()
        | "write shard" >> beam.Map(write_shard, settings)
    )


def write_shard(
    group: tuple[tuple[str, int], Iterable[list[Payload]]], settings: Cleaning | Tokenizing
) -> None:
    """Sorts and writes one shard."""
    if pipeline.stopping(settings.workdir):
        return
    (name, shard), blocks = group
    kind, split = name.rsplit("-", 1)
    path = records.shard_path(_directory(settings), kind, split, shard, settings.num_shards)
    records.write_shard(path, (payload for block in blocks for payload in block))
    pipeline.tick(settings.workdir, WRITTEN)


def _directory(settings: Cleaning | Tokenizing) -> str:
    """Of the records."""
    return f"{settings.workdir}/records"


def _fill_empty_shards(directory: str, num_shards: int) -> None:
    """A record set is complete only with all its shards, the empty ones too."""
    for name in records.record_sets(directory):
        kind, split = name.rsplit("-", 1)
        for shard in range(num_shards):
            path = records.shard_path(directory, kind, split, shard, num_shards)
            if not path.exists():
                records.write_shard(path, [])


# --- tokenize ---


@dataclasses.dataclass(frozen=True)
class Tokenizing:
    """What the workers of 'tokenize' need to know."""

    corpus: str
    vocabulary: str
    module: str | None
    num_shards: int
    workdir: str


def run_tokenize(config: ConfigDict, workdir: str) -> None:
    """corpus, vocabulary -> records/<task>-<split> of TokenExamples, for all of config.tasks."""
    artifact.check_inputs(config)
    with artifact.open_run(config, workdir, "prepare", files=raw.of_tasks(config)) as opened:
        if opened.finished:
            print(f"prepare: {workdir} is done")
            return
        settings = Tokenizing(
            corpus=str(config.inputs.corpus),
            vocabulary=str(config.inputs.vocabulary),
            module=config.module,
            num_shards=config.num_shards,
            workdir=str(opened.workdir),
        )
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
        from gptlab.data import tasks

        tasks.use(settings.corpus, settings.vocabulary, settings.module)
        for name, rates in config.mixtures.items():
            tasks.add_mixture(name, dict(rates))
        names = [*config.tasks, *config.mixtures]
        slices, mixtures = tasks.slices(names, config.slices), tasks.mixture_rates(names)
        phases = [
            pipeline.Phase("tokenizing", "slice", SLICE, len(slices)),
            pipeline.Phase("writing", "shard", WRITTEN),
        ]
        with pipeline.watched(opened, "tokenizing", phases):
            pipeline.run(config.beam, functools.partial(tokenize_pipeline, slices, settings))
        _fill_empty_shards(_directory(settings), config.num_shards)
        counts = json.loads((opened.workdir / STATISTICS).read_text())
        _check_tokens(counts, slices)
        files.atomic_write(opened.workdir / "report.md", token_report(counts, mixtures, opened))
        opened.results(token_sets=counts, mixtures=mixtures)
        opened.complete(records.digest(_directory(settings)))


def tokenize_pipeline(slices: list[Any], settings: Tokenizing, root: beam.Pipeline) -> None:
    """slices of tasks -> token examples -> shards, and their counts."""
    done = (
        root
        | beam.Create(slices)
        | "spread slices" >> beam.Reshuffle()
        | "tokenize" >> beam.FlatMap(tokenize_slice, settings).with_outputs("counts", main="main")
    )
    _write(settings, done.main)
    (
        done.counts
        | "together" >> beam.GroupByKey()
        | "write counts" >> beam.Map(write_counts, settings.workdir)
    )


def tokenize_slice(part: Any, settings: Tokenizing) -> Iterator[Any]:
    """One slice of a task's split -> ((set, shard), payloads), and counts."""
    from gptlab.data import tasks

    tasks.use(settings.corpus, settings.vocabulary, settings.module)
    name = f"{part.task}-{part.split}"
    counts: Counter[str] = Counter()
    shards: dict[int, list[Payload]] = {}
    waiting = 0
    for example in tasks.examples(part):
        if not waiting and pipeline.stopping(settings.workdir):
            return
        if not len(example.tokens):
            counts.update(refused=1)
            continue
        counts.update(
            examples=1, tokens=len(example.tokens), learnt_tokens=int(example.loss_mask.sum())
        )
        shard = records.shard_of(example.id, settings.num_shards)
        shards.setdefault(shard, []).append((example.id, example.to_bytes()))
        waiting += 1
        if waiting >= BLOCK_ITEMS:
            yield from (((name, s), payloads) for s, payloads in sorted(shards.items()))
            shards, waiting = {}, 0
    yield from (((name, s), payloads) for s, payloads in sorted(shards.items()))
    yield TaggedOutput("counts", (0, (name, dict(counts))))
    pipeline.tick(settings.workdir, SLICE)


def write_counts(group: tuple[int, Iterable[tuple[str, dict[str, int]]]], directory: str) -> None:
    """Adds up the slices' counts per record set."""
    totals: dict[str, Counter[str]] = {}
    for name, counts in group[1]:
        totals.setdefault(name, Counter(examples=0, tokens=0, learnt_tokens=0)).update(counts)
    content = json.dumps({name: dict(total) for name, total in sorted(totals.items())})
    files.atomic_write(epath.Path(directory) / STATISTICS, content)


def _check_tokens(counts: dict[str, dict[str, int]], slices: list[Any]) -> None:
    for task in sorted({part.task for part in slices}):
        found = counts.get(f"{task}-train", {})
        if not found.get("learnt_tokens"):
            refused = found.get("refused", 0)
            raise UserError(
                f"task {task!r} gave no token to learn from in train (the chat template refused "
                f"{refused:,} conversations); look at its source"
            )


def token_report(
    counts: dict[str, dict[str, int]], mixtures: dict[str, Any], opened: artifact.Run
) -> str:
    """report.md: examples and tokens of every record set, and the mixtures' rates."""
    out = [
        f"# Tokens {opened.identity}",
        "",
        "| set | examples | tokens | learnt tokens |",
        "|---|---:|---:|---:|",
    ]
    for name, row in counts.items():
        out.append(
            f"| {name} | {row['examples']:,} | {row['tokens']:,} | {row['learnt_tokens']:,} |"
        )
    for name, row in counts.items():
        if refused := row.get("refused"):
            out += ["", f"{name}: {refused:,} conversations that the chat template refuses."]
    for name, rates in mixtures.items():
        out += [
            "",
            f"Mixture {name}: " + ", ".join(f"{task} {rate:g}" for task, rate in rates.items()),
        ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    program.main(run, "prepare")
