"""Folders that are written whole or not at all, also by several processes."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, overwrite: bool, ours: tuple[str, ...]) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` when the block ends; where it fails, nothing is left of it.

    Args:
        overwrite: whether a folder that is not empty may be replaced.
        ours: patterns of names; a folder with a name that matches none of them is never replaced.
    Raises: FileExistsError for a folder that may not be replaced.
    """
    # A link is followed: what it points to is replaced.
    folder = Path(folder).expanduser().resolve()
    there = sorted(os.listdir(folder)) if folder.exists() else []
    foreign = [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ours)]
    if there and not (overwrite and not foreign):
        why = "is not empty" if not overwrite else f"has other files too ({foreign[0]}), so it is not overwritten"
        raise FileExistsError(f"{folder} {why}; choose another folder{'' if overwrite else ', or overwrite it'}")
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
