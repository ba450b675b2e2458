"""Finds the processes of a run, from the command line or its launcher; does not import JAX.

    --coordinator_address, --num_processes, --process_id    by hand, and launch/local.sh
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    launch/kubernetes, launch/skypilot
    srun and mpirun    their own variables
    TPU VMs    TPU_WORKER_HOSTNAMES (Kubernetes), or the metadata server of the VM

A flag overrides a variable of JAX's, and both complete what the launcher says; they must not contradict the launcher.
"""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("coordinator_address", "num_processes", "process_id")
# Above the ports that Linux assigns by itself.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
_METADATA_SECONDS = 5.0


class Cluster(NamedTuple):
    """The processes of a run. On TPUs only their number is known here; JAX finds the rest.

    Attributes:
        launcher: where this comes from, in words.
        num_processes: at least 2.
        coordinator_address: host:port where process 0 waits for the others.
        process_id: the number of this process.
        local_devices: the GPUs of this machine that this process uses; None for all it sees.
    """

    launcher: str
    num_processes: int
    coordinator_address: str | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def find(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Cluster | None:
    """The processes of this run; None where there is only one.

    Args:
        given: NAMES from the command line; None for those not given.
        environ: environment variables; by default those of this process.
    Raises: ValueError, naming the flag or variable, where something is missing or contradicts the launcher.
    """
    environ = os.environ if environ is None else environ
    said = {f"--{name}": (name, value) for name, value in (given or {}).items() if value is not None}
    for name in NAMES:
        if f"JAX_{name.upper()}" in environ and f"--{name}" not in said:
            said[f"JAX_{name.upper()}"] = name, environ[f"JAX_{name.upper()}"]
    own = {name: (label, value if name == NAMES[0] else int(value)) for label, (name, value) in said.items()}
    # One process by hand, whatever the launcher says: a test inside of a larger job.
    if "num_processes" in own and own["num_processes"][1] == 1 and own.get("process_id", ("", 0))[1] == 0:
        return None
    # Open MPI first: within a job of SLURM its processes have the variables of the step that mpirun is in
    found = _open_mpi(environ) or _slurm(environ)
    if found is None and not own:
        # Last, since it may ask a server over the network.
        found = _tpu(environ)
    if found is not None and found.num_processes == 1:
        found = None
    return found if found is not None and found.launcher == "TPU" else _together(own, found)


def _together(own: dict[str, tuple[str, Any]], found: Cluster | None) -> Cluster | None:
    if not own and found is None:
        return None
    values = {name: value for name, (_, value) in own.items()}
    for name, (label, value) in own.items():
        theirs = None if found is None else getattr(found, name)
        # Another address may be right (another network); another number or count cannot be.
        if name != "coordinator_address" and theirs not in (None, value):
            raise ValueError(f"{label}={value}, but {found.launcher} says {theirs}")
    for name in NAMES:
        values.setdefault(name, None if found is None else getattr(found, name))
    # The launcher may know a part, and the command line the rest.
    missing = [f"--{name} (or JAX_{name.upper()})" for name in NAMES if values[name] is None]
    if missing:
        there = ", ".join(label for label, _ in own.values()) or found.launcher
        raise ValueError(f"several processes need {' and '.join(missing)} beside {there}")
    address, count, index = (values[name] for name in NAMES)
    if not re.fullmatch(r".+:\d+", address) or not 0 <= index < count:
        raise ValueError(f"need coordinator_address={address!r} as HOST:PORT and 0 <= process_id={index} < {count}")
    launcher, devices = ("the command line", None) if found is None else (found.launcher, found.local_devices)
    return Cluster(launcher, count, address, index, devices)


def _port(job: str) -> int:
    """A port that all processes of a job agree on, and that most likely differs between jobs."""
    # Not `hash`, which Python makes different in every process.
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A step of SLURM's srun. (The job's own script is one process, whatever the job asks for.)"""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(name in environ for name in names):
        return None
    job, nodes, tasks, *numbers = (environ[name] for name in names)
    count, index = map(int, numbers)
    # node1 of node1,other2 and of node[1,3-7],other2; rack1node03 of rack[1-2]node[03-04]
    first = re.sub(r"\[([^,\]-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    port = _port(f"{job}.{environ.get('SLURM_STEP_ID', '')}")
    address = f"{first}:{port}"
    # tasks of each node: 2(x3),1 is 2, 2, 2 and 1
    on_nodes = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    node, local = (int(environ.get(name, "0")) for name in ("SLURM_NODEID", "SLURM_LOCALID"))
    return Cluster("srun", count, address, index, _share(environ, local, on_nodes[node]))


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    if not all(name in environ for name in names):
        return None
    count, index, on_node, local = (int(environ[name]) for name in names)
    # where process 0 runs is known on a single machine only
    job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
    address = f"127.0.0.1:{_port(job)}" if on_node == count else None
    return Cluster("mpirun", count, address, index, _share(environ, local, on_node))


def _share(environ: Mapping[str, str], local: int, count: int) -> tuple[int, ...] | None:
    """The GPUs of one of `count` processes on a machine; None for all that it sees.

    A process that sees fewer GPUs than there are processes has been given its own by the launcher; and so has one that
    sees as many as SLURM gives each task (--gpus-per-task).
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
    gpus = len([*Path("/dev").glob("nvidia[0-9]*")] if visible is None else visible.split(","))
    # 4, or h100:4
    if environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == str(gpus):
        return None
    return tuple(range(local * gpus // count, (local + 1) * gpus // count)) if 1 < count <= gpus else None


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1"))
    if hosts is None:
        hosts = _tpu_hosts(environ)
    return None if hosts is None else Cluster("TPU", len(hosts.split(",")) * slices)


def _tpu_hosts(environ: Mapping[str, str]) -> str | None:
    """The hosts of a TPU VM's slice, from its metadata server; None on other machines."""
    # The server is asked on TPU machines only: elsewhere the name does not resolve, or takes long not to.
    there = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not there or importlib.util.find_spec("libtpu") is None:
        return None
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError as error:
        if getattr(error, "code", None) == 404:  # a VM that is no part of a slice
            return None
        raise ValueError(
            f"{url} does not say how many hosts there are ({error}); for a single host give --num_processes=1"
        ) from error
