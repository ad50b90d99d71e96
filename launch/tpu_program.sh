# shellcheck shell=bash disable=SC2154  # the options are tpu.sh's variables
# Sourced by tpu.sh: what it does to the program on the slice $name.
most_restarts=10 # of a program that is killed on a slice that is still there

do_logs() {
  queued ssh "$name" --node="$node" --worker="$worker" --command="bash gptlab/launch/worker.sh log"
}

do_stop() {
  on_all "bash gptlab/launch/worker.sh stop"
}

do_run() {
  local commit restarts start
  commit=$(git rev-parse HEAD)$([[ -z $(git status --porcelain) ]] || echo +changes)
  start="GPTLAB_COMMIT=$commit bash gptlab/launch/worker.sh start $(printf '%q ' "$@")"
  for ((restarts = 0; restarts <= most_restarts; restarts++)); do
    do_create
    if (do_setup && on_all "$start"); then
      follow "$1"
    else
      look
      [[ $now != ACTIVE ]] || exit 1
    fi
    # A preempted slice is no fault of the program's.
    [[ $now == ACTIVE ]] || restarts=-1
  done
  fail "$1 was killed $restarts times on a slice that was there; see: launch/tpu.sh logs $name" 1
}

# Waits for the program's end on all hosts, or that of the slice. Returns if it is to start again.
follow() {
  local ended
  while sleep "$poll" && look && [[ $now == ACTIVE ]]; do
    # Exit codes of all hosts, or 'running', 'stopped', 'lost' (worker.sh); nothing if out of reach.
    ended=" $(on_all "bash gptlab/launch/worker.sh code" 2>/dev/null |
      sed -n 's/^gptlab-code //p' | sort -u | tr '\n' ' ')" || continue
    case $ended in
      " " | *" running "*) ;; # where one host's process is lost, the others end within a minute
      *" 2 "*) last_words && exit 2 ;;
      *" 1 "*) last_words && exit 1 ;;
      " 0 ") echo "launch/tpu.sh: $1 is done" && exit ;;
      *stopped*) echo "launch/tpu.sh: $1 is stopped; the same command goes on" && exit 75 ;;
      *) echo "launch/tpu.sh: $1 ended with$ended" && return ;;
    esac
  done
  echo "launch/tpu.sh: $name is $now"
}

last_words() {
  on_all "grep '^gptlab ' gptlab-run/log | tail -n 1" >&2 || true
}
