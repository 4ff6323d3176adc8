"""The least value of a unit where every open ReLU before it may be anywhere in its triangle: a linear program.

A ReLU's input a, known to lie between l and u, is h − g, what is above 0 and what is below, and there is no more of
both than h/u + g/−l ≤ 1 (the triangle of Ehlers, ATVA 2017); one that is assumed in a piece has no g, or no h. The
dual of that program has the form of CROWN's bound with slopes and multipliers chosen (Salman et al., NeurIPS 2019), so
that good ones, which gradient ascent only comes near to, are read off the solver's answer. They are a hint and no
proof: what is bounded with them, linl.crown computes.
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
"""What is below that of both h and g, in shares of their ends, is the solver's own rounding."""
MANY = 2**31 - 1
FAR = 1e4
"""How far along a proof that a part is empty, in sizes of the last multipliers."""


@dataclass
class Solved:
    """What the solver found for one part of a domain.

    Attributes:
        least: the value there, by the solver's word; inf where the part is empty.
        point: the input (*shape) at which the relaxed network is least; None where the part is empty.
        apart: (2, units) h and g of each open ReLU there, in shares of their ends, 0 where it is no ReLU's way to have
            both: a cut at a unit with neither leaves the least value as it is.
        weight: (units,) how high each open ReLU's triangle is, times the price of its output.
        share, pull: slopes below and multipliers, by activation's target, (*shape) float32, as in
            `linl.branching.Leaves`.
    """

    least: float
    point: Tensor | None
    apart: np.ndarray
    weight: np.ndarray
    share: dict[int, Tensor]
    pull: dict[int, Tensor]


def relaxed(walk: Pass, value: int, largest: int = LARGEST) -> Triangles | None:
    """The program for a value's units; None where the network before it isn't of the kind, or is too large.

    Args:
        walk: with the ranges of every value before `value`; of one box.
        value: its number.
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
    return Triangles(walk, dense, bends)


class Triangles:
    """The program: columns x and then h and g of each layer, rows h − g − W·h' = b and then those of the triangles.

    All in shares of what they may be at most. What changes from part to part are ends of columns alone, and prices from
    one unit to another, so that the solver goes on from its last solution.
    """

    def __init__(self, walk: Pass, dense: list[Dense], bends: list[Op]) -> None:
        self.walk, self.bends, self.inputs = walk, bends, walk.ranges[0].lower[0].numel()
        layers = [op.arrays for op in dense[:-1]]
        self.weights, sizes = [weight for weight, _ in layers], [len(bias) for _, bias in layers]
        self.firsts = self.inputs + 2 * np.cumsum([0, *sizes])  # of each layer's columns
        pairs = list(zip(self.firsts, sizes, strict=False))
        self.h = np.concatenate([first + np.arange(n) for first, n in pairs])
        self.g = np.concatenate([first + n + np.arange(n) for first, n in pairs])
        self.lower, self.upper = (
            np.concatenate([getattr(walk.ranges[op.sources[0]], end)[0].flatten().double().numpy() for op in bends])
            for end in ("lower", "upper")
        )
        self.open = (self.lower < 0) & (self.upper > 0)
        self.size = np.maximum(np.abs(self.lower), np.abs(self.upper))
        self.size[self.size == 0] = 1.0
        self.above, self.below = np.where(self.open, [self.upper, -self.lower], self.size)  # what h and g are shares of
        self.following, self.asked = dense[-1].arrays, (-1, 0.0)
        self.dual, self.late = np.zeros(len(self.h)), False  # the last answer's; whether its time was up
        self.solver = solver_with(threads=1, presolve="off", solver="simplex", simplex_scale_strategy=0)
        self.solver.passModel(self._program(np.concatenate([bias for _, bias in layers])))
        self.now = np.full(len(self.h), -1, dtype=np.int8)

    def _rows(self):
        """h − g − W·h', then h + g, of all units; sparse."""
        from scipy.sparse import coo_matrix

        units = len(self.h)
        each, ones = np.arange(units), np.ones(units)
        found = [(each, self.h, self.above / self.size), (each, self.g, -self.below / self.size)]
        found += [(units + each, self.h, ones), (units + each, self.g, ones)]
        row = read = 0  # the first of a layer's rows, and of the columns that it reads
        for weight, (first, following) in zip(self.weights, pairwise(self.firsts.tolist()), strict=True):
            shares = self.above[row - weight.shape[1] : row] if row else 1.0
            at, by = np.nonzero(weight)
            found.append((row + at, read + by, -(weight * shares / self.size[row : row + len(weight), None])[at, by]))
            row, read = row + len(weight), (first + following) // 2 - len(weight)
        rows, columns, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return coo_matrix((values, (rows, columns)), shape=(2 * units, self.firsts[-1])).tocsr()

    def ask(self, unit: int, sign: float) -> Triangles:
        """Makes it the program for the least sign·unit; returns itself."""
        if self.asked != (unit, sign):
            weight, bias = self.following
            self.asked, self.last, self.bias = (unit, sign), sign * weight[unit], sign * float(bias[unit])
            some = slice(-len(self.last), None)
            cost = self.last * self.above[some]
            self.price = np.abs(cost).max() or 1.0
            self.solver.changeColsCost(len(cost), self.h[some].astype(np.int32), cost / self.price)
        return self

    def _program(self, bias: np.ndarray):
        box, size = self.walk.ranges[0], self.size
        ends = [np.zeros(self.firsts[-1]), np.zeros(self.firsts[-1])]
        for end, given in zip(ends, (box.lower, box.upper), strict=True):
            end[: self.inputs] = given[0].flatten().double().numpy()
        for columns, low, high in ((self.h, self.lower, self.upper), (self.g, -self.upper, -self.lower)):
            least, most = low.clip(min=0) / size, high.clip(min=0) / size  # of one that is closed, one is 0
            ends[0][columns], ends[1][columns] = least, np.where(self.open, 1.0, most)
        most = np.where(self.open, 1.0, np.inf)
        sides = np.concatenate([bias / size, np.full(len(size), -np.inf)]), np.concatenate([bias / size, most])
        return linear_program(np.zeros(self.firsts[-1]), tuple(ends), self._rows(), sides)

    def assume(self, pieces: np.ndarray) -> None:
        """Units in pieces, (units,) int8, −1 for neither; those that aren't open stay as they are."""
        for unit in np.flatnonzero((pieces != self.now) & self.open):
            piece = pieces[unit]
            self.solver.changeColBounds(int(self.h[unit]), 0.0, 0.0 if piece == 0 else 1.0)
            self.solver.changeColBounds(int(self.g[unit]), 0.0, 0.0 if piece == 1 else 1.0)
        self.now = pieces.copy()

    def least(self, seconds: float, steps: int | None = None) -> float:
        """The least value as things are assumed, or as near as the dual simplex came in so many steps and seconds; inf
        where nothing is left, −inf where the solver has no answer."""
        import highspy

        status = self._run(seconds, steps)
        if status == highspy.HighsModelStatus.kInfeasible:
            return math.inf
        if status in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kIterationLimit):
            return self._value()
        return -math.inf

    def _value(self) -> float:
        """What was asked, as the solver has it now."""
        return self.price * self.solver.getInfo().objective_function_value + self.bias

    def _run(self, seconds: float, steps: int | None):
        import highspy

        words, solver = highspy.HighsModelStatus, self.solver
        solver.setOptionValue("simplex_iteration_limit", MANY if steps is None else steps)
        solver.setOptionValue("time_limit", solver.getRunTime() + seconds)  # of all its linear programs
        run(solver)
        if solver.getModelStatus() in (words.kUnknown, words.kSolveError):  # once more, from nothing
            solver.clearSolver()
            run(solver)
        found = solver.getModelStatus()
        self.late = found == words.kTimeLimit
        # a point just beyond the tolerances: what is made of it is a hint, as all here is
        near = found == words.kUnknown and solver.getSolution().dual_valid
        return words.kOptimal if near else found

    def solve(self, fixed: Tensor | np.ndarray, seconds: float) -> Solved | None:
        """The least value of what is asked where units are assumed in pieces; None where the solver has no answer in
        time.

        Args:
            fixed: (units,) int8 of all activations before, in order; −1 for none.
            seconds: at most.
        """
        import highspy

        self.assume(np.asarray(fixed))
        status, units = self._run(seconds, None), len(self.h)
        if status == highspy.HighsModelStatus.kOptimal:
            found = self.solver.getSolution()
            self.dual, at = np.array(found.row_dual[:units]), np.array(found.col_value)
            box = self.walk.ranges[0]
            x = torch.from_numpy(at[: self.inputs]).view(box.lower.shape[1:])
            x = torch.minimum(torch.maximum(x, box.lower[0]), box.upper[0])
            return Solved(self._value(), x, self._apart(at), *self._multipliers(self.dual))
        if status == highspy.HighsModelStatus.kInfeasible:
            _, known, ray = self.solver.getDualRay()
            ray = np.array(ray[:units]) if known else np.zeros(units)
            if (size := np.abs(ray).max()) > 0:  # the bound grows without end along it
                far = FAR * max(1.0, np.abs(self.dual).max()) / size
                none = np.zeros((2, units))
                return Solved(math.inf, None, none, *self._multipliers(self.dual + far * ray))
        return None

    def _apart(self, at: np.ndarray) -> np.ndarray:
        apart = at[np.stack([self.h, self.g])].clip(min=0)
        return np.where(self.open & (self.now < 0) & (apart > TOLERANCE).all(0), apart, 0.0)

    def _multipliers(self, dual: np.ndarray) -> tuple[np.ndarray, dict[int, Tensor], dict[int, Tensor]]:
        """The triangles' weights; slopes and multipliers with which a row's way back is that of the equations' duals.

        With p the row over h and y that over a, what p·h − y·a is at least, over a triangle or an assumed piece, is had
        with a line whose slope is y/p, as far as a line can have it, and of the rest with a multiplier of whichever end
        of a is in the way.
        """
        y = self.price * dual / self.size
        p, row = np.zeros(len(y)), self.last
        for number in reversed(range(len(self.weights))):
            some = slice((self.firsts[number] - self.inputs) // 2, (self.firsts[number + 1] - self.inputs) // 2)
            p[some], row = row, y[some] @ self.weights[number]
        share = np.where(p > 0, (y / np.where(p > 0, p, 1.0)).clip(0, 1), 0.5)
        slope = np.where(p > 0, share, self.upper / np.where(self.open, self.upper - self.lower, 1.0))
        piece = np.where(self.open, self.now, self.lower >= 0)
        rest = p * np.where(piece < 0, slope, piece) - y  # over 0 it is a multiplier of a's lower end
        height = np.where(self.open, self.above * self.below / (self.above + self.below), 0.0)
        pull = np.where(self.open & (piece == 0), -rest, rest)
        return np.abs(p) * height, *(self.by_target(torch.from_numpy(flat).float()) for flat in (share, pull))

    def by_target(self, flat: Tensor) -> dict[int, Tensor]:
        """What there is of every unit, (…, units), by activation's target, (…, *shape)."""
        found, start = {}, 0
        for op in self.bends:
            shape = self.walk.program.shapes[op.target]
            found[op.target] = flat[..., start : start + shape.numel()].view(*flat.shape[:-1], *shape)
            start += shape.numel()
        return found
