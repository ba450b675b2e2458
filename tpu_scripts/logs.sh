#!/usr/bin/env bash
# Shows what kd_jax.train says on a machine of a TPU.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/logs.sh --name NAME --zone ZONE [--worker I|all] [--lines N] [--follow] [--project P] [--dry_run]

  --worker I    whose (0, which prints what concerns the run)
  --lines N     how many of the last ones (50)
  --follow      and what comes (of one worker)
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

worker=0 lines=50 follow=''
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --follow) follow=' --follow' ;;
    --worker | --lines)
      [ $# -gt 1 ] || fail "$1 needs a value"
      set -- "$1=$2" "${@:3}" && continue
      ;;
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    *) fail "unknown flag $1" ;;
  esac
  shift
done
check_common
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker=$worker has to be a number, or all"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines has to be a number"
[ -z "$follow" ] || [ "$worker" != all ] || fail "--follow is for one worker"
on "$worker" "tail --lines=$lines$follow $code/train.log"
