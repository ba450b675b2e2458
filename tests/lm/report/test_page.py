"""The language model's report: its numbers against numpy, what its lead says, and its page on partial and odd runs."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kd_jax.lm.report import about_run, figures, interactive, loss_curves, samples, summary
from kd_jax.lm.report import page as report
from kd_jax.metrics import statistics
from kd_jax.reporting import page
from kd_jax.storage.files import read_rows, write_rows

TAUS = (0.8, 0.875, 0.95, 1.0)
# Precision and recall by tau, None being the direct student: all that is expected holds.
HOLDS = {None: (-7.9, -7.2), 0.8: (-5.9, -8.1), 0.875: (-6.7, -7.9), 0.95: (-7.3, -7.7), 1.0: (-7.6, -7.5)}
P_STAR = -3.56  # log-likelihood of p* on its own samples


def evaluation(rng, arm, tau, seed, precision, recall, noise=0.02):
    """One model's row: per token values with noise, the rest following from them."""
    precision, entropy = precision + rng.normal(0, noise), 7.6 - (1.0 - (tau or 1.0)) * 9 + rng.normal(0, noise)
    recall = None if recall is None else recall + rng.normal(0, noise)
    length = 44.0 - 8 * (1.0 - (tau or 1.0)) + rng.normal(0, 0.3)
    values = {"precision": precision, "recall": recall, "entropy": entropy, "kl_model_data": -entropy - precision}
    values["kl_data_model"] = None if recall is None else P_STAR - recall
    row = {"kind": "evaluation", "name": name(arm, tau, seed), "arm": arm, "tau": tau, "seed": seed, "source": "model"}
    row |= {"num_samples": 1024, "num_tokens": 45000, "num_recall": 512, "num_recall_tokens": 22000}
    for key, value in values.items():
        row |= {key: value, f"{key}_se": None if value is None else 0.03}
        row[f"{key}_per_sequence"] = None if value is None else value * length
        row[f"{key}_per_sequence_se"] = None if value is None else 1.2
    row |= {"finished": 0.4 + rng.normal(0, 0.01), "finished_se": 0.01, "length_mean": length, "length_sd": 9.0}
    row |= {f"distinct_{n}": min(1.0, 0.15 * n**1.5 * (tau or 1.0)) for n in (1, 2, 3, 4)}
    teacher_entropy = {"distilled": 7.4 - (1.0 - (tau or 1.0)) * 9, "direct": None}.get(arm)
    return row | {"repetition_4": 0.02 / (tau or 1.0), "teacher_entropy": teacher_entropy, "teacher_entropy_se": 0.01}


def name(arm, tau, seed):
    if arm == "teacher":
        return "teacher" if tau is None else f"teacher/tau-{tau:g}"
    return f"direct/seed-{seed}" if arm == "direct" else f"tau-{tau:g}/seed-{seed}"


def losses(rng, arm, tau, seed, final, steps=240):
    """The training's and the validation's rows of one model, the last validation chosen."""
    row = {"name": name(arm, tau, seed), "arm": arm, "tau": tau, "seed": seed}
    rows = []
    for step in range(10, steps + 1, 10):
        loss = final + 3.2 * np.exp(-step / 40) + rng.normal(0, 0.03)
        rows.append(
            {"kind": "training", **row, "step": step, "tokens": step * 1500, "loss": loss, "learning_rate": 1e-3}
        )
    chosen = steps - 40
    for step in range(0, steps + 1, 40):
        loss = final + 0.1 + 3.2 * np.exp(-step / 40) + 0.02 * max(0, step - chosen) / 40 + rng.normal(0, 0.005)
        rows.append({"kind": "validation", **row, "step": step, "loss": loss, "perplexity": float(np.exp(loss)),
                     "chosen": step == chosen})  # fmt: skip
    return rows


def make_rows(seeds=3, taus=TAUS, values=HOLDS, teacher=True, noise=0.02):
    """All rows of a run; `values` are precision and recall by tau, between which others are interpolated."""
    rng = np.random.default_rng(0)
    known = sorted(tau for tau in values if tau is not None)
    rows = losses(rng, "teacher", None, None, 7.0) if teacher else []
    for seed in range(seeds):
        for tau in (None, *taus):
            arm = "direct" if tau is None else "distilled"
            pair = (
                values[None] if tau is None else [np.interp(tau, known, [values[t][i] for t in known]) for i in (0, 1)]
            )
            rows += losses(rng, arm, tau, seed, -pair[1])
            rows.append(evaluation(rng, arm, tau, seed, *pair, noise=noise))
    if teacher:
        rows += [evaluation(rng, "teacher", t, None, -7.5 + 9 * (1 - t), -7.1 if t == 1 else None) for t in taus]
    for stage, seconds in (("corpus", 402.5), ("teacher", 610.0), ("students", 1800.25), ("evaluation", 300.0)):
        rows.append({"kind": "stage", "name": stage, "seconds": seconds, "tokens": 100_000,
                     "share_of_data_logging_checkpoints": 0.01 if stage != "evaluation" else None})  # fmt: skip
    return rows


def make_samples(seeds=2, taus=TAUS, count=3):
    text = "The town of Aveiro lies on the coast.\nIts <b>canals</b> & boats are known.<|im_end|>"
    return [
        {"name": name(arm, tau, seed), "arm": arm, "tau": tau, "seed": seed, "index": index,
         "text": f"{text} {arm} {tau} {seed} {index}", "finished": index != 1, "length": 48}
        for seed in range(seeds) for arm, tau in [("distilled", t) for t in taus] + [("direct", None)]
        for index in range(count)
    ]  # fmt: skip


def make_run(folder, rows, samples=None, **manifest):
    """A run folder holding the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"experiment": "lm", "teacher": {"layers": 4}, "taus": [0.8, 1.0]}))
    manifest = {"command": "python -m kd_jax.train <x>", "versions": {"jax": "0.0"}, "device": "cpu"} | manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def written(folder, rows, samples=None, **manifest):
    """The page without its images, and its plain text."""
    source = report.write(make_run(folder, rows, samples, **manifest)).read_text(encoding="utf-8")
    source = re.sub(r"base64,[^\"]+", "base64,", source)
    source = re.sub(r"<script.*?</script>", "", source, flags=re.DOTALL)
    return source, " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures unsaved, which takes most of a page's time."""
    monkeypatch.setattr(page, "embed", lambda drawn, folder: dict.fromkeys(drawn, ""))


def of(rows, arm, tau, metric):
    return [r[metric] for r in rows if r["kind"] == "evaluation" and r["arm"] == arm and r["tau"] == tau]


def table_row(source, start):
    """The cells of the first table row after the heading `start[0]` whose first cell is `start[1]`."""
    heading, first = start
    row = re.search(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", source[source.index(f">{heading}</h2>") :])
    return re.findall(r"<td>(.*?)</td>", row[1])


def shown(values):
    """Mean ± standard error, from the definition."""
    return statistics.show(*mean_error(values))


def mean_error(values):
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))


def test_tables_are_numpy_over_seeds(tmp_path, undrawn):
    rows = make_rows()
    source, _ = written(tmp_path / "run", rows)
    likelihood = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
    text = ("finished", "length_mean", "distinct_2", "repetition_4")
    for arm, tau, first in (("distilled", 0.875, "tau = 0.875"), ("direct", None, "direct")):

        def expected(*metrics, arm=arm, tau=tau):
            return [shown(of(rows, arm, tau, metric)) for metric in metrics]

        assert table_row(source, ("Per token", first))[:6] == ["3", *expected(*likelihood)]
        cells = table_row(source, ("Per sequence", first))
        assert cells == ["3", *expected(*(f"{metric}_per_sequence" for metric in likelihood))]
        chosen = [r["perplexity"] for r in rows if r["kind"] == "validation" and r["chosen"] and r["arm"] == arm
                  and r["tau"] == tau]  # fmt: skip
        assert len(chosen) == 3
        assert table_row(source, ("The text, and validation", first)) == ["3", *expected(*text), shown(chosen)]
    lines = (tmp_path / "run" / "figures" / "per_token.csv").read_text(encoding="utf-8").splitlines()
    direct = next(line for line in lines if line.startswith("direct,")).split(",")
    values = of(rows, "direct", None, "precision")
    assert [float(x) for x in direct[2:4]] == pytest.approx([np.mean(values), np.std(values, ddof=1) / np.sqrt(3)])
    assert "Files: figures/per_token.csv, .tex" in source and "± 0.00<" not in source


def test_one_seed_has_errors_over_sequences_and_says_so(tmp_path, undrawn):
    rows = make_rows(seeds=1, taus=(0.8, 1.0))
    source, text = written(tmp_path / "run", rows)
    assert "There is one seed: errors are over its sequences" in text
    (value,) = of(rows, "distilled", 0.8, "precision")
    assert table_row(source, ("Per token", "tau = 0.8"))[:2] == ["1", f"{value:.3f} ± 0.030"]
    (other,) = of(rows, "distilled", 1.0, "precision")
    # two independent standard errors of 0.03
    low, high = value - other - 1.96 * 0.03 * 2**0.5, value - other + 1.96 * 0.03 * 2**0.5
    interval = f"(95 % interval {low:.3g} to {high:.3g}; 1 seed, error over sequences)"
    assert f"Precision falls by {value - other:.3f} ± 0.042 nats per token {interval}" in text
    assert table_row(source, ("The text, and validation", "tau = 0.8"))[2].endswith(" ± 0.28")  # 9 / sqrt(1024)
    assert "All students have the same teacher" in text and "nan" not in text.lower()


def test_page_begins_with_the_finding(tmp_path, undrawn):
    source, text = written(tmp_path / "run", make_rows(), make_samples())
    lead = re.search(r'<h1>.*?</h1>\s*<p class="lead"><strong>(.*?)</strong>', source)[1]
    assert lead.startswith("Students of a more selective teacher have higher precision and lower recall; the direct")
    titles = re.findall(r'<h2 id="[a-z0-9-]+">(.*?)</h2>', source)
    assert titles[:2] == ["What distillation did", "Samples side by side"] and "Per token" in titles
    links = re.findall(r'<li><a href="#([a-z0-9-]+)">(.*?)</a></li>', source)
    assert [title for _, title in links] == titles
    assert [anchor for anchor, _ in links] == re.findall(r'<h2 id="([a-z0-9-]+)">', source)
    assert "cannot tell what distillation adds to mere cooling" in text and "prefers-color-scheme: dark" in source


def with_cooling(rows):
    """The rows and those of all students at 0.8, with a nat more of precision and half a nat less of recall."""
    students = [row for row in rows if row["kind"] == "evaluation" and row["seed"] is not None]
    return rows + [
        row | {"sample_temperature": 0.8, "precision": row["precision"] + 1, "recall": row["recall"] - 0.5}
        for row in students
    ]


def test_cooled_direct_student_is_the_measure(tmp_path, undrawn):
    rows = with_cooling(make_rows())
    source, text = written(tmp_path / "run", rows)
    # direct: (-7.9, -7.2) to (-6.9, -7.7); at the precision of tau = 1, -7.6, it has a recall of -7.35
    assert "compared with the direct student merely sampled at a lower temperature: tau = " in text
    assert "mere cooling" not in text
    cells = table_row(source, ("Distillation or temperature? Recall at equal precision", "tau = 1"))
    direct = [np.mean(of(make_rows(), "direct", None, name)) for name in ("precision", "recall")]
    own = [np.mean(of(make_rows(), "distilled", 1.0, name)) for name in ("precision", "recall")]
    assert cells[2] == "1 to 0.8"
    apart = own[1] - (direct[1] - 0.5 * (own[0] - direct[0]))
    assert float(cells[3].split(" ± ")[0]) == pytest.approx(apart, abs=0.006) and cells[-1] == "is dominated"
    # tables of models at 1 are as before
    assert table_row(source, ("Per token", "direct"))[1] == shown(of(make_rows(), "direct", None, "precision"))
    assert table_row(source, ("What distillation cost", "tau = 1"))[:2] == ["1 to 0.8", "0.000 (matched)"]


def test_a_teacher_at_other_temperatures_is_not_more_of_the_same():
    rows = [row for row in make_rows() if row["kind"] == "evaluation"]
    again = [row | {"sample_temperature": t} for row in rows if row["arm"] == "teacher" and row["tau"] == 1.0
             for t in (1.0, 0.8)]  # fmt: skip
    (teacher,) = summary.summarise(again)
    assert len(teacher.rows) == 1


def test_a_run_on_data_says_who_judges(tmp_path, undrawn):
    said = "Here p* is the data stories.jsonl. The judge, org/judge, stands in"
    folder = make_run(tmp_path / "run", make_rows())
    assert said not in report.write(folder).read_text()
    config = json.loads((folder / "config.json").read_text())
    config |= {"data": {"source": "stories.jsonl"}, "p_star": {"source": "org/judge"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert said in report.write(folder).read_text()


def test_smoke_run_says_so_and_concludes_nothing(tmp_path, undrawn):
    rows = [row | ({"num_samples": 64} if row["kind"] == "evaluation" else {}) for row in with_cooling(make_rows())]
    source, text = written(tmp_path / "run", rows)
    assert "This is a smoke run (64 samples of each student)" in text
    for conclusion in ("Holds.", "Does not hold.", "is dominated", "higher precision", "At equal precision, compared"):
        assert conclusion not in text.replace("An arm dominates if", "").replace("is dominated if", "")
    assert report.result(tmp_path / "run")[0].startswith("This is a smoke run")


def test_result_is_a_sentence_and_four_lines(tmp_path):
    rows = make_rows()
    first, *table = report.result(make_run(tmp_path / "run", rows))
    assert first.startswith("Students of a more selective teacher") and first.endswith(".") and len(table) == 4
    assert [re.split(r"  +", line)[0] for line in table] == ["students", "direct", "tau = 1", "tau = 0.8"]
    assert re.split(r"  +", table[3])[1:3] == [shown(of(rows, "distilled", 0.8, m)) for m in ("precision", "recall")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["evaluation", "validation", "training", "stage"])
def test_missing_kind_is_said_and_the_rest_shown(tmp_path, undrawn, kind):
    rows = [row for row in make_rows() if row["kind"] != kind]
    source, text = written(tmp_path / "run", rows, make_samples())
    assert "Not in this run yet" in text and about_run.KINDS[kind] in text
    for other in about_run.KINDS:
        assert (about_run.KINDS[other] in text) == (other == kind)
    headings = {"evaluation": ">Per token</h2>", "stage": ">Where the time went</h2>"}
    for other, heading in headings.items():
        assert (heading in source) == (other != kind)
    assert (">What distillation did</h2>" in source) == (kind != "evaluation")
    assert ">Training</h2>" in source


@pytest.mark.slow
def test_only_one_kind_is_enough(tmp_path):
    for kind in about_run.KINDS:
        rows = [row for row in make_rows(seeds=1) if row["kind"] == kind]
        assert "Not in this run yet" in written(tmp_path / kind, rows)[1]


def test_run_that_stopped_half_way_names_what_waits(tmp_path, undrawn):
    rows = make_rows()
    gone = [
        r for r in rows if r["kind"] == "evaluation" and (r["arm"] == "direct" or (r["tau"], r["seed"]) == (1.0, 2))
    ]
    source, text = written(tmp_path / "run", [row for row in rows if row not in gone])
    assert "evaluation of: direct/seed-0, direct/seed-1, direct/seed-2, tau-1/seed-2" in text
    assert "the direct student's evaluation" in text and "Not tested." in text
    assert "the direct student has not been compared" in text
    # of the seeds that both have
    low, high = of(rows, "distilled", 0.8, "recall")[:2], of(rows, "distilled", 1.0, "recall")[:2]
    assert (
        f"{statistics.show(*mean_error(np.subtract(high, low)))} nats per token (95 %" in text and "; 2 seeds)" in text
    )
    assert table_row(source, ("Per token", "tau = 1"))[0] == "3"  # three trained; of the values there are two
    assert table_row(source, ("Per token", "tau = 1"))[1].endswith("(n = 2)")


def test_finished_run_misses_nothing(tmp_path, undrawn):
    # the teacher is trained under one name and evaluated under one for each tau
    assert "Not in this run yet" not in written(tmp_path / "run", make_rows(), make_samples())[1]


def test_infinite_and_null_values_are_counted_not_averaged_away(tmp_path, undrawn):
    rows = make_rows()
    own = [r for r in rows if r["kind"] == "evaluation" and r["tau"] == 0.8 and r["arm"] == "distilled"]
    own[0]["recall"] = "-Infinity"
    own[1]["entropy"] = None
    source, text = written(tmp_path / "run", rows)
    cells = table_row(source, ("Per token", "tau = 0.8"))
    assert cells[2] == "-inf (1 of 3 seeds)"
    two = [row["entropy"] for row in own if row["entropy"] is not None]
    assert cells[3] == f"{shown(two)} (n = 2)"
    assert "Not tested. Whether recall rises with tau: a value is not finite" in text
    assert "Not drawn, because not finite: tau = 0.8 (recall)" in text


@pytest.mark.slow
@pytest.mark.parametrize("taus, seeds", [((1.0,), 3), ((0.9,), 1), (tuple(np.linspace(0.5, 1.2, 20).round(3)), 2)])
def test_one_tau_and_twenty(tmp_path, taus, seeds):
    source, text = written(tmp_path / "run", make_rows(seeds=seeds, taus=taus), make_samples(1, taus, 1))
    rows = source.split(">Per token</h2>")[1].split("</tbody>")[0].count("<tr><td>")
    assert rows == 2 * len(taus) + 1  # the direct student, students and the teacher's samples
    assert ("fewer than two values of tau" in text) == (len(taus) == 1)


def test_samples_side_by_side_are_escaped_and_marked(tmp_path, undrawn):
    samples = make_samples()
    samples += [{"name": "p*", "arm": "p_star", "tau": None, "seed": None, "index": 0, "text": "p", "finished": True}]
    samples[0]["text"] = '<script>alert("x")</script> a\x00b \ud800 </s> http://example.org'
    source, text = written(tmp_path / "run", make_rows(), samples)
    assert "<script" not in source and "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; a␀b ? " in source
    assert '<span class="special">&lt;/s&gt;</span>' in source
    assert '<span class="special">&lt;|im_end|&gt;</span>' in source and "<b>" not in source
    head = re.search(r'samples"><table>\s*<thead><tr>(.*?)</tr>', source)[1]
    names = ["direct", *(f"tau = {tau:g}" for tau in TAUS)]
    assert re.findall(r"<th>(.*?)</th>", head) == ["index", "p*", *(f"{name} (seed 0)" for name in names)]
    body = source.split('samples"><table>')[1].split("</table>")[0].split("<tr>")[2:]
    assert len(body) == 3
    for index, row in enumerate(body):
        cells = row.split("<td>")[3:]
        assert len(cells) == 5 and all(f" 0 {index}" in cell for cell in cells[:1] + cells[2:])
        assert row.count("[cut at 48 tokens]") == (5 if index == 1 else 0)
    assert " 1 0<" not in source  # the second seed's are not shown


class Links(HTMLParser):
    """Collects what a page would load or link."""

    def __init__(self):
        super().__init__()
        self.tags, self.found = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action", "poster")]


def test_page_is_whole_and_offline(tmp_path):
    stages = [{"name": "corpus", "folder": "stages/corpus-0", "seconds": 1.0}]
    path = report.write(
        make_run(tmp_path / "run", make_rows(), make_samples(), stages=stages, seconds={"total": 3600.0})
    )  # fmt: skip
    # what scripts fetch (nothing) is seen in tests/reporting/test_browser.py
    source = re.sub(r"<script>.*?</script>", "<script></script>", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = Links()
    links.feed(source)
    images = [link for link in links.found if not link.startswith("#")]
    assert len(images) == 4 and all(link.startswith("data:image/svg+xml;base64,") for link in images)
    assert not links.tags & {"link", "iframe", "object", "embed", "base"}
    assert "<script src" not in source
    assert "@import" not in source and "url(" not in source
    for figure in ("frontier", "curves", "divergences", "training"):
        assert (path.parent / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (path.parent / "figures" / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert f"Files: figures/{figure}.pdf, .svg, .png" in source
    assert "<td>teacher.layers</td><td>4</td>" in source and "kd_jax.train &lt;x&gt;" in source
    # the four stages' shares of 3112.75 s, and what their training spends on data, logging and checkpoints
    assert "<td>students</td><td>1,800.2</td><td>57.8%</td><td>100,000</td><td>56</td><td>1.0%</td>" in source
    assert "take 1.0% of the stages" in source and "total 3600.0 s" in source
    assert sorted(p.name for p in path.parent.glob("*report*")) == ["report.html"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"arm": None}, "no arm"),
        ({"precision": "high"}, "precision is 'high', not a number"),
        ({"tau": True}, "tau is True, not a finite number"),
    ],
)
def test_broken_row_is_named(tmp_path, change, said):
    rows = [row for row in make_rows(seeds=1) if row["kind"] == "evaluation"]
    rows[1] |= change
    with pytest.raises(ValueError, match=f"metrics.jsonl, row 2: {re.escape(said)}"):
        report.write(make_run(tmp_path / "run", rows))
    assert not (tmp_path / "run" / "report.html").exists()


def test_broken_sample_is_named(tmp_path):
    samples = make_samples()
    del samples[3]["text"]
    with pytest.raises(ValueError, match="samples.jsonl, row 4: no text"):
        report.write(make_run(tmp_path / "run", make_rows(seeds=1), samples))


def test_figures_hold_the_numbers():
    rows = make_rows()
    groups = summary.summarise(rows)
    axes = figures.frontier(groups, {}).axes[0]
    means = [[np.mean(of(rows, "distilled", tau, m)) for m in ("recall", "precision")] for tau in TAUS]
    drawn = [np.asarray(c.get_offsets()) for c in axes.collections if hasattr(c, "get_offsets")]
    assert any(points.shape == (4, 2) and np.allclose(points, means) for points in drawn)
    direct = [[np.mean(of(rows, "direct", None, m)) for m in ("recall", "precision")]]
    assert any(points.shape == (1, 2) and np.allclose(points, direct) for points in drawn)
    # Each chosen checkpoint on its validation loss, over the tokens it had been trained on: 200 steps of 1500.
    panels = loss_curves.figure(loss_curves.read(rows)).axes[:2]
    markers = np.concatenate([np.asarray(c.get_offsets()) for ax in panels for c in ax.collections])
    chosen = sorted(r["loss"] for r in rows if r["kind"] == "validation" and r["chosen"])
    assert sorted(y for x, y in markers if x == pytest.approx(0.3)) == pytest.approx(chosen)
    assert panels[0].get_xlabel() == "tokens trained on (millions)"


def test_curves_have_the_numbers_and_a_level_for_the_direct_student():
    rows = make_rows()
    chart = interactive.against(summary.summarise(rows), interactive.CURVES, entropy=True)
    by_tau, by_entropy, *_ = chart["panels"]
    assert len(chart["panels"]) == 4 and by_entropy["x_title"] == "teacher's entropy (nats per token)"
    distilled, teacher, direct = by_tau["series"]
    expected = [[tau, np.mean(of(rows, "distilled", tau, "precision"))] for tau in TAUS]
    np.testing.assert_allclose([point["at"] for point in distilled["points"]], expected)
    level = np.mean(of(rows, "direct", None, "precision"))
    np.testing.assert_allclose([point["at"] for point in direct["points"]], [[0.8, level], [1.0, level]])
    assert distilled["points"][0]["facts"][0] == "tau = 0.8" and len(teacher["points"]) == 4
    entropies = [np.mean(of(rows, "distilled", tau, "teacher_entropy")) for tau in TAUS]
    np.testing.assert_allclose([point["at"][0] for point in by_entropy["series"][0]["points"]], entropies)


def test_map_of_embeddings(tmp_path, undrawn):
    """A diagram for each model on the same axes, p*'s points in all of them, with each point's text."""
    folder, rng = make_run(tmp_path / "run", make_rows(seeds=1)), np.random.default_rng(0)
    rows = [
        {"name": name, "arm": arm, "tau": tau, "index": i, "share": 0.42, "x": rng.normal(), "y": rng.normal(),
         "text": f"<b>{name} & {i}"}
        for name, arm, tau in (("p*", "p_star", None), ("direct/seed-0", "direct", None), ("a", "distilled", 0.8))
        for i in range(4)
    ]  # fmt: skip
    (folder / "embedding_map.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = report.write(folder).read_text(encoding="utf-8")
    chart = json.loads(re.search(r'id="chart-embedding_map">(.*?)</script>', source, flags=re.DOTALL)[1])
    assert [panel["title"] for panel in chart["panels"]] == ["direct", "tau = 0.8"] and chart["same_axes"]
    (real,), (direct,) = chart["shared"], chart["panels"][0]["series"]
    assert [point["at"] for point in real["points"]] == [[row["x"], row["y"]] for row in rows[:4]]
    assert direct["points"][3]["facts"] == ["direct", "<b>direct/seed-0 & 3"]
    assert "(42% of their" in source and 'id="chart-embedding_umap"' not in source
    (folder / "embedding_map.jsonl").write_text(json.dumps(rows[0] | {"x": "a"}) + "\n")
    with pytest.raises(ValueError, match="embedding_map.jsonl, row 1"):
        report.write(folder)
    by_umap = [row | {"umap_x": 0.0, "umap_y": 1.0} for row in rows]
    assert list(samples.maps(by_umap)) == ["embedding_map", "embedding_umap"]
    assert figures.embedding_map(by_umap, "umap_x", "umap_y").axes[1].get_title() == "a"


def test_the_preregistered_comparison_comes_first(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", make_rows(seeds=3))
    config = {"experiment": "lm", "contrast": {"arm": "tau-0.8", "at_equal_precision": False, "metric": "precision"}}
    (folder / "config.json").write_text(json.dumps(config))
    first = report.result(folder)[0]
    assert first.startswith("Preregistered comparison: precision of tau = 0.8 minus that of direct is ")
    assert "t with 2 degrees of freedom" in first
    source = report.write(folder).read_text(encoding="utf-8")
    leads = re.findall(r'<p class="lead"><strong>(.*?)</strong>', source)
    assert len(leads) == 2 and html.unescape(leads[0]) == first


def test_words_that_stand_for_numbers_elsewhere_are_texts_in_samples(tmp_path):
    """A model may write NaN or Infinity, whole tokens of many vocabularies; in a score they are numbers."""
    shown = {"name": "p*", "arm": "p_star", "index": 0, "text": "Infinity", "pieces": ["is", "NaN"], "prompt_length": 1}
    write_rows(tmp_path / "samples.jsonl", [shown | {"log_p_star": [None, -math.inf], "finished": True}])
    (row,) = samples.read(tmp_path / "samples.jsonl")
    assert (row["text"], row["pieces"], row["log_p_star"]) == ("Infinity", ["is", "NaN"], [None, -math.inf])
    assert samples.browsed([row])[0]["pieces"] == ["is", "NaN"]
    assert "Infinity" in str(samples.side_by_side([row])["rows"])
    write_rows(tmp_path / "embedding_map.jsonl", [shown | {"x": 0.0, "y": 1.0}])
    assert samples.read_map(tmp_path / "embedding_map.jsonl")[0]["text"] == "Infinity"
    write_rows(tmp_path / "answers.jsonl", [{"name": "a", "prompt": "NaN", "answer": "Infinity", "rate": math.inf}])
    (row,) = read_rows(tmp_path / "answers.jsonl", texts=("prompt", "answer"))
    assert (row["prompt"], row["answer"], row["rate"]) == ("NaN", "Infinity", math.inf)
