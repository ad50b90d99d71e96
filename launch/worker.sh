#!/usr/bin/env bash
# One host's part of launch/tpu.sh, which copies it there and calls it by ssh:
#   worker.sh install | start PROGRAM [flags] | code | stop | log
# The program outlives the ssh connection. What is known of it is in ~/gptlab-run: the process (pid),
# its output (log), how it ended (code), and that it was asked to stop (stopped).
set -euo pipefail
state=${GPTLAB_RUN_STATE:-$HOME/gptlab-run}
export GPTLAB_EXTRAS=${GPTLAB_EXTRAS:-tpu,cloud}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

running() {
  [[ -s $state/pid ]] && kill -0 "$(< "$state/pid")" 2>/dev/null
}

mkdir -p "$state"
action=${1:-}
shift || true
case $action in
  install)
    # The hosts' Ubuntu 22.04 has Python 3.10.
    if ! command -v python3.11 >/dev/null; then
      sudo apt-get update --quiet=2 && sudo apt-get install --quiet=2 --yes python3.11-venv
    fi
    source "$here/environment.sh"
    ;;
  start)
    if ((!$#)); then
      echo "launch/worker.sh: start PROGRAM [flags]" >&2
      exit 2
    fi
    if running; then
      echo "is running already"
      exit
    fi
    rm -f "$state/code" "$state/stopped"
    setsid nohup bash "$here/worker.sh" run "$@" >> "$state/log" 2>&1 < /dev/null &
    echo $! > "$state/pid"
    ;;
  run) # not by ssh: `start` puts it into a session of its own
    source "$here/environment.sh"
    export GPTLAB_COORDINATOR=auto
    python -m "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null' TERM
    code=0
    # A trapped signal ends a `wait`; the program then still has to save.
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
      code=0
      wait "$child" || code=$?
    done
    echo "$code" > "$state/code"
    ;;
  code) # of the last program: its exit code, 'running', 'stopped' or, after a reboot, 'lost'
    if running; then
      code=running
    elif [[ -e $state/stopped ]]; then # also one that was too young to leave a code
      code=stopped
    elif [[ -s $state/code ]]; then
      code=$(< "$state/code")
    else
      code=lost
    fi
    echo "gptlab-code $code"
    ;;
  stop)
    touch "$state/stopped"
    ! running || kill -TERM "$(< "$state/pid")"
    ;;
  log) exec tail -n 100 -F "$state/log" ;;
  *)
    echo "launch/worker.sh: install, start, code, stop or log" >&2
    exit 2
    ;;
esac
