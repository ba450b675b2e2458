"""Folders that are there whole or not at all, also where several processes fill them."""

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
    """A folder to fill, which takes the place of `folder` once the block is through; else nothing is left of it.

    Of a folder that is there and not empty, only one where every name matches `ours` is replaced, with `overwrite`.
    """
    folder = Path(folder).expanduser().resolve()
    there = sorted(os.listdir(folder)) if folder.exists() else []
    if there and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder, or overwrite it")
    foreign = [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ours)]
    if foreign:
        raise FileExistsError(f"{folder} has other files too ({foreign[0]}), so it is not overwritten; choose another")
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    first = jax.process_index() == 0
    if first:
        if partial.exists():  # from a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices(f"{partial} is there")
    try:
        yield partial
    except BaseException:
        if first:
            shutil.rmtree(partial)
        raise
    multihost_utils.sync_global_devices(f"{partial} is full")
    if first:
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if there:
            if old.exists():
                shutil.rmtree(old)
            os.replace(folder, old)
        os.replace(partial, folder)
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
