"""One writer for a folder: a lock file that also holds between machines that share a file system.

The file is made with O_EXCL, which is atomic on local disks, NFS (3 and later) and Lustre; flock is not seen by the
other clients of many shared file systems. The file's time of change is a heartbeat. A lock is taken over where its
process is known to be dead (on the same machine), or where there has been no heartbeat for STALE seconds (another
machine, or a container whose processes cannot be seen from here). Reading a folder needs no lock.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_jax.storage.errors import RunError, writing

NAME = ".kd_jax.lock"
# Seconds between heartbeats; seconds without one after which the lock of a process that cannot be looked up is free.
BEAT, STALE = 10.0, 120.0


@contextlib.contextmanager
def held(folder: str | os.PathLike, command: str) -> Iterator[None]:
    """Holds a folder while the block writes it; makes the folder, and removes it again if it stays empty.

    Where the lock is another machine's, this waits for its next heartbeat, or until there was none for STALE seconds. A
    process whose own lock was taken over (it was suspended for so long) ends with code 2 as soon as it sees that.

    Args:
        folder: what is written.
        command: what this process runs, for the message to others.
    Raises: RunError, saying who holds the folder and since when; OSError where the folder cannot be written.
    """
    folder = Path(folder)
    # The innermost first, which is the order in which empty folders can be removed.
    made = [path for path in [folder, *folder.parents] if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; it must be a folder")
    # The token tells apart two locks of one process.
    mine = {**_process(), "command": command, "since": _now(), "token": uuid.uuid4().hex}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        _acquire(folder / NAME, mine)
        stop = threading.Event()
        # A daemon does not keep a program alive that ends.
        heart = threading.Thread(target=_beat, args=(folder / NAME, mine, stop), daemon=True)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            # Only if it is still this process's: another one may have taken it over.
            if _read(folder / NAME)[0] == mine:
                (folder / NAME).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # not empty: something was written
            for path in made:
                path.rmdir()


def contents(folder: str | os.PathLike) -> list[str]:
    """The names in a folder without those of its lock, sorted; none where there is no folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not name.startswith(NAME))


def _acquire(lock: Path, mine: dict[str, Any]) -> None:
    """Returns once the lock is this process's; RunError where another one lives."""
    partial = lock.with_name(f"{NAME}.{mine['token']}")
    try:
        while not _create(lock, mine):
            seen = other, beat = _read(lock)
            if other is None and not lock.exists():
                continue  # it has just been given back
            # A process of this machine can be looked up; of another one only the heartbeat is known.
            here = other is not None and _is_here(other)
            alive = _is_alive(other) if here else _beats(lock, other, beat, partial)
            if alive is None:
                continue  # it is another lock by now
            if alive:
                raise RunError(_refusal(lock.parent, other))
            _create(partial, mine)
            if _take_over(lock, seen, partial):
                return
    finally:
        partial.unlink(missing_ok=True)


def _take_over(lock: Path, seen: tuple[dict[str, Any] | None, float], partial: Path) -> bool:
    """Whether `partial` could take the place of a dead lock; False where somebody else was quicker.

    Args:
        seen: content and time that `_read` returned for the dead lock. The content alone is not enough: a lock that is
            gone, or new and not written yet, is as empty as one that a full disk left.
    """
    # Several processes may find a lock dead at once. The claim lets one of them through, which then looks again.
    claim = lock.with_name(f"{NAME}.claim")
    if not _create(claim, {}):
        with contextlib.suppress(FileNotFoundError):
            if _modified(partial) - _modified(claim) > STALE:  # a claim takes milliseconds: this one's owner died
                claim.unlink()
        time.sleep(0.05)
        return False
    try:
        if _read(lock) != seen:
            return False
        os.replace(partial, lock)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _beats(lock: Path, other: dict[str, Any] | None, beat: float, partial: Path) -> bool | None:
    """Whether the process of a lock gives a sign of life within STALE seconds; None where the lock has changed."""
    partial.unlink(missing_ok=True)
    _create(partial, {})
    # both times are the file server's, so that it does not matter how the machines' clocks differ
    end = time.monotonic() + STALE - (_modified(partial) - beat)
    partial.unlink()
    if other is not None and time.monotonic() < end:
        print(f"{_refusal(lock.parent, other)}\nwaiting for its next sign of life", file=sys.stderr, flush=True)
    while time.monotonic() < end:
        time.sleep(0.02 if other is None else min(1.0, BEAT / 4))  # none: it is just being written
        content, latest = _read(lock)
        if content != other or (other is None and latest != beat):
            return None
        if latest != beat:
            return True
    return False


def _beat(lock: Path, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        other = None
        with contextlib.suppress(OSError):  # of a shared file system that is not there for a moment
            if not _create(lock, mine):  # also where somebody has removed the file by hand
                os.utime(lock)
            other = _read(lock)[0]
        if other is not None and other != mine:
            print(f"error: {_refusal(lock.parent, other)}; it took the folder over while this process was suspended",
                  file=sys.stderr, flush=True)  # fmt: skip
            os._exit(2)  # at once: whatever is written now is written into the other's run


def _create(path: Path, content: dict[str, Any]) -> bool:
    """Makes a file with this content; False where there is one."""
    with contextlib.suppress(FileExistsError), writing(path), open(path, "x", encoding="utf-8") as file:
        json.dump(content, file)
        return True
    return False


def _read(lock: Path) -> tuple[dict[str, Any] | None, float]:
    """Content and time of the last heartbeat. None: the file is gone, or not written yet."""
    text, beat = "", 0.0
    # opened before its time is asked for: on NFS that brings the attributes up to date
    with contextlib.suppress(FileNotFoundError), open(lock, encoding="utf-8") as file:
        text, beat = file.read(), os.fstat(file.fileno()).st_mtime
    with contextlib.suppress(ValueError):
        return json.loads(text), beat
    return None, beat


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _process() -> dict[str, Any]:
    """What tells this process from all others."""
    return {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "start": _start(os.getpid())}


def _machine() -> str:
    """Which processes can be looked up from here: those of this boot of this machine, in this container."""
    with contextlib.suppress(OSError):  # on Linux alone
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_here(other: dict[str, Any]) -> bool:
    return other["machine"] == _machine()


def _is_alive(other: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs; a later one with the same number does not count."""
    start = _start(other["process"])
    # Numbers of processes are used again; the time of the start tells them apart.
    return start is not None and start == other["start"]


def _start(process: int) -> str | None:
    """When a process of this machine was started; None where there is none, or it has ended (a zombie)."""
    if os.path.isdir("/proc/self"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # the program's name, in brackets, may have spaces and brackets itself
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        return None
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(process)], capture_output=True, text=True)
    state, _, start = shown.stdout.strip().partition(" ")
    return None if not state or state[0] == "Z" else start.strip()


def _refusal(folder: Path, other: dict[str, Any]) -> str:
    return (
        f"{folder} is in use: process {other['process']} on {other['host']} writes it since {other['since']} "
        f"({other['command']}); wait for it or end it, or choose another folder"
    )


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
