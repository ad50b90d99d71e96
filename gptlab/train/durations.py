"""How long a training stage lasts: exactly one of steps, tokens or epochs is configured."""

import math

from etils import epath
from ml_collections import ConfigDict

from gptlab.run.errors import UserError
from gptlab.train.checkpoint import checkpoint_steps

KEYS = ("total_steps", "total_tokens", "total_epochs")


def total_steps(config: ConfigDict, batch_tokens: int, steps_per_epoch: float) -> int:
    """The number of optimiser steps that the config asks for, rounded up to a whole step.

    Args:
      config: holds total_steps, total_tokens and total_epochs (placeholders), one of them set.
      batch_tokens: token positions of one global batch.
      steps_per_epoch: batches that one pass over the data makes, possibly a fraction.

    Raises:
      UserError: none or several are set, or the one that is set is not positive.
    """
    given = {key: config[key] for key in KEYS if config[key] is not None}
    if len(given) != 1:
        shown = ", ".join(f"{k}={v}" for k, v in given.items()) or "none is set"
        raise UserError(
            f"set exactly one of config.{', config.'.join(KEYS)} ({shown}); =None empties another"
        )
    ((key, amount),) = given.items()
    if amount <= 0:
        raise UserError(f"config.{key}={amount} must be positive")
    per_step = {
        "total_steps": 1,
        "total_tokens": batch_tokens,
        "total_epochs": 1 / steps_per_epoch,
    }[key]
    # The tolerance keeps 3 epochs of 1/0.1 steps from becoming 31 steps.
    return max(1, math.ceil(amount / per_step - 1e-6))


def check_not_passed(config: ConfigDict, workdir: epath.PathLike, batch_tokens: int) -> None:
    """UserError if `workdir` has a checkpoint beyond the steps or tokens that are asked for.

    To be called before the run is opened, as a finished run must not lose its manifest over it.
    How many steps make total_epochs only the data can tell: a run that is asked for fewer epochs
    than it has behind it ends where it stands.
    """
    if config.total_epochs is not None or not checkpoint_steps(workdir):
        return
    asked = total_steps(config, batch_tokens, 1.0)
    key = next(key for key in KEYS if config[key] is not None)
    check_steps_not_passed(workdir, asked, f"config.{key}={config[key]}")


def check_steps_not_passed(workdir: epath.PathLike, asked: int, setting: str) -> None:
    """UserError if `workdir` has a checkpoint beyond the `asked` steps that `setting` makes."""
    reached = max(checkpoint_steps(workdir), default=0)
    if reached > asked:
        raise UserError(
            f"{workdir} is at step {reached} already, beyond the {asked} that {setting} asks for: "
            "raise that, or choose another --workdir"
        )
