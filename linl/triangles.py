"""The least value of a unit where every open ReLU before it may be anywhere in its triangle: a linear program.

A ReLU h of an input a, known to lie between l and u, is over 0 and a and under the line through (l, 0) and (u, u); one
that is assumed in a piece is on it (Ehlers, ATVA 2017). The dual of that program has the form of CROWN's bound with
slopes and multipliers chosen (Salman et al., NeurIPS 2019), so that good ones, which gradient ascent only comes near
to, are read off the solver's answer. They are a hint and no proof: what is bounded with them, linl.crown computes. It
may be below the solver's least value, where that rests on the ends l and u, which a bound by straight lines forgets.
For dense layers with ReLUs between, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from linl.crown import Pass
from linl.milp import linear_program, run, solver_with
from linl.program import Bend, Dense, Op, Reshape

LARGEST = 2_000_000
"""Numbers of the layers' weights; for more, no program is made."""
TOLERANCE = 1e-7
"""Gaps below that, in sizes of a triangle, are the solver's own rounding."""
LEAST = 1e-3
"""The weight, in sizes of the largest, of a ReLU that has none: the same least value may be had elsewhere."""
FAR = 1e4
"""How far along a proof that a part is empty, in sizes of the last multipliers."""


@dataclass
class Solved:
    """What the solver found for one part of a domain.

    Attributes:
        least: the value there, by the solver's word; inf where the part is empty.
        point: the input (*shape) at which the relaxed network is least; None where the part is empty.
        gap: (units,) how far each open ReLU is above max(0, a) there, times the price of it: a cut at one without a gap
            leaves the least value as it is.
        share, pull: slopes below and multipliers, by activation's target, (*shape) float32, as in
            `linl.branching.Leaves`.
    """

    least: float
    point: Tensor | None
    gap: Tensor
    share: dict[int, Tensor]
    pull: dict[int, Tensor]


def relaxed(walk: Pass, value: int, unit: int, sign: float, largest: int = LARGEST) -> Triangles | None:
    """The program for sign·unit of a value; None where the network before it isn't of the kind, or is too large.

    Args:
        walk: with the ranges of every value before `value`; of one box.
        value, unit, sign: what is asked.
        largest: numbers of the layers' weights, at most.
    """
    path = [op for op in walk.program.upto(value) if not isinstance(op, Reshape)]
    dense, bends = path[::2], path[1::2]
    if not bends or len(dense) != len(bends) + 1 or not all(isinstance(op, Dense) for op in dense):
        return None
    if not all(isinstance(op, Bend) and op.pieces.clamp == (0.0, None) for op in bends):
        return None
    if sum(op.weight.numel() for op in dense) > largest:
        return None
    return Triangles(walk, dense, bends, unit, sign)


class Triangles:
    """The program, its columns x and then a and h of each layer; rows a − W·h' = b, h − a ≥ 0 and h under its line.

    What changes from part to part are bounds alone, so that the solver goes on from its last solution.
    """

    def __init__(self, walk: Pass, dense: list[Dense], bends: list[Op], unit: int, sign: float) -> None:
        self.walk, self.bends, self.inputs = walk, bends, walk.ranges[0].lower[0].numel()
        layers = [op.arrays for op in dense[:-1]]
        sizes = [len(bias) for _, bias in layers]
        self.firsts = self.inputs + 2 * np.cumsum([0, *sizes])  # of each layer's columns
        pairs = list(zip(self.firsts, sizes, strict=False))
        self.a = np.concatenate([first + np.arange(n) for first, n in pairs])
        self.h = np.concatenate([first + n + np.arange(n) for first, n in pairs])
        lower, upper = (
            np.concatenate([getattr(walk.ranges[op.sources[0]], end)[0].flatten().double().numpy() for op in bends])
            for end in ("lower", "upper")
        )
        self.open = (lower < 0) & (upper > 0)
        self.slope = np.where(self.open, upper / np.where(self.open, upper - lower, 1.0), 0.0)
        self.constant = -self.slope * lower  # h ≤ slope·a + constant
        self.assumed = np.where(self.open, -1, (lower >= 0).astype(int)).astype(np.int8)  # stable ones for good
        self.matrix = self._rows([weight for weight, _ in layers])
        self.cost = np.zeros(self.firsts[-1])
        self.cost[self.h[-sizes[-1] :]] = sign * dense[-1].weight[unit].double().numpy()
        self.bias = 0.0 if dense[-1].bias is None else sign * float(dense[-1].bias[unit])
        self.dual = np.zeros(3 * len(self.a))
        self.solver = solver_with(threads=1, presolve="off", solver="simplex")
        self.solver.passModel(self._program(np.concatenate([bias for _, bias in layers])))
        self.now = np.full(len(self.a), -2, dtype=np.int8)  # nothing is said yet
        self._assume(self.assumed)

    def _rows(self, weights: list[np.ndarray]):
        """a − W·h', then h − a, then h − slope·a, of all units; sparse."""
        from scipy.sparse import coo_matrix

        units = len(self.a)
        each, ones = np.arange(units), np.ones(units)
        found = [(each, self.a, ones), (units + each, self.h, ones), (units + each, self.a, -ones)]
        found += [(2 * units + each, self.h, ones), (2 * units + each, self.a, -self.slope)]
        row = read = 0  # the first of a layer's rows, and of the columns that it reads
        for weight, (first, following) in zip(weights, pairwise(self.firsts.tolist()), strict=True):
            at, by = np.nonzero(weight)
            found.append((row + at, read + by, -weight[at, by]))
            row, read = row + len(weight), (first + following) // 2
        rows, columns, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return coo_matrix((values, (rows, columns)), shape=(3 * units, self.firsts[-1])).tocsr()

    def _program(self, bias: np.ndarray):
        units, box = len(self.a), self.walk.ranges[0]
        free, rows = np.full(2 * units, np.inf), np.full(units, np.inf)
        ends = [end[0].flatten().double().numpy() for end in (box.lower, box.upper)]
        columns = np.concatenate([ends[0], -free]), np.concatenate([ends[1], free])
        sides = np.concatenate([bias, np.zeros(units), -rows]), np.concatenate([bias, rows, self.constant])
        return linear_program(self.cost, columns, self.matrix, sides)

    def _assume(self, pieces: np.ndarray) -> None:
        """Bounds of the units whose assumption has changed."""
        units, inf = len(self.a), np.inf
        for unit in np.flatnonzero(pieces != self.now):
            piece, a, h = pieces[unit], int(self.a[unit]), int(self.h[unit])
            sided = self.open[unit]  # of a stable unit the side needs no saying, and gets no multiplier
            self.solver.changeColBounds(a, 0.0 if piece == 1 and sided else -inf, 0.0 if piece == 0 and sided else inf)
            self.solver.changeColBounds(h, 0.0 if piece < 1 else -inf, 0.0 if piece == 0 else inf)
            over, under = units + int(unit), 2 * units + int(unit)
            self.solver.changeRowBounds(over, -inf if piece == 0 else 0.0, 0.0 if piece == 1 else inf)
            self.solver.changeRowBounds(under, -inf, float(self.constant[unit]) if piece < 0 else inf)
        self.now = pieces.copy()

    def solve(self, fixed: Tensor, seconds: float) -> Solved | None:
        """The least value where units are assumed in pieces; None where the solver has no answer in time.

        Args:
            fixed: (units,) int8 of all activations before, in order; −1 for none.
            seconds: at most.
        """
        import highspy

        pieces = fixed.numpy()
        self._assume(np.where(self.assumed >= 0, self.assumed, pieces))
        self.solver.setOptionValue("time_limit", self.solver.getRunTime() + seconds)  # of all its linear programs
        run(self.solver)
        status = self.solver.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            found = self.solver.getSolution()
            self.dual, at = np.array(found.row_dual), np.array(found.col_value)
            x = torch.from_numpy(at[: self.inputs]).view(self.walk.ranges[0].lower.shape[1:])
            least = self.solver.getInfo().objective_function_value + self.bias
            return Solved(least, x, self._gaps(at), *self._multipliers(self.dual))
        if status == highspy.HighsModelStatus.kInfeasible:
            _, known, ray = self.solver.getDualRay()
            if known and (size := np.abs(ray).max()) > 0:  # the bound grows without end along it
                far = FAR * max(1.0, np.abs(self.dual).max()) / size
                none = torch.zeros(len(self.a), dtype=torch.float64)
                return Solved(math.inf, None, none, *self._multipliers(self.dual + far * ray))
        return None

    def _gaps(self, at: np.ndarray) -> Tensor:
        gap = np.where(self.now < 0, at[self.h] - at[self.a].clip(min=0), 0.0)
        weight = np.abs(self.dual[2 * len(self.a) :])
        weight += LEAST * max(weight.max(), np.abs(self.cost).max())
        return torch.from_numpy(np.where(gap > TOLERANCE * self.constant, gap * weight, 0.0))

    def _multipliers(self, dual: np.ndarray) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        units = len(self.a)
        left = self.cost - self.matrix.T @ dual
        along, flat = dual[units : 2 * units].clip(min=0), left[self.h].clip(min=0)  # of h ≥ a, and of h ≥ 0
        total = along + flat
        share = np.where(total > 1e-12, along / np.where(total > 1e-12, total, 1.0), 0.5)
        side = np.where(self.now == 1, 1.0, -1.0)
        pull = np.where(self.open & (self.now >= 0), (side * left[self.a]).clip(min=0), 0.0)
        return self._by_target(share), self._by_target(pull)

    def _by_target(self, flat: np.ndarray) -> dict[int, Tensor]:
        found, start = {}, 0
        for op in self.bends:
            shape = self.walk.program.shapes[op.target]
            found[op.target] = torch.from_numpy(flat[start : start + shape.numel()]).float().view(shape)
            start += shape.numel()
        return found
