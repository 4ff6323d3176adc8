"""What is known of an activation's units on one activation pattern of the layers before, over a whole box."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from linl.boxes import Box
from linl.cells import HalfSpace
from linl.program import Bend, Conv, Dense, Program, Sum
from linl.rationals import exact_inputs
from linl.sweep import Sweep, straight

BLURRED = 1e-7
"""Error of a unit's input over its change on the box, above which it is computed in exact arithmetic."""
KEPT = 64
"""Exact pieces that are kept."""
EPS = float(np.finfo(float).eps)


@dataclass
class Context:
    """An activation's inputs on a pattern.

    Attributes:
        site: the activation's number.
        pattern: of the activations before it, the piece of each unit, flat int8.
        at: number of its operation.
        rows, errors: the affine piece of the values still needed, in the coordinates of `Domain`, and by how much
            each may be off anywhere on the box.
        piece: of each unit, for those that stay in one piece on the whole box.
        cuts: (unit, bend's number, half-space above it) for each bend that a unit may cross on the box.
        level: units that lie on a bend on the whole box; which of its pieces they are in makes no difference.
        before: the previous activation's context.
    """

    site: int
    pattern: list[np.ndarray]
    at: int
    rows: dict[int, Tensor]
    errors: dict[int, Tensor]
    piece: np.ndarray
    cuts: list[tuple[int, int, HalfSpace]]
    level: np.ndarray
    before: Context | None = None


class Domain:
    """A box and a network on it, in coordinates u from −1 to 1 at each free position.

    Attributes:
        free: flat positions where the box has a width.
    """

    def __init__(self, read: Program, box: Box) -> None:
        self.program, self.box, self.sweep = read, box, Sweep(read)
        self.free = (box.upper > box.lower).flatten().nonzero()[:, 0]
        self.center, self.radius = box.center.flatten(), box.radius.flatten()[self.free]
        self.kept: dict[bytes, dict[int, np.ndarray]] = {}
        self.ends = torch.stack([box.lower.flatten()[self.free], box.upper.flatten()[self.free]]).numpy()

    def inputs(self, u: np.ndarray) -> Tensor:
        """Inputs at coordinates (n, free); (n, *shape)."""
        flat = self.center.repeat(len(u), 1)
        flat[:, self.free] += torch.from_numpy(u) * self.radius
        return self.box.clip(flat.view(-1, *self.box.shape))

    def exact(self, pattern: list[np.ndarray]) -> np.ndarray:
        """The inputs of the activation after a pattern in exact arithmetic, (1 + free, units)."""
        return self._exact_values(pattern)[self.program.bends[len(pattern)].sources[0]]

    def _exact_values(self, pattern: list[np.ndarray]) -> dict[int, np.ndarray]:
        """`linl.rationals.exact_inputs` after a pattern, going on from the shorter one's; the last few are kept."""
        key = b"|".join(piece.tobytes() for piece in pattern)
        if key not in self.kept:
            before = self._exact_values(pattern[:-1]) if pattern else None
            if len(self.kept) >= KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = exact_inputs(self.program, self.box, pattern, len(pattern), before)
        else:  # those used last go last
            self.kept[key] = self.kept.pop(key)
        return self.kept[key]

    def start(self) -> Context | None:
        """Of the first activation; None if there is none."""
        rows = torch.zeros(1 + len(self.free), self.center.numel(), dtype=torch.float64)
        rows[0] = self.center
        rows[torch.arange(1, len(rows)), self.free] = self.radius
        rows = rows.view(-1, *self.box.shape)
        return self._onward(0, [], {0: rows}, {0: torch.zeros(self.box.shape, dtype=torch.float64)})

    def after(self, context: Context, piece: np.ndarray) -> Context | None:
        """Of the next activation, with the pieces of this one's units; None after the last."""
        op = self.sweep.ops[context.at]
        value, source = op.target, op.sources[0]
        shaped = torch.from_numpy(piece).view(context.rows[source].shape[1:])
        made = straight(op, context.rows[source], shaped)
        slope, offset = op.pieces.straight(shaped)
        error = slope.abs() * context.errors[source]
        error = error + 8 * EPS * (slope.abs() * _size(context.rows[source]) + offset.abs())
        rows, errors = {**context.rows, value: made}, {**context.errors, value: error}
        made = self._onward(context.at + 1, [*context.pattern, piece], rows, errors)
        return None if made is None else replace(made, before=context)

    def _onward(self, at: int, pattern: list[np.ndarray], rows: dict, errors: dict) -> Context | None:
        for number in range(at, len(self.sweep.ops)):
            op, needed = self.sweep.ops[number], self.sweep.live[number]
            rows = {key: value for key, value in rows.items() if key in needed}
            errors = {key: value for key, value in errors.items() if key in needed}
            if isinstance(op, Bend):
                return self._context(op, number, pattern, rows, errors)
            error = self._error(op, [rows[s] for s in op.sources], [errors[s] for s in op.sources])
            rows = self.sweep.rows(number, rows)
            errors = {**errors, op.target: error.view(self.program.shapes[op.target])}
        return None

    @staticmethod
    def _error(op, given: list[Tensor], errors: list[Tensor]) -> Tensor:
        if isinstance(op, Dense | Conv):
            size = _size(given[0])
            carried, grown = op.forward(torch.stack([errors[0], size]), absolute=True)
            bias = 0 if op.bias is None else op.bias.abs()
            return carried * (1 + 1e-9) + EPS * (op.fan + 8) * (grown + bias)
        total = sum(errors)
        if isinstance(op, Sum):
            constant = 0 if op.constant is None else op.constant.abs()
            return total + 4 * EPS * (sum(map(_size, given)) + constant)
        return total

    def _context(self, op: Bend, at: int, pattern, rows, errors) -> Context:
        source = op.sources[0]
        flat, error = rows[source].flatten(1).numpy(), errors[source].flatten().numpy()
        real = op.pieces.bending(rows[source].shape[1:]).flatten(1).numpy()
        norm = np.abs(flat[1:]).sum(0)
        units = flat.shape[1]
        piece, level, cuts = np.zeros(units, dtype=np.int8), np.zeros(units, dtype=bool), []
        for unit in range(units):
            for number, bend in enumerate(op.pieces.bends):
                if not real[number, unit]:
                    continue
                middle, most = flat[0, unit] - bend, norm[unit] + error[unit] + 4 * EPS * abs(bend)
                if abs(middle) > most * (1 + 1e-9):
                    if middle > 0:
                        piece[unit] = number + 1
                    continue
                if norm[unit] > 0 and error[unit] <= BLURRED * norm[unit]:
                    space = HalfSpace(
                        flat[1:, unit] / norm[unit], middle / norm[unit],
                        (error[unit] + 4 * EPS * (abs(middle) + norm[unit])) / norm[unit], (op.site, unit, number, 1),
                    )  # fmt: skip
                    cuts.append((unit, number, space))
                    continue
                space = self._exact(self.exact(pattern)[:, unit], bend, (op.site, unit, number, 1))
                if isinstance(space, HalfSpace):
                    cuts.append((unit, number, space))
                else:
                    level[unit] |= space == 0
                    piece[unit] = number + 1 if space >= 0 else piece[unit]
        return Context(op.site, pattern, at, rows, errors, piece, cuts, level)

    def _exact(self, column: np.ndarray, bend: float, key) -> HalfSpace | int:
        """The half-space of a unit's exact input, or on which side of the bend it is everywhere: −1, 0 (on it), 1."""
        center, radius = ([Fraction(v) for v in t.tolist()] for t in (self.center[self.free], self.radius))
        slope = [s * r for s, r in zip(column[1:], radius, strict=True)]
        middle = column[0] - Fraction(bend) + sum(s * c for s, c in zip(column[1:], center, strict=True))
        norm = sum(map(abs, slope))
        if abs(middle) >= norm:
            return (middle > 0) - (middle < 0)
        row = np.array([float(s / norm) for s in slope])
        return HalfSpace(row, float(middle / norm), 4 * EPS * (1 + len(row)), key)


def _size(rows: Tensor) -> Tensor:
    """The largest magnitude on the box."""
    return rows.abs().sum(0) * (1 + 1e-9)
