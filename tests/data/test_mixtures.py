"""What data.name may name, and whose rows it stands for."""

import numpy as np
import pytest

from gptlab.data import mixtures
from gptlab.data.records import TokenExample
from gptlab.run.errors import UserError
from tests.fixtures import write_artifact

RATES = {"talk": 1.0, "prose": 3.0, "poems": 0.5}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Three tasks, one of which has no held-out split, and a mixture of them."""
    sets = {
        (task, split): [TokenExample(f"{i}", np.full(4, 9 + i), np.ones(4)) for i in range(8)]
        for task in RATES
        for split in ("train", "validation")
        if (task, split) != ("poems", "validation")
    }
    workdir = tmp_path_factory.mktemp("mixtures") / "tokens"
    results = {"mixtures": {"all": RATES, "one": {"poems": 2.0}}}
    return write_artifact(workdir, "prepare", sets, results=results)


def test_a_name_is_a_task_or_a_mixture(tokens):
    assert mixtures.members(tokens, "prose") == {"prose": 1.0}
    assert mixtures.members(tokens, "all") == RATES
    assert list(mixtures.members(tokens, "all")) == sorted(RATES)  # whatever the manifest's order


def test_rows_come_with_the_rates_of_their_tasks(tokens):
    whole = mixtures.packed(tokens, "all", "train", 8)
    names = [source.directory.name.split("-")[0] for source in whole.sources]
    assert dict(zip(names, whole.rates, strict=True)) == RATES
    assert len(whole) == sum(len(source) for source in whole.sources) == 12
    assert whole.seq_len == 8


def test_a_member_without_a_held_out_split_is_left_out_there(tokens):
    held_out = mixtures.packed(tokens, "all", "validation", 8)
    names = [source.directory.name.split("-")[0] for source in held_out.sources]
    assert names == ["prose", "talk"] and held_out.rates == (3.0, 1.0)
    for name in ("one", "poems"):  # but something must be held out
        with pytest.raises(UserError, match="no records poems-validation"):
            mixtures.packed(tokens, name, "validation", 8)


@pytest.mark.parametrize(
    ("name", "near"), [("prosa", "'prose'"), ("al", "'all'"), ("tlak", "'talk'")]
)
def test_an_unknown_name_is_answered_with_the_nearest(tokens, name, near):
    words = f"config.ptx.name='{name}': .* did you mean {near}.* There are: all, one, poems, prose"
    with pytest.raises(UserError, match=words):
        mixtures.members(tokens, name, "config.ptx.name")


def test_an_artifact_of_another_kind_is_named(tmp_path):
    write_artifact(tmp_path / "w", "train_tokenizer", {})
    with pytest.raises(UserError, match="none; was it made by gptlab.prepare, mode tokenize"):
        mixtures.members(tmp_path / "w", "pretrain")


def test_rows_of_different_lengths_do_not_mix(tokens):
    sources = [mixtures.packed(tokens, "prose", "train", n).sources[0] for n in (8, 9)]
    with pytest.raises(UserError, match=r"rows of \[8, 9\] tokens"):
        mixtures.PackedMixture(tuple(sources), (1.0, 1.0))
