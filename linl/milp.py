"""Whether a unit can cross a bend, asked of a mixed-integer solver (HiGHS), and believed only as far as it is sure.

Every unstable unit before the one in question gets its pieces as segments δ of length up to that piece's, filled in
order, a 0/1 variable between two neighbours; stable units are straight lines and vanish (Serra et al., NeurIPS
2021, use the same model with big-M bounds; ours come from linl.bounds).
The question is put as: is there an input at which the unit is beyond the bend, or short of it by no more than the
margin? "Infeasible" then is a proof with room for the solver's tolerances; a point found is only a candidate for a
witness, checked elsewhere; every other answer, a time limit or "Not Set" included, decides nothing.
Columns go to the solver as shares of their range and rows over their largest number: HiGHS takes numbers below
1e-9 for nothing and its tolerances are absolute, so weights of 1e-10 on inputs of 1e10 would make false proofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linl.program import Bend, Conv, Dense, MaxPool, Program, Reshape, Sum, picks
from linl.ranges import Range

MARGIN = 1e-6
"""Relative to the unit's range, or to its row's largest number where that is more: how near to a bend the solver's
answers aren't believed."""
TOLERANCE = 1e-9
"""Of the solver, for constraints and for 0/1 variables."""
Ends = tuple[np.ndarray, np.ndarray]
LARGEST = 50_000_000
"""Numbers of a model; beyond that the question isn't put."""


class NoModel(ValueError):  # noqa: N818 - an answer, not a fault
    """The question isn't put to the solver; the message says why."""


@dataclass
class Answer:
    """What the solver said.

    Attributes:
        verdict: "impossible" (the unit can't cross), "point" (here is where it may), "open".
        point: an input, (*shape), or None.
        status: the solver's own word.
        seconds: spent.
    """

    verdict: str
    point: Tensor | None
    status: str
    seconds: float


class Model:
    """The network up to one activation, as far as its units are open, in the form the solver wants.

    Args:
        program: the network.
        ranges: sound ranges of the inputs of all activations before this one, by site, and of the box.
        site: the activation whose units are asked about.

    Raises:
        NoModel: too many numbers, or a max-pool on the way.
    """

    def __init__(self, program: Program, box: Range, ranges: dict[int, Range], site: int) -> None:
        self.program, self.box, self.ranges = program, box, ranges
        self.target = program.bends[site].sources[0]
        path = program.upto(self.target)
        if any(isinstance(op, MaxPool) for op in path):
            raise NoModel("a max-pool before it")
        self.bends = [op for op in path if isinstance(op, Bend)]
        self.open = {op.target: self._open(op) for op in self.bends}
        inputs = box.lower[0].numel()
        self.columns, count = {}, inputs
        for op in self.bends:  # δ's of every open unit, piece after piece
            units, pieces = len(self.open[op.target]), len(op.pieces.slopes)
            self.columns[op.target] = count
            count += units * pieces
        self.binaries, binaries = {}, count
        for op in self.bends:
            self.binaries[op.target] = binaries
            binaries += len(self.open[op.target]) * len(op.pieces.bends)
        self.count = binaries
        rows = sum(len(units) for units in self.open.values())
        if rows * count > LARGEST:
            raise NoModel(f"a model of {rows} × {count} numbers")
        self._build()

    def _open(self, op: Bend) -> Tensor:
        known = self.ranges[op.site]
        return (op.pieces.piece(known.lower, known.upper)[0].flatten() < 0).nonzero()[:, 0]

    def expression(self, value: int, units: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Units of a value as linear functions of the columns: coefficients (n, columns), constants (n,)."""
        shape = self.program.shapes[value]
        like = self.box.lower
        rows: dict[int, Tensor] = {value: picks(units, shape, like)}
        coefficients = torch.zeros(len(units), self.count, dtype=torch.float64)
        constant = torch.zeros(len(units), dtype=torch.float64)
        for op in reversed(self.program.upto(value)):
            here = rows.pop(op.target, None)
            if here is None:
                continue
            if isinstance(op, Bend):
                back, more = self._through(op, here, coefficients)
                constant += more
                parts = [(op.sources[0], back)]
            elif isinstance(op, Dense | Conv):
                if op.bias is not None:
                    constant += here.flatten(1) @ op.bias.broadcast_to(self.program.shapes[op.target]).flatten()
                parts = [(op.sources[0], op.backward(here))]
            elif isinstance(op, Sum):
                if op.constant is not None:
                    constant += here.flatten(1) @ op.constant.flatten()
                parts = [(s, sign * here) for s, sign in zip(op.sources, op.signs, strict=True)]
            else:
                assert isinstance(op, Reshape)
                parts = [(op.sources[0], here.reshape(len(here), *self.program.shapes[op.sources[0]]))]
            for source, back in parts:
                rows[source] = rows[source] + back if source in rows else back
        if 0 in rows:
            coefficients[:, : self.box.lower[0].numel()] = rows[0].flatten(1)
        return coefficients.numpy(), constant.numpy()

    def _through(self, op: Bend, here: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """A row's way back through an activation: open units end in their columns, stable ones go on."""
        known, pieces = self.ranges[op.site], op.pieces
        piece = pieces.piece(known.lower, known.upper)[0]
        flat, units = here.flatten(1), self.open[op.target]
        slope, offset = (torch.where(piece < 0, 0, t) for t in pieces.straight(piece))
        constant = flat @ offset.flatten()
        constant = constant + flat[:, units] @ pieces(known.lower)[0].flatten()[units] if len(units) else constant
        for number, s in enumerate(pieces.slopes):
            at = self.columns[op.target] + number * len(units)
            coefficients[:, at : at + len(units)] += flat[:, units] * s.expand_as(known.lower[0]).flatten()[units]
        return here * slope, constant

    def _build(self) -> None:
        """Columns' bounds, and the rows: each open unit's value is the sum of its segments, filled in order."""
        inputs = self.box.lower[0].numel()
        self.lower, self.upper = np.zeros(self.count), np.ones(self.count)
        self.lower[:inputs], self.upper[:inputs] = self.box.lower[0].flatten(), self.box.upper[0].flatten()
        blocks, low, high = [], [], []
        for op in self.bends:
            units = self.open[op.target]
            if not len(units):
                continue
            known, n = self.ranges[op.site], len(units)
            least, most = (t[0].flatten()[units].numpy() for t in (known.lower, known.upper))
            edges = np.stack([least, *(np.clip(bend, least, most) for bend in op.pieces.bends), most])
            lengths = np.diff(edges, axis=0)
            at = self.columns[op.target]
            self.upper[at : at + lengths.size] = lengths.ravel()
            rows, constant = self.expression(op.sources[0], units)
            for number in range(len(lengths)):
                rows[np.arange(n), at + number * n + np.arange(n)] -= 1.0
            blocks.append(rows)
            low.append(least - constant)
            high.append(least - constant)
            for number in range(len(lengths) - 1):  # δ_k ≥ length_k·z, δ_{k+1} ≤ length_{k+1}·z
                z = self.binaries[op.target] + number * n + np.arange(n)
                for segment, sign in ((number, 1.0), (number + 1, -1.0)):
                    rows = np.zeros((n, self.count))
                    rows[np.arange(n), at + segment * n + np.arange(n)] = sign
                    rows[np.arange(n), z] = -sign * lengths[segment]
                    blocks.append(rows)
                    low.append(np.zeros(n))
                    high.append(np.full(n, np.inf))
        rows = np.concatenate(blocks) if blocks else np.zeros((0, self.count))
        self.wide = np.where(self.upper > self.lower, self.upper - self.lower, 1.0)
        shift, rows = rows @ self.lower, rows * self.wide
        size = _largest(rows)
        self.rows = rows / size[:, None]
        self.row_lower = ((np.concatenate(low) if low else np.zeros(0)) - shift) / size
        self.row_upper = ((np.concatenate(high) if high else np.zeros(0)) - shift) / size

    def cross(self, unit: int, bend: float, up: bool, known: Range, time_limit: float = math.inf) -> Answer:
        """Can the unit get above (`up`) or below a bend?

        Args:
            unit: flat position.
            known: the unit's range, for the margin.
            time_limit: seconds.
        """
        coefficients, constant = self.expression(self.target, torch.tensor([unit]))
        sign = 1.0 if up else -1.0
        scale = float(known.largest[0].flatten()[unit])
        row, short = sign * coefficients[0], sign * (bend - constant[0])
        short, row = short - row @ self.lower, row * self.wide
        size = _largest(row[None])[0]
        return self._solve(row / size, short / size, MARGIN * max(1.0, scale / size), time_limit)

    def _solve(self, row: np.ndarray, short: float, margin: float, time_limit: float) -> Answer:
        """Looks for an input with row·columns > short, the columns as shares of their ranges."""
        import highspy

        if not all(np.isfinite(t).all() for t in (self.rows, self.row_lower, row, short)):
            return Answer("open", None, "numbers that aren't finite", 0.0)

        solver = solver_with(
            threads=1, time_limit=float(time_limit), mip_rel_gap=0.0, primal_feasibility_tolerance=TOLERANCE,
            dual_feasibility_tolerance=TOLERANCE, mip_feasibility_tolerance=TOLERANCE,
            objective_target=-(short + margin / 100), small_matrix_value=1e-12,
        )  # fmt: skip
        solver.passModel(self._lp(row, short - margin))
        run(solver)
        status, word = solver.getModelStatus(), solver.modelStatusToString(solver.getModelStatus())
        seconds = solver.getRunTime()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Answer("impossible", None, word, seconds)
        if not has_point(solver.getInfo()):
            return Answer("open", None, word, seconds)
        inputs = self.box.lower[0].numel()
        shares = np.array(solver.getSolution().col_value[:inputs])
        values = torch.from_numpy(self.lower[:inputs] + shares * self.wide[:inputs])
        point = values.view(self.box.lower.shape[1:])
        point = torch.minimum(torch.maximum(point, self.box.lower[0]), self.box.upper[0])
        return Answer("point", point, word, seconds)

    def _lp(self, row: np.ndarray, least: float):
        """The model with the question as its last row, and as its objective (to be made small)."""
        from scipy.sparse import csr_matrix

        matrix = csr_matrix(np.concatenate([self.rows, row[None]]))
        columns = np.zeros(self.count), (self.upper > self.lower).astype(float)
        rows = np.concatenate([self.row_lower, [least]]), np.concatenate([self.row_upper, [np.inf]])
        first = min(self.binaries.values(), default=self.count)
        return linear_program(-row, columns, matrix, rows, np.arange(first, self.count))


def linear_program(cost: np.ndarray, columns: Ends, matrix, rows: Ends, integers: Sequence[int] | None = None):
    """A program in HiGHS's form: cost·x made small, for x between the ends of `columns` and matrix·x between those of
    `rows`.

    Args:
        cost: (n,).
        columns, rows: lower and upper ends, (n,) and (m,) each, infinite where there is none.
        matrix: (m, n), scipy's, sparse by rows.
        integers: columns of whole numbers; None for a program without.
    """
    import highspy

    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, (lp.col_lower_, lp.col_upper_), (lp.row_lower_, lp.row_upper_) = cost, columns, rows
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    if integers is not None:
        kinds = np.full(len(cost), highspy.HighsVarType.kContinuous, dtype=object)
        kinds[integers] = highspy.HighsVarType.kInteger
        lp.integrality_ = list(kinds)
    return lp


def has_point(info) -> bool:
    """Whether a run of the solver ended with a point that it takes for feasible."""
    import highspy

    return info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible


def solver_with(**options):
    """A silent HiGHS with options, all set before anything is solved: changed later, they can void its answers.

    Raises:
        RuntimeError: an option that it refuses.
    """
    import highspy

    solver = highspy.Highs()
    for name, value in {"output_flag": False, **options}.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise RuntimeError(f"HiGHS refused the option {name} = {value}")
    return solver


def run(solver) -> None:
    """Puts the question; its model status says whether there is an answer.

    A process has one set of HiGHS's threads: whoever asks first says how many, and whoever asks with another number
    fails, with the status "Not Set". Then they are ended, and the question is put once more.
    """
    import highspy

    if solver.run() == highspy.HighsStatus.kError and solver.getModelStatus() == highspy.HighsModelStatus.kNotset:
        highspy.Highs.resetGlobalScheduler(True)
        solver.run()


def _largest(rows: np.ndarray) -> np.ndarray:
    """Each row's largest magnitude; 1 for a row of zeros."""
    largest = np.abs(rows).max(1, initial=0.0)
    return np.where(largest > 0, largest, 1.0)
