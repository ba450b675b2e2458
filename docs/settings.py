"""Writes docs/settings.md from the declarations of the settings: python -m docs.settings."""

import importlib
from pathlib import Path

from kd_jax.runs import settings
from kd_jax.train import EXPERIMENTS

HEAD = """# Settings

Written by `python -m docs.settings` from the declarations. Each can be set in a config file or on the command line
(`--config.train.learning_rate=1e-3`). A wrong name, type or range is refused before anything is written.
"""


def cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def page() -> str:
    parts = [HEAD]
    for name, module in EXPERIMENTS.items():
        parts.append(f"\n## experiment {name}\n\n| key | type | default | range | meaning |\n|---|---|---|---|---|\n")
        for row in settings.describe(importlib.import_module(module).Spec):
            default = "none" if row.default is None else repr(row.default)
            cells = f"`{row.key}`", row.type, f"`{cell(default)}`", cell(row.range), cell(row.meaning)
            parts.append("| " + " | ".join(cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
