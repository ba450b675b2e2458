"""Names of files that come from a stranger's list."""

from __future__ import annotations

import os
from pathlib import Path


def inside(folder: str | os.PathLike, name: str) -> Path:
    """The path of a file that a list in a folder names; it need not exist.

    Raises: ValueError, naming it, where it lies outside the folder, by its name or as a link. A snapshot in a Hugging
        Face cache consists of links into the cache's blobs/, which are inside.
    """
    roots = [Path(folder).resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append((roots[0].parent.parent / "blobs").resolve())
    path = Path(folder) / name
    real = Path(os.path.realpath(path))  # Path.resolve raises where a link leads to itself
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{name!r} lies outside the folder: it leads to {real}")
    return path
