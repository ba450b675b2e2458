"""The samples of a run as a table of texts side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kd_jax.lm.report import summary
from kd_jax.reporting import row_kinds
from kd_jax.storage import files

# <|im_end|> and the like, and <s>, </s>, <pad>, <unk> and their kin.
SPECIAL = re.compile(r"(<\|[^<>|\s]+\|>|</?(?:s|pad|unk|bos|eos|mask)>)")
KINDS = {
    "name": row_kinds.TEXT,
    "arm": row_kinds.TEXT,
    "tau": row_kinds.FINITE,
    "text": row_kinds.TEXT,
} | dict.fromkeys(("seed", "index", "length"), row_kinds.INTEGER)
# Control characters are shown by their pictures (U+2400 and on): as themselves they are not allowed in HTML.
CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def read(path: Path) -> list[dict]:
    """The rows of a samples.jsonl, none where there is no file; ValueError names one that is not a sample's."""
    rows = files.read_rows(path)
    for index, row in enumerate(rows, start=1):
        missing = [key for key in ("name", "arm", "index", "text") if row.get(key) is None]
        if missing:
            raise ValueError(f"{path}, row {index}: no {missing[0]}; not a sample's row")
        row_kinds.check(row, f"{path}, row {index}", KINDS)
    return rows


def side_by_side(rows: list[dict]) -> dict[str, Any]:
    """The table of texts: a row per index, a column per arm and tau (of the lowest seed that has samples)."""
    columns: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        columns.setdefault(summary.group_key(row), {}).setdefault(row["name"], {})[row["index"]] = row
    keys, head = sorted(columns, key=summary.position), ["index"]
    chosen = []
    for key in keys:
        first = min(columns[key].values(), key=lambda own: next(iter(own.values())).get("seed") or 0)
        seed = next(iter(first.values())).get("seed")
        head.append(summary.label(*key) + ("" if seed is None else f" (seed {seed})"))
        chosen.append(first)
    indices = sorted({index for own in chosen for index in own})
    table = [(index, [_text(own[index]) if index in own else None for own in chosen]) for index in indices]
    return {"head": head, "rows": table}


def _text(row: dict) -> dict[str, Any]:
    """A sample's text in pieces, special tokens apart, and the mark of a text that was cut."""
    text = row["text"].translate(CONTROL)
    pieces = [(piece, i % 2 == 1) for i, piece in enumerate(SPECIAL.split(text)) if piece]
    cut = "" if row.get("finished", True) else "cut" + (f" at {row['length']} tokens" if row.get("length") else "")
    return {"pieces": pieces, "cut": cut}
