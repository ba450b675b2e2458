"""Disks that are full, and folders that cannot be written to, for tests; as root and as anybody."""

import contextlib
import os
import subprocess

import pytest


def _tried(*command):
    return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0


@contextlib.contextmanager
def small(folder, size="16m"):
    """A Disk of its own at `folder`, of `size`; the test is skipped where nobody may mount one."""
    folder.mkdir()
    if os.geteuid() or not _tried("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder):
        pytest.skip("a full disk needs a small tmpfs, and mounting one needs root")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Disk:
    """A file system with little room."""

    def __init__(self, folder):
        self.folder, self._filler = folder, folder / "filler"

    def fill(self, room):
        """Leaves `room` bytes, to the page of 4096."""
        self.free()
        there = os.statvfs(self.folder)
        with open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, there.f_bavail * there.f_bsize - room))

    def free(self):
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """In the block nobody can write to `folder`, which is there; not even root, for whom permissions mean nothing."""
    if os.geteuid():
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        undo = lambda: folder.chmod(mode)  # noqa: E731
    elif _tried("mount", "--bind", folder, folder):
        undo = lambda: subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: E731
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    elif _tried("chattr", "+i", folder):
        undo = lambda: subprocess.run(["chattr", "-i", folder], check=True)  # noqa: E731
    else:
        pytest.skip("root writes anywhere but to a read-only mount or an immutable folder, and can make neither here")
    try:
        yield
    finally:
        undo()
