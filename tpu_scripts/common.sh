# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share; they read it, nobody runs it.
#
# A TPU is named by --name and --zone (or TPU_NAME, TPU_ZONE) and perhaps --project (or TPU_PROJECT; else gcloud's own).

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} dry_run=''
# On the TPU's machines.
code=kd_jax

# Each script has its own `usage`.
fail() {
  echo "error: $*" >&2
  usage >&2
  exit 2
}

# Takes a flag that all scripts have; says how many words it was in $taken, 0 for another flag.
common_flag() {
  taken=1
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry_run) dry_run=1 ;;
    --name=* | --zone=* | --project=*)
      local flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}"
      ;;
    --name | --zone | --project)
      [ $# -gt 1 ] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      taken=2
      ;;
    *) taken=0 ;;
  esac
}

check_common() {
  [ -n "$name" ] || fail "--name (or TPU_NAME) is missing"
  [ -n "$zone" ] || fail "--zone (or TPU_ZONE) is missing"
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name=$name: small letters, digits and -"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "there is no gcloud here: https://cloud.google.com/sdk"
}

# Runs a gcloud command on the TPU's project and zone, or prints it.
tpus() {
  local command=(gcloud compute tpus "$@" --zone="$zone" --quiet)
  if [ -n "$project" ]; then command+=(--project="$project"); fi
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

# The state of the queued resource; empty where there is none.
state() {
  tpus queued-resources list --filter="name ~ /queuedResources/$name\$" --format="value(state.state)"
}

# Runs a command line on workers: all, or a number.
on() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}
