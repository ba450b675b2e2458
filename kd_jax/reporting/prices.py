"""What a knob of selectivity pays in recall for its precision: curves in, prices and comparisons out.

A knob (tau, top-p, a divergence, ...) has a curve: precision and recall at each of its settings, for the same seeds as
every other knob. Gain is the rise in precision and loss the fall in recall, both from a reference student of the same
seeds. Curves are compared at equal gain, pair by pair of seeds; the price is loss / gain.

Every p-value comes from a t test over seeds, with Holm's correction for all the comparisons that were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from kd_jax.metrics.statistics import Interval, holm, t_interval

LEVEL = 0.05  # a difference counts where its adjusted p-value is below


class Curve(NamedTuple):
    """Precision and recall of students, nats: [setting, seed] in the knob's order, or [seed] for the reference."""

    precision: np.ndarray
    recall: np.ndarray


class Price(NamedTuple):
    """What a knob costs at one gain. An error is a standard error over seeds: NaN for fewer than two.

    Attributes:
        knob, gain: which; the gain in nats of precision.
        precision: the reference's mean precision + gain.
        loss: nats of recall lost there.
        price, price_error: loss / gain, and its standard error.
        extra, extra_error: price - that of the cheapest knob at this gain, paired by seed. 0 and 0 for the cheapest.
        p_value: of `extra`, adjusted for all pairs of knobs at all gains, since the cheapest was chosen from the data.
        between: the two settings (indices) it lies between.
        num_seeds: number of seeds.
    """

    knob: str
    gain: float
    precision: float
    loss: float
    price: float
    price_error: float
    extra: float
    extra_error: float
    p_value: float
    between: tuple[int, int]
    num_seeds: int


class Match(NamedTuple):
    """Recall of a way of making students minus that of the control, at equal precision.

    Attributes:
        way, gain: which; the gain in precision over the reference, nats.
        difference: its interval over seeds, nats; None where the control does not reach the gain.
        p_value: adjusted for all comparisons but the preregistered one, which is not adjusted.
    """

    way: str
    gain: float
    difference: Interval | None
    p_value: float


def prices(curves: Mapping[str, Curve], reference: Curve, gains: Sequence[float]) -> list[Price]:
    """The prices of all knobs at each gain, cheapest first; a knob that does not reach a gain is not among that gain's.

    Args:
        curves: name -> curve.
        reference: of shape [seed], finite.
        gains: nats, above 0.
    """
    losses = {}
    for gain in gains:
        reached = {knob: loss_from(curve, reference, gain) for knob, curve in curves.items()}
        losses[gain] = {knob: at for knob, at in reached.items() if at is not None}
    # All pairs are adjusted before the cheapest is looked for.
    adjusted = _adjusted_pairs(losses)
    listed = []
    for gain, at in losses.items():
        order = sorted(at, key=lambda knob: at[knob][0].mean())
        for knob in order:
            # Paired: seeds share p*, data and teacher, and most of their spread cancels.
            (loss, between), (cheapest, _) = at[knob], at[order[0]]
            price, extra = t_interval(loss / gain), t_interval((loss - cheapest) / gain)
            p_value = adjusted.get((gain, frozenset((knob, order[0]))), np.nan)
            listed.append(
                Price(
                    knob, float(gain), float(reference.precision.mean() + gain), float(loss.mean()), price.mean,
                    price.error, extra.mean, extra.error, p_value, between, len(loss),
                )
            )  # fmt: skip
    return listed


def _adjusted_pairs(losses: dict[float, dict]) -> dict[tuple, float]:
    """(gain, pair of knobs) -> p-value of their difference, adjusted for all pairs at all gains."""
    pairs = [(gain, frozenset(pair)) for gain, at in losses.items() for pair in combinations(at, 2)]
    p_values = []
    for gain, (one, other) in pairs:
        p_values.append(t_interval(losses[gain][one][0] - losses[gain][other][0]).p_value)
    return dict(zip(pairs, map(float, holm(p_values)), strict=True))


def matches(
    curves: Mapping[str, Curve], control: Curve, reference: Curve, gains: Sequence[float],
    preregistered: tuple[str, float] | None = None,
) -> list[Match]:  # fmt: skip
    """Each way's recall minus the control's at equal precision, at each gain that the way reaches.

    Args:
        curves: way -> curve.
        control: the curve that costs nothing to have, such as the direct student's over sampling temperatures.
        reference: precision and recall [seed] that gains are counted from.
        gains: nats of precision, above 0.
        preregistered: the way and gain that were named before the data were seen.
    """
    listed = []
    for way, curve in curves.items():
        for gain in gains:
            own, other = loss_from(curve, reference, gain), loss_from(control, reference, gain)
            if own is not None:
                # Losses: the control's minus the way's is the way's recall minus the control's.
                difference = None if other is None else t_interval(other[0] - own[0])
                listed.append(Match(way, float(gain), difference, np.nan if other is None else difference.p_value))
    # The preregistered comparison was not chosen from the data and pays for no other.
    others = [i for i, m in enumerate(listed) if m.difference is not None and (m.way, m.gain) != preregistered]
    for i, p_value in zip(others, holm([listed[i].p_value for i in others]), strict=True):
        listed[i] = listed[i]._replace(p_value=float(p_value))
    return listed


def standing(way: Sequence[Match]) -> str:
    """How a way's curve lies to the control's: "dominates", "is dominated", "crosses", or what is not known.

    Args: way: the matches of one way, at all gains.
    """
    compared = [m for m in way if m.difference is not None]
    if not compared:
        return "beyond the control's reach" if way else "reaches none of the gains"
    # a sign that could be chance does not count
    clear = [m.difference.mean > 0 for m in compared if m.p_value < LEVEL]
    if not clear:
        return "no clear difference"
    if len(set(clear)) > 1:
        return "crosses"
    if len(clear) == len(compared):
        return "dominates" if clear[0] else "is dominated"
    return f"{'more' if clear[0] else 'less'} recall at {len(clear)} of {len(compared)}, else no clear difference"


def loss_from(curve: Curve, reference: Curve, gain: float) -> tuple[np.ndarray, tuple[int, int]] | None:
    """`loss_at` with gains and losses counted from the reference.

    Args:
        curve: [setting, seed].
        reference: [seed].
        gain: nats of precision.
    Returns: as `loss_at`.
    """
    gains = np.asarray(curve.precision, np.float64) - reference.precision
    return loss_at(gains, reference.recall - np.asarray(curve.recall, np.float64), gain)


def loss_at(gains: np.ndarray, losses: np.ndarray, gain: float) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The recall lost at a gain in precision, for each seed; and the settings it lies between. None: not reached.

    The mean curve is interpolated linearly between neighbouring settings: an approximation of the settings between
    them, so that settings should be close, and nothing that is attained where the knob has none (top-k). For a random
    choice between two generators it is a lower bound of the recall: recall is concave in the share. Where the curve
    passes the gain more than once, the least loss counts.

    The mean of the values returned is the mean curve's loss. A seed's own value is its interpolated point, moved to the
    gain along the mean curve's slope, so that the values' standard error is that of the mean curve's loss (delta
    method) and differences of two curves are paired by seed.

    Args:
        gains, losses: [setting, seed], nats. Nothing is known between a setting with a value that is not finite and its
            neighbours.
        gain: nats.
    """
    known = np.isfinite(gains).all(1) & np.isfinite(losses).all(1)
    with np.errstate(invalid="ignore"):  # infinities of both signs make NaN
        x, y = gains.mean(1), losses.mean(1)
    best = None
    # Neighbours in the knob's own order, not in precision: a curve may turn back.
    for a, b in zip(range(len(x) - 1), range(1, len(x)), strict=True):
        if not (known[a] and known[b] and min(x[a], x[b]) <= gain <= max(x[a], x[b])):
            continue
        if x[a] == x[b]:  # both are at the gain: the cheaper one
            share, slope = float(y[b] < y[a]), 0.0
        else:
            share, slope = (gain - x[a]) / (x[b] - x[a]), (y[b] - y[a]) / (x[b] - x[a])
        seed_gain, seed_loss = ((1 - share) * values[a] + share * values[b] for values in (gains, losses))
        values = seed_loss + slope * (gain - seed_gain)
        if best is None or values.mean() < best[0].mean():
            best = values, (a, b)
    return best
