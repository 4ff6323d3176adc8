"""The one affine map that a network is around an input, and how far it reaches."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from linl.boxes import Box
from linl.checking import shown
from linl.program import Bend, Program
from linl.sweep import Sweep, piece_at, readable, straight

ROWS = 1 << 23
"""Numbers of a block of directions, 64 MiB."""
ROUNDING = 1e-12
"""Of a layer's largest number: what a value may be off by."""


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
        nearest: (activation, unit) of the nearest face in the sup norm; None if nothing ever bends.
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

    Inside its region every unit's input is affine in x, so the region is what half-spaces leave: the distance to a
    unit's face is |value − bend| over the dual norm of its gradient (‖·‖₁ for the sup norm), and the least of all
    units' is the radius. It is exact, save that rounding is taken off; at a face it is 0.

    Args:
        net: in eval mode; dense, convolutional, residual, with activations in pieces; no max-pool. A network of n
            inputs costs about n + 1 of its forward passes.
        x: one input (a leading 1 is allowed), or a box, whose middle is taken.

    Raises:
        ValueError: several boxes, several inputs, train mode, a max-pool; as `linl.reading.program`.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    if isinstance(x, Box):
        if len(x) != 1:
            raise ValueError(f"{len(x)} boxes: a piece is taken in one; take box[0]")
        point, reach = x.center[0], x.radius[0].flatten()
    else:
        point, reach = torch.as_tensor(x).detach().cpu().double(), None
        point = point[0] if point.ndim in (2, 4) and len(point) == 1 else point
    read = readable(net, point.shape)
    first = None if isinstance(net, Program) else next(net.parameters(), None)
    with torch.no_grad():
        return _Local(read, point, reach).piece(torch.float64 if first is None else first.dtype)


class _Local:
    """Gradients of all units at one point, a block of directions at a time."""

    def __init__(self, read: Program, point: Tensor, reach: Tensor | None) -> None:
        self.program, self.point, self.reach, self.sweep = read, point, reach, Sweep(read)
        self.pieces = {op.site: piece_at(op, value) for op, value in self._values()}
        sums = {op.site: torch.zeros(read.shapes[op.sources[0]].numel()).double() for op in read.bends}
        self.norms = {name: {site: t.clone() for site, t in sums.items()} for name in ("sup", "l2", "box")}

    def _values(self):
        values = self.program.run(self.point[None])
        self.output = values[self.program.output][0].flatten()
        self.inputs = {op.site: values[op.sources[0]][0] for op in self.program.bends}
        return [(op, self.inputs[op.site]) for op in self.program.bends]

    def piece(self, dtype: torch.dtype) -> Piece:
        """All directions, then the nearest face."""
        n, columns = self.point.numel(), []
        size = max(1, ROWS // max(shape.numel() for shape in self.program.shapes))
        for some in torch.arange(n).split(size):
            columns.append(self._directions(some))
        weight = torch.cat(columns).T
        linear = nn.Linear(n, len(weight), dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(self.output - weight @ self.point.flatten())
        radius, nearest = self._least("sup")
        share = None if self.reach is None else self._least("box")[0]
        return Piece(self.point, linear, radius, self._least("l2")[0], share, nearest)

    def _directions(self, some: Tensor) -> Tensor:
        """Derivatives of the output along some inputs, (n, outputs); the norms of all units' gradients grow."""
        rows = torch.zeros(1 + len(some), self.point.numel(), dtype=torch.float64)
        rows[torch.arange(1, len(rows)), some] = 1.0
        rows[0] = self.point.flatten()
        values = {0: rows.view(-1, *self.point.shape)}

        def bend(op: Bend, rows: Tensor) -> Tensor:
            slopes = rows[1:].flatten(1)
            self.norms["sup"][op.site] += slopes.abs().sum(0)
            self.norms["l2"][op.site] += slopes.square().sum(0)
            if self.reach is not None:
                self.norms["box"][op.site] += self.reach[some] @ slopes.abs()
            return straight(op, rows, self.pieces[op.site])

        for at in range(len(self.sweep.ops)):
            values = self.sweep.rows(at, values, bend)
        return values[self.program.output][1:].flatten(1)

    def _least(self, norm: str) -> tuple[float, tuple[str, int] | None]:
        """The least distance to a face, and whose it is."""
        best, whose = torch.inf, None
        for op in self.program.bends:
            value, size = self.inputs[op.site].flatten(), self.norms[norm][op.site]
            size = size.sqrt() if norm == "l2" else size
            real = op.pieces.bending(self.inputs[op.site].shape).flatten(1)
            rounding = ROUNDING * value.abs().amax()
            for bend, bending in zip(op.pieces.bends, real, strict=True):
                gap = ((value - bend).abs() - rounding).clamp(min=0) / (size * (1 + ROUNDING))
                gap = torch.where(bending & (size > 0), gap, torch.inf)
                unit = int(gap.argmin())
                if gap[unit] < best:
                    best, whose = float(gap[unit]), (op.name, unit)
        return best, whose
