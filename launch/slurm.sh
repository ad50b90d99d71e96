#!/usr/bin/env bash
# Submits one program to Slurm, as one process a task; JAX finds the others by itself:
#   bash launch/slurm.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 -- \
#       gptlab.pretrain --config=FILE.py --workdir=DIR [flags]
# What stands before -- goes to sbatch. On GPUs JAX gives each task one GPU, so ask for as many tasks
# as GPUs. Two minutes before the time limit the program saves, and the job is queued again with the
# same workdir; so it is after a lost node or task. GPTLAB_EXTRAS=cloud (before it) installs for CPUs.
# The checkout and DIR must be on storage that all nodes share (DIR may be in a bucket).
set -euo pipefail
# Deaths by a signal that are tried again, as nothing tells a lost node from a program that crashes.
most_restarts=10


# What the job's first node runs: Slurm has copied this script, so the checkout comes by name.
job() {
  cd "$GPTLAB_CHECKOUT"
  source launch/environment.sh
  export GPTLAB_COORDINATOR=auto
  # A task that is lost is named by the others; those that are still there a minute later are ended.
  code=0
  srun --kill-on-bad-exit=0 --wait=60 python -m "$@" || code=$?
  if ((code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < most_restarts))); then
    echo "launch/slurm.sh: exit code $code, job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

if [[ -n ${GPTLAB_CHECKOUT:-} && -n ${SLURM_JOB_ID:-} ]]; then
  job "$@"
fi
source "$(dirname "${BASH_SOURCE[0]}")/program.sh"
options=()
while (($#)) && [[ $1 != -- ]]; do # values may follow a space, as sbatch has it
  [[ $1 != -h && $1 != --help ]] || { usage && exit; }
  options+=("$1")
  shift
done
[[ ${1:-} == -- ]] || fail "write -- between sbatch's options and the program; see --help"
shift
check_program "$@"
command -v sbatch >/dev/null || fail "there is no sbatch here; run this where jobs are submitted"
export GPTLAB_EXTRAS=${GPTLAB_EXTRAS:-cuda,cloud}
# Installed once, here: the nodes then find it done.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export GPTLAB_CHECKOUT=$PWD
mkdir -p runs/slurm
exec sbatch --job-name="$1" --requeue --signal=TERM@120 --open-mode=append \
  --output=runs/slurm/%j.log "${options[@]}" launch/slurm.sh "$@"
