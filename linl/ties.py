"""Intervals that end at zero but for rounding, in exact arithmetic.

A unit that never fired in training keeps the bias it was made with, often 0. With weights of one sign and inputs from 0
on, its interval ends at 0 exactly: it is inactive, yet a bound with its rounding says 1e-14. All numbers of a network
are binary fractions, so Python's `Fraction` settles such ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from torch import Tensor

from linl.program import Conv, Dense
from linl.ranges import Range

WORK = 300_000
"""Products in exact arithmetic for one layer, about a second; ties beyond that keep their rounding."""


def settled(op: Dense | Conv, given: Range, made: Range, slack: Tensor) -> Range:
    """A layer's range with those ends anew that lie within their slack of zero.

    Args:
        op: the layer.
        given: the range of what it reads, (boxes, *inputs) in float64.
        made: its own, (boxes, *outputs), widened by
        slack: (boxes, *outputs).
    """
    near = ((made.lower < 0) & (made.lower >= -2 * slack)) | ((made.upper > 0) & (made.upper <= 2 * slack))
    if not near.any():
        return made
    places = near.flatten(1).nonzero()
    units = places[:, 1].unique()[: max(1, WORK // op.fan)]
    rows = dict(zip(units.tolist(), op.first(units, given.lower).flatten(1), strict=True))
    bias = None if op.bias is None else op.bias.broadcast_to(made.lower.shape[1:]).flatten()
    lower, upper = made.lower.flatten(1).clone(), made.upper.flatten(1).clone()
    for box, unit in places.tolist()[: max(1, WORK // op.fan)]:
        if unit in rows:
            start = Fraction(0 if bias is None else float(bias[unit]))
            low, high = _ends(rows[unit], given.lower[box].flatten(), given.upper[box].flatten())
            lower[box, unit] = _rounded(start + low, -math.inf)
            upper[box, unit] = _rounded(start + high, math.inf)
    return Range(lower.view(made.lower.shape), upper.view(made.upper.shape)) & made


def _ends(row: Tensor, lower: Tensor, upper: Tensor) -> tuple[Fraction, Fraction]:
    """The least and the greatest of row·x for lower ≤ x ≤ upper."""
    used = row.nonzero()[:, 0]
    rows = list(zip(*(t[used].tolist() for t in (row, lower, upper)), strict=True))
    return _sum((w, a if w > 0 else b) for w, a, b in rows), _sum((w, b if w > 0 else a) for w, a, b in rows)


def _sum(pairs: Iterable[tuple[float, float]]) -> Fraction:
    """Σ of the pairs' products: whole numbers over a power of two, as all its terms are. Ten times as fast as a sum of
    fractions, each of which is reduced."""
    terms = []
    for w, x in pairs:
        (top, bottom), (other_top, other_bottom) = w.as_integer_ratio(), x.as_integer_ratio()
        terms.append((top * other_top, bottom.bit_length() + other_bottom.bit_length() - 2))
    places = max((place for _, place in terms), default=0)
    return Fraction(sum(top << (places - place) for top, place in terms), 1 << places)


def _rounded(value: Fraction, towards: float) -> float:
    """The nearest float on the side of `towards`."""
    near = float(value)
    wrong = Fraction(near) > value if towards < 0 else Fraction(near) < value
    return math.nextafter(near, towards) if wrong else near
