"""Tables of a page and their CSV files."""

import csv
import io
import math

from kd_jax.reporting.tables import Number, Table, save, to_csv


def test_numbers_have_two_digits_of_their_error():
    cells = {
        Number(-3.53567, 0.0412): "-3.536 ± 0.041", Number(44.04, 9.0): "44.0 ± 9.0", Number(0.5): "0.500",
        Number(math.nan): "–", Number(-math.inf, math.nan, " (1 of 3 seeds)"): "-inf (1 of 3 seeds)",
        Number(1.0, 0.0): "1.000 ± 0", Number(1.0, 0.1, " (n = 2)"): "1.00 ± 0.10 (n = 2)",
    }  # fmt: skip
    assert {cell: str(cell) for cell in cells} == cells


def test_csv_has_all_digits_and_a_column_of_errors(tmp_path):
    table = Table("t", "T", ("model", "p", "n"), [["a,b", Number(1 / 3, 0.01), 2], ["c", "–", 1]])
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    assert rows[0] == ["model", "p", "p (error)", "n"]
    assert rows[1][0] == "a,b" and float(rows[1][1]) == 1 / 3 and rows[2] == ["c", "–", "", "1"]
    save([table, Table("empty", "E", ("x",), [])], tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["t.csv"]
