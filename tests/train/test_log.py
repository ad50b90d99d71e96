"""What a step's metrics may be before a run stops, and what is written of them."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from gptlab.run.errors import UserError
from gptlab.train import log as log_lib
from gptlab.train.log import StepLog

FINITE = dict.fromkeys(
    (
        "train/loss",
        "train/grad_norm",
        "train/param_norm",
        "train/critic_grad_norm",
        "train/critic_param_norm",
    ),
    1.0,
)


def step_log(on_nonfinite):
    """(a log, the steps that it writes)."""
    written = []
    write = lambda step, values: written.append(step)  # noqa: E731
    run = SimpleNamespace(metrics=SimpleNamespace(write=write))
    config = ConfigDict({"on_nonfinite": on_nonfinite, "log_every_steps": 1})
    return StepLog(run, config, step_tokens=8, flops_per_token=1.0), written


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_loss_and_every_norm_must_be_finite(name, value):
    log, written = step_log("stop")
    log.push(1, FINITE)
    log.push(2, FINITE | {name: value})
    optimizer = "value_optimizer" if "critic" in name else "optimizer"
    with pytest.raises(UserError, match=rf"{name} is {value} at step 2; .*config\.{optimizer}\.lr"):
        log.flush()
    assert written == [1]


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm", "train/critic_grad_norm"])
def test_gradients_may_be_passed_over_but_not_for_ever(name):
    log, written = step_log("skip")
    bad = FINITE | {name: float("inf")}
    for step in range(1, log_lib.MAX_SKIPPED_IN_A_ROW):
        log.push(step, bad)
    log.push(log_lib.MAX_SKIPPED_IN_A_ROW, FINITE)  # starts the count anew
    log.flush()
    for step in range(1, log_lib.MAX_SKIPPED_IN_A_ROW):
        log.push(step, bad)
    log.flush()
    log.push(log_lib.MAX_SKIPPED_IN_A_ROW, bad)
    with pytest.raises(UserError, match=f"{name} is inf .* this run has diverged"):
        log.flush()


@pytest.mark.parametrize("name", ["train/param_norm", "train/critic_param_norm"])
def test_broken_parameters_are_never_passed_over(name):
    """Also not when the loss that they make is broken as well."""
    for others in ({}, {"train/loss": float("nan")}):
        log, written = step_log("skip")
        log.push(1, FINITE | {name: float("nan")} | others)
        with pytest.raises(UserError, match="nothing of it is saved"):
            log.flush()
        assert not written
