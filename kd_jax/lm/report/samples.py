"""The samples of a run: texts side by side, those of the page's browser, and maps of their embeddings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from kd_jax.lm.report import summary
from kd_jax.reporting import charts, row_kinds
from kd_jax.reporting.charts import Panel, Point, Series
from kd_jax.reporting.figures import DISTILLED
from kd_jax.storage import files

# Characters of a text that the pointer shows on a map.
_LONGEST = 500
# <|im_end|> and the like, and <s>, </s>, <pad>, <unk> and similar.
SPECIAL = re.compile(r"(<\|[^<>|\s]+\|>|</?(?:s|pad|unk|bos|eos|mask)>)")
FIELDS = dict.fromkeys(("name", "arm", "text"), row_kinds.TEXT) | dict.fromkeys(
    ("tau", "sample_temperature"), row_kinds.FINITE
)
FIELDS |= dict.fromkeys(("seed", "index", "length", "prompt_length"), row_kinds.INTEGER)
# HTML allows no control characters but tab and newline; the others are shown by their pictures (U+2400 and on).
CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def read(path: Path) -> list[dict]:
    """The rows of a samples.jsonl; none where there is no file.

    Raises: ValueError, naming file and row, for one that is not a sample's.
    """
    rows = files.read_rows(path, texts=("text", "pieces"))
    for index, row in enumerate(rows, start=1):
        missing = [key for key in ("name", "arm", "index", "text") if row.get(key) is None]
        if missing:
            raise ValueError(f"{path}, row {index}: no {missing[0]}; not a sample's row")
        row_kinds.check(row, f"{path}, row {index}", FIELDS)
    return rows


def browsed(rows: list[dict]) -> list[dict[str, Any]]:
    """What the browser of samples shows of each: model, prompt, and tokens with log p* where they were scored."""
    shown = []
    for row in rows:
        scores = row.get("log_p_star") or []
        known = [value for value in scores if value is not None]
        seed = "" if row.get("seed") is None else f", seed {row['seed']}"
        seed = f", teacher {row['teacher']}{seed}" if row.get("teacher") else seed
        pieces = [piece.translate(CONTROL) for piece in row.get("pieces") or [row["text"]]]
        shown.append({
            "name": row["name"], "label": summary.label(*summary.group_key(row)) + seed, "index": row["index"],
            "pieces": pieces, "prompt": "".join(pieces[: row.get("prompt_length") or 0]), "log_p_star": scores,
            "total": sum(known) / len(known) if known else None, "cut": _cut(row),
        })  # fmt: skip
    return shown


def side_by_side(rows: list[dict], count: int = 8) -> dict[str, Any]:
    """The table of texts: a row per index, a column per arm and tau (of the lowest seed that has samples).

    Args:
        rows: of the run's samples.jsonl.
        count: indices that are shown, the lowest.
    """
    by_group: dict[tuple, dict[tuple, dict[int, dict]]] = {}
    for row in rows:
        if summary.is_main(row):
            seeds = by_group.setdefault(summary.group_key(row), {})
            # The name, too: models without a seed must not share a column.
            seeds.setdefault((row.get("seed") or 0, row["name"]), {})[row["index"]] = row
    head, columns = ["index"], []
    for key in sorted(by_group, key=summary.position):
        # The lowest seed, so that the page shows the same model however many have finished.
        samples = by_group[key][min(by_group[key])]
        seed = next(iter(samples.values())).get("seed")
        head.append(summary.label(*key) + ("" if seed is None else f" (seed {seed})"))
        columns.append(samples)
    indices = sorted({index for samples in columns for index in samples})[:count]
    lines = [(index, [_text(column[index]) if index in column else None for column in columns]) for index in indices]
    return {"head": head, "rows": lines}


def read_map(path: Path) -> list[dict]:
    """The rows of an embedding_map.jsonl; none where there is no file. Raises ValueError, naming file and row."""
    rows = files.read_rows(path, texts=("text",))
    for index, row in enumerate(rows, start=1):
        row_kinds.check(row, f"{path}, row {index}", FIELDS | dict.fromkeys(("x", "y"), row_kinds.FINITE))
        if not {"name", "arm", "text", "x", "y"} <= row.keys():
            raise ValueError(f"{path}, row {index}: not a row of a map of embeddings")
    return rows


def map_charts(rows: list[dict]) -> dict[str, Any]:
    """Interactive maps of embeddings, by name of the figure: a diagram a model, p*'s texts behind, on the same axes.

    Args:
        rows: as `read_map` returns them.
    """
    models: dict[str, list[dict]] = {}
    for row in rows:
        models.setdefault(row["name"], []).append(row)
    made = {}
    for name, (x, y) in maps(rows).items():

        def series(members: list[dict], label: str, colour: str, x=x, y=y) -> Series:
            points = [
                Point(row[x], row[y], math.nan, math.nan, [_map_label(row), _shortened(row["text"])], row["name"])
                for row in members
            ]
            return Series(label, points, colour, size=6)

        real = [series(members, "p*", "#999999") for members in models.values() if members[0]["arm"] == "p_star"]
        every = [
            Panel(_map_label(members[0]), [series(members, "the model", DISTILLED)])
            for members in models.values() if members[0]["arm"] != "p_star"
        ]  # fmt: skip
        made[name] = charts.panels(every, shared=real, same_axes=True)
    return made


def maps(rows: list[dict]) -> dict[str, tuple[str, str]]:
    """The fields of each map's coordinates, by name of its figure; none without rows, and UMAP's where rows have it."""
    named = {"embedding_map": ("x", "y"), "embedding_umap": ("umap_x", "umap_y")}
    return {name: fields for name, fields in named.items() if rows and fields[0] in rows[0]}


def _map_label(row: dict) -> str:
    return summary.label(*summary.group_key({"seed": 0, **row}))


def _shortened(text: str) -> str:
    text = text.translate(CONTROL)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _text(row: dict) -> dict[str, Any]:
    """A sample's text in pieces, special tokens apart, and the mark of a text that was cut."""
    text = row["text"].translate(CONTROL)
    pieces = [(piece, i % 2 == 1) for i, piece in enumerate(SPECIAL.split(text)) if piece]
    return {"pieces": pieces, "cut": _cut(row)}


def _cut(row: dict) -> str:
    """The mark of a text that reached the longest length before it ended."""
    if row.get("finished", True):
        return ""
    return "cut" + (f" at {row['length']} tokens" if row.get("length") else "")
