#!/usr/bin/env bash
# Runs one program on this machine, in one process that uses all of its GPUs (or those that
# CUDA_VISIBLE_DEVICES names):
#   bash launch/gpu.sh gptlab.pretrain --config=FILE.py --workdir=DIR [flags]
# DIR may be in a bucket. Several nodes: launch/slurm.sh. Exit code: the program's; 2 misuse.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/program.sh"
[[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }
check_program "$@"
nvidia-smi -L >/dev/null 2>&1 || fail "nvidia-smi finds no GPU here; is the driver installed?"
export GPTLAB_EXTRAS=${GPTLAB_EXTRAS:-cuda,cloud}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m "$@"
