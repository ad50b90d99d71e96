"""What a loop says about its steps: read one step late, checked for being finite, timed."""

import math
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from gptlab.run.artifact import Run
from gptlab.run.errors import UserError

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}
# So many steps skipped in a row mean that the run has diverged for good.
MAX_SKIPPED_IN_A_ROW = 100
_NORMS = ("grad_norm", "param_norm")  # what must be finite beside the loss, by how names end


class StepLog:
    """Writes the metrics of a step after the next one was dispatched, so the device never waits.

    Loops call `push` after each step; `flush` before anything that takes its own time (evaluating,
    saving) and `resume` after it, so that the speed is that of the steps alone.
    """

    def __init__(
        self, run: Run, config: ConfigDict, step_tokens: int, flops_per_token: float | None
    ):
        """Starts the clock.

        Args:
          run: whose metrics are written.
          config: log_every_steps, on_nonfinite.
          step_tokens: token positions of one global batch.
          flops_per_token: all that a step computes, by its token positions; for perf/mfu where the
            device's peak is known. None where a step does more than one forward and backward of
            one model: there is no perf/mfu then.
        """
        if config.on_nonfinite not in ("stop", "skip"):
            raise UserError(f"config.on_nonfinite={config.on_nonfinite!r}: use 'stop' or 'skip'")
        self._run, self._config, self._step_tokens = run, config, step_tokens
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._mfu = None
        if flops_per_token is not None and peak is not None:
            self._mfu = flops_per_token / (peak * jax.device_count())
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since: float | None = None  # None until the first step, which compiles, is over
        self._steps = 0
        self._total_steps, self._seconds = 0, 0.0
        self._skipped_in_a_row = 0
        self.loss = math.nan

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of step number `step` (from 1) and reads those of the one before.

        Raises:
          UserError: a loss or gradient is not finite, and the policy is to stop.
        """
        previous, self._pending = self._pending, (step, metrics)
        if previous is not None:
            self._read(*previous)

    def flush(self) -> None:
        """Reads what is pending. Nothing that is saved after it has a loss that is not finite."""
        if self._pending is not None:
            self._read(*self._pending)
            self._pending = None
            self._lap(time.perf_counter())

    def resume(self) -> None:
        """Starts the clock anew: what happened since `flush` was no training."""
        if self._since is not None:
            self._since, self._steps = time.perf_counter(), 0

    def mean_tokens_per_sec(self) -> float | None:
        """Over all steps since this process started, without the first; None for fewer than two."""
        return self._total_steps * self._step_tokens / self._seconds if self._total_steps else None

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.loss = values["train/loss"]
        self._check_finite(step, values)
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._steps += 1
        if step % self._config.log_every_steps == 0:
            self._run.metrics.write(step, values | self._lap(now))

    def _lap(self, now: float) -> dict[str, float]:
        """Ends a stretch of steps; returns its speed."""
        steps, since = self._steps, self._since
        if not steps or since is None:
            return {}
        seconds = max(now - since, 1e-9)
        self._total_steps, self._seconds = self._total_steps + steps, self._seconds + seconds
        self._since, self._steps = now, 0
        rate = steps * self._step_tokens / seconds
        figures = {"perf/tokens_per_sec": rate}
        return figures if self._mfu is None else figures | {"perf/mfu": rate * self._mfu}

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        # The critic's norms among them: its loss may be finite when its gradient is not.
        norms = [name for end in _NORMS for name in sorted(values) if name.endswith(end)]
        bad = [name for name in ("train/loss", *norms) if not math.isfinite(values[name])]
        if not bad:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        optimizer = "value_optimizer" if "critic" in bad[0] else "optimizer"
        # What is wrong with the parameters themselves cannot be passed over.
        if self._config.on_nonfinite == "stop" or bad[-1].endswith("param_norm"):
            raise UserError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; nothing of it is saved. Lower "
                f"config.{optimizer}.lr, or pass over such steps with config.on_nonfinite='skip'"
            )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{bad[0]} is {values[bad[0]]} at step {step}, and so were the "
                f"{MAX_SKIPPED_IN_A_ROW - 1} steps before: this run has diverged. Lower "
                f"config.{optimizer}.lr and start again in another --workdir"
            )
