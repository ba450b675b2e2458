"""What the rows of a language-model run add up to: estimates over seeds, and whether the trade-off shows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from scipy.special import stdtr

from kd_jax.lm.distill.loss import DATA
from kd_jax.reporting import row_kinds
from kd_jax.reporting.page import mean_se, number, show

# Nats per token; each has a `_per_sequence` column beside it, and both a `_se` over the sequences.
LIKELIHOOD = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
TEXT = ("finished", "length_mean", "distinct_2", "repetition_4")
METRICS = (*LIKELIHOOD, *(f"{name}_per_sequence" for name in LIKELIHOOD), *TEXT, "teacher_entropy")
ORDER = ("direct", "distilled", "teacher")
KINDS = (
    {
        "kind": row_kinds.TEXT,
        "name": row_kinds.TEXT,
        "arm": row_kinds.TEXT,
        "seed": row_kinds.INTEGER,
        "tau": row_kinds.FINITE,
        "step": row_kinds.SIZE,
        "perplexity": row_kinds.ANY_NUMBER,
    }
    | dict.fromkeys(
        (*METRICS, "loss", "cross_entropy", "data_log_prob", "share_of_data_logging_checkpoints"), row_kinds.NUMBER
    )
    | dict.fromkeys((*(f"{name}_se" for name in METRICS), "length_sd"), row_kinds.FROM_ZERO)
    | dict.fromkeys(("tokens", "seconds", "num_samples", "num_recall"), row_kinds.SIZE)
)
# Of how a student learns (kd_jax.lm.experiment.arms): what has to be there by policy, and what else is shown.
POLICIES = {
    "sequence": (),
    "online": ("divergence", "data"),
    "on_policy": ("divergence", "data", "on_policy_fraction"),
    "offline": ("divergence", "data", "tail"),
}
DISTILL_KINDS = dict.fromkeys(("policy", "divergence", "data", "tail"), row_kinds.TEXT) | dict.fromkeys(
    ("parameter", "loss_temperature", "teacher_temperature", "hard_weight", "on_policy_fraction", "record_top_k",
     "sample_temperature", "top_k", "top_p"),
    row_kinds.NUMBER,
)  # fmt: skip


class Estimate(NamedTuple):
    """One metric of one group.

    Attributes:
        mean: over the seeds that have a value; NaN where none has.
        error: its standard error, over seeds (sd / sqrt(n)), or over the sequences where there is one seed; NaN where
            that is not known.
        count: seeds that have a value.
        bad: how many of these values are not finite.
    """

    mean: float
    error: float
    count: int
    bad: int


class Group(NamedTuple):
    """The models of one arm at one tau: one a seed.

    Attributes:
        arm: "direct", "distilled", "teacher", or another name.
        tau: the teacher's sample_temperature, for the arm "teacher" that of its own samples; None where there is none.
        label: how the page names it.
        rows: the evaluation rows, one a seed; none in a run that has not come so far.
        estimates: by metric, METRICS and "validation_perplexity".
    """

    arm: str
    tau: float | None
    label: str
    rows: list[dict]
    estimates: dict[str, Estimate]


class Finding(NamedTuple):
    """Something the experiment expects, and what became of it.

    Attributes:
        verdict: "holds" (beyond two standard errors), "fails" (the opposite, beyond two), "unclear" or "untested".
        text: in words, with the numbers.
    """

    verdict: str
    text: str


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    """The rows of one kind."""
    return [row for row in rows if row.get("kind") == kind]


def evaluations(rows: list[dict]) -> list[dict]:
    """The evaluation rows, one a model: of a model evaluated at several temperatures, the row at temperature 1."""
    rows = of_kind(rows, "evaluation")
    whole = {row["name"] for row in rows if row.get("sample_temperature", 1) == 1}
    return [row for row in rows if row["name"] not in whole or row.get("sample_temperature", 1) == 1]


def group_key(row: dict) -> tuple:
    """What makes rows one group: arm and tau; of other arms, a model without a seed stands alone, by its name."""
    arm, tau = row["arm"], row.get("tau")
    if arm == "teacher":
        return arm, 1.0 if tau is None else float(tau), None  # the teacher itself is its tau of 1
    alone = arm not in ORDER and row.get("seed") is None
    return arm, None if tau is None else float(tau), row["name"] if alone else None


def arm_name(row: dict) -> str:
    """The name of a student's arm: rows of config.taus have the kind "distilled", and their tau tells them apart."""
    return f"tau-{row['tau']:g}" if row["arm"] == "distilled" else row["arm"]


def is_student(group: Group) -> bool:
    """Whether these models learnt in this run; of arms by name, those have seeds."""
    by_name = group.arm not in (*ORDER, "p_star") and all(row.get("seed") is not None for row in group.rows)
    return group.arm in ("direct", "distilled") or by_name


def label(arm: str, tau: float | None, name: str | None = None) -> str:
    """How a group is named."""
    if arm == "p_star":
        return "p*"
    if arm == "distilled" and tau is not None:
        return f"tau = {tau:g}"
    return (name or arm) + ("" if tau is None else f", tau = {tau:g}")


def position(key: tuple) -> tuple:
    """Sorts group keys: p*, direct, distilled by tau, teacher by tau, then others by name."""
    arm, tau, name = key
    order = ("p_star", *ORDER)
    return (order.index(arm) if arm in order else len(order), arm, -math.inf if tau is None else tau, name or "")


def check(rows: list[dict], path: Any) -> None:
    """Raises ValueError, naming the row, for one that the page could only misread."""
    seen = set()
    for index, row in enumerate(rows, start=1):
        where = f"{path}, row {index}"
        row_kinds.check(row, where, KINDS)
        kind = row.get("kind")
        needed = {"evaluation": ("arm", "name"), "stage": ("name",), "training": ("arm", "name", "step")}
        needed["validation"] = needed["training"]
        missing = [key for key in needed.get(kind, ("kind",)) if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: no {missing[0]}; not a language-model run's row")
        if row.get("distill") is not None:
            _check_distill(row["distill"], f"{where}: distill")
        if kind == "evaluation":
            model = (row["name"], *group_key(row), row.get("seed"), row.get("sample_temperature", 1))
            if model in seen:
                raise ValueError(f"{where}: {row['name']} is evaluated twice at tau {row.get('tau')}")
            seen.add(model)


def _check_distill(how: Any, where: str) -> None:
    if not isinstance(how, dict):
        raise ValueError(f"{where} is {how!r:.40}, not how a student learns")
    row_kinds.check(how, where, DISTILL_KINDS)
    policy = how.get("policy", "sequence")
    if policy not in POLICIES:
        raise ValueError(f"{where}: policy is {policy!r:.40}, not one of {', '.join(POLICIES)}")
    missing = [name for name in POLICIES[policy] if how.get(name) is None]
    if missing:
        raise ValueError(f"{where}: no {missing[0]}, which {policy} has")
    if "data" in how and how["data"] not in DATA:
        raise ValueError(f"{where}: data is {how['data']!r:.40}, not one of {', '.join(DATA)}")
    if "loss_temperature" in how and how["loss_temperature"] is None:
        raise ValueError(f"{where}: loss_temperature is None, not a number")


def summarise(rows: list[dict]) -> list[Group]:
    """The groups, in the page's order, of all models that have been evaluated or have chosen a checkpoint."""
    evaluated: dict[tuple, list[dict]] = {}
    perplexities: dict[tuple, dict[str, float]] = {}
    for row in evaluations(rows):
        evaluated.setdefault(group_key(row), []).append(row)
    for row in of_kind(rows, "validation"):
        if row.get("chosen"):
            perplexities.setdefault(group_key(row), {})[row["name"]] = number(row.get("perplexity"))
    groups = []
    for key in sorted(evaluated.keys() | perplexities.keys(), key=position):
        members = evaluated.get(key, [])
        estimates = {name: _estimate(members, name) for name in METRICS}
        estimates["validation_perplexity"] = _of_values(list(perplexities.get(key, {}).values()))
        if key[0] == "teacher":
            estimates["teacher_entropy"] = _of_values([])  # it is its own, in the column beside it
        groups.append(Group(key[0], key[1], label(*key), members, estimates))
    return groups


def _of_values(values: list[float]) -> Estimate:
    """An infinite value counts and makes the mean infinite; so does NaN."""
    mean, error = mean_se(values)
    return Estimate(mean, error, len(values), sum(not math.isfinite(value) for value in values))


def _estimate(rows: list[dict], name: str) -> Estimate:
    having = [row for row in rows if row.get(name) is not None]
    found = _of_values([number(row[name]) for row in having])
    if len(having) == 1 and not found.bad:
        return found._replace(error=_over_sequences(having[0], name))
    return found


def _over_sequences(row: dict, name: str) -> float:
    """The standard error of one model's metric over its sequences; NaN where the row does not say."""
    spread, count = row.get("length_sd"), row.get("num_samples")
    if name == "length_mean" and row.get("length_mean_se") is None and spread is not None and count:
        return number(spread) / math.sqrt(count)
    return number(row.get(f"{name}_se"))


class Difference(NamedTuple):
    """first - second, in the mean over the seeds that both have; `error` is its standard error."""

    mean: float
    error: float
    count: int


def difference(first: Group, second: Group, name: str) -> Difference:
    """Of one metric, paired by seed.

    With one seed the error is over sequences, those of the two models taken as independent. For recall they are the
    same sequences, whose part in common cancels: the true error is then smaller.
    """
    by_seed = [{row.get("seed"): row for row in group.rows if row.get(name) is not None} for group in (first, second)]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in by_seed[0] if seed in by_seed[1]]
    values = [(number(a[name]), number(b[name])) for a, b in pairs]
    if not all(math.isfinite(value) for pair in values for value in pair):
        return Difference(math.nan, math.nan, len(pairs))
    mean, error = mean_se([a - b for a, b in values])
    if len(pairs) == 1:
        error = math.hypot(*(_over_sequences(row, name) for row in pairs[0]))
    return Difference(mean, error, len(pairs))


def verdict(found: Difference, sign: int) -> str:
    """Whether a difference has the sign expected of it, by two standard errors."""
    mean = sign * found.mean
    if math.isnan(mean) or math.isnan(found.error):
        return "untested"
    return "holds" if mean > 2 * found.error else "fails" if mean < -2 * found.error else "unclear"


def chance(count: int) -> float | None:
    """How often two standard errors are passed in one given direction where there is no difference (Student's t)."""
    return float(stdtr(count - 1, -2.0)) if count > 1 else None


def findings(groups: list[Group]) -> list[Finding]:
    """The four expectations: precision falls and recall rises with tau; the direct student is at the end of both."""
    return [
        _trend(groups, "precision", -1),
        _trend(groups, "recall", +1),
        _extreme(groups, "recall", +1),
        _extreme(groups, "precision", -1),
    ]


def headline(found: list[Finding]) -> str:
    """The outcome in one sentence; `found` as `findings` gives them."""
    trends, rest = [f.verdict for f in found[:2]], [f.verdict for f in found[2:]]
    if "untested" in trends:
        return "This run does not tell yet whether precision is traded for recall."
    if trends != ["holds", "holds"]:
        return "The expected trade of precision for recall does not show in this run."
    shows = "The trade of precision for recall shows: the lower tau, the higher the precision and the lower the recall"
    if rest == ["holds", "holds"]:
        return f"{shows}, and the direct student is at the far end of both."
    if "untested" in rest:
        return f"{shows}; the direct student cannot be compared yet."
    return f"{shows}. Not all that is expected of the direct student holds."


def _trend(groups: list[Group], name: str, sign: int) -> Finding:
    """Whether a metric rises (sign 1) or falls (-1) from the lowest tau to the highest."""
    expected = f"{name} {'rises' if sign > 0 else 'falls'} with tau"
    students = [g for g in groups if g.arm == "distilled" and g.tau is not None and g.estimates[name].count]
    if len(students) < 2:
        return Finding("untested", f"Whether {expected}: there are not two values of tau to compare.")
    low, high = min(students, key=lambda g: g.tau), max(students, key=lambda g: g.tau)
    found = difference(high, low, name)
    state = verdict(found, sign)
    span = f"from tau = {low.tau:g} to {high.tau:g}"
    if state == "untested":
        return Finding(state, f"Whether {expected}: {_why_not(found)} {span}.")
    if state == "unclear":
        return Finding(state, f"Expected was that {expected}; {span} it changes by {_amount(found)}: no clear change.")
    moves = f"{'rises' if found.mean > 0 else 'falls'} by {_amount(found, absolute=True)} {span}"
    if state == "holds":
        return Finding(state, f"{name.capitalize()} {moves}.")
    return Finding(state, f"Expected was that {expected}; it {moves}.")


def _extreme(groups: list[Group], name: str, sign: int) -> Finding:
    """Whether the direct student has the highest (sign 1) or lowest (-1) value of all; the closest rival decides."""
    most = "highest" if sign > 0 else "lowest"
    direct = [g for g in groups if g.arm == "direct" and g.estimates[name].count]
    rivals = [g for g in groups if g.arm == "distilled" and g.estimates[name].count]
    if not direct or not rivals:
        missing = "direct" if not direct else "distilled"
        text = f"Whether the direct student has the {most} {name}: no {missing} student has a value."
        return Finding("untested", text)
    # The worst verdict counts, and among equals the closest rival: one student beyond the direct one is enough.
    ranks = ("fails", "untested", "unclear", "holds")
    compared = [(difference(direct[0], rival, name), rival) for rival in rivals]
    found, rival = min(compared, key=lambda pair: (ranks.index(verdict(pair[0], sign)), sign * number(pair[0].mean)))
    state = verdict(found, sign)
    if state == "untested":
        text = f"Whether the direct student has the {most} {name}: {_why_not(found)} beside {rival.label}."
        return Finding(state, text)
    side = "above" if found.mean > 0 else "below"
    apart = f"{_amount(found, absolute=True)} {side} {rival.label}"
    if state == "holds":
        return Finding(state, f"The direct student has the {most} {name}, {apart}, the closest.")
    text = f"Expected was that the direct student has the {most} {name}; it is {apart}"
    return Finding(state, text + (": no clear difference." if state == "unclear" else "."))


def _amount(found: Difference, absolute: bool = False) -> str:
    mean = abs(found.mean) if absolute else found.mean
    seeds = f"{found.count} seeds" if found.count > 1 else "1 seed, error over sequences"
    return f"{show(mean, found.error)} nats per token ({seeds})"


def _why_not(found: Difference) -> str:
    if not found.count:
        return "no seed has both values"
    return "a value is not finite" if math.isnan(found.mean) else "there is no standard error"
