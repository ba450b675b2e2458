#!/usr/bin/env bash
# Submits a run to SLURM: one job, or its stages as jobs that wait for one another.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/slurm/submit.sh [--dry_run] [sbatch options] [STAGES ...] -- --config CONFIG --workdir FOLDER [...]

  sbatch options   as --name=value: --partition=gpu --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=08:00:00
  STAGES           a job each, one after the other; stages with a comma between them share a job. Without: one job
                   for all. `python -m kd_jax.train ... --dry_run` lists the stages.
  --dry_run        print the commands

Prints the jobs' numbers. FOLDER is on a file system that all nodes share; a relative path counts from the repository.
TEXT
}

fail() {
  echo "error: $*" >&2
  usage >&2
  exit 2
}

dry_run='' options=() stages=() separated=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry_run) dry_run=1 ;;
    --) separated=1 && shift && break ;;
    --?*=*) options+=("$1") ;;
    -*) fail "$1: options of sbatch are written --name=value; flags of kd_jax.train come after --" ;;
    *) stages+=("$1") ;;
  esac
  shift
done
[ -n "$separated" ] && [ $# -gt 0 ] || fail "flags of kd_jax.train are missing: -- --config CONFIG --workdir FOLDER"
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a node of the cluster"

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
previous=''
submit() { # name, flags of kd_jax.train
  local command=(sbatch --parsable --job-name="kd_jax-$1" ${options[@]+"${options[@]}"})
  if [ -n "$previous" ]; then command+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes); fi
  command+=(launch/slurm/train.sbatch "${@:2}")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    previous="JOB-$1"
  else
    # with several clusters sbatch says NUMBER;CLUSTER
    previous=$("${command[@]}")
    previous=${previous%%;*}
    echo "$previous $1"
  fi
}

if [ ${#stages[@]} -eq 0 ]; then
  submit all "$@"
else
  for stage in "${stages[@]}"; do submit "$stage" "$@" --stages="$stage"; done
fi
