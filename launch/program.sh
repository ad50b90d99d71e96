# shellcheck shell=bash
# Sourced by the scripts that start a program: their help, how they fail, and a look at the program.

# The comment at the head of the script.
usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
}
# One line and the exit code, 2 for misuse.
fail() {
  echo "launch/${0##*/}: $1" >&2
  exit "${2:-2}"
}
# Fails unless $1 names a program of this checkout. A slice or a job is not asked for before that.
check_program() {
  [[ ${1:-} =~ ^[a-z_]+(\.[a-z_]+)+$ ]] || fail "name a program: gptlab.pretrain, say; see --help"
  local file=${1//.//}.py
  [[ -f $(dirname "${BASH_SOURCE[0]}")/../$file ]] ||
    fail "there is no program $1 ($file is not in this checkout); those of gptlab are gptlab/*.py"
}
