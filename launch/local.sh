#!/usr/bin/env bash
# Runs one program as several real processes on this machine, as a cluster of hosts would:
#   bash launch/local.sh --processes=4 gptlab.pretrain --config=FILE.py --workdir=DIR [flags]
# Process 0 has the terminal, the lines of the others begin with their number. When one is lost, the
# others stop within a minute and say so; the same command goes on. JAX_NUM_CPU_DEVICES=2 before it
# gives each process two virtual devices. Exit code: 0 done, 2 misuse, 75 stopped and resumable.
set -euo pipefail
# The processes find a loss by themselves; past this nobody waits for them any longer.
patience=45

source "$(dirname "${BASH_SOURCE[0]}")/program.sh"
processes=
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --processes=*) processes=${1#*=} ;;
    *) fail "there is no option $1 before the program (values follow an =); see --help" ;;
  esac
  shift
done
[[ -n $processes ]] || fail "--processes=N is missing before the program; see --help"
[[ $processes =~ ^[1-9][0-9]{0,2}$ ]] || fail "--processes=$processes is no number from 1 to 999"
check_program "$@"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
export GPTLAB_COORDINATOR=127.0.0.1:$port GPTLAB_NUM_PROCESSES=$processes
pids=()
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    GPTLAB_PROCESS_ID=0 python -m "$@" &
  else
    GPTLAB_PROCESS_ID=$i python -m "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

# Waits for each process that ends. A trapped signal ends a `wait` as well, and names no process.
codes=()
deadline=
left=$processes
while ((left)); do
  for i in "${!pids[@]}"; do
    if [[ -n ${codes[i]:-} ]] || kill -0 "${pids[i]}" 2>/dev/null; then
      continue
    fi
    codes[i]=0
    { wait "${pids[i]}" || codes[i]=$?; } 2>/dev/null # or bash says itself what killed it
    left=$((left - 1))
    if ((codes[i] > 128)); then
      signal=$(kill -l $((codes[i] - 128)))
      echo "launch/local.sh: process $i of $processes was killed by SIG$signal" >&2
    fi
    # Who was asked to stop may be saving for long.
    ((codes[i] == 0 || codes[i] == 75)) || : "${deadline:=$((SECONDS + patience))}"
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline && left)); then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.2
done
# A mistake or a defect is the first thing to mend; a process that was killed comes back by itself.
for code in 1 2 75; do
  [[ " ${codes[*]} " == *" $code "* ]] && exit "$code"
done
for code in "${codes[@]}"; do
  ((code == 0)) || { echo "launch/local.sh: the same command goes on" >&2 && exit 75; }
done
