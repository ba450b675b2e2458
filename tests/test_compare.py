"""The page of several runs: its differences against SciPy, how they are paired, and what is refused."""

import csv
import html
import json
import re

import numpy as np
import pytest
from scipy import stats

from kd_jax import compare
from kd_jax.lm.report import comparison
from kd_jax.reporting import run_comparison
from tests.gmm.report.test_page import make_rows as mixture_rows
from tests.gmm.report.test_page import make_run as mixture_run
from tests.lm.report.test_page import make_rows, make_run


def shifted(rows, by, seed=5):
    """The rows with `by` nats more precision and a little noise."""
    rng = np.random.default_rng(seed)
    return [
        row | {"precision": row["precision"] + by + rng.normal(0, 0.1)} if "precision" in row else row for row in rows
    ]


def mixture_pair(tmp_path, **config):
    rows = mixture_rows(seeds=6, cooled=True)
    mixture_run(tmp_path / "a", rows, with_panels=False)
    mixture_run(tmp_path / "b", shifted(rows, 0.5), with_panels=False, num_distill=500, **config)
    return [compare.COMPARABLE["gmm"], tmp_path / "a", tmp_path / "b"]


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_runs_of_mixtures_are_paired_by_seed_as_scipy_has_it(tmp_path, capsys):
    _, a, b = mixture_pair(tmp_path)
    out = tmp_path / "out"
    assert compare.main(["compare", str(a), str(b), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "page: " in shown and "paired by 6 seeds" in shown
    row = next(r for r in lines_of(out / "figures/compare.csv") if (r["students"], r["run"]) == ("beta = 10", "b"))
    values = [[r["precision"] for r in map(json.loads, open(f / "metrics.jsonl")) if r["beta"] == 10.0] for f in (a, b)]
    apart = np.subtract(values[1], values[0])
    assert float(row["precision − a's"]) == pytest.approx(apart.mean())
    assert float(row["precision − a's (error)"]) == pytest.approx(apart.std(ddof=1) / 6**0.5)
    assert row["recall − a's"] == "0.0" and row["differences"] == "paired by 6 seeds"
    (setting,) = lines_of(out / "figures/settings.csv")
    assert setting == {"setting": "num_distill", "a": "–", "b": "500"}
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "2 runs that differ in 1 setting: num_distill." in page and "data:image/svg+xml;base64," in page
    # what scripts fetch (nothing) is seen in tests/reporting/test_browser.py
    source = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http:" not in source and "https:" not in source and "kd-jax compare" in source
    chart = json.loads(re.search(r'id="chart-compare">(.*?)</script>', page, flags=re.DOTALL)[1])
    (beta,) = [one for one in chart["panels"][0]["series"] if one["label"] == "b" and one["line"] == "solid"]
    assert beta["points"][1]["at"][1] == pytest.approx(np.mean(values[1]))
    assert beta["points"][1]["facts"][:2] == ["b", "beta = 10, 6 students"]
    assert beta["points"][1]["facts"][-1] == "num_distill: 500"
    (cooled,) = [one for one in chart["panels"][0]["series"] if one["label"] == "b" and one["line"] == "dashed"]
    (direct,) = [
        one for one in lines_of(out / "figures/compare.csv") if (one["students"], one["run"]) == ("direct", "b")
    ]
    assert cooled["points"][0]["at"] == pytest.approx([float(direct["recall"]), float(direct["precision"])])


def test_runs_are_called_by_the_part_of_the_path_that_differs():
    assert compare.short_names(["x/a", "y/b"]) == ["a", "b"]
    assert compare.short_names(["x/a", "y/a"]) == ["x/a", "y/a"]


def test_other_seeds_are_not_paired_and_have_welchs_interval(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.normal(0, 1, 5), rng.normal(0.3, 2, 8)]
    runs = [
        run_comparison.Run({}, {}, [run_comparison.Student("direct", "direct", [(0, i) for i in range(len(v))],
                           {"precision": v, "recall": v})], seeds, "same rows", "nats", False)
        for seeds, v in enumerate(values)
    ]  # fmt: skip
    for metric in ("precision", "recall"):
        got, how = run_comparison.difference(*runs, "direct", metric)
        expected = stats.ttest_ind(values[1], values[0], equal_var=False)
        interval = expected.confidence_interval(0.95)
        assert how == "unpaired" and got.p_value == pytest.approx(expected.pvalue)
        np.testing.assert_allclose((got.low, got.high), (interval.low, interval.high))


def lm_pair(tmp_path, *, rows_of_b="validation-1", seed_of_b=0):
    """Two language-model runs of three seeds, with each sequence's recall."""
    rng = np.random.default_rng(3)
    for name, by, stage, seed in (("a", 0.0, "validation-1", 0), ("b", 0.3, rows_of_b, seed_of_b)):
        stages = [{"name": "p_star/validation", "folder": f"stages/p_star/{stage}"}]
        rows = [row | {"sample_temperature": 1.0} for row in make_rows(seeds=3, taus=(0.8, 1.0), teacher=False)]
        folder = make_run(tmp_path / name, rows, stages=stages)
        (folder / "config.json").write_text(json.dumps({"experiment": "lm", "seed": seed, "student": {"width": 64}}))
        students = [row for row in rows if row["kind"] == "evaluation"]
        log_prob = rng.normal(-40 + by, 3, (len(students), 50))
        np.savez(
            folder / "recall.npz", tokens=np.full(50, 8), name=np.array([row["name"] for row in students]),
            sample_temperature=np.ones(len(students)), log_prob=log_prob.astype(np.float32),
        )  # fmt: skip
    return [comparison.comparable(tmp_path / name)._replace(name=name) for name in ("a", "b")]


def test_runs_of_language_models_are_paired_where_seeds_and_rows_are_the_same(tmp_path):
    a, b = lm_pair(tmp_path)
    assert [one.label for one in a.students] == ["direct", "tau = 0.8", "tau = 1"]
    difference = run_comparison.difference
    assert difference(a, b, "direct", "precision")[1] == "paired by 3 seeds"
    assert difference(a, b, "direct", "recall")[1] == "paired by 3 seeds and by sequence"
    # held-out rows of another corpus: precision is paired all the same, recall is not
    a, b = lm_pair(tmp_path, rows_of_b="validation-2")
    assert difference(a, b, "direct", "precision")[1] == "paired by 3 seeds"
    (apart, how), parts = (
        difference(a, b, "direct", "recall"),
        [run_comparison.estimate(run.students[0], "recall") for run in (a, b)],
    )
    assert how == "unpaired" and apart.error == pytest.approx(np.hypot(parts[0].error, parts[1].error))
    a, b = lm_pair(tmp_path, seed_of_b=1)
    assert {difference(a, b, "direct", metric)[1] for metric in ("precision", "recall")} == {"unpaired"}


def test_one_seed_each_is_compared_over_sequences(tmp_path):
    a, b = (
        run._replace(students=[one._replace(
            members=one.members[:1], values={k: v[:1] for k, v in one.values.items()}, by_sequence=one.by_sequence[:1],
        ) for one in run.students])
        for run in lm_pair(tmp_path)
    )  # fmt: skip
    got, how = run_comparison.difference(a, b, "direct", "recall")
    apart = (b.students[0].by_sequence - a.students[0].by_sequence)[0]
    assert how == "paired by sequence" and got.error == pytest.approx(apart.std(ddof=1) / 50**0.5)
    # samples are each model's own
    got, how = run_comparison.difference(a, b, "direct", "precision")
    assert how == "unpaired" and got.error == pytest.approx(0.03 * 2**0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "two or more"),
        (["a", "a"], "none of them twice"),
        (["a", "lm"], "only runs of one experiment can be compared"),
        (["a", "nothing"], "no such run folder"),
        (["lm", "young"], "no evaluated students yet"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(tmp_path, capsys, words, said):
    mixture_run(tmp_path / "a", mixture_rows(), with_panels=False)
    make_run(tmp_path / "lm", make_rows(seeds=1, taus=(1.0,)))
    make_run(tmp_path / "young", [row for row in make_rows(seeds=1, taus=(1.0,)) if row["kind"] != "evaluation"])
    assert compare.main(["compare", *(str(tmp_path / word) for word in words), f"--out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_that_are_not_finished_are_named(tmp_path, capsys):
    _, a, b = mixture_pair(tmp_path)
    finished, running = ({"status": status, "command": "x"} for status in ("finished", "running"))
    for there, said in (
        ((finished, finished), []),
        ((finished, running), ["b is not finished: its numbers may change (manifest.json, status: running)."]),
        ((None, finished), ["a has no manifest.json: nothing says that the run is finished."]),
    ):
        for folder, manifest in zip((a, b), there, strict=True):
            (folder / "manifest.json").unlink(missing_ok=True)
            if manifest is not None:
                (folder / "manifest.json").write_text(json.dumps(manifest))
        assert compare.main(["compare", str(a), str(b), f"--out={tmp_path / 'out'}"]) == 0
        page, shown = (tmp_path / "out/compare.html").read_text(), capsys.readouterr().out
        for text in (page, shown):
            assert re.findall(r"\w (?:is not finished:|has no manifest.json:).*?\.(?=\n|</p>)", text) == said


def test_another_prompt_is_another_p_star(tmp_path):
    a, b = lm_pair(tmp_path)
    for value, said in (("The", False), ("Once upon", True)):
        runs = [run._replace(config={**run.config, "sampling": {"prompt": p}}) for run, p in ((a, "The"), (b, value))]
        path, _ = run_comparison.write(runs, tmp_path / "out", "kd-jax compare a b")
        assert ("p* differs between these runs (sampling.prompt)" in html.unescape(path.read_text())) == said
