"""Students of arms by name in words: how each learns, and how it differs from the direct student."""

from __future__ import annotations

from typing import Any

from kd_jax.lm.report import summary
from kd_jax.lm.report.summary import Difference, Group
from kd_jax.reporting.page import show

HEAD = ("students", "learn", "precision − direct's", "recall − direct's")
TEXTS = {"p_star": "p*'s text", "samples": "the teacher's text", "mix": "text of both"}


def named(groups: list[Group]) -> list[Group]:
    """The students of arms by name."""
    return [group for group in groups if summary.is_student(group) and group.arm not in summary.ORDER and group.rows]


def table(groups: list[Group]) -> list[list[str]]:
    """A line for each kind of student that learns from the teacher; none where there are no arms by name."""
    if not named(groups):
        return []
    direct, lines = _direct(groups), []
    for group in groups:
        if not summary.is_student(group) or not group.rows or group is direct:
            continue
        apart = ["–", "–"]
        if direct is not None:
            apart = [_shown(summary.difference(group, direct, name)) for name in ("precision", "recall")]
        lines.append([group.label, learns(group.rows[0]), *apart])
    return lines


def headline(groups: list[Group]) -> str:
    """How many arms by name clearly differ from the direct student, in one sentence."""
    arms, direct = named(groups), _direct(groups)
    if direct is None:
        return "Students of the teacher cannot be compared with the direct student yet: it is not there."
    ends = {}
    for name in ("precision", "recall"):
        found = [summary.difference(group, direct, name) for group in arms]
        for sign, word in ((1, "higher"), (-1, "lower")):
            ends[word, name] = sum(summary.verdict(one, sign) == "holds" for one in found)
    return (
        f"Beside the direct student, of {len(arms)} arm(s) {ends['higher', 'precision']} have clearly higher precision "
        f"and {ends['lower', 'precision']} lower; {ends['higher', 'recall']} have clearly higher recall and "
        f"{ends['lower', 'recall']} lower."
    )


def _direct(groups: list[Group]) -> Group | None:
    return next((group for group in groups if group.arm == "direct" and group.rows), None)


def _shown(found: Difference) -> str:
    return show(found.mean, found.error) if found.count else "–"


def learns(row: dict[str, Any]) -> str:
    """What the student of a row learns, in words."""
    how = row.get("distill") or {}
    policy = how.get("policy", "sequence")
    if policy == "sequence":
        return "the teacher's text" + _sampled(how if how else {"sample_temperature": row.get("tau")})
    parameter = f" ({how['parameter']:g})" if how.get("parameter") is not None else ""
    loss = [how["divergence"].replace("_", " ") + parameter]
    if how.get("loss_temperature", 1.0) != 1:
        loss.append(f"loss temperature {how['loss_temperature']:g}")
    if how.get("teacher_temperature") is not None:
        loss.append(f"teacher temperature {how['teacher_temperature']:g}")
    if how.get("hard_weight"):
        loss.append(f"cross-entropy's share {how['hard_weight']:g}")
    text = TEXTS[how["data"]] + (_sampled(how) if how["data"] != "p_star" else "")
    if policy == "on_policy":
        text = f"the student's own text in {how['on_policy_fraction']:.0%} of updates, else {text}"
    if policy == "offline":
        few = f"{how['record_top_k']} " if "record_top_k" in how else ""
        loss.append(f"of the teacher's {few}likeliest tokens, recorded, tail: {how['tail']}")
    return f"{', '.join(loss)}; on {text}"


def _sampled(how: dict[str, Any]) -> str:
    """How the teacher was sampled."""
    names = {"sample_temperature": "tau", "top_k": "top-k", "top_p": "top-p"}
    parts = [f"{word} = {how[name]:g}" for name, word in names.items() if how.get(name) is not None]
    return f" at {', '.join(parts)}" if parts else ""
