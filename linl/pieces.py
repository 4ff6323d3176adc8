"""Piecewise linear activations: their value, their range over an interval, and straight lines below and above.

One rule serves every such activation. Over [l, u] a line of any slope s, put through the extreme of f(x) − s·x
over l, u and the bends between them, lies below (above) f, because f(x) − s·x is piecewise linear as well. For a
ReLU the lines chosen here are CROWN's (Zhang et al., NeurIPS 2018, section 3.2): the chord above; below, the
identity or zero, whichever leaves the smaller area.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from linl.units import FixedPartial, FixedTwoSlope, LiNLU, PartialLinear

STATES = ("inactive", "active", "saturated")
"""A unit that never leaves its first, second, third piece."""


@dataclass(frozen=True)
class Pieces:
    """A piecewise linear function, the same for every unit of a channel.

    Attributes:
        bends: where the slope changes, ascending.
        values: the function there.
        slopes: of each piece, one more than bends; each () or (C, 1, …), broadcasting against one example.
    """

    bends: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The function at x (…, *shape)."""
        if self.clamp is not None:
            return x.clamp(*self.clamp)
        s = [slope.to(x) for slope in self.slopes]
        y = self.values[0] + s[0] * (x - self.bends[0]).clamp(max=0) + s[-1] * (x - self.bends[-1]).clamp(min=0)
        for a, b, slope in zip(self.bends, self.bends[1:], s[1:], strict=False):
            y = y + slope * (x.clamp(a, b) - a)
        return y

    @property
    def offset(self) -> float:
        """The largest |bend| and |value|: what the function's own sums are rounded by, besides their input."""
        return float(max(map(abs, (*self.bends, *self.values))))

    @cached_property
    def clamp(self) -> tuple[float, float | None] | None:
        """What a ReLU or ReLU6 clamps to; None of any other function."""
        plain = [slope.item() if slope.numel() == 1 else math.nan for slope in self.slopes]
        if self.bends != self.values or plain not in ([0.0, 1.0], [0.0, 1.0, 0.0]):
            return None
        return self.bends[0], self.bends[1] if len(self.bends) > 1 else None

    @cached_property
    def rises(self) -> bool:
        """Whether it never falls: then its values over an interval lie between those at its ends."""
        return all(bool((slope >= 0).all()) for slope in self.slopes)

    @cached_property
    def rounds(self) -> bool:
        """Whether its values are rounded; those of ReLU and ReLU6, slopes 0 and 1 from 0 on, aren't."""
        plain = all(bool(((slope == 0) | (slope == 1)).all()) for slope in self.slopes)
        return not (plain and self.bends[0] == self.values[0] == 0)

    def largest_slope(self, like: Tensor) -> Tensor:
        """The greatest |slope|, () or (C, 1, …)."""
        largest = self.slopes[0].abs()
        for slope in self.slopes[1:]:
            largest = torch.maximum(largest, slope.abs())
        return largest.to(like)

    def slope_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest slope, () or (C, 1, …)."""
        low = high = self.slopes[0]
        for slope in self.slopes[1:]:
            low, high = torch.minimum(low, slope), torch.maximum(high, slope)
        return low.to(like), high.to(like)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest value over [lower, upper], up to rounding."""
        if self.rises:
            return self(lower), self(upper)
        ends = torch.stack([self(p) for p in self._points(lower, upper)])
        return ends.amin(0), ends.amax(0)

    @property
    def edges(self) -> tuple[float, ...]:
        """Where the pieces begin and end, from −∞ to ∞."""
        return (-torch.inf, *self.bends, torch.inf)

    def bending(self, shape: torch.Size) -> Tensor:
        """Whether each unit's slope changes at each bend, (bends, *shape) bool: at p = 1 a LiNLU has none."""
        pairs = zip(self.slopes, self.slopes[1:], strict=False)
        return torch.stack([(a != b).expand(shape) for a, b in pairs])

    def straight(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of each unit's piece, by its number, (*shape); nan where that is below 0."""
        slope = torch.full(piece.shape, torch.nan, dtype=torch.float64)
        offset = slope.clone()
        for number, s in enumerate(self.slopes):
            at, s = max(0, number - 1), s.expand(piece.shape)
            slope = torch.where(piece == number, s, slope)
            offset = torch.where(piece == number, self.values[at] - s * self.bends[at], offset)
        return slope, offset

    def piece(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The number of the piece that [lower, upper] lies in, −1 where it reaches into two; int8."""
        found = torch.full(lower.shape, -1, dtype=torch.int8, device=lower.device)
        for number in reversed(range(len(self.slopes))):
            found.masked_fill_((lower >= self.edges[number]) & (upper <= self.edges[number + 1]), number)
        return found

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and intercept of a line below and of one above, on [lower, upper].

        The intercepts leave room for their own rounding, so the lines are sound for the floating-point numbers
        returned.
        """
        points = self._points(lower, upper)
        at = [self(p) for p in points]
        chord = _chord(lower, upper, at)
        middle = lower / 2 + upper / 2
        best: list[Tensor] = []
        for slope in (chord, *(s.to(lower).expand_as(lower) for s in self.slopes)):
            low, high = self._intercepts(slope, points, at)
            here = [slope, low, slope, high]
            if not best:
                best = here
                continue
            closer = slope * middle + low > best[0] * middle + best[1]
            best[:2] = [torch.where(closer, new, old) for new, old in zip(here[:2], best[:2], strict=True)]
            closer = slope * middle + high < best[2] * middle + best[3]
            best[2:] = [torch.where(closer, new, old) for new, old in zip(here[2:], best[2:], strict=True)]
        return tuple(best)

    def chord(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The slope of the line through both ends; 0 where they are one."""
        return _chord(lower, upper, [self(lower), self(upper)])

    def band(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The intercepts of the two lines of a given slope around the function on [lower, upper]; differentiable."""
        points = self._points(lower, upper)
        return self._intercepts(slope, points, [self(p) for p in points])

    def _points(self, lower: Tensor, upper: Tensor) -> list[Tensor]:
        inside = [torch.minimum(torch.maximum(lower.new_tensor(b), lower), upper) for b in self.bends]
        return [lower, *inside, upper]

    def _intercepts(self, slope: Tensor, points: list[Tensor], at: list[Tensor]) -> tuple[Tensor, Tensor]:
        eps = torch.finfo(slope.dtype).eps
        gaps = [y - slope * p for p, y in zip(points, at, strict=True)]
        low, high, slack = gaps[0], gaps[0], torch.zeros_like(slope)
        own = self.offset * (1 + self.largest_slope(slope)) if self.offset else 0.0  # of the values at the points
        for gap, p, y in zip(gaps, points, at, strict=True):
            low, high = torch.minimum(low, gap), torch.maximum(high, gap)
            slack = torch.maximum(slack, 4 * eps * (y.abs() + (slope * p).abs() + own))
        return low - slack, high + slack


def _chord(lower: Tensor, upper: Tensor, at: list[Tensor]) -> Tensor:
    wide = upper > lower
    return torch.where(wide, (at[-1] - at[0]) / torch.where(wide, upper - lower, 1), 0)


Slope = Callable[[object], Tensor]
"""Makes a slope of a number or a tensor, one for all or one a channel, that broadcasts against an example."""

RULES: dict[type[nn.Module], Callable[[nn.Module, Slope], Pieces | None]] = {}
"""What is known of each kind of activation; a later kind's rule comes before an earlier one's."""


def rule(*kinds: type[nn.Module]) -> Callable:
    """Registers a function that gives an activation of these kinds as pieces (None where it can't be):
    `made(module, slope)`, slopes made by `slope`."""

    def register(made: Callable[[nn.Module, Slope], Pieces | None]) -> Callable:
        for kind in kinds:
            RULES.pop(kind, None)  # a new rule for an old kind is the latest as well
            RULES[kind] = made
        return made

    return register


def pieces_of(module: nn.Module, dims: int) -> Pieces | None:
    """An activation as pieces; None where no rule knows its kind.

    Args:
        module: the activation, a unit of linl's or a fixed form of one.
        dims: spatial dimensions of what it gets, for slopes by channel.
    """

    def slope(value) -> Tensor:
        t = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        t = t.to("cpu", torch.float64)
        return t.reshape(-1, *[1] * dims) if t.numel() > 1 else t.reshape(())

    return _by_rule(module, slope)


def _by_rule(module: nn.Module, slope: Slope) -> Pieces | None:
    made = next((RULES[kind] for kind in reversed(RULES) if isinstance(module, kind)), None)
    return made(module, slope) if made else None


def _two(negative: Tensor, positive: Tensor) -> Pieces:
    return Pieces((0.0,), (0.0,), (negative, positive))


@rule(nn.ReLU)
def _relu(module: nn.ReLU, slope: Slope) -> Pieces:
    return _two(slope(0.0), slope(1.0))


@rule(nn.Hardtanh)
def _hardtanh(module: nn.Hardtanh, slope: Slope) -> Pieces:  # ReLU6 is one
    ends = (float(module.min_val), float(module.max_val))
    return Pieces(ends, ends, (slope(0.0), slope(1.0), slope(0.0)))


@rule(nn.LeakyReLU)
def _leaky(module: nn.LeakyReLU, slope: Slope) -> Pieces:
    return _two(slope(module.negative_slope), slope(1.0))


@rule(nn.PReLU)
def _prelu(module: nn.PReLU, slope: Slope) -> Pieces:
    return _two(slope(module.weight), slope(1.0))


@rule(LiNLU)
def _linlu(module: LiNLU, slope: Slope) -> Pieces:
    return _two(slope(2 * module.p.detach().double() - 1), slope(module.p))


@rule(FixedTwoSlope)
def _fixed(module: FixedTwoSlope, slope: Slope) -> Pieces:
    return _two(slope(module.negative), slope(module.positive))


@rule(PartialLinear, FixedPartial)
def _partial(module: PartialLinear | FixedPartial, slope: Slope) -> Pieces | None:
    inner, alpha = _by_rule(module.activation, slope), slope(module.alpha)
    if inner is None or any(bend != value for bend, value in zip(inner.bends, inner.values, strict=True)):
        return None  # the bends' values would differ by channel
    mixed = tuple(alpha + (1 - alpha) * s for s in inner.slopes)
    return Pieces(inner.bends, inner.values, mixed)
