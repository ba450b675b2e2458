#!/usr/bin/env bash
# Asks for a TPU as a queued resource. Repeated, it makes another only where the old one has failed or was taken away.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/create.sh --name NAME --zone ZONE --type TYPE [flags]

  --type TYPE               v4-8, v5litepod-16, v5p-8, v6e-8, ...
  --runtime_version NAME    of the machines' image (by the type, if it is left out)
  --spot                    cheaper; may be taken away at any time
  --network NAME, --subnetwork NAME, --service_account EMAIL    as gcloud has them
  --wait                    until it is there
  --project P, --dry_run    see tpu_scripts/README.md
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

type='' runtime_version='' spot='' wait='' more=()
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --spot) spot=1 ;;
    --wait) wait=1 ;;
    --type | --runtime_version | --network | --subnetwork | --service_account)
      [ $# -gt 1 ] || fail "$1 needs a value"
      set -- "$1=$2" "${@:3}" && continue
      ;;
    --type=*) type=${1#*=} ;;
    --runtime_version=*) runtime_version=${1#*=} ;;
    --network=* | --subnetwork=*) more+=("$1") ;;
    --service_account=*) more+=(--service-account="${1#*=}") ;;
    *) fail "unknown flag $1" ;;
  esac
  shift
done
check_common
[ -n "$type" ] || fail "--type is missing"
if [ -z "$runtime_version" ]; then
  case $type in
    v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    *) fail "which image --type=$type wants is not known here: --runtime_version" ;;
  esac
fi
if [ -n "$spot" ]; then more+=(--spot); fi

create() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime_version" ${more[@]+"${more[@]}"}
}

if [ -n "$dry_run" ]; then
  state
  create
  exit 0
fi
there=$(state)
case $there in
  '') create ;;
  FAILED | SUSPENDED)
    echo "$name is $there; it is removed and asked for again"
    tpus queued-resources delete "$name" --force
    create
    ;;
  SUSPENDING | DELETING) fail "$name is $there; try again when it is gone" ;;
  *) echo "$name is there already: $there" ;;
esac

while [ -n "$wait" ]; do
  there=$(state)
  echo "$(date +%T) $name: ${there:-gone}"
  case $there in
    ACTIVE) exit 0 ;;
    '' | FAILED | SUSPENDING | SUSPENDED | DELETING)
      echo "error: $name will not come (gcloud compute tpus queued-resources describe $name says why)" >&2
      exit 1
      ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
