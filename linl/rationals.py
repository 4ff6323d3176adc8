"""The affine piece of a network in exact arithmetic, for what floating point leaves open.

All numbers of a network are binary fractions, so Python's `Fraction` holds each unit's input on one activation
pattern exactly. That settles the cases that lie on an edge: a unit that is zero on a whole region, two units with one
face, a network without biases whose every face goes through the origin.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from linl.boxes import Box
from linl.program import Bend, Conv, Dense, Op, Program, Sum
from linl.sweep import without_bias

exactly = np.vectorize(Fraction, otypes=[object])
"""An array of floats as `Fraction`s, which hold them without rounding."""


def exact_inputs(
    read: Program, box: Box, pattern: list[np.ndarray], site: int, before: dict[int, np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """Every value up to an activation's input, as a function of the box's free positions.

    Args:
        read: the network.
        box: one; positions where lower equals upper are constants.
        pattern: for each activation before, the piece of each unit, flat.
        site: the activation.
        before: what this gave for the activation before, on the same pattern: only the rest is computed.

    Returns: by value, (1 + free, units) of Fractions: the value where all free positions are 0, then the slopes.
    """
    values, target = dict(before or {0: _free(box)}), read.bends[site].sources[0]
    for op in read.upto(target):
        if op.target not in values:
            values[op.target] = _step(op, [values[s] for s in op.sources], pattern, read.shapes[op.target])
    return values


def _free(box: Box) -> np.ndarray:
    """The inputs themselves."""
    lower, upper = box.lower[0].flatten().numpy(), box.upper[0].flatten().numpy()
    free = (upper > lower).nonzero()[0]
    rows = _zeros(1 + len(free), len(lower))
    rows[0] = exactly(np.where(upper > lower, 0.0, lower))
    rows[np.arange(1, 1 + len(free)), free] = Fraction(1)
    return rows


def _zeros(rows: int, columns: int) -> np.ndarray:
    return np.full((rows, columns), Fraction(0), dtype=object)


def _step(op: Op, given: list[np.ndarray], pattern: list[np.ndarray], shape: torch.Size) -> np.ndarray:
    if isinstance(op, Dense | Conv):
        return _linear(op, given[0])
    if isinstance(op, Sum):
        made = sum(sign * value for sign, value in zip(op.signs, given, strict=True))
        if op.constant is not None:
            made[0] = made[0] + exactly(op.constant.flatten().numpy())
        return made
    if isinstance(op, Bend):
        return _bend(op, given[0], pattern[op.site], shape)
    return given[0]


def _linear(op: Dense | Conv, rows: np.ndarray) -> np.ndarray:
    one = torch.eye(rows.shape[1], dtype=torch.float64).view(-1, *op.inputs)
    weight = without_bias(op).forward(one).flatten(1).numpy()  # one product in each number: no rounding
    made, moving = _zeros(len(rows), weight.shape[1]), rows.astype(bool)
    if moving.sum() * weight.shape[1] <= len(rows) * (weight != 0).sum():  # over the inputs, rows are nearly empty
        exact = exactly(weight)
        for row in moving.any(1).nonzero()[0]:
            made[row] = rows[row, moving[row]].dot(exact[moving[row]])
    else:  # a convolution's weights are
        for unit in (weight != 0).any(0).nonzero()[0]:
            used = weight[:, unit].nonzero()[0]
            made[:, unit] = rows[:, used].dot(exactly(weight[used, unit]))
    if op.bias is not None:
        shape = op.outputs if isinstance(op, Conv) else op.bias.shape
        made[0] = made[0] + exactly(op.bias.expand(shape).flatten().numpy())
    return made


def _bend(op: Bend, rows: np.ndarray, piece: np.ndarray, shape: torch.Size) -> np.ndarray:
    made = rows.copy()
    for number, slope in enumerate(op.pieces.slopes):
        mine = (piece == number).nonzero()[0]
        if not len(mine):
            continue
        at = max(0, number - 1)
        slopes = exactly(slope.expand(shape).flatten().numpy()[mine])
        made[:, mine] = rows[:, mine] * slopes
        made[0, mine] = made[0, mine] + (Fraction(op.pieces.values[at]) - slopes * Fraction(op.pieces.bends[at]))
    return made


def nowhere_inside(rows: np.ndarray, constants: np.ndarray, ends: np.ndarray, weights: np.ndarray) -> bool:
    """Whether half-spaces and a box have no common interior, proved from multipliers that are nearly right.

    With y ≥ 0, not all 0, and Σ y·(row·x + constant) ≤ 0 everywhere on the box, no point is strictly inside all
    half-spaces. The y that a solver gives leaves a remainder; here those rows that it uses are combined anew so that
    the remainder is 0 wherever it was nearly that.

    Args:
        rows, constants: (m, free) and (m,) of Fractions: row·x + constant ≥ 0 each.
        ends: (2, free) floats, the box.
        weights: (m,) floats, the solver's multipliers for these rows as they are.

    Returns: True is proved; False is not known.
    """
    return any(_combined(rows, constants, ends, weights, alike) for alike in (False, True))


def _combined(rows: np.ndarray, constants: np.ndarray, ends: np.ndarray, weights: np.ndarray, alike: bool) -> bool:
    """`nowhere_inside`; what counts as nearly 0 is measured by each column's own numbers, or by all columns' alike:
    the solver's tolerance doesn't know that a column's are all tiny."""
    lower, upper = exactly(ends)
    used = list(weights.nonzero()[0])
    while used:
        total = weights[used] @ rows[used].astype(float)
        size = weights[used] @ np.abs(rows[used]).astype(float)
        near = np.abs(total) <= 1e-9 * np.maximum(size.max() if alike else size, 1e-300)
        kernel = _kernel(rows[np.ix_(used, near.nonzero()[0])].T)
        if len(kernel) == 1:
            y = kernel[0] if sum(kernel[0]) > 0 else -kernel[0]
            slope = y.dot(rows[used])
            most = sum(max(s * low, s * high) for s, low, high in zip(slope, lower, upper, strict=True))
            if (y >= 0).all() and most + y.dot(constants[used]) <= 0:
                return True
        used.remove(min(used, key=lambda i: weights[i]))  # the least of them may be the solver's tolerance alone
    return False


def _kernel(matrix: np.ndarray) -> list[np.ndarray]:
    """A basis of all y with matrix·y = 0, by elimination."""
    matrix, pivots, row = matrix.copy(), [], 0
    columns = matrix.shape[1]
    for column in range(columns):
        at = next((i for i in range(row, len(matrix)) if matrix[i, column] != 0), None)
        if at is None:
            continue
        matrix[[row, at]] = matrix[[at, row]]
        matrix[row] = matrix[row] / matrix[row, column]
        for i in range(len(matrix)):
            if i != row and matrix[i, column] != 0:
                matrix[i] = matrix[i] - matrix[i, column] * matrix[row]
        pivots.append(column)
        row += 1
    found = []
    for column in set(range(columns)) - set(pivots):
        y = _zeros(1, columns)[0]
        y[column] = Fraction(1)
        for i, pivot in enumerate(pivots):
            y[pivot] = -matrix[i, column]
        found.append(y)
    return found
