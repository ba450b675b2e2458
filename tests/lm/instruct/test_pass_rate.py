import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy import stats

from kd_jax.lm import model as model_lib
from kd_jax.lm.evaluation import Entry, EvaluationSpec, LazyModel
from kd_jax.lm.instruct import contrast, pass_rate
from kd_jax.lm.instruct.pass_rate import Answers, InstructSpec


def test_metrics_by_hand():
    passed = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool)
    tokens = [np.array(ids) for ids in ([1, 2, 3], [1, 2], [1, 2, 1, 2, 9], [4], [5], [6], [7], [8])]
    row = pass_rate.metrics(
        Answers([""] * 8, passed, tokens, np.array([True] * 6 + [False] * 2)), ["copy", "sort", "copy", "sort"]
    )
    assert row["pass_rate"] == 0.5 and row["best_of_n"] == 0.75 and row["samples_per_prompt"] == 2
    # over instructions: their means are .5, 0, 1 and .5
    assert row["pass_rate_se"] == pytest.approx(np.std([0.5, 0, 1, 0.5], ddof=1) / 2)
    assert row["best_of_n_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert (row["pass_rate_copy"], row["pass_rate_sort"]) == (0.75, 0.25)
    assert row["finished"] == 0.75 and row["length_mean"] == 15 / 8
    assert row["distinct_2"] == pytest.approx(4 / 7)  # pairs 12 23, 12, 12 21 12 29


def row(arm, split, tau, rate, variety, seed=0):
    return {
        "kind": "instruct", "name": f"{arm}/seed-{seed}", "arm": arm, "tau": None, "seed": seed, "split": split,
        "sample_temperature": tau, "pass_rate": rate, "pass_rate_se": 0.1, "best_of_n": rate, "samples_per_prompt": 1,
        "distinct_2": variety, "repetition_4": 0.0, "finished": 1.0, "length_mean": 9.0, "num_instructions": 8,
    }  # fmt: skip


ROWS = [
    row("direct", "validation", 1.0, 0.2, 0.9), row("direct", "validation", 0.6, 0.4, 0.5),
    # the test split would choose otherwise
    row("direct", "test", 1.0, 0.9, 0.9), row("direct", "test", 0.6, 0.3, 0.55),
    row("sharp", "test", 1.0, 0.3, 0.8), row("sharp", "test", 0.8, 0.5, 0.6), row("sharp", "test", 0.6, 0.7, 0.5),
]  # fmt: skip


def test_contrast_of_arms_by_tau_has_the_names_of_the_config():
    by_tau = [{**one, "arm": "distilled", "tau": 0.8} if one["arm"] == "sharp" else one for one in ROWS]
    other = [{**one, "tau": 1.0, "pass_rate": 0.0} for one in by_tau if one["arm"] == "distilled"]
    out = contrast.at_equal_variety([*by_tau, *other], arm="tau-0.8", control="direct")
    assert out["difference"] == pytest.approx(0.3)


def test_contrast_by_hand():
    out = contrast.at_equal_variety(ROWS, arm="sharp", control="direct")
    # direct at 0.6 has distinct-2 .55: half way between sharp's .5 and .6, so .6 against .3
    assert out["difference"] == pytest.approx(0.3) and (out["pairs"], out["outside"]) == ([(0, 0)], [])
    assert out["low"] is None
    again = [{**one, "seed": 1, "pass_rate": one["pass_rate"] - 0.2 * (one["arm"] == "sharp")} for one in ROWS]
    out = contrast.at_equal_variety([*ROWS, *again], arm="sharp", control="direct")
    assert out["difference"] == pytest.approx(0.2) and out["pairs"] == [(0, 0), (0, 1)]
    # the 0.975 quantile of t with one degree of freedom is 12.706
    assert out["high"] - out["difference"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    varied = [{**one, "distinct_2": 0.99} if one["arm"] == "direct" else one for one in ROWS]
    out = contrast.at_equal_variety(varied, arm="sharp", control="direct")
    assert out["difference"] is None and out["outside"] == [(0, 0)]
    # The best temperature is 0.6, but there sharp is never as little varied. At 1 it has .3 at its .8.
    varied = [{**one, "distinct_2": {1.0: 0.8, 0.6: 0.4}[one["sample_temperature"]]} if one["arm"] == "direct" else one
              for one in ROWS]  # fmt: skip
    out = contrast.at_equal_variety(varied, arm="sharp", control="direct")
    assert out["difference"] == pytest.approx(0.3 - 0.9) and out["outside"] == []


def test_contrast_reads_between_neighbouring_temperatures():
    # variety .5, .7, .6: the mark .55 lies between 1.0 and 0.8, where the rate is .25, and not between 1.0 and 0.6
    rates = {1.0: (0.2, 0.5), 0.8: (0.4, 0.7), 0.6: (0.9, 0.6)}
    rows = [row("sharp", "test", tau, rate, variety) for tau, (rate, variety) in rates.items()]
    rows += [row("direct", split, 1.0, 0.4, 0.55) for split in ("validation", "test")]
    assert contrast.at_equal_variety(rows, arm="sharp", control="direct")["difference"] == pytest.approx(-0.15)


def test_contrast_of_several_teachers_is_over_teachers():
    rng, rows, means = np.random.default_rng(0), [], []
    for teacher, effect in enumerate((-0.2, 0.0, 0.25)):
        changes = effect + rng.normal(0, 0.01, 4)
        means.append(0.3 + changes.mean())
        for seed, change in enumerate(changes):
            rows += [{**one, "teacher": teacher, "seed": seed, "pass_rate": one["pass_rate"] + change *
                      (one["arm"] == "sharp")} for one in ROWS]  # fmt: skip
    out = contrast.at_equal_variety(rows, arm="sharp", control="direct")
    reach = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
    assert out["difference"] == pytest.approx(np.mean(means)) and len(out["pairs"]) == 12
    assert out["high"] - out["difference"] == pytest.approx(reach)


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="a value twice"):
        InstructSpec(sample_temperatures=(1.0, 0.8, 0.8))
    with pytest.raises(ValueError, match="both are needed"):
        InstructSpec(num_test=3)
    with pytest.raises(ValueError, match="'validation' has 84 instructions, not 85"):
        InstructSpec(num_test=3, num_validation=85)
    with pytest.raises(ValueError, match="copies.*one of name_three"):
        InstructSpec(kinds=("copies",))


@pytest.mark.slow
def test_students_of_other_teachers_have_other_random_numbers(tmp_path):
    # one model under three names: with the same random numbers all of its answers would be equal
    architecture = dataclasses.replace(model_lib.PRESETS["tiny"], vocab_size=256)
    model = model_lib.Model(architecture, model_lib.init(jax.random.key(0), architecture), (0,))
    students = {
        "one": Entry(model, "direct", seed=0, teacher=0), "same": Entry(model, "logits", seed=0, teacher=0),
        "other": Entry(model, "direct", seed=0, teacher=1),
    }  # fmt: skip
    p_star = LazyModel(model, "float32", None, tmp_path)
    spec = InstructSpec(num_validation=1, num_test=2, kinds=("copy",))
    _, answers = pass_rate.evaluate(spec, p_star, students, EvaluationSpec(), tmp_path, max_length=90)
    said = {name: [row["answer"] for row in answers if row["name"] == name] for name in students}
    assert said["one"] == said["same"]
    assert all(a != b for a, b in zip(said["one"], said["other"], strict=True))
