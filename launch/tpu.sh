#!/usr/bin/env bash
# A program on TPU slices, from the request to the result, by gcloud's queued resources:
#   bash launch/tpu.sh run NAME --zone=ZONE --type=v5p-128 --runtime=v2-alpha-tpuv5 --spot -- \
#       gptlab.pretrain --config=FILE.py --workdir=gs://BUCKET/DIR [flags]
# `run` requests the slice unless it is there (create), copies this checkout to all hosts and
# installs it (setup), starts the program on all of them, and waits for its end. If the slice is
# preempted it is deleted, requested anew, and the same program goes on from its workdir. Interrupt
# and repeat `run` at will: the program doesn't notice. By themselves:
#   create | setup | delete      NAME --zone=ZONE [as above]
#   stop                         NAME --zone=ZONE    saves and stops the program (exit code 75)
#   logs                         NAME --zone=ZONE [--node=0 --worker=0]    follows one host's output
# --slices=N asks for N slices (config.mesh.replica=N), --project=P is gcloud's. Runtimes: v2-alpha-
# tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4.
# Exit code: the program's (75: stopped, resumable); 2 misuse; 1 what gcloud refuses.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/program.sh"
[[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }
action=${1:-}
[[ $action =~ ^(create|setup|run|logs|stop|delete)$ ]] ||
  fail "say what to do: create, setup, run, logs, stop or delete; see --help"
name=${2:-}
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "name the slice after $action: small letters, digits, -"
shift 2
zone='' type='' runtime='' project='' slices=1 spot='' node=0 worker=0
while [[ ${1:-} == -* && $1 != -- ]]; do
  case $1 in
    --zone=* | --type=* | --runtime=* | --project=* | --slices=* | --node=* | --worker=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    --spot) spot=--spot ;;
    *) fail "there is no option $1 (values follow an =); see --help" ;;
  esac
  shift
done
[[ -n $zone ]] || fail "--zone=ZONE is missing"
[[ $slices =~ ^[1-9][0-9]{0,2}$ ]] || fail "--slices=$slices is no number from 1 to 999"
if [[ $action == create || $action == run ]] && [[ -z $type || -z $runtime ]]; then
  fail "$action needs --type=TYPE and --runtime=VERSION; see --help"
fi
if [[ $action == run ]]; then
  [[ ${1:-} == -- ]] || fail "write -- between the options and the program; see --help"
  shift
  check_program "$@"
  # What is on a host's disk is gone with it.
  [[ " $* " == *" --workdir=gs://"* ]] || fail "write --workdir=gs://BUCKET/DIR: hosts come and go"
elif (($#)); then
  fail "$action takes no program ($1); see --help"
fi
command -v gcloud >/dev/null || fail "there is no gcloud here; install the Google Cloud CLI"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/tpu_gcloud.sh
source launch/tpu_slice.sh
source launch/tpu_program.sh
"do_$action" "$@"
