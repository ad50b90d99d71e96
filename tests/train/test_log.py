"""What a step's metrics may be before a run stops, and what is written of them."""

from types import SimpleNamespace

import jax
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


@pytest.mark.parametrize("flops_per_token", [3e6, None])
def test_mfu_is_the_share_of_all_devices_peak_and_absent_where_nothing_was_counted(
    flops_per_token, monkeypatch
):
    lines = []
    run = SimpleNamespace(metrics=SimpleNamespace(write=lambda step, line: lines.append(line)))
    config = ConfigDict({"on_nonfinite": "stop", "log_every_steps": 1})
    monkeypatch.setattr(log_lib, "PEAK_FLOPS", {jax.devices()[0].device_kind: 1e9})
    clock = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr(log_lib, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    log = StepLog(run, config, step_tokens=1000, flops_per_token=flops_per_token)
    for step in (1, 2, 3, 4):
        log.push(step, FINITE)
    assert "perf/tokens_per_sec" not in lines[0]  # it compiled
    assert [line["perf/tokens_per_sec"] for line in lines[1:]] == [2000.0] * 2
    if flops_per_token is None:
        assert not any("perf/mfu" in line for line in lines)
    else:  # 2000 tokens/s of 3 MFLOP each, of 1 GFLOP/s a device
        want = 2000 * 3e6 / (1e9 * jax.device_count())
        assert [line["perf/mfu"] for line in lines[1:]] == [pytest.approx(want)] * 2


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
