#!/usr/bin/env bash
# Gives a TPU back: the queued resource, and the machines with all that is on their disks.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/delete.sh --name NAME --zone ZONE [--yes] [--project P] [--dry_run]

  --yes    do not ask
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

yes=''
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --yes) yes=1 ;;
    *) fail "unknown flag $1" ;;
  esac
  shift
done
check_common

if [ -n "$dry_run" ]; then
  state
  tpus queued-resources delete "$name" --force
  exit 0
fi
there=$(state)
if [ -z "$there" ]; then
  echo "there is no $name in $zone"
  exit 0
fi
if [ -z "$yes" ]; then
  read -r -p "delete $name ($there) and its disks? [y/N] " answer || fail "--yes is needed where nobody can answer"
  [ "$answer" = y ] || exit 1
fi
tpus queued-resources delete "$name" --force
