"""Several processes in one run: they start together, work together, and end together.

Every process runs the same program on the same arguments, and so comes to the same collectives in the same order. What
goes beyond that is here: process 0 alone writes (`leads`), work that one process does for all (`once`), and what has to
be the same everywhere though it comes from the outside (`Agreement`, `same`). With one process none of this does
anything. Files are to be on a file system that all processes share.

How it ends where something goes wrong: a process that fails says why and leaves, without waiting for the others
(`leave`); JAX's coordination service sees that it is gone, at once or after HEARTBEAT seconds, and ends the others.
(One that is only stopped, as by SIGSTOP, is gone as well.)
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
from jax._src import distributed as jax_distributed  # barriers with a time-out: JAX has no public ones
from jax.experimental import multihost_utils

from kd_jax.parallel.cluster import Cluster
from kd_jax.storage.errors import RunError

# Seconds after which a process that has not been heard of is taken for dead, unless the run says otherwise.
HEARTBEAT = 60
# Seconds that the others wait for what one process does for all: opening the run folder, reading data, the report.
WORK = 3600
# Seconds that a process which is done waits for the others to be; one which failed, for others to fail alike.
SHUTDOWN, GRACE = 120, 10

T = TypeVar("T")
_started = False
_calls = itertools.count()


def start(cluster: Cluster, timeout: int = 300, heartbeat: int = HEARTBEAT) -> None:
    """Waits until all processes of the cluster are there; before anything else is asked of JAX, and once.

    A process that is not heard of for `heartbeat` seconds later on is taken for dead, which ends the others. Where not
    all are there within `timeout` seconds this one ends, with code 2. Raises RunError where the port is taken.
    """
    global _started
    if cluster.process_id == 0:
        _check_port(cluster.coordinator_address)
    # It would take SIGTERM over, which then ends nothing any more; kd_jax.runs.run.Stop and Agreement stand for it.
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
        raise RunError(f"{who} could not join the others (do two have one process_id?): {error}") from error
    finally:
        watch.cancel()
    _started = True
    if jax.process_count() != cluster.num_processes:
        raise RunError(
            f"{who}: the devices are those of {jax.process_count()} processes, not of {cluster.num_processes}; "
            f"is JAX's build for them installed? (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r})"
        )


def _give_up(missing: str) -> NoReturn:
    # JAX's own end to this wait is an abort that says neither who waits nor where
    print(missing, file=sys.stderr)
    leave(2)


def _check_port(address: str) -> None:
    # JAX's own server would share the port with another's, and then wait in vain
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise RunError(f"the coordinator's port {port} on {host} is taken ({error}); choose another") from error


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
    """Returns once all processes are here. Raises RunError after so many seconds."""
    if _started:
        _barrier(f"kd_jax {next(_calls)} {what}", seconds)


def _barrier(key: str, seconds: int) -> None:
    try:
        jax_distributed.global_state.client.wait_at_barrier(key, seconds * 1000)
    except RuntimeError as error:
        raise RunError(f"not all processes came to {key!r} within {seconds} s: {error}") from error


def once(work: Callable[[], T], what: str) -> T:
    """What `work` returns in process 0, in every process; it has to be plain values, as JSON has them.

    An error of it that can be put right (ValueError, OSError, RunError) is raised in all: in the others as a RunError.
    """
    if not _started:
        return work()
    error, said = None, {}
    if leads():
        try:
            said = {"value": work()}
        except (ValueError, OSError, RunError) as reason:
            error, said = reason, {"error": str(reason)}
    wait(what)
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if error is not None:
        raise error
    if "error" in said:
        raise RunError(f"process 0 cannot go on: {said['error']}")
    return said["value"]


def _broadcast(text: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" ")[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Process 0 goes through the block before the others do: it makes the files that they then find."""
    if not leads():
        wait(what)
    yield
    if leads():
        wait(what)


def same(number: int) -> int:
    """Process 0's number, everywhere."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if _started else number


def fetch(tree: Any) -> Any:
    """Arrays that lie on the devices of all processes, whole, as NumPy arrays; all processes have to ask."""

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def spread(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, on the devices of all: each sends the parts that lie on its own."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Agreement:
    """Whether any process says yes: the same answer in all of them, in calls that all make.

    A signal may reach one process alone, or all at different moments; what they do about it has to be the same. Of
    several processes the answer is that to the votes of `behind` calls ago, so that nobody has to wait for it.
    """

    def __init__(self, behind: int):
        self._behind, self._votes = behind, collections.deque()
        if _started:
            mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
            self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._any = jax.jit(lambda votes: votes.any(), out_shardings=whole)

    def __call__(self, vote: bool) -> bool:
        if not _started:
            return vote
        votes = jax.make_array_from_callback((jax.device_count(),), self._split, lambda index: np.asarray([vote]))
        self._votes.append(self._any(votes))
        return len(self._votes) > self._behind and bool(self._votes.popleft())


def end() -> None:
    """Waits for the other processes to be done too."""
    global _started
    if _started:
        wait("the end")
        jax.distributed.shutdown()
        _started = False


def leave(code: int) -> NoReturn:
    """Ends this process, GRACE seconds later at the most.

    Where all fail alike they go together, each having said why; a process that fails alone does not wait for others,
    of which some may never come.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _started:
        with contextlib.suppress(RunError):
            _barrier("kd_jax leaves", GRACE)
    os._exit(code)
