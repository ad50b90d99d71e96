# shellcheck shell=bash
# Sourced by the scripts that start a program: fails, by their `fail`, unless $1 names one of this
# checkout. A slice or a job is not asked for before that.
check_program() {
  [[ ${1:-} =~ ^[a-z_]+(\.[a-z_]+)+$ ]] || fail "name a program: gptlab.pretrain, say; see --help"
  local file=${1//.//}.py
  [[ -f $(dirname "${BASH_SOURCE[0]}")/../$file ]] ||
    fail "there is no program $1 ($file is not in this checkout); those of gptlab are gptlab/*.py"
}
