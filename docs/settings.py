"""Writes docs/settings.md from the declarations of the settings: python -m docs.settings."""

import importlib
import itertools
from pathlib import Path

from kd_jax.runs import settings
from kd_jax.train import EXPERIMENTS

HEAD = """# Settings

Every setting of every experiment, written by `python -m docs.settings` from the declarations. Set them in a config
file (`config.train.learning_rate = 1e-3`) or on the command line (`--config.train.learning_rate=1e-3`).
`kd-jax train --config CONFIG --help` lists them with that config's values. A wrong name, type or range is an error
before anything is written, and so is a setting that has no effect under the others.
"""
# headings
TITLES = {
    "gmm": "Mixtures (gmm)",
    "gmm_frontier": "Every knob on mixtures (gmm_frontier)",
    "lm": "Language models (lm)",
}


def group_of(row: settings.Setting) -> str:
    return row.key.rpartition(".")[0]


def table(rows: list[settings.Setting]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = "none" if row.default is None else repr(row.default)
        meaning = row.meaning + (f" ({row.range})" if row.range else "")
        cells = f"`{row.key.rpartition('.')[2]}`", row.type, f"`{default}`", meaning
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def experiment(name: str, rows: list[settings.Setting]) -> str:
    """The section of an experiment; a group that repeats another one's settings only says so."""
    # in the order of the declarations, but a group's settings together
    groups = {}
    for group, members in itertools.groupby(rows, group_of):
        groups.setdefault(group, []).extend(members)
    # the shortest name of a set of settings has the table: config.train, not config.student.train
    first = {}
    for group in sorted(groups, key=len):
        first.setdefault(frozenset(row.meaning for row in groups[group]), group)
    parts = [f"\n## {TITLES[name]}\n"]
    for group, members in groups.items():
        same = first[frozenset(row.meaning for row in members)]
        title = f"\n### {group}.*\n\n"
        if same == group:
            parts.append(title + table(members))
        elif any(row.default is not None for row in members):
            parts.append(f"{title}As `{same}.*`.\n")
        else:
            parts.append(f"{title}As `{same}.*`, for this model alone; none takes the value of `{same}`.\n")
    return "".join(parts)


def page() -> str:
    specs = {name: importlib.import_module(module).Spec for name, module in EXPERIMENTS.items()}
    return HEAD + "".join(experiment(name, list(settings.describe(spec))) for name, spec in specs.items())


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
