"""Intervals that end at zero but for rounding, in exact arithmetic.

A unit that never fired in training keeps the bias it was made with, often 0. With weights of one sign and inputs from 0
on, its interval ends at 0 exactly: it is inactive, yet a bound with its rounding says 1e-14. All numbers of a network
are binary fractions, so Python's `Fraction` settles such ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from linl.program import Conv, Dense
from linl.ranges import Range

WORK = 300_000
"""Products in exact arithmetic for one layer, about a second, half of them for lower ends; ties beyond that keep their
rounding."""

AT_ONCE = 1 << 22
"""Products that are looked at together: 32 MiB a tensor."""


def settled(op: Dense | Conv, given: Range, largest: Tensor, made: Range, unit: float) -> Range:
    """A layer's range with those ends anew that lie within twice their slack of zero, as far as `WORK` goes.

    They hold in exact arithmetic. What is evaluated in floats may be past them by its own rounding, unless nothing is
    added to the bias.

    Args:
        op: the layer.
        given, largest: the range of what it reads, (boxes, *inputs) in float64, and its magnitudes.
        made: its own, (boxes, *outputs), widened by its slack:
        unit: times the sum of magnitudes that an output is a sum of.
    """
    shape = made.lower.shape[1:]
    bias = made.lower.new_zeros(()) if op.bias is None else op.bias
    most = largest.flatten(1).amax(1).view(-1, *[1] * len(shape))
    most = 2 * unit * (bias.abs() + 1.01 * op.norms * most)  # no less than twice the slack, and cheap
    near = (made.lower < 0) & (made.lower >= -most), (made.upper > 0) & (made.upper <= most)
    if not (near[0].any() or near[1].any()):
        return made
    ends = made.lower.flatten(1).clone(), -made.upper.flatten(1)  # an upper end: the lower one of what is negated
    left = 0
    for sign, anew, where in zip((1, -1), ends, near, strict=True):
        left += WORK // 2
        shifts = sign * bias.broadcast_to(shape).flatten()
        places = where.flatten(1).nonzero()
        for some in places.split(max(1, AT_ONCE // op.fans[0])) if len(places) else ():
            left = _settle_(anew, some, op, given, sign, shifts, unit, left)
    return Range(ends[0].view(made.lower.shape), -ends[1].view(made.upper.shape)) & made


def _settle_(
    ends: Tensor, places: Tensor, op: Dense | Conv, given: Range, sign: int, bias: Tensor, unit: float, left: int
) -> int:
    """Lower ends of sign·layer at some places (box, unit) anew, in place. Returns how much work is left to be spent."""
    box, units = places.T
    at, weights = op.terms(units)
    weights = sign * weights
    low, high = (side.flatten(1)[box[:, None], at] for side in (given.lower, given.upper))
    slack = unit * ((weights.abs() * torch.maximum(low.abs(), high.abs())).sum(1) + bias[units].abs())
    x = torch.where(weights > 0, low, high)
    some = (weights != 0) & (x != 0)
    near = (ends[box, units] >= -2.01 * slack) & (slack < math.inf)
    plain = near & ~some.any(1)  # nothing is added to the bias
    ends[box[plain], units[plain]] = bias[units[plain]]
    for i in (near & ~plain).nonzero()[:, 0].tolist():
        if left <= 0:
            break
        terms = list(zip(weights[i, some[i]].tolist(), x[i, some[i]].tolist(), strict=True))
        ends[box[i], units[i]] = _rounded_down(Fraction(bias[units[i]].item()) + _sum(terms))
        left -= len(terms)
    return left


def _sum(pairs: Iterable[tuple[float, float]]) -> Fraction:
    """Σ of the pairs' products: whole numbers over a power of two, as all its terms are. Ten times as fast as a sum of
    fractions, each of which is reduced."""
    terms = []
    for w, x in pairs:
        (top, bottom), (other_top, other_bottom) = w.as_integer_ratio(), x.as_integer_ratio()
        terms.append((top * other_top, bottom.bit_length() + other_bottom.bit_length() - 2))
    places = max((place for _, place in terms), default=0)
    return Fraction(sum(top << (places - place) for top, place in terms), 1 << places)


def _rounded_down(value: Fraction) -> float:
    """The largest float that isn't above it."""
    near = float(value)
    return math.nextafter(near, -math.inf) if Fraction(near) > value else near
