"""The grid of teacher and student sizes of configs/lm_capacity.py, cell by cell in one run folder, and its table.

    python -m benchmarks.lm_capacity --workdir runs/capacity
    python -m benchmarks.lm_capacity --workdir runs/capacity_smoke --smoke --sizes small,medium

Cells share the stages that are the same (p*'s corpora; a teacher's, for all students), and the same command resumes.
Each cell's rows, page and figures stay in cells/TEACHER-STUDENT; capacity.jsonl has a row a cell.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.lm_capacity import SIZES
from kd_jax import report, train
from kd_jax.lm.report import comparison, cooling
from kd_jax.metrics import statistics
from kd_jax.reporting import page, units
from kd_jax.storage.files import write_rows

KEPT = ("config.json", "manifest.json", "metrics.jsonl", "samples.jsonl", "recall.npz")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_capacity", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES), metavar="A,B")
    parser.add_argument("--smoke", action="store_true")
    args, flags = parser.parse_known_args(argv)
    rows = []
    for student in args.sizes:
        # Direct students have no teacher: trained and evaluated once, they serve all cells of their size.
        for teacher in args.sizes:
            folder = args.workdir / "cells" / f"{teacher}-{student}"
            if not (folder / "report.html").exists():
                name = f"configs/lm_capacity.py:{teacher}-{student}{',smoke' * args.smoke}"
                code = train.main(["kd_jax.train", "--config", name, "--workdir", str(args.workdir), *flags])
                if code:
                    return code
                folder.mkdir(parents=True, exist_ok=True)
                for file in KEPT:
                    shutil.copy2(args.workdir / file, folder / file)
                report.write(folder)
            rows.append({"teacher": teacher, "student": student, **_cell(folder)})
    write_rows(args.workdir / "capacity.jsonl", rows)
    print(table(rows, args.sizes))
    return 0


def _cell(folder: Path) -> dict[str, float | None]:
    """Recall of a cell's distilled students minus that of the direct ones cooled to equal precision, nats a token."""
    rows = page.read_rows(folder)
    units.attach(rows, folder)
    curves = cooling.curves(rows)
    arm = comparison.read_contrast(page.read_json(folder / "config.json")).arm
    match = cooling.match(curves[arm], 1.0, curves["direct"], "recall")
    if match is None:
        return {"recall_difference": None, "error": None, "p_value": None}
    interval = match.interval
    return {"recall_difference": interval.mean, "error": interval.error, "p_value": interval.p_value}


def table(rows: list[dict], sizes: Sequence[str]) -> str:
    """The grid as text: a line for each teacher, a column for each student."""
    lines = [["teacher / student", *sizes]]
    for teacher in sizes:
        cells = [row for row in rows if row["teacher"] == teacher]
        shown = {
            row["student"]: "not reached" if row["recall_difference"] is None
            else statistics.show(row["recall_difference"], row["error"]) for row in cells
        }  # fmt: skip
        lines.append([teacher, *(shown[student] for student in sizes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(["recall minus the cooled direct student's, nats per token", *text])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
