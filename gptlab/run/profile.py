"""A jax.profiler trace of a few training steps, asked for by config.

`--config.profile.start_step=10 --config.profile.num_steps=3` writes a trace of steps 10, 11 and 12
to WORKDIR/profile; look at it with TensorBoard's profile plug-in or with Perfetto.
"""

import atexit
import os
import shutil
import tempfile
from typing import Any

import jax

from gptlab.run import processes, storage
from gptlab.run.errors import UserError


class StepProfiler:
    """Traces steps [start_step, start_step + num_steps) on process 0."""

    def __init__(self, start_step: int, num_steps: int, directory: str):
        self._first, self._end = start_step, start_step + num_steps
        self._directory = self._local = directory
        self._annotation: Any = None
        self._tracing = False

    def step(self, i: int) -> None:
        """To be called just before step `i`, with i increasing."""
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if not self._first <= i < self._end:
            self.close()
            return
        if not self._tracing:
            # Work dispatched earlier would otherwise show up in the trace.
            jax.block_until_ready(jax.live_arrays())
            if storage.in_bucket(self._directory):  # the profiler writes files only
                self._local = tempfile.mkdtemp(prefix="gptlab-profile-")
            jax.profiler.start_trace(self._local)
            self._tracing = True
            atexit.register(self.close)
        self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=i)
        self._annotation.__enter__()

    def close(self) -> None:
        """Ends the trace, if one is running; a run may end inside the window."""
        if not self._tracing:
            return
        self._tracing = False
        atexit.unregister(self.close)
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        jax.block_until_ready(jax.live_arrays())  # steps still running belong to the trace
        jax.profiler.stop_trace()
        if self._local != self._directory:
            storage.upload(self._local, self._directory)
            shutil.rmtree(self._local)


def step_profiler(profile: Any, workdir: str | os.PathLike[str]) -> StepProfiler:
    """A profiler for the config subtree `profile` (start_step, num_steps; 0 steps means off)."""
    if profile.start_step < 0 or profile.num_steps < 0:
        raise UserError(
            f"config.profile: start_step ({profile.start_step}) and num_steps "
            f"({profile.num_steps}) can't be negative; num_steps=0 turns the profiler off"
        )
    num_steps = profile.num_steps if processes.is_first() else 0
    return StepProfiler(profile.start_step, num_steps, os.path.join(workdir, "profile"))
