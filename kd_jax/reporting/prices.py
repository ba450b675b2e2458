"""What a knob of selectivity pays in recall for its precision: curves in, prices out. Arrays and numbers only.

A knob (tau, top-p, a divergence, ...) has a curve: precision and recall at each of its settings, for the same seeds as
every other knob. All is counted from a reference student of the same seeds, such as the one of the unchanged teacher:
gain is the rise in precision, loss the fall in recall. Knobs are compared at equal gain; the price is loss / gain.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


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
        between: the two settings (indices) it lies between.
        num_seeds: how many seeds there are.
    """

    knob: str
    gain: float
    precision: float
    loss: float
    price: float
    price_error: float
    extra: float
    extra_error: float
    between: tuple[int, int]
    num_seeds: int


def prices(curves: Mapping[str, Curve], reference: Curve, gains: Sequence[float]) -> list[Price]:
    """The prices of all knobs at each gain, cheapest first; a knob that does not reach a gain is not among that gain's.

    Raises:
        ValueError: shapes that do not fit, a gain not above 0, or a reference that is not finite.
    """
    reference, curves = _checked(curves, reference)
    found = []
    for gain in gains:
        if not 0 < gain < np.inf:
            raise ValueError(f"a gain of {gain} nats is not above 0 and finite")
        losses = {}
        for knob, curve in curves.items():
            at = loss_at(curve.precision - reference.precision, reference.recall - curve.recall, gain)
            if at is not None:
                losses[knob] = at
        order = sorted(losses, key=lambda knob: losses[knob][0].mean())
        for knob in order:
            (loss, between), (cheapest, _) = losses[knob], losses[order[0]]
            price, extra = loss / gain, (loss - cheapest) / gain
            found.append(
                Price(
                    knob, float(gain), float(reference.precision.mean() + gain), float(loss.mean()),
                    *_mean_error(price), *_mean_error(extra), between, len(loss),
                )
            )  # fmt: skip
    return found


def loss_at(gains: np.ndarray, losses: np.ndarray, gain: float) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The recall lost at a gain in precision, for each seed; and the settings it lies between. None: not reached.

    The mean curve is interpolated linearly between settings that follow each other: a generator that takes one of the
    two students at random has that precision exactly, and at least that recall. Where the curve passes the gain more
    than once, the least loss counts. The mean of the values returned is the mean curve's loss; a seed's own value is
    its interpolated point, moved to the gain along the mean curve's slope. So their standard error is that of the mean
    curve's loss (delta method), and differences of two knobs' values are paired by seed.

    Args:
        gains, losses: [setting, seed], nats. A setting with a value that is not finite is left out.
        gain: nats.
    """
    settings = np.flatnonzero(np.isfinite(gains).all(1) & np.isfinite(losses).all(1))
    gains, losses = gains[settings], losses[settings]
    x, y = gains.mean(1), losses.mean(1)
    best = None
    for a, b in zip(range(len(x) - 1), range(1, len(x)), strict=True):
        if not min(x[a], x[b]) <= gain <= max(x[a], x[b]):
            continue
        if x[a] == x[b]:  # both are at the gain
            share, slope = float(y[b] < y[a]), 0.0
        else:
            share, slope = (gain - x[a]) / (x[b] - x[a]), (y[b] - y[a]) / (x[b] - x[a])
        own_gain, own_loss = ((1 - share) * values[a] + share * values[b] for values in (gains, losses))
        values = own_loss + slope * (gain - own_gain)
        if best is None or values.mean() < best[0].mean():
            best = values, (int(settings[a]), int(settings[b]))
    return best


def _checked(curves: Mapping[str, Curve], reference: Curve) -> tuple[Curve, dict[str, Curve]]:
    reference = Curve(*(np.asarray(values, np.float64) for values in reference))
    shape = reference.precision.shape
    if len(shape) != 1 or reference.recall.shape != shape or not shape[0]:
        raise ValueError(f"the reference needs precision and recall [seed], not {shape} and {reference.recall.shape}")
    if not all(np.isfinite(values).all() for values in reference):
        raise ValueError("the reference's precision and recall must be finite")
    checked = {}
    for knob, curve in curves.items():
        curve = Curve(*(np.asarray(values, np.float64) for values in curve))
        sizes = {values.shape for values in curve}
        if len(sizes) != 1 or curve.precision.ndim != 2 or curve.precision.shape[1:] != shape:
            raise ValueError(f"{knob}: precision and recall must be [setting, {shape[0]} seeds], not {sorted(sizes)}")
        checked[knob] = curve
    return reference, checked


def _mean_error(values: np.ndarray) -> tuple[float, float]:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)
