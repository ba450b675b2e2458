"""The frontier of every knob on a language-model run's page: its numbers against numpy."""

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex

from configs import lm_frontier
from kd_jax.lm.experiment import knobs
from kd_jax.lm.report import cooling, frontier
from kd_jax.lm.report import page as report
from kd_jax.metrics import statistics
from kd_jax.reporting import page
from kd_jax.reporting.figures import NAMED
from kd_jax.storage.files import read_rows

KNOBS = (
    ("tau", (("1", "tau-1"), ("0.5", "tau-0.5"))),
    ("top-k", (("all", "tau-1"), ("20", "topk"))),
    ("divergence", (("forward KL", "fkl"), ("reverse KL", "rkl"))),
)
SEEDS = 4
NOISE = np.array([[-0.2, 0.1, 0.3, -0.2], [0.1, -0.1, 0.2, -0.2]]) / 8  # precision and recall by seed
# Precision, recall, the share of the noise, and the entropy of what is learnt from.
POINTS = {
    "direct": (-7.9, -7.2, 1.0, 3.5), "tau-1": (-7.6, -7.5, 1.0, 7.4), "tau-0.5": (-4.6, -9.0, 2.0, 4.0),
    "topk": (-5.6, -7.9, 0.5, 2.9), "fkl": (-7.4, -7.3, 1.5, 7.0), "rkl": (-6.8, -8.5, 1.2, 7.0),
}  # fmt: skip
DISTILL = {
    "topk": {"policy": "sequence", "sample_temperature": 1.0, "top_k": 20, "top_p": None},
    "fkl": {"policy": "online", "divergence": "forward_kl", "loss_temperature": 1.0, "data": "p_star"},
    "rkl": {"policy": "online", "divergence": "reverse_kl", "loss_temperature": 1.0, "data": "p_star"},
}  # fmt: skip
GAINS = [0.5, 1.0, 2.0]


def make_rows(skip=()):
    rows = []
    for arm, (precision, recall, share, entropy) in POINTS.items():
        tau = {"tau-1": 1.0, "tau-0.5": 0.5, "topk": 1.0}.get(arm)
        kind = "distilled" if arm.startswith("tau") else arm
        for seed in range(SEEDS):
            if (arm, seed) in skip or arm in skip:
                continue
            values = np.array([precision, recall]) + share * NOISE[:, seed] * (1, -1 if arm == "rkl" else 1)
            row = {"kind": "evaluation", "name": f"{arm}/seed-{seed}", "arm": kind, "tau": tau, "seed": seed}
            row |= {"precision": values[0], "recall": values[1], "entropy": 6.0 + seed, "kl_model_data": 1.0 + seed}
            row |= {"kl_data_model": 2.0 - values[1], "teacher_entropy": entropy, "num_samples": 640, "num_recall": 320}
            rows.append(row | ({"distill": DISTILL[arm]} if arm in DISTILL else {}))
    teacher = {"kind": "evaluation", "name": "teacher/tau-1", "arm": "teacher", "tau": 1.0, "seed": None}
    return [*rows, teacher | {"precision": -7.5, "recall": -7.1, "entropy": 7.4}]


def of(rows, arm, metric):
    return np.array([row[metric] for row in rows if row["name"].startswith(f"{arm}/seed-")])


def priced(rows, ends, gain, neutral="tau-1"):
    """Price by seed at a gain between two arms: the mean line's loss, each seed's error moved along its slope."""
    plain = {name: of(rows, neutral, name) for name in ("precision", "recall")}
    gains, losses = (np.array([of(rows, end, "precision") - plain["precision"] for end in ends]),
                     np.array([plain["recall"] - of(rows, end, "recall") for end in ends]))  # fmt: skip
    x, y = gains.mean(1), losses.mean(1)
    share, slope = (gain - x[0]) / (x[1] - x[0]), (y[1] - y[0]) / (x[1] - x[0])
    assert 0 <= share <= 1
    at = [(1 - share) * each[0] + share * each[1] for each in (gains, losses)]
    return (at[1] + slope * (gain - at[0])) / gain


# precision on average: tau-1 -7.6, tau-0.5 -4.6, topk -5.6, fkl -7.4, rkl -6.8
ENDS = {"tau": ("tau-1", "tau-0.5"), "top-k": ("tau-1", "topk"), "divergence": ("fkl", "rkl")}


def mean_error(values):
    return values.mean(), values.std(ddof=1) / np.sqrt(values.size)


def shown(values, digits=2):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / np.sqrt(values.size):.{digits}f}"


def make_run(folder, rows):
    folder.mkdir()
    made = {"experiment": "lm", "frontier": {"knobs": KNOBS, "references": ["tau-1", "fkl"], "gains": GAINS}}
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "manifest.json").write_text(json.dumps({"command": "train"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(folder, rows):
    source = report.write(make_run(folder, rows)).read_text(encoding="utf-8")
    source = re.sub(r"base64,[^\"]+", "base64,", source)
    return source, " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures unsaved, which takes most of a page's time."""
    monkeypatch.setattr(page, "embed", lambda drawn, folder: dict.fromkeys(drawn, ""))


def cells(source, heading):
    """The body of the table after a heading."""
    body = source[source.index(f">{heading.replace(chr(39), '&#39;')}</h2>") :].split("<tbody>")[1].split("</tbody>")[0]
    return [[html.unescape(c) for c in re.findall(r"<td>(.*?)</td>", row)] for row in body.split("</tr>")[:-1]]


def same(lines, wanted):
    """Whether tables have the same words, and numbers that are equal to two digits after the point."""
    pairs = [pair for line, other in zip(lines, wanted, strict=True) for pair in zip(line, other, strict=True)]
    numbers = [[[float(x) for x in re.findall(r"-?\d+\.\d+", cell)] for cell in pair] for pair in pairs]
    words = [[re.sub(r"-?\d+\.\d+", "#", cell) for cell in pair] for pair in pairs]
    return all(a == b for a, b in words) and all(a == pytest.approx(b, abs=0.0101) for a, b in numbers)


def price_lines(values_at):
    """Lines of a table of prices from gain -> knob -> price by seed."""
    lines = []
    for gain, values in values_at.items():
        order = sorted(values, key=lambda name: values[name].mean())
        for name in order:
            above = shown(values[name] - values[order[0]]) if name != order[0] else "cheapest"
            loss = f"{gain * values[name].mean():.2f}"
            lines.append([f"{gain:g}", f"{-7.6 + gain:.2f}", name, loss, shown(values[name]), above])
    return lines


def test_prices_and_verdict_are_numpy_over_seeds(tmp_path, undrawn):
    rows = make_rows()
    source, text = written(tmp_path / "run", rows)
    assert "not attained by any measured student" in text
    # the divergence gains 0.8 at most
    values = {g: {name: priced(rows, ends, g) for name, ends in ENDS.items() if g < 0.8 or name != "divergence"}
              for g in GAINS}  # fmt: skip
    assert same(cells(source, "Which knob buys precision most cheaply?"), price_lines(values))
    # tau costs 0.5 and top-k 0.2 nats of recall per nat of precision on average, with errors below 0.02
    assert "At every gain compared, the knob that buys precision most cheaply in recall is top-k." in text
    # 0.2 more of each, with standard errors of half the noise, below 0.01
    assert "Clearly more precision and more recall than tau-1: fkl." in text
    assert "Gain 2: top-k costs 0.20" in text and "not reached by divergence." in text


def test_prices_from_a_knobs_own_unchanged_setting(tmp_path, undrawn):
    rows = make_rows()
    source, text = written(tmp_path / "run", rows)
    neutral = {"tau": "tau-1", "top-k": "tau-1", "divergence": "fkl"}
    # the divergence gains 0.6 of its own, at twice that in recall
    values = {g: {name: priced(rows, ENDS[name], g, neutral[name]) for name in ENDS if g < 0.6 or name != "divergence"}
              for g in GAINS}  # fmt: skip
    assert values[0.5]["divergence"].mean() == pytest.approx(2.0)
    wanted = [[line[0], *line[2:]] for line in price_lines(values)]
    assert same(cells(source, "Prices from each knob's own unchanged setting"), wanted)
    assert "tau, top-k from tau-1; divergence from fkl." in text


def test_table_has_both_divergences_and_the_text_of_each_entropy(tmp_path, undrawn):
    rows = make_rows()
    source, text = written(tmp_path / "run", rows)
    table = {line[1]: line for line in cells(source, "Every setting of every knob")}
    assert list(table) == ["tau-1", "tau-0.5", "topk", "fkl", "rkl", "direct"]
    columns = ("precision", "recall", "kl_model_data", "kl_data_model", "entropy", "teacher_entropy")
    for arm, line in table.items():
        assert line[2:8] == [statistics.show(*mean_error(of(rows, arm, column))) for column in columns]
    assert [table[arm][0] for arm in ("tau-1", "rkl", "direct")] == [
        "tau = 1, top-k = all", "divergence = reverse KL", "no teacher",
    ]  # fmt: skip
    own, theirs = "the teacher's text", "p*'s text"
    assert {arm: line[8] for arm, line in table.items()} == {
        "tau-1": own, "tau-0.5": own, "topk": own, "fkl": theirs, "rkl": theirs, "direct": theirs,
    }  # fmt: skip
    assert "unchanged, 7.400 on its own and 7.000 on p*'s" in text
    learns = {line[0]: line[1] for line in cells(source, "What students learn, beside the direct student")}
    assert learns == {
        "tau = 0.5": "the teacher's text at tau = 0.5", "tau = 1": "the teacher's text at tau = 1",
        "fkl": "forward KL; on p*'s text", "rkl": "reverse KL; on p*'s text",
        "topk, tau = 1": "the teacher's text at tau = 1, top-k = 20",
    }  # fmt: skip


def test_figure_has_every_setting_and_its_entropy(tmp_path):
    rows = make_rows()
    found = knobs.read({"frontier": {"knobs": KNOBS, "references": ["tau-1", "fkl"], "gains": GAINS}})
    curves = cooling.curves(rows)
    axes, bar = frontier.figure(frontier.knob_students(found, curves), curves).axes[:2]
    scatters = [c for c in axes.collections if hasattr(c, "get_sizes")]
    points = {tuple(np.round(point, 6)): colour for c in scatters[:3]
              for point, colour in zip(c.get_offsets(), c.get_facecolors(), strict=True)}  # fmt: skip
    assert set(points) == {
        tuple(np.round([of(rows, arm, name).mean() for name in ("recall", "precision")], 6)) for arm in found.arms
    }
    assert "teacher's entropy" in bar.get_ylabel() and bar.get_ylim() == (2.9, 7.4)
    # the two divergences have one teacher, so the colour of their knob
    places = [[of(rows, arm, name).mean() for name in ("recall", "precision")] for arm in ("fkl", "rkl")]
    assert {to_hex(points[tuple(np.round(place, 6))]) for place in places} == {NAMED[2].lower()}


@pytest.mark.slow
def test_knobs_are_compared_on_the_seeds_that_all_have(tmp_path, undrawn):
    rows = make_rows(skip=[("topk", 1), ("rkl", 3)])
    source, _ = written(tmp_path / "run", rows)
    kept = [row for row in rows if row["seed"] in (0, 2)]
    line = next(line for line in cells(source, "Every setting of every knob") if line[1] == "tau-0.5")
    assert line[2] == statistics.show(*mean_error(of(kept, "tau-0.5", "precision")))


def test_arms_that_are_not_there_are_named(tmp_path, undrawn):
    source, text = written(tmp_path / "run", make_rows(skip=["rkl", "fkl"]))
    assert "students of the arms: fkl, rkl (settings of knobs on the frontier)" in text
    assert {line[2] for line in cells(source, "Which knob buys precision most cheaply?")} == {"tau", "top-k"}
    _, text = written(tmp_path / "none", make_rows(skip=["tau-1"]))
    assert "students of the arms: tau-1 " in text and "Which knob buys" not in text


def test_reference_without_a_finite_value_has_no_prices(tmp_path, undrawn):
    rows = make_rows()
    rows[SEEDS]["recall"] = "-Infinity"
    assert rows[SEEDS]["name"] == "tau-1/seed-0"
    _, text = written(tmp_path / "run", rows)
    assert "Knobs have no prices: the reference's precision or recall is not finite." in text


def test_the_cooled_direct_student_is_on_the_figure(tmp_path):
    rows = make_rows()
    rows += [row | {"sample_temperature": 0.8, "precision": row["precision"] + 1, "recall": row["recall"] - 0.2}
             for row in rows if row["arm"] == "direct"]  # fmt: skip
    found = knobs.read({"frontier": {"knobs": KNOBS, "references": ["tau-1", "fkl"], "gains": GAINS}})
    curves = cooling.curves(rows)
    axes = frontier.figure(frontier.knob_students(found, curves), curves).axes[0]
    assert any(np.allclose(line.get_xydata(), [[-7.2, -7.9], [-7.4, -6.9]]) for line in axes.lines)
    # the knobs are of students sampled at 1
    assert np.allclose(
        frontier.knob_students(found, curves).direct.metrics["precision"], of(rows[:SEEDS], "direct", "precision")
    )


def test_without_knobs_there_is_no_section():
    assert frontier.section(None, {}, False) is None and frontier.missing(None, {}) == []


def test_a_smoke_run_has_prices_and_no_verdict(tmp_path, undrawn):
    source, text = written(tmp_path / "run", [row | {"num_samples": 64} for row in make_rows()])
    assert "This is a smoke run (64 samples of each student)" in text and "most cheaply in recall is" not in text
    assert cells(source, "Which knob buys precision most cheaply?")


@pytest.mark.long
def test_from_config_to_page(tmp_path):
    command = ["-m", "kd_jax.train", "--config", "configs/lm_frontier.py:smoke", "--workdir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "evaluation"]
    found = knobs.read(lm_frontier.get_config("smoke"))
    students = cooling.curves(rows)
    both = [(0, 0), (0, 1)]
    assert {arm: curve.students for arm, curve in students.items()} == dict.fromkeys(["direct", *found.arms], both)
    entropies = {arm: curve.rows[1.0][0, 0]["teacher_entropy"] for arm, curve in students.items()}
    # what is to make the teacher selective lowers its entropy; what is of the loss alone leaves it
    assert entropies["tau-0.5"] < entropies["tau-1"] > entropies["topp-0_7"] and entropies["topk-20"] <= np.log(20)
    assert entropies["sharp-0_5"] < entropies["forward_kl"] < entropies["T-2"]
    same = [entropies[arm] for arm in ("jensen_shannon", "reverse_kl", "lambda-1")]
    assert same == pytest.approx([entropies["forward_kl"]] * 3, rel=1e-6)
    source = (tmp_path / "run" / "report.html").read_text()
    assert len(cells(source, "Every setting of every knob")) == len(students)
    assert (tmp_path / "run" / "figures" / "frontier.png").stat().st_size > 0
