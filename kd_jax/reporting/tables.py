"""Tables of a page, which are also CSV files beside it: numbers with their errors, and how both are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.metrics import statistics
from kd_jax.storage import files


class Number(NamedTuple):
    """A cell: a mean with its standard error, which is NaN where it is unknown.

    On a page it is rounded to two digits of its error; in a CSV file it has all digits.
    """

    mean: float
    error: float = math.nan
    remark: str = ""

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–" + self.remark
        text = statistics.show(self.mean, self.error) if math.isfinite(self.mean) else f"{self.mean}"
        return text + self.remark


class Table(NamedTuple):
    """A table with its heading.

    Attributes:
        name: of its CSV file in the run's figures/.
        title: its heading.
        head: names of the columns.
        rows: cells, each a Number or anything that `str` shows.
        note: what the numbers are.
        texts: sentences above it.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    texts: Sequence[str] = ()


def save(tables: Iterable[Table], folder: Path) -> None:
    """Writes each table that has rows as figures/NAME.csv of a run folder."""
    for table in tables:
        if table.rows:
            path = folder / "figures" / f"{table.name}.csv"
            path.parent.mkdir(exist_ok=True)
            files.write_text(path, to_csv(table))


def to_csv(table: Table) -> str:
    """A table as CSV; a column of Numbers is two, the mean and its standard error."""
    columns = []
    for title, *cells in zip(table.head, *table.rows, strict=True):
        if any(isinstance(cell, Number) for cell in cells):
            pairs = [cell[:2] if isinstance(cell, Number) else (cell, "") for cell in cells]
            # All digits, so that a figure can be drawn again from the file.
            columns += [[title, *(mean for mean, _ in pairs)], [f"{title} (error)", *(error for _, error in pairs)]]
        else:
            columns.append([title, *cells])
    text = io.StringIO()
    # csv would end lines with \r\n, in a folder whose other files end them with \n.
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    # a name out of a run's folder can hold half of a surrogate pair, which UTF-8 cannot encode
    return text.getvalue().encode("utf-8", "replace").decode("utf-8")


def to_text(table: Table) -> list[str]:
    """A table as lines for a terminal, its columns aligned."""
    cells = [[str(cell) for cell in line] for line in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
