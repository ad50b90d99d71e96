"""The documented commands of benchmarks/ start; one goes all the way at a tiny size."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_documented_command_starts(path):
    command = re.search(r"^    (python .*?)( \[.*)?$", path.read_text(), re.MULTILINE)[1]
    assert "usage:" in run(*shlex.split(command)[1:], "--help")


@pytest.mark.slow
def test_a_step_and_the_loop_around_it_are_measured():
    tiny = "--preset=tiny --batch_size=8 --seq_len=32 --unroll=2 --steps=20".split()
    figures = json.loads(run("-m", "benchmarks.train_step", *tiny))
    assert figures["step"]["ms"] > 0 and figures["loop"]["ms"] > 0
