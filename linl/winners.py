"""Which number of a max-pool's window is the largest: where the numbers stand, and which of them can win."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linl.program import MaxPool


def entries(op: MaxPool, inputs: torch.Size) -> Tensor:
    """Where the numbers of each window stand in the flat input, (windows, size).

    A place in the padding repeats one of the window's own: it can't win, nor change who does.
    """
    number = torch.arange(inputs.numel(), dtype=torch.float64).view(1, *inputs)
    at = op.windows(number, fill=-1.0)[0].flatten(0, -2).long()
    return torch.where(at < 0, at.amax(1, keepdim=True), at)


def contested(index: Tensor, home: Tensor, rows: Tensor, basis: Tensor, touch: float) -> Tensor:
    """Windows in which another number may exceed the one at home somewhere; their numbers.

    Args:
        index: `entries`.
        home: flat position of one number of each window, (windows,).
        rows: values as sums of the basis, (r, inputs).
        basis: at some corners, (n, r): values lie within the smallest box around these.
        touch: what counts as exceeding.
    """
    low, high = basis.amin(0), basis.amax(0)
    middle, half = (low + high) / 2, (high - low) / 2 * (1 + 1e-9)
    found = torch.zeros(len(index), dtype=torch.bool)
    for other in index.T:
        ahead = rows[:, other] - rows[:, home]
        found |= middle @ ahead + half @ ahead.abs() > touch
    return found.nonzero()[:, 0]


def undecided(best: np.ndarray, cells: list[list[int]]) -> list[np.ndarray]:
    """For each polygon, the windows in which no number is the largest at all corners.

    Args:
        best: which numbers are the largest at each corner, (corners, windows, size) bool.
    """
    most, found = max(map(len, cells)), []
    padded = np.array([cell + [cell[-1]] * (most - len(cell)) for cell in cells])
    step = max(1, (1 << 26) // max(1, best[0].size))
    for some in np.split(padded, range(step, len(padded), step)):
        common = best[some[:, 0]].copy()
        for corner in some.T[1:]:
            common &= best[corner]
        cell, window = np.nonzero(~common.any(2))
        found += np.split(window, np.searchsorted(cell, np.arange(1, len(some))))
    return found


def rivals(values: np.ndarray, touch: float) -> list[int]:
    """The numbers of a window, (corners, size), that are the largest somewhere in a polygon; of equal ones the first.

    One that another exceeds or equals at all corners does so inside as well. (Others that win nowhere may be left.)
    """
    ahead = values[:, :, None] - values[:, None, :]  # of the second by the third
    never_below = (ahead >= -touch).all(0)
    once_above = (ahead > touch).any(0)
    first = np.triu(np.ones(never_below.shape, dtype=bool), 1)
    beaten = (never_below & (once_above | first)).any(0)
    return (~beaten).nonzero()[0].tolist()
