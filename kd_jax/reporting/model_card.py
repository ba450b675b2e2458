"""The README of a model for others: a model card as the Hugging Face hub reads it, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_jax.reporting.tables import Table

TAGS = ("knowledge-distillation", "kd_jax")
CITATION = """@article{cha2025why,
  title   = {Why Knowledge Distillation Works in Generative Models: A Minimal Working Explanation},
  author  = {Cha, Sungmin and Cho, Kyunghyun},
  journal = {arXiv preprint arXiv:2505.13111},
  year    = {2025}
}"""
_LOADING = """```python
from transformers import AutoModelForCausalLM{auto}

model = AutoModelForCausalLM.from_pretrained("{where}")
{line}```"""


class Card(NamedTuple):
    """What a card says of a model.

    Attributes:
        title: of the page.
        summary: what the model is, in sentences.
        facts: heading -> sentences, such as "Data" and "Teacher".
        settings: names and values of how it was trained.
        results: tables; none where nothing was measured.
        reproduction: what it takes to make it again, by name.
        base_model: its id on the hub, where training started from such a model.
    """

    title: str
    summary: str
    facts: Mapping[str, str] = {}
    settings: Mapping[str, Any] = {}
    results: Sequence[Table] = ()
    reproduction: Mapping[str, Any] = {}
    base_model: str = ""


def write(card: Card, *, where: str, tokenizer: bool) -> str:
    """The card as Markdown.

    Args:
        card: what it says.
        where: the model's folder, or its id on the hub, for the example of loading it.
        tokenizer: whether one comes with the model.
    """
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(TAGS)}
    head |= {"base_model": card.base_model} if card.base_model else {}
    # JSON is YAML, and quotes whatever needs it.
    parts = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {card.title}", ""]
    parts += [card.summary, ""]
    for heading, text in card.facts.items():
        parts += [f"## {heading}", "", text, ""]
    for table in card.results:
        parts += [f"## {table.title}", "", *_table(table.head, table.rows), "", table.note, ""]
    if card.settings:
        rows = [(f"`{key}`", f"`{_text(value)}`") for key, value in card.settings.items()]
        parts += ["## Settings", "", *_table(("setting", "value"), rows), ""]
    auto, line = (
        (", AutoTokenizer", f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n') if tokenizer else ("", "")
    )
    parts += ["## How to load it", "", _LOADING.format(auto=auto, where=where, line=line), ""]
    if not tokenizer:
        parts += ["The model has no tokenizer: it takes and gives token ids.", ""]
    if card.reproduction:
        parts += ["## Reproduction", "", *(f"- {key}: {_text(value)}" for key, value in card.reproduction.items()), ""]
    return "\n".join([*parts, "## Citation", "", "```bibtex", CITATION, "```", ""])


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    # A bar would end the cell.
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {member}" for key, member in value.items())
    return value if isinstance(value, str) else json.dumps(value)
