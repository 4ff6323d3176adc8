"""A program's operations, one by one, on points or on an affine piece of the network.

An affine piece travels as rows: row 0 the value at one point, the others how the value changes along directions (or
with numbers that aren't inputs at all). Layers act on all rows alike, save that a bias is row 0's alone; on an
activation each unit goes on along one straight piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from linl.program import Bend, Conv, Dense, MaxPool, Op, Program, Sum, apply

TOUCH = 1e-12
"""Of a layer's largest number: how near to a bend counts as on it. Evaluation and interpolation are off by some
1e-15; what is thinner than this, in a unit's value, isn't told from its neighbour."""


class Sweep:
    """The walk over a program.

    Attributes:
        program: the network, in float64.
        live: for each operation, the values that it or a later one reads and an earlier one gave; last, the output.
    """

    def __init__(self, read: Program) -> None:
        self.program, self.ops = read, read.ops
        self.biases = [getattr(op, "bias", None) if isinstance(op, Dense | Conv) else None for op in read.ops]
        self.plain = [without_bias(op) for op in read.ops]
        self.touches: dict[int, float] = {}
        wanted = {read.output}
        self.live = [wanted]
        for op in reversed(self.ops):
            wanted = (wanted - {op.target}) | set(op.sources)
            self.live.insert(0, wanted)

    def points(self, at: int, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """The values needed after operation number `at`, at points: (n, *shape) each."""
        op = self.ops[at]
        if isinstance(op, Dense | Conv):
            made = self._linear(at, values[op.sources[0]])
            if self.biases[at] is not None:
                made = made.add_(self.biases[at])
        else:
            made = apply(op, [values[s] for s in op.sources], self.program.shapes[op.target])
        return self._kept(at, values, made)

    def rows(
        self,
        at: int,
        values: dict[int, Tensor],
        bend: Callable[[Bend, Tensor], Tensor] | None = None,
        pool: Callable[[MaxPool, Tensor], Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """The same for an affine piece's rows.

        Args:
            bend: what an activation makes of its rows.
            pool: what a max-pool makes of its rows.
        """
        op = self.ops[at]
        given = [values[s] for s in op.sources]
        if isinstance(op, Bend):
            made = bend(op, given[0])
        elif isinstance(op, MaxPool):
            made = pool(op, given[0])
        elif isinstance(op, Dense | Conv):
            made = self._linear(at, given[0])
            if self.biases[at] is not None:
                made[0] += self.biases[at]
        elif isinstance(op, Sum):
            most = max(map(len, given))
            made = sum(sign * padded(value, most) for sign, value in zip(op.signs, given, strict=True))
            if op.constant is not None:
                made = torch.cat([made[:1] + op.constant, made[1:]])
        else:
            made = given[0].reshape(-1, *self.program.shapes[op.target])
        return self._kept(at, values, made)

    def _linear(self, at: int, x: Tensor) -> Tensor:
        op = self.plain[at]
        if isinstance(op, Conv) and op.scales:
            return x * op.layer.weight.view(-1, *[1] * op.layer.geometry.dims)  # torch's depthwise layers are slow
        return op.forward(x)

    def _kept(self, at: int, values: dict[int, Tensor], made: Tensor) -> dict[int, Tensor]:
        values = {**values, self.ops[at].target: made}
        return {key: value for key, value in values.items() if key in self.live[at + 1]}

    def touch(self, op: Op, largest: Callable[[], float], bends: tuple[float, ...] = ()) -> float:
        """How near to a bend of an operation counts as on it; from the largest number it is first given."""
        if op.target not in self.touches:
            self.touches[op.target] = TOUCH * max(largest(), *map(abs, bends), 1e-300)
        return self.touches[op.target]

    def numbers(self, at: int) -> int:
        """Numbers that are kept for one point before operation `at`."""
        return max(1, sum(self.program.shapes[value].numel() for value in self.live[at]))


def straight(op: Bend, rows: Tensor, piece: Tensor) -> Tensor:
    """An activation's rows (n, *shape) where each unit stays in one piece, by its number (*shape)."""
    slope, offset = op.pieces.straight(piece)
    made = rows * slope
    made[0] += offset
    return made


def padded(rows: Tensor, count: int) -> Tensor:
    """Rows, and rows of zeros after them up to `count`."""
    more = count - len(rows)
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows


def piece_at(op: Bend, value: Tensor) -> Tensor:
    """The number of each unit's piece where the activation gets `value`; at a bend the upper one; int8."""
    return sum((value >= bend).to(torch.int8) for bend in op.pieces.bends)


def without_bias(op: Op) -> Op:
    """A layer's linear part; other operations as they are."""
    if isinstance(op, Dense):
        return replace(op, bias=None)
    if isinstance(op, Conv):
        return replace(op, layer=replace(op.layer, bias=None))
    return op
