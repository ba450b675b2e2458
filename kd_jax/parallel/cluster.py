"""Which processes a run has, from the command line or from what started it; JAX is not needed for that.

    --coordinator_address, --num_processes, --process_id    by hand, and launch/local.sh
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    launch/kubernetes, launch/skypilot
    srun and mpirun    their own variables
    TPU VMs    TPU_WORKER_HOSTNAMES (Kubernetes), or the metadata server of the VM

A flag goes before a variable of JAX's, and both before what the launcher says; one may say what another leaves out, but
none may contradict it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("coordinator_address", "num_processes", "process_id")
# Ports above those that Linux hands out by itself.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
_METADATA_SECONDS = 5.0


class Cluster(NamedTuple):
    """The processes of a run; of a TPU, JAX itself finds out all but their number.

    Attributes:
        launcher: what said so, in words.
        num_processes: at least 2.
        coordinator_address: host:port at which process 0 waits for the others.
        process_id: of this one.
        local_devices: numbers of the GPUs of this machine that are this process'; None for all that it sees.
    """

    launcher: str
    num_processes: int
    coordinator_address: str | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def find(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Cluster | None:
    """The processes of this run, None where there is one only.

    Args:
        given: what the command line says of NAMES; None for what it does not.
        environ: the variables of the environment, by default this process' own.
    Raises: ValueError, naming the flag or the variable, where they are not enough or do not go together.
    """
    environ = os.environ if environ is None else environ
    said = {f"--{name}": (name, value) for name, value in (given or {}).items() if value is not None}
    for name in NAMES:
        if f"JAX_{name.upper()}" in environ and f"--{name}" not in said:
            said[f"JAX_{name.upper()}"] = name, environ[f"JAX_{name.upper()}"]
    own = {
        name: (label, value if name == NAMES[0] else _integer(label, value)) for label, (name, value) in said.items()
    }
    if "num_processes" in own and own["num_processes"][1] == 1 and own.get("process_id", ("", 0))[1] == 0:
        return None
    found = _slurm(environ) or _open_mpi(environ)
    if found is None and not own:
        found = _tpu(environ)
    if found is not None and found.num_processes == 1:
        found = None
    return found if found is not None and found.launcher == "TPU" else _together(own, found)


def check_alone(program: str) -> None:
    """Raises ValueError where a program that runs as one process was started as several: each would do all of it."""
    found = find()
    if found is not None:
        raise ValueError(
            f"{program} runs as one process, and {found.launcher} started {found.num_processes}; start it once "
            "(it uses every device of its machine), or run the same as a stage of kd_jax.train"
        )


def _together(own: dict[str, tuple[str, Any]], found: Cluster | None) -> Cluster | None:
    if not own and found is None:
        return None
    values = {name: value for name, (_, value) in own.items()}
    for name, (label, value) in own.items():
        theirs = None if found is None else getattr(found, name)
        if name != "coordinator_address" and theirs not in (None, value):
            raise ValueError(f"{label}={value}, but {found.launcher} says {theirs}")
    for name in NAMES:
        values.setdefault(name, None if found is None else getattr(found, name))
    missing = [f"--{name} (or JAX_{name.upper()})" for name in NAMES if values[name] is None]
    if missing:
        there = ", ".join(label for label, _ in own.values()) or found.launcher
        raise ValueError(f"several processes need {' and '.join(missing)} beside {there}")
    address, count, index = (values[name] for name in NAMES)
    _check(address, count, index)
    launcher, devices = ("the command line", None) if found is None else (found.launcher, found.local_devices)
    return Cluster(launcher, count, address, index, devices)


def _check(address: str, count: int, index: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator_address={address!r} has to be HOST:PORT")
    if count < 1:
        raise ValueError(f"num_processes={count} must be at least 1")
    if not 0 <= index < count:
        raise ValueError(f"process_id={index} must be from 0 and below num_processes={count}")


def _integer(label: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"{label}={value!r} is not a whole number") from error


def _port(job: str) -> int:
    """The same for all processes of a job, and most likely another one for another job."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A step of SLURM's srun. (In the script of a job itself there is one process, whatever the job asks for.)"""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_PROCID")
    if not all(name in environ for name in names):
        return None
    job, nodes, *numbers = (environ[name] for name in names)
    count, num_nodes, index = (_integer(name, value) for name, value in zip(names[2:], numbers, strict=True))
    # node1 of node1,other2 and of node[1,3-7],other2
    first = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", nodes)
    port = _port(f"{job}.{environ.get('SLURM_STEP_ID', '')}")
    address = f"{first[1]}{first[2] or ''}:{port}"
    local = _integer("SLURM_LOCALID", environ.get("SLURM_LOCALID", "0"))
    return Cluster("srun", count, address, index, _share(environ, local, count > num_nodes))


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    if not all(name in environ for name in names):
        return None
    count, index, on_node, local = (_integer(name, environ[name]) for name in names)
    # only on one machine is it known where process 0 is
    job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
    address = f"127.0.0.1:{_port(job)}" if on_node == count else None
    return Cluster("mpirun", count, address, index, _share(environ, local, on_node > 1))


def _share(environ: Mapping[str, str], local: int, shared: bool) -> tuple[int, ...] | None:
    """One GPU for each process of a machine that several share, unless the launcher has shared them out itself."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    return (local,) if shared and "," in visible else None


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    slices = _integer("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES", "1"))
    if hosts is None:
        hosts = _tpu_hosts(environ)
    return None if hosts is None else Cluster("TPU", len(hosts.split(",")) * slices)


def _tpu_hosts(environ: Mapping[str, str]) -> str | None:
    """The hosts of a TPU VM's slice, as its metadata server has them; None on other machines."""
    there = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not there or importlib.util.find_spec("libtpu") is None:
        return None
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:  # a VM that is no part of a slice
            return None
        raise ValueError(f"{url} does not say how many hosts this TPU has: {error}") from error
    except OSError as error:
        raise ValueError(
            f"cannot ask {url} how many hosts this TPU has ({error}); for this one alone: --num_processes=1"
        ) from error
