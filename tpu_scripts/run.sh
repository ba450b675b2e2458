#!/usr/bin/env bash
# Starts kd_jax.train on all machines of a TPU; it goes on when the connection is gone. Or stops it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/run.sh --name NAME --zone ZONE [--project P] [--dry_run] -- --config CONFIG --workdir runs/X [...]
       tpu_scripts/run.sh --name NAME --zone ZONE [--project P] [--dry_run] --stop

Where a run is under way, no other is started. One that was stopped, or whose TPU was taken away, goes on with the same
command. --stop lets it save first. tpu_scripts/logs.sh shows what it says.
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stop=''
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --stop) stop=1 ;;
    --) shift && break ;;
    *) fail "unknown flag $1 (flags of kd_jax.train come after --)" ;;
  esac
  shift
done
check_common

# The process of a run is the one that kd_jax/train.pid has, as long as it is a kd_jax.train.
# shellcheck disable=SC2016 # it is for the shell of the TPU's machines
running='[ -e train.pid ] && grep -aq kd_jax.train "/proc/$(cat train.pid)/cmdline" 2>/dev/null'
if [ -n "$stop" ]; then
  [ $# -eq 0 ] || fail "--stop takes no flags of kd_jax.train"
  on all "cd $code
if $running; then kill -TERM \$(cat train.pid); else echo 'nothing is running'; fi"
  exit 0
fi
[ $# -gt 0 ] || fail "flags of kd_jax.train are missing: -- --config CONFIG --workdir runs/X"
printf -v arguments ' %q' "$@"
on all "cd $code
if $running; then echo \"process \$(cat train.pid) is running already\" >&2; exit 1; fi
nohup .venv/bin/python -m kd_jax.train$arguments >>train.log 2>&1 </dev/null &
echo \$! >train.pid"
