"""What a training learns from: the rows of its corpora as the batches of its updates, and those it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm.corpus import Corpus, batches
from kd_jax.lm.corpus.batches import Layout, Sequences, Updates
from kd_jax.lm.distill import loss
from kd_jax.lm.distill.loss import Distillation
from kd_jax.lm.distill.rollouts import Rollouts
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.training.recipe import Member, Settings
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.storage.files import remove


class Data(NamedTuple):
    """What is trained on, the batches the checkpoint is chosen by, and how the student's own sequences are made."""

    updates: Updates
    validation: list[batches.Batch]
    rollouts: Rollouts | None


def prepare(
    settings: Settings, model: Model, member: Member, compute: Compute, mesh: Mesh | None,
    distillation: Distillation | None,
) -> Data:  # fmt: skip
    """The data of a member (all arguments as of kd_jax.lm.training.train). Raises ValueError for a corpus too small."""
    how = None if distillation is None else distillation.settings
    if distributed.leads():
        remove(member.folder / "arrow")  # of an earlier start: the corpus has checksums, a copy of it has none
    train, rest = _sequences(settings, member, how)
    own = how is not None and how.policy == "on_policy"
    about = member.corpus.manifest["settings"]
    longest = max(int(part.lengths.max()) for part in (train, rest))
    if own:  # one shape for both kinds of sequences
        longest = max(longest, about["max_length"])
    layout = Layout(
        settings.batch_size, longest, settings.row_length and max(settings.row_length, longest), settings.parts,
        mesh_lib.batch_devices(mesh),
    )  # fmt: skip
    # in the order they come; a last batch that is not full is filled up with empty rows
    validation = []
    for first in range(0, len(rest), settings.batch_size):
        rows = np.arange(first, min(first + settings.batch_size, len(rest)))
        validation.append(batches.arrange(rest.tokens(rows), rest.prompt_lengths[rows], layout, rest.targets(rows)))
    updates = Updates(train, layout, member.seed, settings.epochs)
    if not own:
        return Data(updates, validation, None)
    prompts = train
    if member.prompts is not None and how.prompt_length:
        prompts = _halves(settings, member.prompts, member.folder)[0]
    rollouts = Rollouts(
        how, model, layout, member.seed, about["prompt_ids"], prompts, about["max_length"], compute, mesh
    )
    return Data(updates, validation, rollouts)


def _sequences(settings: Settings, member: Member, how: loss.Settings | None) -> tuple[Sequences, Sequences]:
    """Sequences to train on and to choose the checkpoint by, of both of the member's corpora if there are two."""
    recorded = how is not None and how.policy == "offline"
    halves = _halves(settings, member.corpus, member.folder, recorded)
    if how is None or not how.mix:
        return halves
    others = _halves(settings, member.mixed, member.folder, recorded)
    train, rest = (ours.mixed(theirs, how.mix) for ours, theirs in zip(halves, others, strict=True))
    return train, rest


def _halves(settings: Settings, corpus: Corpus, folder: Path, targets: bool = False) -> tuple[Sequences, Sequences]:
    with distributed.first_alone("Arrow files"):
        sequences, held = Sequences.of(corpus, str(folder / "arrow"), targets), settings.num_validation
    if not held < len(sequences):
        raise ValueError(f"{corpus.folder} has {len(sequences)} rows; {held} of them would be held out for validation")
    return sequences.part(0, len(sequences) - held), sequences.part(len(sequences) - held, len(sequences))
