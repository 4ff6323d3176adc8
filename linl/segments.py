"""Every linear piece of a network along a segment between two inputs, by its breakpoints.

Between two breakpoints of the layers so far every value is affine in the position on the segment, so where a unit's
values at the two ends lie on different sides of a bend, its own breakpoint follows from them. The network is
evaluated once at each breakpoint; stretches go depth first in blocks, so memory doesn't grow with their number.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor, nn

from linl.asking import given, seconds
from linl.checking import shown
from linl.program import Bend, MaxPool, Program
from linl.sweep import Sweep

BLOCK = 1 << 24
"""Numbers kept for the breakpoints of one block, 128 MiB."""
NEAR = 1e-14
"""Of the segment: breakpoints nearer to each other than this are one."""


@dataclass(repr=False)
class Segment:
    """The linear pieces of a network on a segment.

    Attributes:
        ends: the two inputs, (2, *shape).
        breaks: where the pieces begin and end, ascending from 0 to 1, (count + 1,).
        outputs: the network's output there, (count + 1, outputs).
        layer: for each breakpoint inside, (count − 1,), the name of the activation or max-pool that bends there.
        complete: whether the whole segment is covered; False when time was up: `breaks` then ends before 1.
        seconds: spent.
    """

    ends: Tensor
    breaks: Tensor
    outputs: Tensor
    layer: list[str]
    complete: bool = True
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Pieces."""
        return max(0, len(self.breaks) - 1)

    def inputs(self, at: Tensor) -> Tensor:
        """Inputs at positions (N,) from 0 to 1; (N, *shape)."""
        share = at.double().view(-1, *[1] * (self.ends.ndim - 1))
        return self.ends[0] + share * (self.ends[1] - self.ends[0])

    def __call__(self, at: Tensor) -> Tensor:
        """The network at positions (N,), from the pieces alone; (N, outputs).

        Raises:
            ValueError: a position that no piece covers.
        """
        first, last = (float(self.breaks[0]), float(self.breaks[-1])) if self.count else (0.0, 0.0)
        if not (self.count and (at >= first).all() and (at <= last).all()):
            raise ValueError(f"the pieces known go from {first:.6g} to {last:.6g}: ask for positions in between")
        after = torch.searchsorted(self.breaks, at.double().contiguous()).clamp(1, self.count)
        left, right = self.breaks[after - 1], self.breaks[after]
        share = ((at - left) / (right - left))[:, None]
        return (1 - share) * self.outputs[after - 1] + share * self.outputs[after]

    @property
    def table(self) -> pd.DataFrame:
        """A row a layer that bends: breakpoints."""
        return (
            pd.Series(self.layer, dtype=object)
            .value_counts(sort=False)
            .rename_axis("layer")
            .reset_index(name="breakpoints")
        )

    def __repr__(self) -> str:
        rest = "" if self.complete else f", up to {float(self.breaks[-1]) if len(self.breaks) else 0:.3g}: time was up"
        return f"Segment: {self.count} linear pieces{rest}; {self.seconds:.1f} s"

    def _repr_html_(self) -> str:
        row = {"pieces": self.count, "complete": self.complete, "seconds": round(self.seconds, 2)}
        return shown(pd.DataFrame([row])) + shown(self.table)


def along(net: nn.Module | Program, a: Tensor, b: Tensor, time_limit: float | None = None) -> Segment:
    """Every linear piece of a network on the segment between two inputs, exactly.

    A piece here is one of an activation pattern: at each breakpoint a unit bends, or a max-pool's winner changes,
    though the output need not bend (when that unit is cancelled, or never reaches it).

    Args:
        net: in eval mode; as `linl.bounds.bound` takes it, max-pools too.
        a, b: inputs, one example's shape each (a leading 1 is allowed).
        time_limit: seconds; the pieces found by then, from a onwards, are returned with `complete` False.

    Raises:
        ValueError: the same input twice, a time limit not above 0; and as `linl.asking.given`.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    began = time.perf_counter()
    limit = seconds(time_limit)
    read, ends = given(net, a, b)
    if torch.equal(ends[0], ends[1]):
        raise ValueError("the two inputs are the same point: a segment needs two")
    made = Segment(ends, torch.zeros(0), torch.zeros(0, 0), [])
    with torch.no_grad():
        _Pieces(read, made, began + limit).run()
    made.seconds = time.perf_counter() - began
    return made


@dataclass
class _Block:
    """Breakpoints in order on their way through the network: positions, who made them, values still needed."""

    operation: int
    breaks: Tensor
    by: Tensor
    values: dict[int, Tensor]


class _Pieces:
    """One segment under way."""

    def __init__(self, read: Program, made: Segment, end: float) -> None:
        self.sweep, self.made, self.end = Sweep(read), made, end

    def run(self) -> None:
        """All blocks, from the segment's start to its end."""
        at = torch.tensor([0.0, 1.0], dtype=torch.float64)
        waiting = [_Block(0, at, torch.full((2,), -1), {0: self.made.inputs(at)})]
        done: list[_Block] = []
        while waiting:
            block = self._through(waiting.pop(), waiting)
            if time.perf_counter() > self.end:
                self.made.complete = False
                break
            if block is not None:
                done.append(block)
        output = self.sweep.program.output
        width = self.sweep.program.shapes[output].numel()
        empty = torch.zeros(0, dtype=torch.float64)
        starts = [0 if i == 0 else 1 for i in range(len(done))]  # neighbours share a breakpoint
        self.made.breaks = torch.cat([empty, *(b.breaks[s:] for s, b in zip(starts, done, strict=True))])
        outputs = [b.values[output].flatten(1)[s:] for s, b in zip(starts, done, strict=True)]
        self.made.outputs = torch.cat([empty.view(0, 1).expand(0, width), *outputs])
        by = torch.cat([empty.long(), *(b.by[s:] for s, b in zip(starts, done, strict=True))])
        self.made.layer = [self.sweep.ops[int(i)].name for i in by[1:-1]]

    def _through(self, block: _Block, waiting: list[_Block]) -> _Block | None:
        """A block to the end; None if it was taken apart on the way, or time is up."""
        while block.operation < len(self.sweep.ops):
            if time.perf_counter() > self.end:
                self.made.complete = False
                return None
            op = self.sweep.ops[block.operation]
            if isinstance(op, Bend):
                self._bend(op, block)
            elif isinstance(op, MaxPool):
                self._max_pool(op, block)
            size = max(2, BLOCK // self.sweep.numbers(block.operation))
            if len(block.breaks) > 2 * size:
                cuts = [*range(0, len(block.breaks) - 1, size), len(block.breaks) - 1]
                parts = [slice(low, high + 1) for low, high in pairwise(cuts)]
                waiting += [_some(block, part) for part in reversed(parts)]
                return None
            block.values = self.sweep.points(block.operation, block.values)
            block.operation += 1
        return block

    def _near(self, op: Bend | MaxPool, values: Tensor, bends: tuple[float, ...] = ()) -> float:
        return self.sweep.touch(op, lambda: float(values.abs().amax()), bends)

    def _bend(self, op: Bend, block: _Block) -> None:
        """A breakpoint wherever a unit comes to a bend."""
        values = block.values[op.sources[0]]
        flat, touch = values.flatten(1), self._near(op, values, op.pieces.bends)
        real, found = op.pieces.bending(values.shape[1:]).flatten(1), []
        for bend, bending in zip(op.pieces.bends, real, strict=True):
            side = (flat > bend + touch).to(torch.int8) - (flat < bend - touch).to(torch.int8)
            stretch, unit = ((side[:-1] * side[1:] < 0) & bending).nonzero().T
            left, right = flat[stretch, unit] - bend, flat[stretch + 1, unit] - bend
            found.append((stretch, unit, left / (left - right), torch.full_like(left, bend)))
        self._insert(block, op, *(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _max_pool(self, op: MaxPool, block: _Block) -> None:
        """A breakpoint wherever another number of a window becomes its largest; from left to right, in rounds."""
        while True:
            values = block.values[op.sources[0]]
            touch, window = self._near(op, values), op.windows(values).flatten(1, -2)  # (n, units, k)
            first = window >= window.amax(-1, keepdim=True) - touch
            stretch, unit = (~(first[:-1] & first[1:]).any(-1)).nonzero().T
            if not len(stretch):
                return
            left, right = window[stretch, unit], window[stretch + 1, unit]
            winner = torch.where(first[stretch, unit], right, -torch.inf).argmax(-1, keepdim=True)
            ahead, behind = left.gather(1, winner) - left, right.gather(1, winner) - right
            share = torch.where(behind < 0, ahead / (ahead - behind), torch.inf).amin(-1)
            self._insert(block, op, stretch, None, share, None)

    def _insert(self, block: _Block, op: Bend | MaxPool, stretch, unit, share, height) -> None:
        """Breakpoints at shares of stretches; there, units of the operation's input are at a height exactly."""
        width = block.breaks[stretch + 1] - block.breaks[stretch]
        place, order = (block.breaks[stretch] + share * width).sort()
        if not len(order):
            return
        fresh = torch.ones(len(order), dtype=torch.bool)
        fresh[1:] = place[1:] - place[:-1] > NEAR
        number = fresh.cumsum(0) - 1
        stretch, share = stretch[order], share[order]
        source, part = stretch[fresh], share[fresh]
        where = torch.cat([block.breaks, place[fresh]]).argsort(stable=True)
        for key, value in block.values.items():
            shares = part.view(-1, *[1] * (value.ndim - 1))
            new = (1 - shares) * value[source] + shares * value[source + 1]
            if key == op.sources[0] and unit is not None:
                new.flatten(1)[number, unit[order]] = height[order]
            block.values[key] = torch.cat([value, new])[where]
        block.breaks = torch.cat([block.breaks, place[fresh]])[where]
        block.by = torch.cat([block.by, torch.full((len(part),), block.operation)])[where]


def _some(block: _Block, part: slice) -> _Block:
    values = {key: value[part] for key, value in block.values.items()}
    return _Block(block.operation, block.breaks[part], block.by[part], values)
