"""Models that are loaded once, when they are first needed, and freed when they are done.

What a model is (architecture, tokenizer, the content of its files) is known without its weights. Its fingerprint, which
names it in results and corpora, is that of the loaded weights; it is kept by the content of the files, so that a
finished evaluation is found without loading anything. Nothing is written before the work has begun.
"""

from __future__ import annotations

import os
from pathlib import Path

from jax.sharding import Mesh

from kd_jax.lm import weights
from kd_jax.lm.model import Model
from kd_jax.parallel import distributed
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_json, write_json


class LazyModel:
    """A model of an evaluation.

    Args:
        source: what kd_jax.lm.weights.load takes, or the model itself.
        dtype, mesh: how it is loaded.
        folder: of the evaluation; fingerprints that are known are kept in it.
    """

    def __init__(self, source: str | os.PathLike | Model, dtype: str, mesh: Mesh | None, folder: Path):
        self.source, self._dtype, self._mesh, self._known = source, dtype, mesh, folder / "fingerprints.json"
        self.metadata = metadata(source)
        self._model = source if isinstance(source, Model) else None
        self._fingerprint = None if self._model is None else weights.fingerprint(self._model.params)
        # The content of the files, without reading any weights: it is what the loaded fingerprint is kept by.
        self._identity = None if self._model is not None else weights.identity(source)

    @property
    def fingerprint(self) -> str:
        """Of the weights; they are loaded where they have not been seen before."""
        if self._fingerprint is None:
            # One process reads, so that all of them decide alike whether to load.
            known = distributed.once(lambda: _read(self._known), f"reading {self._known}")
            self._fingerprint = known.get(self._key)
        if self._fingerprint is None:
            self.load()
        return self._fingerprint

    def load(self) -> Model:
        """The model with its weights. Raises RunError where the files have changed since the evaluation began."""
        if self._model is None:
            self._model = weights.load(self.source, dtype=self._dtype, mesh=self._mesh)
            # of the loaded arrays, so that it depends on the dtype and not on how the files are laid out
            fingerprint = weights.fingerprint(self._model.params)
            # a training that still runs has a newer checkpoint by now
            if self._fingerprint not in (None, fingerprint) or weights.identity(self.source) != self._identity:
                raise RunError(f"the weights of {self.source} have changed since this began")
            self._fingerprint = fingerprint
        return self._model

    def remember(self) -> None:
        """Keeps the fingerprint, so that the next start finds it without loading the model."""
        # A model that was given in memory has no files to recognise it by.
        if self._identity is not None and self._fingerprint is not None and distributed.leads():
            self._known.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._known, {**_read(self._known), self._key: self._fingerprint})

    def release(self) -> None:
        """Frees the weights, unless the model itself was given."""
        if self._identity is not None:
            self._model = None

    @property
    def _key(self) -> str:
        return f"{self._identity} {self._dtype}"


def _read(path: Path) -> dict[str, str]:
    return read_json(path) if path.exists() else {}


def metadata(source: str | os.PathLike | Model) -> Model:
    """The model without its weights."""
    return source._replace(params={}) if isinstance(source, Model) else weights.describe(source)
