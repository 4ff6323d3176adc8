"""Every linear region of a network in a plane, as a polygon.

The plane through three inputs meets each linear region in a convex polygon. Starting from one window, each layer's
units cut the polygons so far: inside one of them all values are affine in the plane's two coordinates, so that a
unit's bend is a straight line there, seen by the signs at the corners alone (linl.cutting). Corners are shared by
neighbours, hence the network is evaluated about once a region. Polygons go depth first in blocks, so memory doesn't
grow with their number. (Polygon subdivision layer by layer: Humayun et al., SplineCam, CVPR 2023, on GPUs.)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from linl.asking import given, seconds
from linl.checking import shown
from linl.cutting import Corners, Cutter
from linl.pieces import Pieces
from linl.program import Bend, MaxPool, Program, picks
from linl.sweep import Sweep, padded, piece_at, straight
from linl.winners import contested, entries, rivals, undecided

FLAT = 1e-9
"""Sine of the angle at the first of three inputs below which they count as lying on one line."""
BLOCK = 1 << 26
"""Numbers kept for the corners of one block of polygons, 512 MiB."""


@dataclass(repr=False)
class Slice:
    """The linear regions of a network in a plane.

    Attributes:
        corners: the three inputs, (3, *shape).
        axes: two directions of length 1 at right angles, (2, *shape); the first from the first input to the second.
        window: (left, right, bottom, top) in the plane's coordinates: distances (L2) from the first input.
        points: corners of the polygons, (V, 2).
        outputs: the network's output there, (V, outputs).
        cells: each polygon's corners by number, in order around it.
        complete: whether the whole window is covered; False when time was up before.
        seconds: spent.
    """

    corners: Tensor
    axes: Tensor
    window: tuple[float, float, float, float]
    points: Tensor
    outputs: Tensor
    cells: list[list[int]] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Regions in the window."""
        return len(self.cells)

    @property
    def marks(self) -> Tensor:
        """The three inputs in the plane's coordinates, (3, 2)."""
        return self.locate(self.corners)

    def locate(self, x: Tensor) -> Tensor:
        """Coordinates of inputs (N, *shape), projected into the plane; (N, 2)."""
        return (x.double() - self.corners[0]).flatten(1) @ self.axes.flatten(1).T

    def inputs(self, points: Tensor) -> Tensor:
        """Inputs at points (N, 2) of the plane; (N, *shape)."""
        flat = self.corners[0].flatten() + points.double() @ self.axes.flatten(1)
        return flat.view(-1, *self.corners.shape[1:])

    @property
    def areas(self) -> Tensor:
        """Of each region, (count,)."""
        return torch.tensor([_area(self.points[cell]) for cell in self.cells], dtype=torch.float64)

    @property
    def centers(self) -> Tensor:
        """The mean of each region's corners, inside of it; (count, 2)."""
        if not self.cells:
            return torch.zeros(0, 2, dtype=torch.float64)
        return torch.stack([self.points[cell].mean(0) for cell in self.cells])

    def maps(self) -> tuple[Tensor, Tensor]:
        """Each region's affine map from the plane's coordinates to the output.

        Returns: matrices (count, outputs, 2) and outputs at the centres (count, outputs): the network at a point p
        of region i is matrices[i] @ (p − centers[i]) + values[i].
        """
        matrices, values = [], []
        for cell, center in zip(self.cells, self.centers, strict=True):
            matrix, value = _fit(self.points[cell], self.outputs[cell], center)
            matrices.append(matrix)
            values.append(value)
        empty = torch.zeros(0, self.outputs.shape[1], dtype=torch.float64)
        return (torch.stack(matrices), torch.stack(values)) if matrices else (empty[..., None].expand(0, -1, 2), empty)

    @property
    def table(self) -> pd.DataFrame:
        """A row a region: area, corners, class at its centre."""
        values = self.maps()[1]
        return pd.DataFrame({
            "area": self.areas.numpy(), "corners": [len(cell) for cell in self.cells], "class": values.argmax(1).numpy()
        })  # fmt: skip

    def __repr__(self) -> str:
        left, right, bottom, top = self.window
        rest = "" if self.complete else ", and some are missing: time was up"
        return f"Slice of {right - left:.4g} × {top - bottom:.4g}: {self.count} regions{rest}; {self.seconds:.1f} s"

    def _repr_html_(self) -> str:
        left, right, bottom, top = self.window
        row = {"width": right - left, "height": top - bottom, "regions": self.count, "complete": self.complete}
        return shown(pd.DataFrame([{**row, "seconds": round(self.seconds, 2)}]))


def in_plane(
    net: nn.Module | Program,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    window: float | Sequence[float] | None = None,
    time_limit: float | None = None,
) -> Slice:
    """Every linear region in the plane through three inputs, exactly: convex polygons that tile a window.

    A region here is one of an activation pattern: neighbours differ in a unit's piece, or in which number of a
    max-pool's window is the largest, though the network may be the same affine map on both (when that unit's bend is
    cancelled, or never reaches the output). Numbers of a window that are equal all over don't cut it.

    Args:
        net: in eval mode; dense, convolutional, residual, with activations in pieces and max-pools.
        a, b, c: inputs, one example's shape each (a leading 1 is allowed).
        window: (left, right, bottom, top) in coordinates of the plane: a is (0, 0), b lies on the first axis, lengths
            are L2 distances of inputs. One number: a square of that side around the middle of the three. None: the
            smallest window around the three, and a tenth more on each side.
        time_limit: seconds; what is found by then is returned, with `complete` False.

    Raises:
        ValueError: inputs on one line, a window without area, a time limit not above 0; and as `linl.asking.given`.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    began = time.perf_counter()
    limit = seconds(time_limit)
    read, corners = given(net, a, b, c)
    axes = _axes(corners)
    made = Slice(corners, axes, (0.0, 0.0, 0.0, 0.0), torch.zeros(0, 2), torch.zeros(0, 0))
    made.window = _window(window, made.marks)
    with torch.no_grad():
        _Subdivision(read, made, began + limit).run()
    made.seconds = time.perf_counter() - began
    return made


def _axes(corners: Tensor) -> Tensor:
    """Gram and Schmidt, twice.

    Raises:
        ValueError: the three lie on one line.
    """
    u, v = (corners[1] - corners[0]).flatten(), (corners[2] - corners[0]).flatten()
    if not (u.norm() > 0 and v.norm() > 0):
        raise ValueError("two of the three inputs are the same point: a plane needs three that aren't on one line")
    first = u / u.norm()
    second = v - (v @ first) * first
    if not second.norm() > FLAT * v.norm():
        raise ValueError("the three inputs lie on one line: a plane needs three that don't")
    second = second - (second @ first) * first
    return torch.stack([first, second / second.norm()]).view(2, *corners.shape[1:])


def _window(window, marks: Tensor) -> tuple[float, float, float, float]:
    if window is None:
        low, high = marks.amin(0), marks.amax(0)
        room = 0.1 * (high - low)
        low, high = low - room, high + room
    else:
        try:
            ends = torch.as_tensor(window, dtype=torch.float64).cpu()
        except (TypeError, ValueError):
            ends = torch.zeros(0)
        if ends.shape not in ((), (4,)):
            raise ValueError(f"window = {window!r}: a number, or (left, right, bottom, top)")
        middle = marks.mean(0)
        low, high = (ends[::2], ends[1::2]) if ends.ndim else (middle - ends / 2, middle + ends / 2)
    found = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    if not (all(map(math.isfinite, found)) and found[0] < found[1] and found[2] < found[3]):
        raise ValueError(f"window = {window!r}: has no area; left must be below right, bottom below top")
    return found


@dataclass
class _Block:
    """Polygons on their way through the network.

    Attributes:
        at: number of the operation that comes next.
        cells: corners by number, of each.
        basis: at the corners (n, 3 + k): 1, the coordinates from the window's middle, the residues of k units.
        rows: values that are still needed, as sums of the basis: (3 + k, *shape).
    """

    at: int
    cells: list[list[int]]
    basis: Tensor
    rows: dict[int, Tensor]


class _Subdivision:
    """One slice under way."""

    def __init__(self, read: Program, made: Slice, end: float) -> None:
        self.sweep, self.made, self.end = Sweep(read), made, end

    def run(self) -> None:
        """All blocks, depth first."""
        left, right, bottom, top = self.made.window
        width, height = (right - left) / 2, (top - bottom) / 2
        self.middle = torch.tensor([left + width, bottom + height], dtype=torch.float64)
        signs = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
        basis = torch.cat([torch.ones(4, 1).double(), signs * torch.tensor([width, height], dtype=torch.float64)], 1)
        rows = {0: torch.cat([self.made.inputs(self.middle[None]), self.made.axes])}
        waiting = [_Block(0, [[0, 1, 2, 3]], basis, rows)]
        points, outputs, count = [], [], 0
        thin = 8 * torch.finfo(torch.float64).eps * max(width, height)  # no wider than its corners' rounding
        while waiting:
            block = self._through(waiting.pop(), waiting)
            if block is None:
                continue
            if time.perf_counter() > self.end:
                self.made.complete = False
                break
            wide = [cell for cell in block.cells if _height(block.basis[cell, 1:3]) > thin]
            self.made.cells += [[count + corner for corner in cell] for cell in wide]
            count += len(block.basis)
            points.append(block.basis[:, 1:3] + self.middle)
            rows = block.rows[self.sweep.program.output].flatten(1)
            outputs.append(block.basis[:, : len(rows)] @ rows)
        size = self.sweep.program.shapes[self.sweep.program.output].numel()
        self.made.points = torch.cat(points) if points else torch.zeros(0, 2).double()
        self.made.outputs = torch.cat(outputs) if outputs else torch.zeros(0, size).double()

    def _through(self, block: _Block, waiting: list[_Block]) -> _Block | None:
        """A block to the end; None if it was taken apart on the way, or time is up."""
        while block.at < len(self.sweep.ops):
            if time.perf_counter() > self.end:
                self.made.complete = False
                return None
            block.rows = self.sweep.rows(
                block.at, block.rows, lambda op, rows: self._bend(op, rows, block),
                lambda op, rows: self._pool(op, rows, block),
            )  # fmt: skip
            block.at += 1
            if block.basis.numel() > BLOCK and len(block.cells) > 1:
                half = len(block.cells) // 2
                waiting += [_part(block, block.cells[half:]), _part(block, block.cells[:half])]
                return None
        return block

    def _bend(self, op: Bend, rows: Tensor, block: _Block) -> Tensor:
        """Cuts the block's polygons by an activation's units; returns the rows of what the activation gives."""
        shape, rows = rows.shape[1:], padded(rows, block.basis.shape[1])
        flat, pieces = rows.flatten(1), op.pieces
        touch = self._touch(op, flat, block, pieces.bends)
        real = pieces.bending(shape).flatten(1)
        units = _reaching(pieces.bends, real, flat, block.basis, touch)
        values = block.basis @ flat[:, units]
        number, column = real[:, units].nonzero().T  # a line for each bend that a unit has
        height = torch.tensor(pieces.bends, dtype=torch.float64)[number]
        values = self._cut(block, values, column, height, touch)
        piece = piece_at(op, rows[0])
        slope, offset = (t.flatten()[units] for t in pieces.straight(piece))
        bent = Pieces(pieces.bends, pieces.values, tuple(s.expand(shape).flatten()[units] for s in pieces.slopes))
        same = piece_at(op, values) == piece.flatten()[units]
        residue = torch.where(same, 0.0, bent(values) - (slope * values + offset))
        kept = residue.abs().amax(0) > touch
        block.basis = torch.cat([block.basis, residue[:, kept]], 1)
        return torch.cat([straight(op, rows, piece), picks(units[kept], shape, rows)])

    def _touch(self, op: Bend | MaxPool, flat: Tensor, block: _Block, bends: tuple[float, ...] = ()) -> float:
        return self.sweep.touch(op, lambda: float((block.basis.abs().amax(0) @ flat.abs()).amax()), bends)

    def _pool(self, op: MaxPool, rows: Tensor, block: _Block) -> Tensor:
        """Cuts the block's polygons where a window's largest number changes; returns the rows of the largest ones."""
        shape, flat = self.sweep.program.shapes[op.target], padded(rows, block.basis.shape[1]).flatten(1)
        touch, index = self._touch(op, flat, block), entries(op, rows.shape[1:])
        place = flat[0][index].argmax(1, keepdim=True)
        home = index.gather(1, place)[:, 0]  # the largest in the middle of the slice
        made, units = flat[:, home].view(-1, *shape), []
        open_ = contested(index, home, flat, block.basis, touch)
        for some in open_.split(max(1, BLOCK // (4 * len(block.basis) * index.shape[1]))):
            if not len(some):
                break
            values = block.basis[:, : len(flat)] @ flat[:, index[some].flatten()]
            values = self._tile(block, values.view(-1, *index[some].shape), touch)
            residue = values.amax(2) - values.gather(2, place[some].expand(len(values), -1, 1))[..., 0]
            kept = residue.amax(0) > touch
            block.basis = torch.cat([block.basis, residue[:, kept]], 1)
            units.append(some[kept])
        return torch.cat([made, *(picks(some, shape, rows) for some in units)])

    def _tile(self, block: _Block, values: Tensor, touch: float) -> Tensor:
        """Cuts the polygons so that one number of each window, (corners, windows, size), is the largest in each part;
        the numbers at all corners, the new ones last."""
        numbers, points, cells = values.numpy(), block.basis[:, 1:3].numpy(), []
        size, corners = numbers.shape[2], Corners(len(points))
        best = numbers >= numbers.max(2, keepdims=True) - touch
        for cell, windows in zip(block.cells, undecided(best, block.cells), strict=True):
            lines, own, columns = [], [], []
            for window in windows.tolist():
                here = numbers[cell, window]
                rival = rivals(here, touch)
                at = np.zeros((len(rival), len(rival)), dtype=np.int64)
                for i, j in itertools.combinations(range(len(rival)), 2):
                    at[i, j] = len(lines)
                    lines.append(here[:, rival[i]] - here[:, rival[j]])
                    own.append((window * size + rival[i]) * size + rival[j])
                columns.append(at)
            if lines:
                cells += Cutter(cell, points[cell], np.stack(lines, 1), touch, own, corners).tile(columns)
            else:
                cells.append(cell)
        block.cells = cells
        return _grown(block, corners, values)

    def _cut(self, block: _Block, values: Tensor, column: Tensor, height: Tensor, touch: float) -> Tensor:
        """Cuts the polygons where value number `column` is `height`; the values at all corners, the new ones last."""
        above = (values[:, column] - height).numpy()
        sides = (above > touch).astype(np.int8) - (above < -touch).astype(np.int8)
        points, cells = block.basis[:, 1:3].numpy(), []
        corners = Corners(len(points))
        for cell, lines in zip(block.cells, _crossed(sides, block.cells), strict=True):
            if len(lines):
                cells += Cutter(cell, points[cell], above[np.ix_(cell, lines)], touch, lines, corners).cut()
            else:
                cells.append(cell)
        block.cells = cells
        values = _grown(block, corners, values)
        for corner, line in corners.on:  # on a bend exactly
            values[corner, column[line]] = height[line]
        return values


def _grown(block: _Block, corners: Corners, values: Tensor) -> Tensor:
    """Gives a block its new corners; values at the old ones, (n, …), with those at the new ones."""
    between = corners.matrix()
    block.basis = torch.cat([block.basis, torch.from_numpy(between @ block.basis.numpy())])
    block.basis[:, 0] = 1.0
    new = torch.from_numpy(between @ values.flatten(1).numpy())
    return torch.cat([values, new.view(len(new), *values.shape[1:])])


def _reaching(bends, real: Tensor, rows: Tensor, basis: Tensor, touch: float) -> Tensor:
    """Units that may come to a bend of theirs somewhere; flat positions."""
    low, high = basis.amin(0), basis.amax(0)
    middle = (low + high) / 2 @ rows
    reach = ((high - low) / 2 @ rows.abs()) * (1 + 1e-9) + 2 * touch
    near = [(middle - bend).abs() <= reach for bend in bends]
    return (torch.stack(near) & real).any(0).nonzero()[:, 0]


def _part(block: _Block, cells: list[list[int]]) -> _Block:
    """Some of a block's polygons as a block of their own, without the residues that are zero there."""
    used = np.unique(np.concatenate([np.asarray(cell) for cell in cells]))
    place = {int(corner): number for number, corner in enumerate(used)}
    basis = block.basis[torch.from_numpy(used)]
    kept = (basis != 0).any(0)
    kept[:3] = True
    rows = {key: value[kept[: len(value)]] for key, value in block.rows.items()}
    return _Block(block.at, [[place[corner] for corner in cell] for cell in cells], basis[:, kept], rows)


def _crossed(sides: np.ndarray, cells: list[list[int]]) -> list[np.ndarray]:
    """For each polygon, the columns with corners on both sides."""
    most = max(map(len, cells))
    padded = np.array([cell + [cell[-1]] * (most - len(cell)) for cell in cells])
    found = []
    step = max(1, (1 << 26) // max(1, sides.shape[1]))
    for some in np.split(padded, range(step, len(padded), step)):
        low, high = sides[some[:, 0]].copy(), sides[some[:, 0]].copy()
        for corner in some.T[1:]:
            np.minimum(low, sides[corner], out=low)
            np.maximum(high, sides[corner], out=high)
        cell, line = np.nonzero((low < 0) & (high > 0))
        found += np.split(line, np.searchsorted(cell, np.arange(1, len(some))))
    return found


def _height(points: Tensor) -> float:
    """How far a polygon's corners are from the line through the two that are far apart, at most."""
    away = points - points[0]
    side = away[away.square().sum(1).argmax()]
    return float((away[:, 0] * side[1] - away[:, 1] * side[0]).abs().max() / side.norm().clamp(min=1e-300))


def _area(points: Tensor) -> float:
    x, y = (points - points[0]).T
    return 0.5 * abs(float((x * y.roll(-1) - y * x.roll(-1)).sum()))


def _fit(points: Tensor, outputs: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map through three corners that are far apart: matrix (outputs, 2), value at the centre."""
    away = points - points[0]
    second = int(away.square().sum(1).argmax())
    side = away[second]
    third = int((away[:, 0] * side[1] - away[:, 1] * side[0]).abs().argmax())
    edges = torch.stack([side, away[third]])  # (2, 2)
    change = torch.stack([outputs[second] - outputs[0], outputs[third] - outputs[0]])
    matrix = torch.linalg.solve(edges, change).T
    return matrix, outputs[0] + matrix @ (center - points[0])
