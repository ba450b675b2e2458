"""Sampling into a corpus on disk: it resumes after a kill and gives the same samples.

Samples are drawn a shard at a time. What runs beside a sample changes how its numbers are rounded; a shard always has
the same samples, so those of a resumed run are the same to the bit. With several processes all of them sample, each on
its own devices, and process 0 writes.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import decode
from kd_jax.lm.corpus import Corpus, manifest
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.parallel import distributed
from kd_jax.runs import progress
from kd_jax.storage.files import remove, write_json


def sample(
    model: Model | Callable[[], Model], folder: str | os.PathLike, settings: dict[str, Any], *, command: str,
    label: str, prompts: Sequence[Sequence[int]] | None = None, batch_size: int = 64, compute: Compute = DEFAULT,
    mesh: Mesh | None = None,
) -> Corpus:  # fmt: skip
    """The corpus of these settings, with the samples that were missing.

    A corpus of other settings in that folder is removed first; one with fewer samples is completed, and one with more
    keeps them. Another `source` is another name of the same weights.

    Args:
        model: or a function that loads it, called only if samples are missing.
        settings: see kd_jax.lm.corpus.SETTINGS.
        command: what the manifest says that made it.
        label: of the progress bar.
        prompts: of the rows, where they have their own: those that the settings have the fingerprint of.
        batch_size: samples drawn at a time.
    Raises: RunError for a folder of other things.
    """
    folder = Path(folder)
    corpus = Corpus(folder, distributed.once(lambda: _open(folder, settings, command), f"opening {folder}"))
    if corpus.finished:
        return corpus
    wanted = corpus.manifest["settings"]
    # Only now, when samples are missing, is a model loaded.
    model = model if isinstance(model, Model) else model()

    def stream() -> Iterator[decode.Samples]:
        # A stream for each shard, begun anew: a resumed run then rounds like one that was never stopped.
        for first in range(corpus.num_rows, wanted["num_samples"], wanted["shard_size"]):
            yield from decode.stream(
                model, prompts or wanted["prompt_ids"], min(first + wanted["shard_size"], wanted["num_samples"]),
                first=first, max_length=wanted["max_length"], max_new_tokens=wanted.get("max_new_tokens"),
                sampler=SamplerSpec.of(wanted), seed=wanted["seed"],
                samples_per_prompt=wanted.get("samples_per_prompt"), batch_size=batch_size, compute=compute, mesh=mesh,
            )  # fmt: skip

    with progress.sampling_bar(label, corpus.num_rows, wanted["num_samples"]) as report:
        if distributed.leads():
            corpus_lib.write(corpus, stream(), report)
        else:
            # The other processes run the same steps, whose collectives need all of them.
            collections.deque(stream(), maxlen=0)
    distributed.wait(f"{folder} is written")
    return corpus_lib.open(folder)


def _open(folder: Path, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The manifest of the corpus folder, made or opened again."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)  # from a run that was killed
    if (folder / "manifest.json").exists():
        there = corpus_lib.open(folder)
        before = there.manifest["settings"]
        # num_samples may grow, and the source is a name: the fingerprint is compared.
        same = all(before.get(name) == settings[name] for name in set(settings) - {"source", "num_samples"})
        if same and there.finished and before["num_samples"] > settings["num_samples"]:
            return there.manifest
        if same:
            settings = {**settings, "source": before["source"]}
            if before["num_samples"] > settings["num_samples"]:
                # Killed on the way to more samples: the rows that it has stay.
                settings["num_samples"] = max(there.num_rows, settings["num_samples"])
                fewer = there.manifest | {"settings": before | {"num_samples": settings["num_samples"]}}
                write_json(folder / "manifest.json", manifest.with_shards(fewer, fewer["shards"]))
        else:
            # renamed first: half removed, it would be neither a corpus nor an empty folder
            os.replace(folder, old)
            remove(old)
    return corpus_lib.create_or_resume(folder, settings, command=command).manifest
