"""What `config.data.name` may name: a task of a tokenised corpus, or a mixture of its tasks.

The rates of mixtures, from the config of `prepare` or a module of the user's, are in the manifest
of the tokens; token records are always those of tasks. Here the packed rows of a mixture's members
come together. A rate is a share of rows, so about that of the tokens that are trained on, whatever
the lengths of the examples.
"""

from __future__ import annotations

import dataclasses
import difflib

from etils import epath

from gptlab.data import packing, records
from gptlab.data.packing import Overlong, PackedSource
from gptlab.run import artifact
from gptlab.run.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedMixture:
    """Packed rows of one or several tasks, and how often a row is taken from each.

    Attributes:
      sources: the rows of each task, all of one length.
      rates: of each, relative to each other; positive.
    """

    sources: tuple[PackedSource, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.sources) or min(self.rates, default=0) <= 0:
            raise UserError(
                f"{len(self.sources)} sources need as many positive rates, got {self.rates}"
            )
        lengths = {source.seq_len for source in self.sources}
        if len(lengths) > 1:
            raise UserError(f"a mixture of rows of {sorted(lengths)} tokens")

    def __len__(self) -> int:
        """Rows of all members together: what is called an epoch."""
        return sum(len(source) for source in self.sources)

    @property
    def seq_len(self) -> int:
        """Slots of a row, T."""
        return self.sources[0].seq_len


def members(workdir: epath.PathLike, name: str, key: str = "config.data.name") -> dict[str, float]:
    """{task: rate} of a mixture, sorted; of a task, itself alone.

    Args:
      workdir: of `prepare`, mode 'tokenize'.
      name: of a task or a mixture.
      key: where the name was given, for the error.

    Raises:
      UserError: there is no such task or mixture; it names the most similar one.
    """
    known = artifact.read_manifest(workdir)["results"].get("mixtures", {})
    tasks = {s.rpartition("-")[0] for s in records.record_sets(epath.Path(workdir) / "records")}
    if name in tasks:
        return {name: 1.0}
    if name in known:
        return dict(sorted(known[name].items()))
    there = sorted(tasks | known.keys())
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"{key}={name!r}: {workdir} has no such task or mixture; {hint}There are: "
        f"{', '.join(there) or 'none; was it made by gptlab.prepare, mode tokenize?'}"
    )


def packed(
    workdir: epath.PathLike,
    name: str,
    split: str,
    seq_len: int,
    *,
    overlong: Overlong = "split",
    max_reply_tokens: int = 0,
    key: str = "config.data.name",
) -> PackedMixture:
    """The packed rows of a task, or of a mixture's members with their rates.

    A member without a held-out split (a TFDS builder may have none) is left out of that split.
    Otherwise as `packing.packed`; errors as there and in `members`.
    """
    rates = members(workdir, name, key)
    if len(rates) > 1 and split != "train":
        there = records.record_sets(epath.Path(workdir) / "records")
        rates = {t: rate for t, rate in rates.items() if f"{t}-{split}" in there} or rates
    sources = [
        packing.packed(
            workdir, t, split, seq_len, overlong=overlong, max_reply_tokens=max_reply_tokens
        )
        for t in rates
    ]
    return PackedMixture(tuple(sources), tuple(rates.values()))
