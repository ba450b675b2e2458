"""Tables of a page and their CSV files."""

import csv
import io
import math

from kd_jax.reporting.tables import Number, Table, save, to_csv, to_latex


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
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["t.csv", "t.tex"]


def test_csv_keeps_remarks():
    table = Table("t", "T", ("p",), [[Number(1.0, 0.1, " (n = 2)")], [Number(2.0)]])
    assert to_csv(table).splitlines()[:2] == ["p,p (error),p (remark)", "1.0,0.1,(n = 2)"]


def test_latex_has_booktabs_rules_and_escaped_text():
    rows = [["50 % of a_b & {c}\n\nd", Number(-3.53567, 0.0412, " *")], ["\\", Number(-math.inf)]]
    table = Table("t", "All of it", ("KL(p″‖p*)", "recall − direct's"), rows, "In nats,\nper token.")
    assert to_latex(table).splitlines() == [
        "% All of it", "% In nats, per token.", r"% Needs \usepackage{booktabs}.", r"\begin{tabular}{lr}", r"\toprule",
        r"KL(p\ensuremath{''}\ensuremath{\Vert}p*) & recall \ensuremath{-} direct's \\", r"\midrule",
        r"50 \% of a\_b \& \{c\} d & $-3.536 \pm 0.041$ * \\", r"\textbackslash{} & -inf \\", r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip


def test_a_mean_that_rounds_to_zero_has_no_sign():
    assert str(Number(-0.0004, 0.5)) == "0.00 ± 0.50" and str(Number(-1e-9)) == "0.000"
