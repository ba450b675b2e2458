"""The prompts of a run: which ones its models learn to answer, and which ones they are measured on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax.lm.corpus import Corpus, documents, prompt_files
from kd_jax.lm.instruct.templates import INSTRUCTIONS, every

# The source of prompts that stands for our own templates: those of the split "train".
TEMPLATES = "templates"
# Raised when `load` takes other prompts, or another order: finished stages are then not reused.
_ORDER = "sources in turn"


class Bytes:
    """Stands in for the tokenizer of a random p*, which has none: a text's bytes are its ids."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. An id above 255 shows as "?", and bytes that are not UTF-8 as U+FFFD."""
        return bytes(int(i) if i < 256 else 63 for i in ids).decode(errors="replace")


def room(max_length: int) -> int:
    """The most ids of a prompt: a quarter of `max_length` is left for its answer."""
    return 3 * max_length // 4


def load(sampling: Any, tokenizer: Any, *, seed: int, needed: int, kinds: Sequence[str] = ()) -> list[list[int]]:
    """The different prompts of config.sampling as ids: sources in turn, each in an order by the seed.

    So the first prompts are half of one source and half of another, whatever their sizes. Prompts that leave less than
    a quarter of max_length for an answer are left out.

    Args:
        sampling: with `prompts` (sources, see prompt_files.read, or TEMPLATES), `prompts_column` and `max_length`.
        tokenizer: of the model that answers; None for one of random weights.
        seed: of the order.
        needed: how many there have to be.
        kinds: of the instructions from templates; none takes all.

    Raises: ValueError where there are fewer; and as prompt_files.read.
    """
    tokenizer = tokenizer or Bytes()
    sources = []
    for number, source in enumerate(sampling.prompts):
        if source == TEMPLATES:
            prompts = [prompt_files.encode(one.prompt, tokenizer) for one in every("train", kinds)]
        else:
            prompts = prompt_files.read(source, tokenizer, sampling.prompts_column or None)
        order = np.argsort(np.random.Philox((seed, number)).random_raw(len(prompts)), kind="stable")
        sources.append([tuple(prompts[i]) for i in order])
    in_turn = [ids for row in itertools.zip_longest(*sources) for ids in row if ids is not None]
    # no prompt is trained on and measured with, so each one counts once
    different = [list(ids) for ids in dict.fromkeys(in_turn) if len(ids) <= room(sampling.max_length)]
    if len(different) < needed:
        raise ValueError(
            f"config.sampling.prompts has {len(different)} different prompts that leave room for an answer, and "
            f"num_train, num_validation and num_recall need {needed}"
        )
    return different


def of_corpus(
    spec: Any, tokenizer: Any, first: int, count: int, text_rows: int = 0, asked: Corpus | None = None
) -> tuple[dict[str, Any], list[list[int]] | None]:  # fmt: skip
    """The settings of a corpus of samples that say what its rows begin with, and its prompts where they differ.

    Args:
        spec: of the run (kd_jax.lm.experiment.specs.LmSpec).
        tokenizer: of the model that is sampled, or None.
        first, count: which of the run's prompts; one sample answers each.
        text_rows: training rows of a teacher's text; 0 for other corpora. They have p*'s training prompts, which start
            again where there are more rows. The validation rows after them have p*'s validation prompts.
        asked: p*'s corpus, where it is data whose rows have prompts of their own: those are the prompts.

    Raises: as `load`.
    """
    sampling = spec.sampling
    if asked is None and not sampling.prompts:
        ids = list(sampling.prompt_ids) or tokenizer.encode_prompt(sampling.prompt)
        return {"prompt": sampling.prompt or None, "prompt_ids": ids}, None
    if asked is not None:
        chosen = prompt_files.of_rows(asked.rows())
    else:
        # p*'s corpora of all teachers and the validation rows have prompts of their own
        needed = spec.teachers * (spec.num_train + spec.num_validation) + spec.num_recall
        chosen = load(sampling, tokenizer, seed=spec.seed, needed=needed, kinds=spec.instruct.kinds)[first:]
    if text_rows:
        train, validation = chosen[: spec.num_train], chosen[spec.num_train :]
        chosen = [train[i % len(train)] for i in range(text_rows)] + validation
    chosen = chosen[:count]
    return prompt_files.settings(chosen, samples_per_prompt=1), chosen


def settings(sampling: Any, first: int, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that decide a stage's prompts; none where all samples share one. Nothing is fetched.

    Args:
        sampling: see `load`.
        first: the stage's first prompt.
        kinds: see `load`.

    Raises: FileNotFoundError for a source that is not there.
    """
    if not sampling.prompts:
        return {}
    templates = {"templates": INSTRUCTIONS, "kinds": list(kinds)}
    content = [templates if source == TEMPLATES else documents.identity(source) for source in sampling.prompts]
    return {"prompts": content, "prompts_column": sampling.prompts_column, "order": _ORDER, "first": first}
