"""Arms by name on the page: in words, beside the direct student, and in the figures."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kd_jax.lm.report import comparison, figures, loss_curves, summary
from kd_jax.reporting import figures as shared

ONLINE = {"policy": "online", "divergence": "forward_kl", "parameter": None, "loss_temperature": 1.0, "data": "p_star"}
# precision and recall by seed
VALUES = {
    "direct": ([-7.9, -7.7, -7.8], [-7.2, -7.0, -7.1]), "online": ([-7.5, -7.2, -7.4], [-7.0, -6.7, -6.9]),
    "other": ([-8.5, -8.2, -8.4], [-8.2, -8.0, -8.2]),
}  # fmt: skip


def rows_of(arms=VALUES, seeds=3):
    return [
        {"kind": "evaluation", "name": f"{arm}/seed-{seed}", "arm": arm, "tau": None, "seed": seed,
         "precision": VALUES[arm][0][seed], "recall": VALUES[arm][1][seed], "teacher_entropy": 3.5 + len(arm)}
        | ({} if arm == "direct" else {"distill": ONLINE})
        for arm in arms for seed in range(seeds)
    ]  # fmt: skip


def test_differences_from_the_direct_student_are_paired():
    lines = comparison.table(summary.summarise(rows_of())).rows
    assert [line[0] for line in lines] == ["online", "other"]
    for line in lines:
        for shown, values, direct in zip(line[2:], VALUES[line[0]], VALUES["direct"], strict=True):
            apart = np.subtract(values, direct)
            assert shown[:2] == pytest.approx((apart.mean(), apart.std(ddof=1) / np.sqrt(3)))


def test_headline_counts_who_clearly_differs():
    groups = summary.summarise(rows_of())
    assert comparison.headline(groups) == (
        "Of 2 ways of distilling, beside the direct student: precision is clearly higher in 1 and lower in 1; recall "
        "is clearly higher in 1 and lower in 1."
    )
    assert "has not been evaluated" in comparison.headline(summary.summarise(rows_of(["online"])))


def test_without_distilled_students_there_is_no_table():
    assert comparison.table(summary.summarise(rows_of(["direct"]))).rows == []


@pytest.mark.parametrize("row, said", [
    ({"tau": 0.8}, "the teacher's text at tau = 0.8"),
    ({"distill": {"policy": "sequence", "sample_temperature": 1.0, "top_k": None, "top_p": 0.9}},
     "the teacher's text at tau = 1, top-p = 0.9"),
    ({"distill": ONLINE}, "forward KL; on p*'s text"),
    ({"distill": {**ONLINE, "divergence": "jensen_shannon", "parameter": 0.9, "loss_temperature": 2.0,
                  "teacher_temperature": 0.5, "hard_weight": 0.1}},
     "jensen shannon (0.9) + 0.1 cross-entropy, loss temperature 2, teacher temperature 0.5; on p*'s text"),
    ({"distill": {**ONLINE, "policy": "on_policy", "on_policy_fraction": 0.5}},
     "forward KL; on the student's own text in 50% of updates, else p*'s text"),
    ({"distill": {**ONLINE, "data": "mix", "sample_temperature": 0.8}},
     "forward KL; on p*'s and the teacher's text at tau = 0.8"),
    ({"distill": {**ONLINE, "policy": "offline", "record_top_k": 64, "tail": "bucket"}},
     "forward KL, recorded of the teacher's 64 most probable tokens (tail: bucket); on p*'s text"),
])  # fmt: skip
def test_what_an_arm_learns_in_words(row, said):
    assert comparison.learns(row) == said


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figures_tell_arms_by_name_apart():
    groups = summary.summarise(rows_of())
    drawn = figures.frontier(groups, {})
    names = [*legend(drawn), *(text.get_text() for text in drawn.axes[0].texts)]
    assert {"online", "other", "direct (no teacher)"} <= set(names) and "other models" not in names
    assert names.count("online") == names.count("other") == 1
    colours = {}
    for collection in drawn.axes[0].collections:
        if hasattr(collection, "get_sizes") and len(collection.get_offsets()) == 1:
            colours[tuple(np.round(collection.get_offsets()[0], 6))] = to_hex(collection.get_facecolors()[0])
    means = {
        arm: tuple(np.round([np.mean(recall), np.mean(precision)], 6)) for arm, (precision, recall) in VALUES.items()
    }
    assert len({colours[mean] for mean in means.values()}) == 3 and colours[means["direct"]] == shared.DIRECT
    # against the entropy alone: there are no students by tau
    assert len(figures.curves(groups).axes) == 2 and figures.divergences(groups) is None


def test_every_mark_of_an_arm_by_name_is_its_own():
    assert len({figures.named(index) for index in range(24)}) == 24


def test_each_panel_shows_the_loss_that_was_trained_on():
    row = {"kind": "validation", "name": "online/seed-0", "arm": "online", "tau": None, "seed": 0, "divergence": 0.5}
    losses = [
        row | {"step": step, "loss": 1.0 - step / 40, "cross_entropy": 9.0, "chosen": step == 20} for step in (10, 20)
    ]
    text = row | {"name": "direct/seed-0", "arm": "direct", "divergence": None, "step": 10, "loss": 7.5}
    # before the evaluation only the rows themselves tell that a divergence is learnt
    assert list(loss_curves.by_loss([*losses, text])) == [("students", "cross-entropy"), ("students", "divergence")]
    trainings = loss_curves.read([*losses, text, *rows_of(seeds=1)])
    first, second, *logged = loss_curves.figure(trainings).axes
    assert first.get_ylabel() == "cross-entropy (nats per token)"
    assert second.get_ylabel() == "forward KL (nats per token)"
    np.testing.assert_allclose(np.concatenate([line.get_ydata() for line in second.lines]), [0.75, 0.5])
    assert [axes.get_title() for axes in logged][:2] == ["cross-entropy on the text", "divergence from the teacher"]
    panel = loss_curves.chart(trainings)["panels"][1]
    curve, chosen = panel["series"]
    assert [point["at"] for point in curve["points"]] == [[10, 0.75], [20, 0.5]] and len(chosen["points"]) == 1
    assert curve["points"][1]["facts"][1:] == [
        "validation, update 20", "steps: 20", "forward KL (nats per token): 0.500"
    ]  # fmt: skip
