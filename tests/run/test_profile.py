import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from gptlab.run.errors import UserError
from gptlab.run.profile import step_profiler


def traces(workdir):
    return list(workdir.glob("profile/**/*.xplane.pb"))


def run_steps(profiler, workdir, start, end):
    """The steps after whose beginning there was a trace on disk."""
    seen = []
    for i in range(start, end):
        profiler.step(i)
        jnp.ones(3).sum()
        if traces(workdir):
            seen.append(i)
    return seen


def test_the_asked_steps_are_traced(tmp_path):
    profiler = step_profiler(ConfigDict({"start_step": 2, "num_steps": 2}), tmp_path)
    assert run_steps(profiler, tmp_path, 0, 6) == [4, 5]  # written when step 4 is about to begin
    assert len(traces(tmp_path)) == 1


def test_a_run_that_resumes_or_ends_inside_the_window(tmp_path):
    profiler = step_profiler(ConfigDict({"start_step": 2, "num_steps": 5}), tmp_path)
    assert run_steps(profiler, tmp_path, 4, 6) == []
    profiler.close()
    assert len(traces(tmp_path)) == 1


def test_no_steps_means_no_trace(tmp_path):
    profiler = step_profiler(ConfigDict({"start_step": 0, "num_steps": 0}), tmp_path)
    assert run_steps(profiler, tmp_path, 0, 3) == []
    assert not (tmp_path / "profile").exists()


def test_negative_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="can't be negative"):
        step_profiler(ConfigDict({"start_step": -1, "num_steps": 3}), tmp_path)
