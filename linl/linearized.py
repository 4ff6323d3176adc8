"""The affine piece of a network at one input: forward along directions, backward from values."""

from __future__ import annotations

import torch
from torch import Tensor

from linl.program import Bend, Conv, Dense, MaxPool, Program, Reshape, Sum
from linl.sweep import Sweep, piece_at, straight
from linl.winners import entries


class Linearized:
    """A program in which each unit stays in the piece, and each max-pool's window with the winner, of one input.

    Attributes:
        program: the network.
        values: every value at the input, by number, (*shape).
        entries: of each max-pool's windows, by its target, (windows, size).
        winner: flat position of each window's largest number, by the pool's target, (windows,).
    """

    def __init__(self, read: Program, point: Tensor) -> None:
        self.program, self.sweep = read, Sweep(read)
        self.values = {key: value[0] for key, value in read.run(point[None]).items()}
        self.pieces = {op.site: piece_at(op, self.values[op.sources[0]]) for op in read.bends}
        self.entries, self.winner = {}, {}
        for op in read.ops:
            if isinstance(op, MaxPool):
                index = self.entries[op.target] = entries(op, read.shapes[op.sources[0]])
                flat = self.values[op.sources[0]].flatten()
                self.winner[op.target] = index.gather(1, flat[index].argmax(1, keepdim=True))[:, 0]

    def forward(self, directions: Tensor, seen) -> None:
        """Derivatives along directions (n, *inputs): `seen(op, slopes)` gets those of each activation's and max-pool's
        input, (n, units)."""
        # row 0 stands for the value at the input, which the derivatives don't need
        values = {0: torch.cat([torch.zeros_like(directions[:1]), directions])}

        def bend(op: Bend, rows: Tensor) -> Tensor:
            seen(op, rows[1:].flatten(1))
            return straight(op, rows, self.pieces[op.site])

        def pool(op: MaxPool, rows: Tensor) -> Tensor:
            seen(op, rows[1:].flatten(1))
            return rows.flatten(1)[:, self.winner[op.target]].view(-1, *self.program.shapes[op.target])

        for at in range(len(self.sweep.ops)):
            values = self.sweep.rows(at, values, bend, pool)

    def back(self, value: int, rows: Tensor) -> Tensor:
        """Gradients of rows·value, (n, numbers of the value) to (n, numbers of the input)."""
        shapes = self.program.shapes
        found = {value: rows.view(-1, *shapes[value])}
        for op in reversed(self.program.upto(value)):
            rows = found.pop(op.target)
            for source, sign in zip(op.sources, op.signs if isinstance(op, Sum) else (1,), strict=True):
                made = sign * self._step(op, rows)
                found[source] = found[source] + made if source in found else made
        return found[0].flatten(1) if 0 in found else rows.new_zeros(len(rows), shapes[0].numel())

    def _step(self, op, rows: Tensor) -> Tensor:
        shape = self.program.shapes[op.sources[0]]
        if isinstance(op, Dense | Conv):
            return op.backward(rows)
        if isinstance(op, Bend):
            return rows * op.pieces.straight(self.pieces[op.site])[0]
        if isinstance(op, MaxPool):
            made = rows.new_zeros(len(rows), shape.numel())
            return made.index_add_(1, self.winner[op.target], rows.flatten(1)).view(-1, *shape)
        return rows.view(-1, *shape) if isinstance(op, Reshape) else rows
