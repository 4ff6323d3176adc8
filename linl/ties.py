"""Intervals that end at zero but for rounding, in exact arithmetic.

A unit that never fired in training keeps the bias it was made with, often 0. With weights of one sign and inputs from 0
on, its interval ends at 0 exactly: it is inactive, yet a bound with its rounding says 1e-14. All numbers of a network
are binary fractions, so Python's `Fraction` settles such ends.
"""

from __future__ import annotations

import math
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
    low, high = Fraction(0), Fraction(0)
    for w, a, b in zip(*(t[used].tolist() for t in (row, lower, upper)), strict=True):
        w, a, b = Fraction(w), Fraction(a), Fraction(b)
        low, high = (low + w * a, high + w * b) if w > 0 else (low + w * b, high + w * a)
    return low, high


def _rounded(value: Fraction, towards: float) -> float:
    """The nearest float on the side of `towards`."""
    near = float(value)
    wrong = Fraction(near) > value if towards < 0 else Fraction(near) < value
    return math.nextafter(near, towards) if wrong else near
