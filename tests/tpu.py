"""Tests that compile for TPUs, by the libtpu that launch/test.sh puts beside the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptlab.train import chips

ROOT = Path(__file__).parents[1]
TPU_COMPILER = Path(sys.prefix) / "tpu"  # where launch/test.sh puts libtpu
needs_libtpu = pytest.mark.skipif(
    not TPU_COMPILER.is_dir() and chips.libtpu_version() is None,
    reason="bash launch/test.sh installs libtpu",
)


def compile_for_tpu(*command: str, timeout: float, **extra: str) -> str:
    """What a program of Python that compiles for TPUs prints; `extra` are variables for it."""
    path = {} if chips.libtpu_version() else {"PYTHONPATH": str(TPU_COMPILER)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, timeout=timeout, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **path, **extra},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
