#!/usr/bin/env bash
# Copies a run folder from a TPU's first machine to here.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/fetch.sh --name NAME --zone ZONE --run X [--to FOLDER] [--all] [--project P] [--dry_run]

  --run X        the run in kd_jax/runs/X
  --to FOLDER    where X goes (runs)
  --all          also its stages: corpora, checkpoints and models. Without: config, manifest, numbers, report.
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run='' to=runs all=''
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --all) all=1 ;;
    --run | --to)
      [ $# -gt 1 ] || fail "$1 needs a value"
      set -- "$1=$2" "${@:3}" && continue
      ;;
    --run=*) run=${1#*=} ;;
    --to=*) to=${1#*=} ;;
    *) fail "unknown flag $1" ;;
  esac
  shift
done
check_common
[[ $run =~ ^[A-Za-z0-9._-]+$ && $run != .* ]] || fail "--run='$run' has to be the name of a folder in kd_jax/runs"

leave_out=''
if [ -z "$all" ]; then leave_out="--exclude='$run/stages' --exclude='$run/evaluation' --exclude='$run/checkpoints' "; fi
on 0 "cd $code/runs && tar --create --gzip --file=/tmp/$run.tar.gz $leave_out'$run'"
[ -n "$dry_run" ] || mkdir -p "$to"
tpus tpu-vm scp "$name:/tmp/$run.tar.gz" "$to/$run.tar.gz" --worker=0
if [ -n "$dry_run" ]; then exit 0; fi
tar --extract --gzip --file="$to/$run.tar.gz" --directory="$to"
rm "$to/$run.tar.gz"
echo "$to/$run"
