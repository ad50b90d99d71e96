# shellcheck shell=bash disable=SC2154  # the options are tpu.sh's variables
# Sourced by tpu.sh: gcloud, with patience.
poll=${GPTLAB_POLL_SECONDS:-30} # between two looks at a state
most_tries=5                    # of a gcloud command that fails, as its services at times do

# What no repetition mends.
hopeless='NOT_FOUND|PERMISSION_DENIED|INVALID_ARGUMENT|active account|required property'

# gcloud, tried again if it fails.
try() {
  local tries said
  said=$(mktemp)
  for ((tries = 1; ; tries++)); do
    if gcloud "$@" --zone="$zone" ${project:+"--project=$project"} --quiet 2> "$said"; then
      rm "$said"
      return
    fi
    reason=$(grep -m1 ERROR "$said" || tail -n 1 "$said")
    if ((tries == most_tries)) || grep -qE "$hopeless" "$said"; then
      rm "$said"
      [[ $reason == *NOT_FOUND* ]] && return 44
      [[ $reason == *"active account"* ]] && reason+=" Run: gcloud auth login"
      [[ $reason == *"required property [project]"* ]] && reason+=" Give --project=P."
      fail "gcloud: $reason" 1
    fi
    echo "launch/tpu.sh: gcloud: $reason; again in $poll s" >&2
    sleep "$poll"
  done
}
queued() { try compute tpus queued-resources "$@"; }
on_all() { queued ssh "$name" --node=all --worker=all --command="$1"; }
