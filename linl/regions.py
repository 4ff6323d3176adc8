"""How many linear regions a network has on a box: every activation pattern with an interior, found and counted.

Depth first over the units, layer by layer: inside a cell all earlier units stay in one piece, so the next unit's bend
is a hyperplane; it cuts the cell in two, or a linear program (linl.cells) shows that it misses it. A region that was
found has a point at which interval arithmetic sees every unit strictly inside its piece; a branch that was cut off has
a proof that doesn't rest on the solver. What neither settles, a cell thinner than the arithmetic, is reported.

Both constraints are there for each unit, in its piece from below and from above: the published code for the count of
Kumar et al. (arXiv 1905.11428, section 5) lacks those of inactive units, which Cai et al. (CPAIOR 2023, 2301.07966)
have.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from linl.asking import one, readable, seconds, without_pools
from linl.bounds import bound
from linl.boxes import Box
from linl.cells import THIN, Cell, HalfSpace
from linl.checking import shown
from linl.contexts import Context, Domain
from linl.drawing import draw_slice
from linl.locality import affine_at
from linl.program import Bend, Program
from linl.rationals import exactly, nowhere_inside
from linl.segments import along
from linl.slices import in_plane
from linl.sweep import Sweep, straight
from linl.witnesses import Witnesses


@torch.no_grad()
def maps(net: nn.Module | Program, found: Regions) -> tuple[Tensor, Tensor, Tensor]:
    """Each region's affine map, and which regions share one.

    Regions with one map may lie apart; those that touch are one linear region by the definition through the function.
    So the number of linear regions in that sense lies between the number of maps and `found.lower`.

    Args:
        net: the network that was counted.
        found: what `count` gave.

    Returns: weights (found, outputs, inputs) and biases (found, outputs) for flattened inputs, and the number of each
        region's map (found,), equal for maps that agree to 1e-9 of the largest number.

    Raises:
        ValueError: regions of another network.
    """
    read = readable(net, found.box.shape)
    if read.fingerprint() != found.fingerprint:
        raise ValueError("the regions are of another network, or its weights have changed since: count anew")
    sweep, weights, biases = Sweep(read), [], []
    n = found.box.shape.numel()
    rows = torch.cat([torch.zeros(1, n), torch.eye(n)]).double().view(-1, *found.box.shape)
    for region in range(found.lower):
        values = {0: rows}
        for at in range(len(sweep.ops)):
            values = sweep.rows(at, values, lambda op, r, i=region: straight(op, r, _shaped(found, op, r, i)))
        made = values[read.output].flatten(1)
        weights.append(made[1:].T)
        biases.append(made[0])
    if not found.lower:
        outputs = read.shapes[read.output].numel()
        return torch.zeros(0, outputs, n).double(), torch.zeros(0, outputs).double(), torch.zeros(0, dtype=torch.long)
    weight, bias = torch.stack(weights), torch.stack(biases)
    numbers = torch.cat([weight, bias[..., None]], 2).flatten(1)
    near = torch.cdist(numbers, numbers, p=torch.inf) <= 1e-9 * numbers.abs().amax().clamp(min=1.0)
    first = near.int().argmax(1)  # the first region with the same map
    return weight, bias, first.unique(return_inverse=True)[1]


def _shaped(found: Regions, op: Bend, rows: Tensor, region: int) -> Tensor:
    return found.patterns[op.site][region].view(rows.shape[1:])


MAGNIFIED = (1e6, 1e9)
"""How many times a cell is magnified that the solver found too thin to tell."""
BATCH = 512
"""Regions whose points are looked at together."""


@dataclass
class _Node:
    """A cell on its way down: an activation's context, how many of its cuts are settled, and how.

    Attributes:
        context: of the activation.
        next: number of the cut that comes next.
        piece: of each unit of this activation so far.
        spaces: the half-spaces that cut out the cell.
        point: inside of all of them by more than `THIN`.
    """

    context: Context
    next: int
    piece: np.ndarray
    spaces: list[HalfSpace]
    point: np.ndarray


@dataclass(repr=False)
class Regions:
    """The activation patterns of a network whose regions in a box have an interior.

    Attributes:
        names: of the activations, in the order of the forward pass.
        box: the domain.
        patterns: for each activation, the piece of each unit in each region found, (found, units) int8.
        points: one inside each, (found, *shape): every unit is strictly inside its piece there, in interval
            arithmetic.
        sizes: half-side of the largest cube that fits into each, as a share of the box's half-sides, (found,).
        thin: cells that were left: too thin to tell whether they have an interior. (Words, most regions in it.)
        open: most regions in what was not searched yet.
        waiting: what was not searched yet.
        ceiling: the least upper bound so far.
        seconds: spent, over all calls.
        fingerprint: of the network.
    """

    names: list[str]
    box: Box
    patterns: list[Tensor]
    points: Tensor
    sizes: Tensor
    thin: list[tuple[str, int]] = field(default_factory=list)
    open: int = 0
    ceiling: float = math.inf
    seconds: float = 0.0
    fingerprint: str = ""
    waiting: list[_Node] = field(default_factory=list, repr=False)

    @property
    def lower(self) -> int:
        """Regions found, each with its point: there are no fewer."""
        return len(self.points)

    @property
    def upper(self) -> int:
        """There are no more."""
        return int(min(self.ceiling, self.lower + self.open + sum(most for _, most in self.thin)))

    @property
    def count(self) -> int | None:
        """Regions there are; None while the bounds differ."""
        return self.lower if self.lower == self.upper else None

    @property
    def table(self) -> pd.DataFrame:
        """One row: lower, upper, count, thin, complete, seconds."""
        row = {"lower": self.lower, "upper": self.upper, "count": self.count, "thin": len(self.thin)}
        return pd.DataFrame([{**row, "complete": not self.waiting, "seconds": round(self.seconds, 2)}])

    def __repr__(self) -> str:
        if self.count is not None:
            return f"{self.count} linear regions on {self.box}; {self.seconds:.1f} s"
        why = f"{len(self.thin)} cells too thin to tell" if self.thin and not self.waiting else "time was up"
        return f"{self.lower} to {Decimal(self.upper):.4g} linear regions on {self.box} ({why}); {self.seconds:.1f} s"

    def _repr_html_(self) -> str:
        return shown(self.table)


def count(net: nn.Module | Program, box: Box, time_limit: float | None = None, state: Regions | None = None) -> Regions:
    """Every linear region of a network on a box, exactly.

    What is counted: activation patterns, a piece for each unit of each activation, for which the inputs in the box
    where every unit is in that piece have an interior. Such a region is convex, and the network is affine on it. Two
    conventions. A bend where the slope doesn't change (LiNLU at p = 1, PartialLinear at α = 1) is none. A unit that
    lies on its bend on a whole region (a dead layer before it and no bias) doesn't cut it. Different patterns may
    still have one affine map, when a unit's bend is cancelled or never reaches the output: neighbours of that sort
    are one *linear* region by the definition through the function. `linl.regions.maps` tells how many maps there are.

    Args:
        net: in eval mode; dense, convolutional, residual, with activations in pieces; no max-pool. In practice some
            tens of units, on a handful of inputs or with few of them unstable.
        box: one `Box`; positions of no width are constants, and an interior is one within the others.
        time_limit: seconds of searching; None for no limit. What is found by then is a sound lower and upper bound.
        state: an earlier answer for this network and box, to go on from; left alone.

    Returns: `Regions`; `.count` is None as long as `.lower` and `.upper` differ.

    Raises:
        ValueError: train mode, several boxes, a box without any width or of another shape, a time limit not above 0,
            a max-pool, a state of another network or box.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    began = time.perf_counter()
    if not (one(box).upper > box.lower).any():
        raise ValueError("the box is a single point: nothing in it has an interior")
    limit = seconds(time_limit)
    read = without_pools(net, box.shape)
    with torch.no_grad():
        return _Search(read, box, state).run(began, limit)


class _Search:
    """One count under way."""

    def __init__(self, read: Program, box: Box, state: Regions | None) -> None:
        self.program, self.box, self.domain = read, box, Domain(read, box)
        self.cell = Cell(len(self.domain.free))
        self.witnesses = Witnesses(read, box)
        self.ranks = [_ranks(op.pieces.bending(read.shapes[op.sources[0]]).flatten(1)) for op in read.bends]
        counts = [read.shapes[op.sources[0]].numel() for op in read.bends]
        mark = read.fingerprint()
        if state is None:
            self.made = Regions(
                [op.name for op in read.bends], box, [torch.zeros(0, n, dtype=torch.int8) for n in counts],
                torch.zeros(0, *box.shape, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), fingerprint=mark,
            )  # fmt: skip
            self.waiting = self._first()
        else:
            if state.fingerprint != mark:
                raise ValueError("the state is of another network, or its weights have changed since: count anew")
            if not (torch.equal(state.box.lower, box.lower) and torch.equal(state.box.upper, box.upper)):
                raise ValueError("the state given is of another box: leave it out")
            self.made = Regions(
                state.names, box, list(state.patterns), state.points, state.sizes, list(state.thin),
                ceiling=state.ceiling, seconds=state.seconds, fingerprint=mark,
            )  # fmt: skip
            self.waiting = [replace(node, piece=node.piece.copy()) for node in state.waiting]  # a search changes them
        self.most = self._most_by_layer()
        self.found: list[tuple[list[np.ndarray], list[np.ndarray], np.ndarray, float]] = []

    def _first(self) -> list[_Node]:
        context = self.domain.start()
        middle = np.zeros(len(self.domain.free))
        if context is None:  # no activation: one region
            self.made.points = self.domain.inputs(middle[None])
            self.made.sizes = torch.ones(1, dtype=torch.float64)
            return []
        return [_Node(context, 0, context.piece.copy(), [], middle)]

    def _most_by_layer(self) -> list[int]:
        """For each activation, the most cells that its units can make of one, within the box."""
        known = bound(self.program, self.box)
        chain = all(len(op.sources) == 1 for op in self.program.ops)
        found, width = [], len(self.domain.free)
        for op, range_ in zip(self.program.bends, known.inputs, strict=True):
            real = op.pieces.bending(range_.lower.shape[1:])
            bends = torch.tensor(op.pieces.bends, dtype=torch.float64).view(-1, *[1] * (real.ndim - 1))
            crossed = int((real & (range_.lower[0] < bends) & (range_.upper[0] > bends)).sum())
            if chain:  # all that is behind depends on no more numbers than a layer has
                width = min(width, self._narrowest(op.sources[0]))
            found.append(_cells(crossed, width))
        return found

    def _narrowest(self, value: int) -> int:
        behind = [self.program.shapes[op.target].numel() for op in self.program.upto(value)]
        return min(behind, default=len(self.domain.free))

    def _most(self, node: _Node) -> int:
        """The most regions in a node's cell."""
        left = len(node.context.cuts) - node.next
        return _cells(left, len(self.domain.free)) * math.prod(self.most[node.context.site + 1 :])

    # --- the search ------------------------------------------------------------------------------

    def run(self, began: float, limit: float) -> Regions:
        """Until all is searched or time is up."""
        end = time.perf_counter() + limit  # from here: reading a large network must not use it all up
        while self.waiting and time.perf_counter() < end:
            self._down(self.waiting.pop(), end)
            if len(self.found) >= BATCH:
                self._look()
        self._look()
        self.made.waiting = self.waiting
        self.made.open = sum(self._most(node) for node in self.waiting)
        self.made.ceiling = self.made.upper
        self.made.seconds += time.perf_counter() - began
        return self.made

    def _down(self, node: _Node, end: float) -> None:
        """Follows the side that a node's point is on down to a region; the other sides wait."""
        while True:
            while node.next < len(node.context.cuts):
                if time.perf_counter() > end:
                    self.waiting.append(node)
                    return
                if not self._settle(node):
                    return
            after = self.domain.after(node.context, node.piece)
            if after is None:
                self._take(node)
                return
            node = _Node(after, 0, after.piece.copy(), node.spaces, node.point)

    def _settle(self, node: _Node) -> bool:
        """The node's next cut: goes on on one side; where there is another, that waits.

        False where neither side can be told to have an interior: both are among the thin ones then.
        """
        unit, number, above = node.context.cuts[node.next]
        node.next += 1
        if node.piece[unit] < number:
            return True  # below a lower bend already
        below = HalfSpace(-above.row, -above.constant, above.error, (*above.key[:3], -1))
        here = float(above.row @ node.point + above.constant)
        near, far = (above, below) if here > 0 else (below, above)
        known = len(self.made.thin)
        beyond = self._inside(node, far)
        within = node.point if abs(here) > THIN + near.error else self._inside(node, near)
        if within is None:
            near, far, within, beyond = far, near, beyond, None
        if within is None:
            if len(self.made.thin) == known:
                raise RuntimeError("a cell with an interior has none on either side of a cut: please report this net")
            return False
        if beyond is not None:
            piece = node.piece.copy()
            piece[unit] = number + (far is above)
            self.waiting.append(_Node(node.context, node.next, piece, [*node.spaces, far], beyond))
            node.spaces = [*node.spaces, near]
        node.piece[unit] = number + (near is above)
        node.point = within
        return True

    def _inside(self, node: _Node, space: HalfSpace) -> np.ndarray | None:
        """A point of the node's cell beyond a cut, by more than THIN from all faces; None if the part has no interior,
        or none that can be told."""
        spaces = [*node.spaces, space]
        self.cell.become(spaces)
        answer = self.cell.largest()
        if answer is not None:
            size, point, weights = answer
            if size > THIN + max(s.error for s in spaces):
                return point
            if self.cell.empty(weights) or self._exactly_empty(node, spaces, weights):
                return None
            if (inside := self._exactly_inside(node, spaces, point)) is not None:
                return inside
        site, unit, number, sign = space.key
        side = "above" if sign > 0 else "below"
        what = f"{self.made.names[site]} {unit} {side} bend {number}"
        self.made.thin.append((what, self._most(node)))
        return None

    def _exactly_empty(self, node: _Node, spaces: list[HalfSpace], weights: np.ndarray) -> bool:
        """The same proof in exact arithmetic: for faces that coincide, or all go through one point."""
        rows, constants, scaled = [], [], []
        for i in (weights > 0).nonzero()[0]:
            row, constant = self._exact(node, spaces[i])
            rows.append(row)
            constants.append(constant)
            scaled.append(weights[i] / float(np.abs(row.astype(float)) @ self.domain.radius.numpy()))
        if not rows:
            return False
        return nowhere_inside(np.array(rows), np.array(constants), self.domain.ends, np.array(scaled))

    def _exactly_inside(self, node: _Node, spaces: list[HalfSpace], point: np.ndarray) -> np.ndarray | None:
        """A point near the given one that is strictly inside in exact arithmetic: real cells that are thinner than
        floats can tell, as a weight of 1e-8 beside one of 0.1 makes them."""
        center, radius = (exactly(t.numpy()) for t in (self.domain.center[self.domain.free], self.domain.radius))
        faces = [self._exact(node, space) for space in spaces]
        sizes = [float(np.abs(row).dot(radius)) for row, _ in faces]

        def gaps(at: np.ndarray) -> list[Fraction]:
            x = center + exactly(at) * radius
            return [row.dot(x) + constant for row, constant in faces]

        found = gaps(point)
        for by in (1.0, *MAGNIFIED):
            if by > 1:
                known = np.array([float(gap) / size for gap, size in zip(found, sizes, strict=True)])
                at = self.cell.magnified(point, known, by)
            else:
                at = point
            if at is not None and (np.abs(at) < 1).all() and all(gap > 0 for gap in gaps(at)):
                return at
        return None

    def _exact(self, node: _Node, space: HalfSpace) -> tuple[np.ndarray, Fraction]:
        """A half-space of a node's cell as row·x + constant ≥ 0 over the free positions, in Fractions."""
        site, unit, number, sign = space.key
        column = self.domain.exact(node.context.pattern[:site])[:, unit]
        bend = Fraction(self.program.bends[site].pieces.bends[number])
        return sign * column[1:], sign * (column[0] - bend)

    # --- regions ---------------------------------------------------------------------------------

    def _take(self, node: _Node) -> None:
        """A region: its middle is kept."""
        self.cell.become(node.spaces)
        answer = self.cell.largest()
        size, point = answer[:2] if answer is not None and answer[0] > 0 else (THIN, node.point)
        pattern = [*node.context.pattern, node.piece]
        self.found.append((pattern, self._levels(node), point, size))

    def _levels(self, node: _Node) -> list[np.ndarray]:
        levels, context = [node.context.level], node.context
        while (context := context.before) is not None:
            levels.append(context.level)
        return levels[::-1]

    def _look(self) -> None:
        """Regions found since the last look are believed if intervals see each unit in its piece at the point."""
        if not self.found:
            return
        points = self.domain.inputs(np.stack([point for _, _, point, _ in self.found]))
        seen = self.witnesses.pieces_at(points)
        right = np.ones(len(points), dtype=bool)
        patterns = [np.stack(parts) for parts in zip(*(pattern for pattern, _, _, _ in self.found), strict=True)]
        levels = [np.stack(parts) for parts in zip(*(level for _, level, _, _ in self.found), strict=True)]
        for site, (pattern, level) in enumerate(zip(patterns, levels, strict=True)):
            rank, units = self.ranks[site], np.arange(pattern.shape[1])
            here = seen[site].numpy()
            idle = level | (rank[-1] == 0)[None]  # on its bend all over the region, or without one
            right &= (((here >= 0) & (rank[here, units] == rank[pattern, units])) | idle).all(1)
        kept = torch.from_numpy(right)
        for site, pattern in enumerate(patterns):
            self.made.patterns[site] = torch.cat([self.made.patterns[site], torch.from_numpy(pattern)[kept]])
        sizes = torch.tensor([size for *_, size in self.found], dtype=torch.float64)
        self.made.points = torch.cat([self.made.points, points[kept]])
        self.made.sizes = torch.cat([self.made.sizes, sizes[kept]])
        self.made.thin += [("a region whose point intervals can't confirm", 1)] * int((~kept).sum())
        self.found = []


def _ranks(real: Tensor) -> np.ndarray:
    """For each piece and unit, how many bends there are below it, (pieces, units): pieces of one rank are one."""
    return torch.cat([torch.zeros_like(real[:1], dtype=torch.int8), real.to(torch.int8).cumsum(0)]).numpy()


def _cells(cuts: int, dimensions: int) -> int:
    """The most cells that hyperplanes make of a convex set (Zaslavsky 1975): Σ C(cuts, j), j ≤ dimensions."""
    return sum(math.comb(cuts, j) for j in range(min(cuts, dimensions) + 1))


__all__ = ["Regions", "affine_at", "along", "count", "draw_slice", "in_plane", "maps"]
