"""How long a training stage lasts: exactly one of steps, tokens or epochs is configured."""

import math

from ml_collections import ConfigDict

from gptlab.run.errors import UserError

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
        raise UserError(f"set exactly one of config.{', config.'.join(KEYS)} ({shown})")
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
