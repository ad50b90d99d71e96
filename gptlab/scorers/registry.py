"""Scorers by name. Rewards, judges and simulated labellers are made of these.

A scorer turns replies to prompts into numbers. It only reads records and text: it knows nothing of
models or devices.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from gptlab.data.records import Prompt
from gptlab.run.errors import UserError
from gptlab.scorers import classifiers, lexicon, programs


class Scorer(Protocol):
    """Scores replies."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> np.ndarray:
        """Returns float32 [n], one score for each (prompt, reply)."""
        ...


# What a factory calls `workdir` is given in the spec as `input`, a name under config.inputs:
# lineage knows only what is there.
_FACTORIES: dict[str, Callable[..., Scorer]] = {
    "length": programs.Length,
    "repetition": programs.Repetition,
    "tfidf_comparisons": classifiers.fit_comparison_records,
    "vader": lexicon.Vader,
    "word_fraction": programs.WordFraction,
}


def make(
    spec: ConfigDict | Mapping[str, Any],
    inputs: Mapping[str, str | os.PathLike | None] | None = None,
) -> Scorer:
    """Makes the scorer that a config subtree describes.

    Args:
      spec: `name` and that scorer's own settings, all of them and no others.
      inputs: config.inputs, for scorers that are fitted on an artifact.

    Raises:
      UserError: no scorer of that name, or the settings are not those it takes.
    """
    settings = dict(spec)
    name = settings.pop("name", None)
    if name not in _FACTORIES:
        nearest = difflib.get_close_matches(str(name), _FACTORIES, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"no scorer {name!r}; there are {', '.join(_FACTORIES)}{hint}")
    factory = _FACTORIES[name]
    takes = set(inspect.signature(factory).parameters)
    if "workdir" in takes:
        key = settings.pop("input", None)
        if not inputs or not inputs.get(key):
            raise UserError(
                f"scorer {name!r} is fitted on the artifact config.inputs.{key}, which is not given"
            )
        settings["workdir"] = inputs[key]
    if set(settings) != takes:
        wanted = ", ".join(sorted(takes)).replace("workdir", "input") or "no settings"
        raise UserError(
            f"scorer {name!r} takes {wanted}; got {', '.join(sorted(settings)) or 'none'}"
        )
    return factory(**settings)
