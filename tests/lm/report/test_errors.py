"""Errors over teachers, seeds and sequences: against NumPy from the definitions, and their coverage in simulation."""

import numpy as np
import pytest

from kd_jax.lm.experiment.knobs import ContrastSpec
from kd_jax.lm.report import comparison, cooling, summary
from kd_jax.metrics import statistics
from kd_jax.reporting import units
from tests.lm.report.test_cooling import direct, rows_of

STUDENTS = [(teacher, seed) for teacher in range(3) for seed in range(2)]


def test_seeds_of_a_teacher_are_one_unit():
    values = np.random.default_rng(0).normal(size=6)
    found = units.interval(STUDENTS, values)
    means = values.reshape(3, 2).mean(1)
    assert found.dof == 2 and found.error == pytest.approx(np.std(means, ddof=1) / np.sqrt(3))
    # of one teacher, seeds are the units
    assert units.interval([(0, seed) for seed in range(6)], values).dof == 5
    assert units.words(STUDENTS) == "3 teachers" and units.words(STUDENTS[:2]) == "2 seeds"


def test_shared_sequences_add_their_part():
    values = np.random.default_rng(0).normal(size=(6, 40)) + np.random.default_rng(1).normal(size=40)
    found = units.interval(STUDENTS, values.mean(1), values)
    assert found == statistics.two_way(values.reshape(3, 2, 40).mean(1))
    assert found.error > units.interval(STUDENTS, values.mean(1)).error


@pytest.mark.slow
def test_intervals_of_nested_students_cover_the_truth():
    """Teacher, seed and sequence effects: 95 % intervals over teachers hold it 95 % of the time, over students less."""
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        teachers = np.repeat(rng.normal(size=(3, 1)), 2, axis=1)
        values = teachers + 0.5 * rng.normal(size=(3, 2))
        by_sequence = values.reshape(6, 1) + 3 * rng.normal(size=64) + rng.normal(size=(6, 64))
        found = units.interval(STUDENTS, by_sequence.mean(1), by_sequence)
        hits += found.low <= 0 <= found.high
        as_seeds = statistics.t_interval(by_sequence.mean(1))
        naive += as_seeds.low <= 0 <= as_seeds.high
    assert 930 <= hits <= 985 and naive < 900


def kept(folder, rows, log_probs, tokens, **more):
    np.savez(
        folder / "recall.npz", tokens=tokens, name=np.array([row["name"] for row in rows]),
        sample_temperature=np.array([row["sample_temperature"] for row in rows]), log_prob=log_probs, **more,
    )  # fmt: skip


def with_sequences(folder, arms, seed=0):
    """Rows of three teachers with two seeds each, whose recall is the ratio of sums over 50 shared sequences."""
    rng = np.random.default_rng(seed)
    rows = [{**row, "teacher": row["seed"] // 2, "seed": row["seed"] % 2} for row in rows_of(arms, seeds=6)]
    tokens = rng.integers(5, 30, 50)
    hard = rng.normal(0, 0.5, 50)
    log_probs = np.stack([(row["recall"] + hard + rng.normal(0, 0.1, 50)) * tokens for row in rows])
    for row, values in zip(rows, log_probs, strict=True):
        row["recall"] = values.sum() / tokens.sum()
    kept(folder, rows, log_probs, tokens)
    units.attach(rows, folder)
    return rows, log_probs, tokens


def test_a_sequences_share_averages_to_the_recall(tmp_path):
    rows, log_probs, tokens = with_sequences(tmp_path, direct())
    values = units.by_sequence(rows, "recall")
    np.testing.assert_allclose(values.mean(1), [row["recall"] for row in rows], rtol=1e-12)
    # its standard error is the delta method's for a ratio of sums
    residuals = log_probs[0] - rows[0]["recall"] * tokens
    error = np.sqrt(50 / 49 * (residuals**2).sum()) / tokens.sum()
    assert statistics.t_interval(values[0]).error == pytest.approx(error)
    assert units.by_sequence(rows, "precision") is None


def test_divergence_of_shared_sequences_is_paired_as_recall_is(tmp_path):
    rows, log_probs, tokens = with_sequences(tmp_path, direct() | {"student": [(1.0, -6.5, -7.4)]})
    p_star = -3 * tokens + np.random.default_rng(1).normal(0, 5, len(tokens))
    for row in rows:
        row["kl_data_model"] = p_star.sum() / tokens.sum() - row["recall"]
    kept(tmp_path, rows, log_probs, tokens, p_star=p_star)
    units.attach(rows, tmp_path)
    groups = {group.arm: group for group in summary.summarise(rows)}
    recall, divergence = (
        summary.difference(groups["student"], groups["direct"], name).interval for name in ("recall", "kl_data_model")
    )
    # log p* is in both, so that one is minus the other
    assert divergence.mean == pytest.approx(-recall.mean) and divergence.error == pytest.approx(recall.error)


def test_sequences_with_one_prompt_are_not_independent(tmp_path):
    rows, log_probs, tokens = with_sequences(tmp_path, direct())
    prompt = np.arange(50) // 5
    kept(tmp_path, rows, log_probs, tokens, prompt=prompt)
    units.attach(rows, tmp_path)
    values = units.by_sequence(rows, "recall")
    assert values.shape == (len(rows), 10)
    np.testing.assert_allclose(values.mean(1), [row["recall"] for row in rows], rtol=1e-6)
    # the delta method's error over prompts, by its definition
    residuals = (log_probs[0] - rows[0]["recall"] * tokens).reshape(10, 5).sum(1)
    error = np.sqrt(10 / 9 * (residuals**2).sum()) / tokens.sum()
    assert statistics.t_interval(values[0]).error == pytest.approx(error, rel=1e-5)


def test_differences_are_paired_by_teacher_seed_and_sequence(tmp_path):
    rows, _, _ = with_sequences(tmp_path, direct() | {"student": [(1.0, -6.5, -7.4)]})
    groups = {group.arm: group for group in summary.summarise(rows)}
    apart = summary.difference(groups["student"], groups["direct"], "recall")
    first, second = (units.by_sequence(groups[arm].rows, "recall") for arm in ("student", "direct"))
    expected = statistics.two_way((first - second).reshape(3, 2, -1).mean(1))
    assert apart.interval == pytest.approx(expected) and apart.count == 6 and apart.over == "3 teachers"
    # how hard a sequence is cancels
    assert apart.interval.error < groups["student"].estimates["recall"].error


def test_matched_recall_is_two_way(tmp_path):
    rows, _, _ = with_sequences(tmp_path, direct() | {"student": [(1.0, -6.5, -7.4)]})
    curves = cooling.curves(rows)
    apart = cooling.differences(curves["student"], 1.0, curves["direct"], "recall")
    np.testing.assert_allclose(apart.by_sequence.mean(1), apart.values)
    matched = cooling.match(curves["student"], 1.0, curves["direct"], "recall").interval
    assert matched.mean == pytest.approx(apart.values.mean()) and matched.error >= units.interval(
        apart.students, apart.values
    ).error * (1 - 1e-9)


def test_the_preregistered_comparison_in_words(tmp_path):
    rows, _, _ = with_sequences(tmp_path, direct() | {"student": [(1.0, -6.5, -7.9)], "far": [(1.0, -3.0, -9.0)]})
    curves = cooling.curves(rows)
    matched = cooling.match(curves["student"], 1.0, curves["direct"], "recall").interval
    text = comparison.preregistered(ContrastSpec(arm="student"), curves)
    assert text.startswith(
        "Preregistered comparison: recall of student minus that of direct, cooled to equal precision"
    )
    assert statistics.show(matched.mean, matched.error) in text and f"p = {matched.p_value:.2g}" in text
    assert f"t with {matched.dof:.3g} degrees of freedom" in text and "over 3 teachers and 50 sequences" in text
    assert "hierarchical bootstrap" in text
    assert "is not known" in comparison.preregistered(ContrastSpec(arm="far"), curves)
    assert "absent has not been evaluated" in comparison.preregistered(ContrastSpec(arm="absent"), curves)
    plain = comparison.preregistered(ContrastSpec(arm="student", at_equal_precision=False, metric="precision"), curves)
    assert "precision of student minus that of direct is 1." in plain and "3 teachers" in plain
    assert comparison.preregistered(ContrastSpec(), curves) is None


def test_the_preregistered_comparison_is_not_corrected():
    arms = {"one": [(1.0, -7.0, -7.2)], "two": [(1.0, -7.0, -7.3)], "three": [(1.0, -7.0, -7.3)]}
    rows = rows_of(direct() | arms, noise=0.0)
    apart = iter([0.08, 0.1, 0.16, 0.05])  # p = 0.02 alone
    rows = [row | {"recall": -7.3 + next(apart)} if row["arm"] == "one" else row for row in rows]
    rng = np.random.default_rng(0)
    rows = [row | {"recall": row["recall"] + rng.normal()} if row["arm"] in ("two", "three") else row for row in rows]
    curves = cooling.curves(rows)
    assert cooling.standings(curves)["one"].sides[1.0] == cooling.ALIKE
    assert cooling.standings(curves, "one")["one"].sides[1.0] == cooling.ABOVE
