"""The part of a page on instructions: its table, its figure, the declared contrast, and answers side by side."""

import pytest

from kd_jax.lm.instruct import page
from kd_jax.lm.report import summary
from tests.lm.instruct.test_pass_rate import ROWS


def answer(name, arm, seed, tau, index, passed):
    return {
        "name": name, "arm": arm, "tau": None, "seed": seed, "sample_temperature": tau, "index": index,
        "prompt": f"prompt {index}", "task": "copy", "answer": f"{name} says {index} at {tau}", "passed": passed,
        "split": "test",
    }  # fmt: skip


def test_answers_side_by_side(tmp_path):
    rows = [
        answer(name, arm, seed, tau, index, index == 0)
        for name, arm, seed in [("p_star", "p_star", None), *((f"direct/seed-{n}", "direct", n) for n in (1, 0))]
        for tau in (1.0, 0.6)
        for index in range(2)
    ]  # fmt: skip
    shown = page.side_by_side(rows)
    assert shown["columns"] == ["p* at 0.6", "direct at 0.6"]
    assert [prompt for prompt, _ in shown["prompts"]] == ["prompt 0", "prompt 1"]
    assert [cell["answer"] for cell in shown["prompts"][1][1]] == [
        "p_star says 1 at 0.6",
        "direct/seed-0 says 1 at 0.6",
    ]
    assert [cell["passed"] for _, cells in shown["prompts"] for cell in cells] == [True, True, False, False]
    assert not page.read(tmp_path, ROWS)["prompts"]


def test_declared_contrast_in_a_sentence():
    assert "+0.300, 1 pair of students." in page.declared(ROWS, {"arm": "sharp", "control": "direct"})
    assert page.declared([], {"arm": "sharp", "control": "direct"}) is None
    assert page.declared(ROWS, {"arm": "", "control": "direct"}) is None


def test_an_arm_by_name_is_not_merged_with_the_students_of_its_tau():
    rows = [{**ROWS[2], "arm": arm, "tau": tau} for arm, tau in (("distilled", 0.8), ("x4", 0.8), ("direct", None))]
    labels = [line[0] for line in page.table(rows).rows]
    assert labels == ["tau = 0.8", "x4, tau = 0.8", "direct"]
    assert labels == [summary.label(row["arm"], row["tau"]) for row in rows]  # as the rest of the page has them


def test_table_and_figure_have_a_line_for_each_arm_and_temperature():
    again = [{**one, "seed": 1, "pass_rate": one["pass_rate"] + 0.2} for one in ROWS if one["arm"] == "sharp"]
    table = page.table([*ROWS, *again])
    assert [line[:2] for line in table.rows] == [
        ["direct", "1"], ["direct", "0.6"], ["sharp", "1"], ["sharp", "0.8"], ["sharp", "0.6"],
    ]  # fmt: skip
    assert table.rows[1][2] == (0.3, 0.1, "")  # one student: the error over instructions
    # two students, .3 and .5: mean .4, and the standard deviation .2 / sqrt 2 over sqrt 2
    assert table.rows[2][2][:2] == pytest.approx((0.4, 0.1))
    drawn, chart = page.figure([*ROWS, *again], {"direct": "#d1495b"})
    x, y = drawn.axes[0].lines[0].get_data()
    assert list(x) == [0.9, 0.55] and list(y) == [0.9, 0.3]
    assert [series["label"] for series in chart["panels"][0]["series"]] == ["direct", "sharp"]
    assert page.figure([], {}) is None and not page.table([]).rows
