"""Corpus preparation on public packages; `:clean` (the default) or `:tokenize`.

    python -m gptlab.prepare --config=configs/prepare.py:clean --workdir=runs/clean
    python -m gptlab.train_tokenizer --config=configs/train_tokenizer.py \
        --config.inputs.corpus=runs/clean --workdir=runs/vocabulary
    python -m gptlab.prepare --config=configs/prepare.py:tokenize --workdir=runs/tokens \
        --config.inputs.corpus=runs/clean --config.inputs.vocabulary=runs/vocabulary

The packages hold 25 MB of training text. On two CPU cores cleaning takes 17 seconds, the vocabulary
14, tokenising 42. report.md of each says what was kept, and what was not.

Your own files instead (.txt .md .html .jsonl, also with .gz): --config.data.documents=DIR_OR_GLOB
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gptlab.run.errors import UserError


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one mode."""
    if arg in (None, "", "clean"):
        return clean()
    if arg == "tokenize":
        return tokenize()
    raise UserError(f"configs/prepare.py:{arg}: there is no such mode; use 'clean' or 'tokenize'")


def clean() -> ConfigDict:
    """sources -> clean, deduplicated, split text."""
    config = ConfigDict()
    config.mode = "clean"
    config.data = ConfigDict(
        dict(
            sources=(
                "package:chitchat",
                "package:reviews",
                "package:pydoc_topics",
                "package:idlelib_help",
            ),
            documents=placeholder(str),  # a directory or glob: takes the place of the sources
            beside=(),  # sources that are read beside documents of one's own, and only then
            keep_fraction=1.0,  # of the units (conversations, films, documents), drawn by name
            max_line_bytes=10_000_000,  # longer lines are quarantined unread
            max_html_bytes=10_000_000,
            stretch_bytes=100_000,  # a longer text file becomes several documents
            sides=1,  # 2: either speaker of a human dialogue is the assistant once
            pairs_per_review=2,  # comparisons a review takes part in, at most
            review_documents=True,  # reviews and plots of training films are documents too
            tfds_dir=placeholder(str),  # this and the next are read only with sources 'tfds:...'
            tfds_feature="text",
        )
    )
    # Imported first; may register TFDS builders. Its file, or package, counts as an input.
    config.module = placeholder(str)
    config.clean = ConfigDict(
        dict(
            min_chars=20,
            max_chars=1_000_000,
            min_letters=0.4,
            max_repeated_lines=0.3,
            min_compressed=0.12,
            straight_quotes=True,
        )
    )
    config.split = ConfigDict(dict(test_fraction=0.1, validation_fraction=0.05, seed=2))
    config.prompts = ConfigDict(dict(per_conversation=2, min_chars=10))
    config.max_bad_fraction = 0.05
    config.num_shards = 1
    config.beam = beam()
    return config


def tokenize() -> ConfigDict:
    """corpus, vocabulary -> token records."""
    config = ConfigDict()
    config.mode = "tokenize"
    config.inputs = ConfigDict(dict(corpus=placeholder(str), vocabulary=placeholder(str)))
    # Imported first; may register Tasks and TFDS builders. Its file, or package, and the files that
    # the Tasks name (TFDS, seqio.FileDataSource) count as inputs.
    config.module = placeholder(str)
    config.tasks = ("pretrain", "dialogues")  # Tasks or Mixtures (all their Tasks)
    # name -> {task: rate}: what --config.data.name of pretrain and sft may name, too. The tasks are
    # tokenised whether config.tasks names them or not; a rate is a share of the rows of a batch.
    config.mixtures = ConfigDict()
    config.slices = 8  # units of work for each task and split
    config.num_shards = 1
    config.beam = beam()
    return config


def beam() -> ConfigDict:
    """This machine. For a cluster: runner='FlinkRunner' etc. and its command line's options."""
    return ConfigDict(dict(runner="DirectRunner", num_workers=1, options=()))
