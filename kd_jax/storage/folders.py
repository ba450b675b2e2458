"""Folders that are written whole or not at all, also by several processes."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from kd_jax.storage import files


def check(folder: str | os.PathLike, overwrite: bool, ours: tuple[str, ...]) -> tuple[Path, list[str]]:
    """Whether `replacing` can fill a folder; writes nothing.

    Args:
        folder, overwrite, ours: as of `replacing`.
    Returns: the folder, links followed, and the names in it.
    Raises: FileExistsError for a folder that may not be replaced; PermissionError or NotADirectoryError where none can
        be made; RunError for a path that checkpoints cannot lie in.
    """
    # A link is followed: what it points to is replaced.
    folder = files.without_brackets(folder).resolve()
    there = sorted(os.listdir(folder)) if folder.exists() else []
    foreign = [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ours)]
    if there and not (overwrite and not foreign):
        why = "is not empty" if not overwrite else f"has other files too ({foreign[0]}), so it is not overwritten"
        raise FileExistsError(f"{folder} {why}; choose another folder{'' if overwrite else ', or overwrite it'}")
    # it is filled beside its place
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, so {folder} cannot be made; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} cannot be written to, so {folder} cannot be made; choose another folder")
    return folder, there


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, overwrite: bool, ours: tuple[str, ...]) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` when the block ends; where it fails, nothing is left of it.

    Args:
        overwrite: whether a folder that is not empty may be replaced.
        ours: patterns of names; a folder with a name that matches none of them is never replaced.
    Raises: what `check` raises.
    """
    folder, there = check(folder, overwrite, ours)
    # Beside the folder, so on the same disk: a rename is atomic within one file system only.
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    first = jax.process_index() == 0
    if first:
        if partial.exists():  # from a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices(f"{partial} is there")
    filled = False
    try:
        yield partial
        filled = True
    finally:
        if first and not filled:
            shutil.rmtree(partial)
    multihost_utils.sync_global_devices(f"{partial} is full")
    if first:
        # Everything is on disk before the folder gets its name.
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if there:
            if old.exists():
                shutil.rmtree(old)
            # A folder that is not empty cannot be replaced by one rename. A kill between the two leaves the old one as
            # .NAME.old.
            os.replace(folder, old)
        os.replace(partial, folder)
        # The rename itself is an entry of the parent folder.
        _sync(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    multihost_utils.sync_global_devices(f"{folder} is there")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
