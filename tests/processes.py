"""Several JAX processes on this machine's CPU, for tests."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Virtual devices that share a core may be long in coming to a collective.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=3600 --xla_cpu_collective_timeout_seconds=3600"
_START = """
import json
import sys

from kd_jax.parallel import cluster, distributed

address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
arguments = json.loads(sys.argv[4])
found = cluster.find({"coordinator_address": address, "num_processes": count, "process_id": index}, {})
if found is not None:
    distributed.start(found, 3600, arguments.get("heartbeat", 3600))


def say(**values):
    print("RESULT " + json.dumps(values), flush=True)


"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices):
    number = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _PATIENT, "PYTHONPATH": str(ROOT)} | number


def spawn(command, devices=1, **options):
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(devices) | options.pop("env", {}), **options,
    )  # fmt: skip


def start(script, count, devices=1, arguments=None):
    """`count` processes of `devices` each, started; `script` has `say`, `arguments` and kd_jax.parallel.distributed."""
    address = f"127.0.0.1:{free_port()}"
    text = _START + textwrap.dedent(script)
    tail = json.dumps(arguments or {})
    return [spawn([sys.executable, "-c", text, address, count, i, tail], devices) for i in range(count)]


def results(processes, timeout=3600):
    """What each has said, a dict; all have to end well."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, f"{out}\n{err}"
    lines = [[line for line in out.splitlines() if line.startswith("RESULT ")] for out, _ in ended]
    return [json.loads(found[-1].removeprefix("RESULT ")) for found in lines]


def run(script, count, devices=1, arguments=None, timeout=3600):
    return results(start(script, count, devices, arguments), timeout)
