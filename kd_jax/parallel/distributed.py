"""Several processes in one run: they start together, work together, and end together.

Every process runs the same program with the same arguments, so all reach the same collectives in the same order. This
module has the rest: only process 0 writes (`leads`), one process works for all (`once`), and values from outside the
program are made equal everywhere (`Agreement`, `same`). With one process these do nothing. All processes must share
the file system.

When a process fails, it prints the error and leaves without waiting for the others (`leave`). JAX's coordination
service notices at once, or after HEARTBEAT seconds of silence, and ends the others. A suspended process is silent too.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.parallel.cluster import Cluster
from kd_jax.storage.errors import Absent, RunError

# Seconds of silence after which a process counts as dead, unless the command line says otherwise.
HEARTBEAT = 60
# Seconds that the others wait for work that one process does for all: opening the run folder, reading data, the report.
WORK = 3600
# Seconds that a finished process waits for the others to finish; that a failed one waits for others to fail as well.
SHUTDOWN, GRACE = 120, 10

T = TypeVar("T")
_started = False
_calls = itertools.count()


def start(cluster: Cluster, timeout: int = 300, heartbeat: int = HEARTBEAT) -> None:
    """Joins the processes of the cluster; to be called once, before JAX is used.

    Args:
        timeout: seconds to wait for all processes; then this one ends with code 75.
        heartbeat: seconds of silence after which a process counts as dead, which ends the others.
    Raises: RunError where the coordinator's port is taken, or where JAX's backend does not see all processes;
        Absent where the others cannot be joined.
    """
    global _started
    if cluster.process_id == 0 and cluster.coordinator_address and not _is_free(cluster.coordinator_address):
        raise RunError(f"the coordinator's port, {cluster.coordinator_address}, is taken; choose another")
    # JAX's preemption service would handle SIGTERM, and nothing would end; kd_jax.runs.run.Stop and Agreement do it.
    jax.config.update("jax_enable_preemption_service", False)
    given = {"cluster_detection_method": "deactivate"} if cluster.coordinator_address else {}
    who = f"process {cluster.process_id} of {cluster.num_processes} ({cluster.launcher})"
    missing = (
        f"error: {who}: not all processes were at {cluster.coordinator_address or 'the coordinator'} within "
        f"{timeout} s; are all of them started, and has each its own process_id?"
    )
    watch = threading.Timer(timeout, _give_up, [missing])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator_address, None if not given else cluster.num_processes, cluster.process_id,
            cluster.local_devices, initialization_timeout=timeout + GRACE, heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN, **given,
        )  # fmt: skip
    except RuntimeError as error:
        raise Absent(f"{who} could not join the others (do two have one process_id?): {error}") from error
    finally:
        watch.cancel()
    _started = True
    if jax.process_count() != cluster.num_processes:
        platforms = f"is JAX's build for them installed? (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r})"
        raise RunError(f"{who}: JAX sees the devices of {jax.process_count()} processes; {platforms}")


def _give_up(missing: str) -> NoReturn:
    # JAX itself ends this wait by an abort that names neither the process nor the address
    print(missing, file=sys.stderr)
    leave(os.EX_TEMPFAIL)


def _is_free(address: str) -> bool:
    """Whether a port of this machine can be listened on."""
    # JAX's server would share the port with another run's (SO_REUSEPORT) and wait until its timeout
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("", int(address.rpartition(":")[2])))
            return True
    return False


def several() -> bool:
    """Whether this is one of several processes."""
    return _started


def leads() -> bool:
    """Whether this process is the one that writes."""
    return not _started or jax.process_index() == 0


def name() -> str:
    """Which process this is, for messages; empty where there is one."""
    return f"process {jax.process_index()} of {jax.process_count()}: " if _started else ""


def wait(what: str, seconds: int = WORK) -> None:
    """Returns once all processes have called this. Raises Absent after `seconds`; `what` names the place."""
    if _started:
        _barrier(f"kd_jax {next(_calls)} {what}", seconds)


def _barrier(key: str, seconds: int) -> None:
    # JAX itself has no public barrier with a time-out
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=seconds * 1000)
    except RuntimeError as error:
        raise Absent(f"not all processes came to {key!r} within {seconds} s: {error}") from error


def once(work: Callable[[], T], what: str) -> T:
    """Runs `work` in process 0 and returns its result in all processes.

    Args:
        work: returns plain values, as JSON has them.
        what: names the work, in the error of a process that waited for it too long.
    Raises: what `work` raises of ValueError, OSError and RunError; in the other processes as a RunError.
    """
    if not _started:
        return work()
    error, said = None, {}
    if leads():
        try:
            said = {"value": work()}
        except (ValueError, OSError, RunError) as reason:
            error, said = reason, {"error": str(reason)}
    # With a time-out, which the broadcast after it does not have.
    wait(what)
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if error is not None:
        raise error
    if "error" in said:
        raise RunError(f"process 0 cannot go on: {said['error']}")
    return said["value"]


def _broadcast(text: bytes) -> bytes:
    # The length goes first: what is broadcast has to have one shape in all processes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" ")[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Process 0 runs the block before the others do: it makes files, which the others then find."""
    if not leads():
        wait(what)
    yield
    if leads():
        wait(what)


def same(number: int) -> int:
    """Process 0's number, in all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if _started else number


def fetch(tree: Any) -> Any:
    """Gathers arrays that are split over the devices of all processes; all processes must call it.

    Returns: the tree with whole NumPy arrays.
    """

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        # A collective: a process that does not call it leaves the others waiting.
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def spread(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process has onto the devices of all; each sends the shards of its own devices.

    Args:
        array: the whole array, equal in all processes.
        sharding: over the devices of all processes.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Agreement:
    """Whether any process votes yes; all processes make the same calls and get the same answers.

    A signal may reach one process only, or all at different moments, but all must react at the same update. With
    several processes the answer is to the votes of `behind` calls ago, so that the device never waits for the host.
    """

    def __init__(self, behind: int):
        self._behind, self._votes = behind, collections.deque()
        if _started:
            # One vote for each device, that of its process. `any` over all devices is an all-reduce.
            mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
            self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._any = jax.jit(lambda votes: votes.any(), out_shardings=whole)

    def __call__(self, vote: bool) -> bool:
        if not _started:
            return vote
        votes = jax.make_array_from_callback((jax.device_count(),), self._split, lambda index: np.asarray([vote]))
        # Queued behind the update; the answer is read `behind` calls later, when the device has it for long.
        self._votes.append(self._any(votes))
        return len(self._votes) > self._behind and bool(self._votes.popleft())


def end() -> None:
    """Waits until the other processes have finished too."""
    global _started
    if _started:
        wait("the end")
        jax.distributed.shutdown()
        _started = False


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code.

    Processes that all fail for the same reason end together, each after its message. One that fails alone waits GRACE
    seconds for the others and then ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _started:
        # RuntimeError: JAX's, where a process was killed meanwhile
        with contextlib.suppress(RunError, RuntimeError):
            _barrier("kd_jax leaves", GRACE)
            # All are here. If the coordinator exited without this, JAX would abort those that have not exited yet.
            jax.distributed.shutdown()
    # not sys.exit: JAX's exit handlers would wait for processes that no longer answer
    os._exit(code)
