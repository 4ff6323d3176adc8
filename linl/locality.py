"""The one affine map that a network is around an input, and how far it reaches.

Inside its region every unit's input is affine in x, so the region is what half-spaces leave: the distance to a unit's
face is |value − bend| over the dual norm of its gradient g (‖g‖₁ for the sup norm), and the least of all units' is the
radius. A max-pool's faces are where another number of a window comes up to the largest: g is the difference of two
gradients.

A network has many more faces than inputs, and few of them are near. So every face gets a bound on ‖g‖₂ from a few
directions, the same for all; then gradients are computed one by one, the face that may be nearest first, until no
other can be nearer than the nearest found.

**The bound.** For m directions ω with independent standard normal numbers, Σ(g·ω)²/‖g‖₂² is χ² with m degrees of
freedom, whatever g is, so ‖g‖₂ > 5·√(Σ(g·ω)²/m) has a probability of at most exp(−m/2·(ln 25 − 1 + 1/25)): 3e-24 for
m = 48, below 1e-16 for all the faces of a network with ten million. (Chernoff.) Up to
m inputs, each input is a direction, and ‖g‖₂ is what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from linl.asking import given, one, wide_or_own
from linl.boxes import Box
from linl.checking import shown
from linl.linearized import Linearized
from linl.program import Bend, MaxPool, Program

DIRECTIONS = 48
"""By which gradients are bounded."""
SAFE = 5.0
"""How many times the norm that the directions show a gradient may have."""
AT_ONCE = 32
"""Gradients that are computed together."""
ROWS = 1 << 23
"""Numbers of a block of directions or gradients, 64 MiB."""
ROUNDING = 1e-12
"""Of a layer's largest number: what a value, or a gradient, may be off by."""


@dataclass(repr=False)
class Piece:
    """An affine piece of a network.

    Attributes:
        point: the input it was taken at, (*shape).
        linear: the piece, from the flattened input to the flattened output; in the network's dtype.
        radius: every input nearer to the point than this at each position (sup norm) gets the piece's output.
        radius_l2: every input nearer than this in L2.
        share: where a box was given, how many times its half-sides the piece reaches; above 1 the network is `linear`
            on the whole box.
        nearest: (activation or max-pool, unit or window) of the nearest face in the sup norm; None if nothing bends.
    """

    point: Tensor
    linear: nn.Linear
    radius: float
    radius_l2: float
    share: float | None
    nearest: tuple[str, int] | None

    @property
    def table(self) -> pd.DataFrame:
        """One row: radius, radius_l2, share of the box, layer and unit of the nearest face."""
        layer, unit = self.nearest or ("", -1)
        row = {"radius": self.radius, "radius_l2": self.radius_l2, "share": self.share, "layer": layer, "unit": unit}
        return pd.DataFrame([row])

    def __repr__(self) -> str:
        where = "everywhere" if self.nearest is None else f"within {self.radius:.4g} (sup), {self.radius_l2:.4g} (L2)"
        return f"{self.linear} {where}"

    def _repr_html_(self) -> str:
        return shown(self.table)


def affine_at(net: nn.Module | Program, x: Tensor | Box) -> Piece:
    """The affine map that a network is at an input, as one layer, and the distance to where it ends.

    The radius is exact, save that rounding is taken off; at a face it is 0. A unit that is on its bend all around the
    input, and numbers of a max-pool's window that are equal all around it, are no faces.

    Args:
        net: in eval mode; dense, convolutional, residual, with activations in pieces and max-pools. It costs some
            hundreds of forward passes, whatever its size.
        x: one input (a leading 1 is allowed), or a box, whose middle is taken.

    Raises:
        ValueError: several boxes, several inputs, train mode; as `linl.asking.given`.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    reach = None
    if isinstance(x, Box):
        x, reach = one(x).center[0], x.radius[0].flatten()
    read, points = given(net, x)
    with torch.no_grad():
        return _Local(read, points[0], reach).piece(wide_or_own(net))


@dataclass
class _Faces:
    """The faces of one activation or max-pool.

    Attributes:
        op: whose they are.
        unit: its unit or window, (n,).
        above, below: flat positions in its input: the face is where their difference is what a bend says; below is
            None where the bend is a number.
        gap: how far the value is from there, rounding taken off, (n,).
        norm: ‖gradient‖₂ is at most that, (n,).
    """

    op: Bend | MaxPool
    unit: Tensor
    above: Tensor
    below: Tensor | None
    gap: Tensor
    norm: Tensor

    def of(self, slopes: Tensor) -> Tensor:
        """Derivatives of the values whose faces these are, from those of the inputs (m, inputs); (m, n)."""
        made = slopes[:, self.above]
        return made if self.below is None else made - slopes[:, self.below]

    def rows(self, some: Tensor, size: int) -> Tensor:
        """Rows over the flat input that give some of the values, (len(some), size)."""
        made = torch.zeros(len(some), size, dtype=torch.float64)
        at = torch.arange(len(some))
        made[at, self.above[some]] = 1.0
        if self.below is not None:
            made[at, self.below[some]] = -1.0
        return made


class _Local:
    """The faces around one point, and the nearest of them in each norm."""

    def __init__(self, read: Program, point: Tensor, reach: Tensor | None) -> None:
        self.program, self.point, self.reach = read, point, reach
        self.here = Linearized(read, point)
        self.faces = {op.target: self._faces(op) for op in read.ops if isinstance(op, Bend | MaxPool)}
        self.most = max(1, ROWS // max(shape.numel() for shape in read.shapes))  # rows at once
        norms = ["sup", "l2"] if reach is None else ["sup", "l2", "box"]
        self.best = dict.fromkeys(norms, math.inf)
        self.whose: dict[str, tuple[str, int] | None] = dict.fromkeys(norms)

    def _faces(self, op: Bend | MaxPool) -> _Faces:
        value = self.here.values[op.sources[0]].flatten()
        rounding = ROUNDING * value.abs().amax()
        if isinstance(op, Bend):
            real = op.pieces.bending(self.program.shapes[op.sources[0]]).flatten(1)
            number, unit = real.nonzero().T
            above, below = unit, None
            away = (value[unit] - torch.tensor(op.pieces.bends, dtype=torch.float64)[number]).abs()
        else:
            index, winner = self.here.entries[op.target], self.here.winner[op.target]
            unit, place = (index != winner[:, None]).nonzero().T
            above, below = winner[unit], index[unit, place]
            away = value[above] - value[below]
        return _Faces(op, unit, above, below, (away - rounding).clamp(min=0), torch.zeros(len(unit)).double())

    def piece(self, dtype: torch.dtype) -> Piece:
        """The map by one way back for each output, then the nearest faces."""
        n, output = self.point.numel(), self.program.output
        value = self.here.values[output].flatten()
        one_each = torch.eye(len(value), dtype=torch.float64)
        weight = torch.cat([self.here.back(output, some) for some in one_each.split(self.most)])
        linear = nn.Linear(n, len(weight), dtype=dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(value - weight @ self.point.flatten())
        self._bound()
        for norm in self.best:
            self._search(norm)
        best = self.best
        return Piece(self.point, linear, best["sup"], best["l2"], best.get("box"), self.whose["sup"])

    def _bound(self) -> None:
        """Bounds the norms of all faces' gradients by their derivatives along a few directions."""
        n, safe = self.point.numel(), 1 + 1e-9
        ways = torch.eye(n, dtype=torch.float64)
        if n > DIRECTIONS:
            ways = torch.randn(DIRECTIONS, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            safe *= SAFE / math.sqrt(DIRECTIONS)

        def seen(op, slopes: Tensor) -> None:
            faces = self.faces[op.target]
            faces.norm += faces.of(slopes).square().sum(0)

        for some in ways.split(self.most):
            self.here.forward(some.view(-1, *self.point.shape), seen)
        for faces in self.faces.values():
            faces.norm = safe * faces.norm.sqrt()

    def _search(self, norm: str) -> None:
        """The nearest face in a norm: those that may be nearest first, until no other can be."""
        n = self.point.numel()
        wide = {"sup": math.sqrt(n), "l2": 1.0, "box": 0.0 if self.reach is None else float(self.reach.norm())}[norm]
        least = [f.gap / (wide * f.norm) for f in self.faces.values()]  # Cauchy and Schwarz; nan where all is 0
        least = torch.cat([torch.zeros(0).double(), *least]).nan_to_num(torch.inf, torch.inf)
        ends = torch.tensor([0, *(len(f.unit) for f in self.faces.values())]).cumsum(0)
        order = least.argsort(stable=True)
        for some in order.split(min(AT_ONCE, self.most)):
            if not (len(some) and least[some[0]] < self.best[norm]):
                return
            for faces, first, last in zip(self.faces.values(), ends, ends[1:], strict=False):
                mine = some[(some >= first) & (some < last)] - first
                if len(mine):
                    self._measure(faces, mine)

    def _measure(self, faces: _Faces, some: Tensor) -> None:
        """The distances of some faces, in every norm."""
        source = faces.op.sources[0]
        slopes = self.here.back(source, faces.rows(some, self.program.shapes[source].numel())).abs()
        sizes = {"sup": slopes.sum(1), "l2": slopes.norm(dim=1)}
        if self.reach is not None:
            sizes["box"] = slopes @ self.reach
        gap = faces.gap[some]
        # on its face, and without a slope but for rounding: there all around
        level = (gap == 0) & (sizes["l2"] <= ROUNDING * faces.norm.amax())
        for norm, size in sizes.items():
            away = torch.where(level | (size == 0), torch.inf, gap / (size * (1 + ROUNDING)))
            nearest = int(away.argmin())
            if away[nearest] < self.best[norm]:
                self.best[norm] = float(away[nearest])
                self.whose[norm] = (faces.op.name, int(faces.unit[some[nearest]]))
