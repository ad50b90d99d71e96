#!/usr/bin/env bash
# Every check that a change must pass: bash launch/test.sh
# With arguments, only pytest with those: bash launch/test.sh tests/run -k manifest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Tests start hundreds of programs: what those import is compiled once.
unset PYTHONDONTWRITEBYTECODE

if (($#)); then
  exec python -m pytest "$@"
fi
# The TPU's compiler, for plans, stands apart: beside JAX it would look for TPUs at every start.
# The slow tests of it: PYTHONPATH=.venv/tpu bash launch/test.sh tests/test_plan.py -m slow
libtpu=0.0.42.1
if [[ -n ${venv:-} && ! -d $venv/tpu/libtpu-$libtpu.dist-info ]]; then
  python -m pip install --quiet --upgrade --no-deps --target "$venv/tpu" "libtpu==$libtpu" ||
    { rm -rf "$venv/tpu"; echo "libtpu is not to be had: the test of a plan for a TPU is skipped" >&2; }
fi
ruff check .
ruff format --check .
mypy
lint-imports
# Files go to workers whole, as fixtures are shared within one. Each test waits for the compiler
# or for single-threaded Python most of the time, so two workers pay off on two cores.
python -m pytest -q -n 2 --dist loadfile -m "not slow and not smoke"
# Whole programs, which use all cores by themselves.
python -m pytest -q -n 0 -m "smoke and not slow"
