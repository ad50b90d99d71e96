# shellcheck shell=bash disable=SC2154  # the options are tpu.sh's variables
# Sourced by tpu.sh: what it does to the slice $name.

# Sets `now`: the state of the request, NONE if there is none, PREEMPTED if a slice of it is gone.
look() {
  local code=0 i nodes=("$name")
  now=$(queued describe "$name" --format='value(state.state)') || code=$?
  ((code == 0)) || { ((code == 44)) && now=NONE && return; } || exit "$code"
  [[ $now == ACTIVE ]] || return 0
  ((slices == 1)) || for ((i = 0; i < slices; i++)); do nodes[i]=$name-$i; done
  for i in "${nodes[@]}"; do
    code=0
    state=$(try compute tpus tpu-vm describe "$i" --format='value(state)') || code=$?
    ((code == 0 || code == 44)) || exit "$code"
    if ((code == 44)) || [[ $state =~ ^(PREEMPTED|TERMINATED)$ ]]; then now=PREEMPTED; fi
  done
}

do_create() {
  local requested='' nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  while look && [[ $now != ACTIVE ]]; do
    echo "launch/tpu.sh: $name is $now"
    case $now in
      NONE)
        queued create "$name" --accelerator-type="$type" --runtime-version="$runtime" \
          "${nodes[@]}" ${spot:+"$spot"} --async
        requested=yes
        ;;
      FAILED)
        [[ -z $requested ]] || fail "the request for $name failed; gcloud compute tpus \
queued-resources describe $name --zone=$zone says why" 1
        do_delete
        ;;
      SUSPENDED | PREEMPTED) do_delete ;;
    esac
    sleep "$poll"
  done
}

do_delete() {
  look
  [[ $now == NONE ]] || queued delete "$name" --force || (($? == 44))
}

# A chain, as `run` calls it where bash ignores set -e.
do_setup() {
  local code
  code=$(mktemp --suffix=.tgz)
  git ls-files --cached --others --exclude-standard -z |
    tar --create --gzip --null --files-from=- --ignore-failed-read --file="$code" &&
    queued scp "$code" "$name:gptlab.tgz" --node=all --worker=all &&
    rm "$code" &&
    on_all "mkdir -p gptlab && tar -xzf gptlab.tgz -C gptlab && bash gptlab/launch/worker.sh install"
}
