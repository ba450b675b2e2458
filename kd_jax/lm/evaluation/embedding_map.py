"""Embeddings of texts in the plane: principal components, and UMAP where `umap-learn` is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.lm.corpus import Corpus
from kd_jax.lm.evaluation.preconditions import Entry
from kd_jax.storage.files import read_arrays


def rows(
    folder: Path, corpora: Mapping[str, tuple[Entry, Corpus]], show: Callable[[np.ndarray], str], seed: int,
    count: int = 200,
) -> list[dict[str, Any]]:  # fmt: skip
    """Where texts lie in the plane, a row a text.

    Args:
        folder: of an evaluation with an embedding model.
        corpora: the texts of models that were evaluated by name, and of p* as "p*".
        show: ids as text.
        seed: of UMAP.
        count: texts of each.
    """
    points = {name: read_arrays(folder / name / "embeddings.npz")["embeddings"] for name in corpora if name != "p*"}
    real = read_arrays(folder / "embeddings.npz")["embeddings"]
    placed, share = principal_components(real, points)
    by_umap = umap(real, points, seed)
    listed = []
    for name, (entry, corpus) in corpora.items():
        for i, ids in enumerate(corpus.rows(0, min(count, len(placed[name]))).tokens):
            row = {"name": name, "arm": entry.arm, "tau": entry.tau, "index": i, "share": share, "text": show(ids)}
            row |= dict(zip("xy", placed[name][i].tolist(), strict=True))
            if by_umap is not None:
                row |= dict(zip(("umap_x", "umap_y"), by_umap[name][i].tolist(), strict=True))
            listed.append(row)
    return listed


def principal_components(real: np.ndarray, others: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """All points on the two directions in which the real ones vary most.

    The directions are those of the real points alone, so that a model that covers less of them shows as less spread.

    Args:
        real: texts of p* [n, dimensions].
        others: texts of models by name [m, dimensions].
    Returns: coordinates [points, 2] by name, those of `real` under "p*"; their share of the real points' variance.
    """
    centre = real.mean(0, dtype=np.float64)
    _, scale, directions = np.linalg.svd(real - centre, full_matrices=False)
    # A direction's sign is arbitrary: the largest entry is made positive, so that figures do not flip between runs.
    largest = directions[np.arange(2), np.abs(directions[:2]).argmax(1)]
    plane = (directions[:2] * np.sign(largest)[:, None]).T
    placed = {name: (points - centre) @ plane for name, points in {"p*": real, **others}.items()}
    return placed, float((scale[:2] ** 2).sum() / (scale**2).sum())


def umap(real: np.ndarray, others: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray] | None:
    """The same by UMAP (McInnes et al. 2018, arXiv 1802.03426) fitted to the real points; None without `umap-learn`."""
    if importlib.util.find_spec("umap") is None:
        return None
    import umap as library

    fitted = library.UMAP(n_components=2, random_state=seed).fit(real)
    return {"p*": fitted.embedding_, **{name: fitted.transform(points) for name, points in others.items()}}
