"""The page of several models beside one p*: its sentence, its figure, and what is not finite."""

import csv
import math

from kd_jax.reporting import models_page

EMPTY = {name: None for _, _, columns, _ in models_page.TABLES for name, _ in columns}


def row(name, precision, recall, temperature=1.0, **more):
    values = {"precision": precision, "recall": recall, "entropy": 2.0}
    errors = {f"{key}_se": 0.1 for key in values}
    about = {"name": name, "sample_temperature": temperature, "num_samples": 300, "source": "folder"}
    return {**EMPTY, **about, **values, **errors, **more}


ROWS = [row("a", -3.0, -4.0), row("a", -2.0, -5.0, 0.8), row("b", -3.5, -3.0), row("c", -math.inf, -6.0)]


def test_the_sentence_names_the_best():
    assert models_page.lead(ROWS) == (
        "a at 0.8 has the highest precision (precision -2.00 ± 0.10), b the highest recall (recall -3.00 ± 0.10), in "
        "nats per token."
    )
    assert models_page.lead(ROWS[:1]) == "a has precision -3.00 ± 0.10 and recall -4.00 ± 0.10, in nats per token."
    assert models_page.lead([ROWS[0], row("d", -4, -5)]) == "a has the highest precision and the highest recall."


def test_points_of_a_model_are_joined_and_the_infinite_is_left_out():
    series = models_page.chart(ROWS)["panels"][0]["series"]
    assert [(one["label"], len(one["points"]), one["line"]) for one in series] == [("a", 2, "dashed"), ("b", 1, "")]
    assert series[0]["points"][1]["at"] == [-5.0, -2.0] and series[0]["points"][1]["facts"][0] == "a at 0.8"
    axes = models_page.figure(ROWS).axes[0]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}


def test_page_and_files(tmp_path):
    (tmp_path / "manifest.json").write_text('{"command": "python -m kd_jax.evaluate --out here"}')
    page = models_page.write(ROWS, tmp_path).read_text()
    # of tables without a value there is none
    assert "Likelihood" in page and "By embeddings" not in page and page.count("kd_jax.evaluate") == 1
    lines = list(csv.reader((tmp_path / "figures" / "likelihood.csv").open()))
    assert lines[2][:3] == ["a at 0.8", "-2.0", "0.1"] and lines[4][1] == "-inf"
