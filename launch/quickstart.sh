#!/usr/bin/env bash
# From raw documents to a chat model: bash launch/quickstart.sh [smoke] [--config.key=value ...]
# `smoke` is the same loop in a few minutes. Run again, it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

variant=
if [[ ${1:-} == [!-]* ]]; then
  variant=$1
  shift
fi
exec python -m gptlab.rounds --config="configs/quickstart.py${variant:+:$variant}" \
  --workdir="runs/quickstart${variant:+-$variant}" "$@"
