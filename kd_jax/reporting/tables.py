"""Tables of a page, which are also CSV and LaTeX files beside it: numbers with their errors, and their formats."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.metrics import statistics
from kd_jax.storage import files

# Characters that pdfLaTeX does not print as they are.
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    | {"−": r"\ensuremath{-}", "<": r"\ensuremath{<}", ">": r"\ensuremath{>}", "±": r"\ensuremath{\pm}"}
    | {"″": r"\ensuremath{''}", "‖": r"\ensuremath{\Vert}", "→": r"\ensuremath{\to}"}
)


class Number(NamedTuple):
    """A cell: a mean with its standard error, which is NaN where it is unknown.

    On a page and in LaTeX it is rounded to two digits of its error; in a CSV file it has all digits.
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
        name: of its CSV and LaTeX files in the run's figures/.
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
    """Writes each table that has rows as figures/NAME.csv and figures/NAME.tex of a run folder."""
    for table in tables:
        if table.rows:
            home = folder / "figures"
            home.mkdir(exist_ok=True)
            files.write_text(home / f"{table.name}.csv", to_csv(table))
            files.write_text(home / f"{table.name}.tex", to_latex(table))


def to_csv(table: Table) -> str:
    """A table as CSV; a column of Numbers is two or three: the mean, its standard error, and remarks if it has any."""
    columns = []
    for title, *cells in zip(table.head, *table.rows, strict=True):
        if any(isinstance(cell, Number) for cell in cells):
            triples = [cell if isinstance(cell, Number) else (cell, "", "") for cell in cells]
            means, errors, remarks = zip(*triples, strict=True)
            # All digits, so that a figure can be drawn again from the file.
            columns += [[title, *means], [f"{title} (error)", *errors]]
            columns += [[f"{title} (remark)", *map(str.strip, remarks)]] if any(remarks) else []
        else:
            columns.append([title, *cells])
    text = io.StringIO()
    # csv would end lines with \r\n, in a folder whose other files end them with \n.
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    return _encodable(text.getvalue())


def to_latex(table: Table) -> str:
    """A table as a LaTeX `tabular` with the rules of the package booktabs; its note is a comment above it."""
    lines = [[_latex(cell) for cell in line] for line in (table.head, *table.rows)]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    comments = [f"% {_one_line(text)}" for text in (table.title, table.note) if text]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}"
    rules = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    text = [*comments, r"% Needs \usepackage{booktabs}.", begin, *rules, r"\end{tabular}", ""]
    return _encodable("\n".join(text))


def _latex(cell: Any) -> str:
    if isinstance(cell, Number) and math.isfinite(cell.mean):
        # In formulas a minus sign is not a hyphen.
        number = str(cell._replace(remark="")).replace("±", r"\pm")
        return f"${number}$ {_latex(cell.remark)}".rstrip()
    # an empty line within a tabular would be an error
    return _one_line(str(cell)).translate(_LATEX)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _encodable(text: str) -> str:
    # A name out of a run's folder can hold half of a surrogate pair, which UTF-8 cannot encode.
    return text.encode("utf-8", "replace").decode("utf-8")


def to_text(table: Table) -> list[str]:
    """A table as lines for a terminal, its columns aligned."""
    cells = [[str(cell) for cell in line] for line in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
