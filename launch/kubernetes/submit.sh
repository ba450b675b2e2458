#!/usr/bin/env bash
# Fills in a JobSet and hands it to the cluster.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/kubernetes/submit.sh --name NAME --image IMAGE --claim CLAIM [flags] -- --config CONFIG --workdir /runs/X [...]

  --name NAME       of the JobSet
  --image IMAGE     with kd_jax in it: docker build --build-arg EXTRA=cuda, pushed to a registry
  --claim CLAIM     PersistentVolumeClaim (ReadWriteMany) that is mounted at /runs in every pod
  --pods N          processes (1)
  --gpus K          GPUs of each pod (1; 0 for none)
  --tpu TYPE --topology AxB --chips K    a TPU slice in place of GPUs: gke-tpu-accelerator, gke-tpu-topology, and
                    the chips of a pod; N pods are its hosts
  --cpu Q --memory Q    of each pod (4, 16Gi)
  --dry_run         print the manifest

The run goes on after a pre-empted or failed pod (all pods start again); a wrong config ends it.
TEXT
}

fail() {
  echo "error: $*" >&2
  usage >&2
  exit 2
}

name='' image='' claim='' pods=1 gpus=1 tpu='' topology='' chips='' cpu=4 memory=16Gi dry_run='' separated=''
while [ $# -gt 0 ]; do
  flag=${1%%=*}
  case $flag in
    --help | -h) usage && exit 0 ;;
    --dry_run) dry_run=1 && shift && continue ;;
    --) separated=1 && shift && break ;;
    --name | --image | --claim | --pods | --gpus | --tpu | --topology | --chips | --cpu | --memory) ;;
    *) fail "unknown flag $1 (flags of kd_jax.train come after --)" ;;
  esac
  if [ "$flag" = "$1" ]; then
    [ $# -gt 1 ] || fail "$flag needs a value"
    shift && value=$1
  else
    value=${1#*=}
  fi
  [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || fail "$flag='$value' has characters that no such value has"
  printf -v "${flag#--}" %s "$value"
  shift
done
for needed in name image claim; do [ -n "${!needed}" ] || fail "--$needed is missing"; done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name=$name: small letters, digits and -, at most 40"
[[ $pods =~ ^[1-9][0-9]*$ ]] || fail "--pods=$pods has to be a whole number from 1"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus=$gpus has to be a whole number"
[ -n "$separated" ] && [ $# -gt 0 ] || fail "flags of kd_jax.train are missing: -- --config CONFIG --workdir /runs/X"
kind=gpu
if [ -n "$tpu$topology$chips" ]; then
  kind=tpu
  [ -n "$tpu" ] && [ -n "$topology" ] && [[ $chips =~ ^[1-9][0-9]*$ ]] || fail "--tpu, --topology and --chips go together"
fi
[ -n "$dry_run" ] || command -v kubectl >/dev/null || fail "there is no kubectl here"

# the flags as a list of JSON strings, which YAML reads too
arguments=''
for argument in "$@"; do
  [[ $argument != *[$'\n\r\t']* ]] || fail "a flag with a line break or a tab in it: $argument"
  argument=${argument//\\/\\\\}
  arguments+=", \"${argument//\"/\\\"}\""
done

cd "$(dirname "${BASH_SOURCE[0]}")"
manifest=$(<"jobset-$kind.yaml")
manifest=${manifest//__NAME__/"$name"}
manifest=${manifest//__IMAGE__/"$image"}
manifest=${manifest//__CLAIM__/"$claim"}
manifest=${manifest//__PODS__/"$pods"}
manifest=${manifest//__CPU__/"$cpu"}
manifest=${manifest//__MEMORY__/"$memory"}
manifest=${manifest//__GPUS__/"$gpus"}
manifest=${manifest//__TPU__/"$tpu"}
manifest=${manifest//__TOPOLOGY__/"$topology"}
manifest=${manifest//__CHIPS__/"$chips"}
manifest=${manifest//', "__ARGUMENTS__"'/"$arguments"}
if [ -n "$dry_run" ]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
