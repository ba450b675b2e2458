#!/usr/bin/env bash
# One run in several processes on this machine. The first process that ends badly ends the others, and says why.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh N [--cpu] [--devices K] -- --config CONFIG --workdir FOLDER [flags of kd_jax.train]

  N            processes; with GPUs, each gets one of them (CUDA_VISIBLE_DEVICES says which, if it is set)
  --cpu        on the CPU, whatever else there is
  --devices K  CPU devices of each process (1)

Relative paths count from the repository. Process 0 prints here, process I into $LOGS/process-I.log (LOGS: a folder, by
default a new one under /tmp).
PYTHON is the interpreter (.venv/bin/python), GRACE the seconds that processes have to save when all are to end (60).
TEXT
}

fail() {
  echo "error: $*" >&2
  usage >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

count='' cpu='' devices=1
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --cpu) cpu=1 ;;
    --devices) devices=${2:-} && shift ;;
    --devices=*) devices=${1#*=} ;;
    --) shift && break ;;
    -*) fail "unknown flag $1 (flags of kd_jax.train come after --)" ;;
    *) [ -z "$count" ] || fail "unexpected $1" && count=$1 ;;
  esac
  shift
done
is_count "$count" || fail "N has to be a whole number from 1, not '$count'"
is_count "$devices" || fail "--devices has to be a whole number from 1, not '$devices'"
[ $# -gt 0 ] || fail "flags of kd_jax.train are missing: -- --config CONFIG --workdir FOLDER"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || fail "there is no $python; make builds it, or name one: PYTHON=/path/to/python"

gpus=()
if [ -z "$cpu" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    while read -r gpu; do gpus+=("$gpu"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
fi
if [ ${#gpus[@]} -eq 0 ]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
elif [ ${#gpus[@]} -lt "$count" ]; then
  fail "$count processes need as many GPUs; there are ${#gpus[@]} (--cpu does without)"
fi

logs=${LOGS:-$(mktemp -d "${TMPDIR:-/tmp}/kd_jax-local.XXXXXX")}
mkdir -p "$logs"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
start() {
  local one=(--coordinator_address="127.0.0.1:$port" --num_processes="$count" --process_id="$1")
  if [ ${#gpus[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${gpus[$1]}; fi
  if [ "$1" -eq 0 ]; then
    "$python" -m kd_jax.train "${@:2}" "${one[@]}" &
  else
    "$python" -m kd_jax.train "${@:2}" "${one[@]}" >"$logs/process-$1.log" 2>&1 &
  fi
  pids+=($!)
}

# TERM to all that are there: what can be saved is, and those that cannot end are killed after a while.
end_all() {
  local pid deadline=$((SECONDS + ${GRACE:-60}))
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do
      if [ $SECONDS -ge $deadline ]; then kill -KILL "$pid" 2>/dev/null || true; fi
      sleep 0.2
    done
  done
}

stopped=''
trap 'stopped=1' INT TERM
trap 'end_all' EXIT
for ((i = 0; i < count; i++)); do start "$i" "$@"; done

# What a process ended with, in words.
ending() {
  if [ "$1" -gt 128 ] && kill -l "$(($1 - 128))" >/dev/null 2>&1; then
    echo "SIG$(kill -l "$(($1 - 128))")"
  else
    echo "exit code $1"
  fi
}

codes=()
while [ ${#codes[@]} -lt "$count" ]; do
  if [ -n "$stopped" ]; then
    echo "stopping $count processes" >&2
    end_all
    exit 130
  fi
  failed=()
  for ((i = 0; i < count; i++)); do
    if [ -n "${codes[$i]:-}" ] || kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
    codes[i]=0
    wait "${pids[$i]}" || codes[i]=$?
    [ "${codes[$i]}" -eq 0 ] || failed+=("$i")
  done
  if [ ${#failed[@]} -gt 0 ]; then
    end_all
    # more than one, where the others noticed at once that it was gone
    for i in "${failed[@]}"; do
      echo "error: process $i of $count ended with $(ending "${codes[$i]}")" >&2
      if [ "$i" -gt 0 ]; then sed "s/^/  process $i: /" <(tail -n 20 "$logs/process-$i.log") >&2; fi
    done
    echo "all processes have been ended; their logs are in $logs" >&2
    exit "${codes[${failed[0]}]}"
  fi
  sleep 0.2
done
trap - EXIT
