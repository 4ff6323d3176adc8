"""Cells: what a list of half-spaces leaves of a box, and whether it has an interior, by linear programs (HiGHS).

A cell lives in coordinates u from −1 to 1 at each position of the box. The solver looks for the greatest t with
a·u + c ≥ t for each half-space; rows come divided by ‖a‖₁, so it sees numbers of size 1 whatever the network's are
(see linl.milp for what happens otherwise). Pulled towards the box's middle by the factor 1 − t/2, the point loses at
most t/2 in each row: around it fits a cube of half-side t/2, at least half as large as the largest that does. The
largest itself would cost two rows an input; this costs none, and hundreds of inputs are no burden.

The solver is never taken at its word. That a cell has an interior is shown by a point, looked at elsewhere. That it
has none is shown by the solver's multipliers y ≥ 0 alone: Σ y·(a·u + c) above 0 nowhere on the box means that no
point is inside all half-spaces, and that sum is bounded here with its rounding and that of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linl.milp import run, solver_with

THIN = 1e-8
"""Half of the box's sides: a cell that isn't larger than this is looked at in exact arithmetic."""
TOLERANCE = 1e-10
"""Of the solver; the least it takes."""


@dataclass(frozen=True)
class HalfSpace:
    """Where sign·(row·u + constant) ≥ 0.

    Attributes:
        row, constant: divided by the row's ‖·‖₁; the sign is taken in.
        error: by how much row·u + constant may be off on the box, rounding of earlier layers included.
        key: (site, unit, bend's number, sign), what it came from.
    """

    row: np.ndarray
    constant: float
    error: float
    key: tuple[int, int, int, int]


class Cell:
    """Half-spaces that come and go, last in first out, and the solver that knows them."""

    def __init__(self, inputs: int) -> None:
        import highspy

        self.inputs, self.spaces = inputs, []
        self.solver = solver_with(
            threads=1, presolve="off", primal_feasibility_tolerance=TOLERANCE, dual_feasibility_tolerance=TOLERANCE,
            small_matrix_value=1e-12,
        )  # fmt: skip
        for _ in range(inputs):
            self.solver.addVar(-1.0, 1.0)
        self.solver.addVar(-highspy.kHighsInf, 1.0)  # t
        self.solver.changeColCost(inputs, -1.0)
        self.columns = np.arange(inputs + 1, dtype=np.int32)

    def become(self, spaces: list[HalfSpace]) -> None:
        """Exactly these half-spaces; those that are there already, from the first on, stay."""
        same = 0
        while same < min(len(spaces), len(self.spaces)) and spaces[same] is self.spaces[same]:
            same += 1
        if same < len(self.spaces):
            gone = np.arange(same, len(self.spaces), dtype=np.int32)
            self.solver.deleteRows(len(gone), gone)
        for space in spaces[same:]:
            self._add(space)
        self.spaces = list(spaces)

    def _add(self, space: HalfSpace) -> None:
        import highspy

        values = np.append(space.row, -1.0)
        self.solver.addRow(-space.constant, highspy.kHighsInf, self.inputs + 1, self.columns, values)

    def largest(self) -> tuple[float, np.ndarray, np.ndarray] | None:
        """The half-side of a cube that fits (below 0: none does), its middle and the rows' multipliers.

        None if the solver can't say.
        """
        import highspy

        for attempt in range(2):
            run(self.solver)
            if self.solver.getModelStatus() == highspy.HighsModelStatus.kOptimal:
                solution = self.solver.getSolution()
                values, duals = np.array(solution.col_value), np.array(solution.row_dual)
                half = values[-1] / 2
                return float(half), values[:-1] * (1 - max(half, 0.0)), np.abs(duals)
            if not attempt:
                self.solver.clearSolver()  # once more from nothing
        return None

    def magnified(self, point: np.ndarray, gaps: np.ndarray, by: float) -> np.ndarray | None:
        """`largest`'s point looked for anew around a point, in coordinates that are magnified.

        The solver's tolerance is one of its own numbers; what is thinner it sees only when it is made larger (iterative
        refinement: Gleixner, Steffy and Wolter, INFORMS J. Computing 2016).

        Args:
            point: near to the cell, (inputs,).
            gaps: the half-spaces' row·point + constant, free of rounding, (half-spaces,).
            by: how many times.
        """
        import highspy

        solver = solver_with(threads=1, presolve="off", primal_feasibility_tolerance=TOLERANCE)
        for u in point.tolist():
            solver.addVar((-1 - u) * by, (1 - u) * by)
        solver.addVar(-highspy.kHighsInf, 1.0)
        solver.changeColCost(self.inputs, -1.0)
        for space, gap in zip(self.spaces, gaps, strict=True):
            row = np.append(space.row, -1.0)
            solver.addRow(-gap * by, highspy.kHighsInf, self.inputs + 1, self.columns, row)
        run(solver)
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        values = np.array(solver.getSolution().col_value)
        return (point + values[:-1] / by) * (1 - max(values[-1], 0.0) / (2 * by))

    def empty(self, weights: np.ndarray) -> bool:
        """Whether Σ weights·(row·u + constant) is above 0 nowhere on the box: a proof that there is no interior."""
        if not len(weights) or not weights.max() > 0:
            return False
        rows = np.stack([space.row for space in self.spaces])
        constants = np.array([space.constant for space in self.spaces])
        error = weights @ np.array([space.error for space in self.spaces])
        size = weights @ (np.abs(rows).sum(1) + np.abs(constants))
        most = np.abs(weights @ rows).sum() + weights @ constants
        rounding = (len(weights) + self.inputs + 8) * np.finfo(float).eps * size
        return bool(most + error + rounding < 0)
