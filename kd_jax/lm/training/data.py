"""The data of a training: batches of its updates, held-out batches, and how the student's own samples are made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm.corpus import Corpus, batches, compatibility
from kd_jax.lm.corpus.batches import Layout, Sequences, Updates
from kd_jax.lm.distill.loss import Distillation, DistillSpec
from kd_jax.lm.distill.rollouts import Rollouts
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.training.recipe import Member, TrainSpec
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.storage.files import remove

# Rows that are looked through at a time.
_ROWS = 1024


class Data(NamedTuple):
    """Batches to train on, batches that choose the checkpoint, and the student's own samples (on_policy alone)."""

    updates: Updates
    validation: list[batches.Batch]
    rollouts: Rollouts | None


def prepare(
    spec: TrainSpec, model: Model, member: Member, compute: Compute, mesh: Mesh | None,
    distillation: Distillation | None,
) -> Data:  # fmt: skip
    """The data of a member.

    Args: as of kd_jax.lm.training.train; `distillation` is None where text alone is learnt.
    Raises: ValueError for a corpus with too few rows.
    """
    if distributed.leads():
        # Left by an earlier start. The corpus has checksums and its Arrow copy has none, so the copy is made again.
        remove(member.folder / "arrow")
    distill, complete = None, _as_it_is
    if distillation is not None:
        distill, complete = distillation.spec, distillation.pairing or _as_it_is
    train, held_out = _sequences(member, distill)
    if model.tokenizer is not None and model.tokenizer.vocab_size > model.num_tokens:
        for part in (train, held_out):
            _check_ids(part, model, member)
    on_policy = distill is not None and distill.policy == "on_policy"
    corpus_settings = member.corpus.manifest["settings"]
    longest = max(int(part.lengths.max()) for part in (train, held_out))
    if on_policy:  # one shape for corpus rows and samples
        longest = max(longest, corpus_settings["max_length"])
    # A packed row has to hold the longest sequence.
    layout = Layout(
        spec.batch_size, longest, spec.row_length and max(spec.row_length, longest), spec.parts,
        mesh_lib.batch_devices(mesh),
    )  # fmt: skip
    # In corpus order, so that every validation adds up alike; a last batch that is not full gets empty rows.
    validation = []
    for first in range(0, len(held_out), spec.batch_size):
        rows = np.arange(first, min(first + spec.batch_size, len(held_out)))
        targets, masks = held_out.targets(rows), held_out.masks(rows)
        batch = batches.arrange(held_out.tokens(rows), held_out.prompt_lengths[rows], layout, targets, masks)
        validation.append(complete(batch))
    if not any(batch.mask.any() for batch in validation):
        raise ValueError(
            f"the {len(held_out)} held-out sequences of {member.name} have no token to learn; hold out more of them"
        )
    updates = Updates(train, layout, member.seed, spec.epochs, complete, count=spec.updates)
    if not on_policy:
        return Data(updates, validation, None)
    prompts, own_prompts = train, compatibility.has_own_prompts(member.corpus)
    if member.prompts is not None and (distill.prompt_length or own_prompts):
        # Their training rows: rows that are held out of training begin no sample either.
        prompts = _split(member.prompts, member)[0]
    rollouts = Rollouts(
        spec=distill, student=model, layout=layout, seed=member.seed, prompts=prompts,
        prompt_ids=[] if own_prompts else corpus_settings["prompt_ids"], max_length=corpus_settings["max_length"],
        compute=compute, mesh=mesh, complete=complete,
    )  # fmt: skip
    return Data(updates, validation, rollouts)


def _as_it_is(batch: batches.Batch) -> batches.Batch:
    return batch


def _check_ids(sequences: Sequences, model: Model, member: Member) -> None:
    for first in range(0, len(sequences), _ROWS):
        rows = sequences.tokens(np.arange(first, min(first + _ROWS, len(sequences))))
        compatibility.check_ids(f"the text of {member.name}", rows, model)


def _sequences(member: Member, distill: DistillSpec | None) -> tuple[Sequences, Sequences]:
    """Sequences to train on and held-out ones, from both of the member's corpora if there are two."""
    recorded = distill is not None and distill.policy == "offline"
    parts = _split(member.corpus, member, recorded)
    if distill is None or not distill.share_of_samples:
        return parts
    others = _split(member.mixed, member, recorded)
    # Both parts are mixed alike: validation is of what is trained on.
    train, held_out = (ours.mixed(theirs, distill.mix) for ours, theirs in zip(parts, others, strict=True))
    return train, held_out


def _split(corpus: Corpus, member: Member, targets: bool = False) -> tuple[Sequences, Sequences]:
    cache: Path = member.folder / "arrow"
    # One process converts the Parquet files; the others then find the copy.
    with distributed.first_alone("Arrow files"):
        sequences = Sequences.of(corpus, str(cache), targets)
    count, held_out = len(sequences), member.num_validation
    if not held_out < count:
        raise ValueError(f"{corpus.folder} has {count} rows; {held_out} of them would be held out for validation")
    return sequences.part(0, count - held_out), sequences.part(count - held_out, count)
