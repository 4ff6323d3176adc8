"""Bounds from a few activations back, for convolutions: each unit's row is kept as a window on an earlier map.

Going back to the input costs a row as large as the image for each of a network's units; a residual network for
32 × 32 pixels has half a million. A few layers back, a unit reads no more than a window of the map there (the
"patches" of Xu et al., NeurIPS 2020, who keep them down to the input), and the bounds known there do for the rest.

Each activation lies between two *parallel* lines (Weng et al., ICML 2018, section 3.3), not CROWN's adaptive ones: a
unit's lower and upper bound then share one row and one middle. The middle is what the lines' own middles give going
forward from the centres of what is known; rows only carry how far each number may be from there. So rows may be rough,
bfloat16 where the processor multiplies it: what they are off by counts in shares of a distance, not of a value.

**Rounding.** With d the distance of a value from its middle: a row over a layer's output that goes back through
weights W is off by no more than δ·|row|·|W|, and costs δ·|row|·|W|·d. That, the rounding of the middles and the lines'
distance are summed up in one map for each value, which meets |row| in one product.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linl.affine import Affine, Geometry, Size
from linl.devices import pick_precision
from linl.program import Bend, Conv, MaxPool, Op, Program, Sum, apply
from linl.ranges import Range
from linl.whole import TRANSPOSED

AT_ONCE = 1 << 22  # numbers of a block of rows: they stay in the processor's cache
WIDE = 512  # channels from which on matrix products beat torch's transposed convolutions of small windows
Block = tuple[tuple[int, int], ...]
"""First position and the one after the last, in each dimension."""


@dataclass(frozen=True)
class Window:
    """Where rows read: the unit at position i reads i·step + start and the size − 1 after it, in each dimension."""

    step: Size
    start: Size
    size: Size

    def through(self, g: Geometry) -> Window:
        """On the input of a convolution, for a window on its output."""
        moved = zip(self.start, g.stride, g.padding, strict=True)
        wider = zip(self.size, g.stride, g.span, strict=True)
        return Window(
            tuple(a * b for a, b in zip(self.step, g.stride, strict=True)),
            tuple(a * stride - low for a, stride, (low, _) in moved),
            tuple((n - 1) * stride + span + 1 for n, stride, span in wider),
        )

    def __or__(self, other: Window) -> Window:
        """The smallest window that holds both."""
        ends = [max(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        start = tuple(map(min, self.start, other.start))
        return Window(self.step, start, tuple(end - a for end, a in zip(ends, start, strict=True)))

    def inner(self, size: Size, positions: Size) -> Block:
        """The positions whose window lies inside a map."""
        ends = []
        for step, start, width, n, count in zip(self.step, self.start, self.size, size, positions, strict=True):
            first = max(0, -(start // step))
            last = (n - width - start) // step + 1
            ends.append((min(first, count), max(min(first, count), min(last, count))))
        return tuple(ends)

    def inside(self, size: Size, block: Block) -> bool:
        """Whether all windows of a block lie inside a map."""
        return all(
            a * step + start >= 0 and (b - 1) * step + start + width <= n
            for (a, b), step, start, width, n in zip(block, self.step, self.start, self.size, size, strict=True)
        )

    def padded(self, rows: Tensor, wider: Window) -> Tensor:
        """Rows (…, *size, C) with zeros around, for a wider window."""
        sides = []
        for a, n, b, m in zip(self.start, self.size, wider.start, wider.size, strict=True):
            sides.append((a - b, b + m - a - n))
        return F.pad(rows, [0, 0, *(side for pair in reversed(sides) for side in pair)])

    def reaching(self, size: Size, block: Block) -> Block:
        """The part of the window that lies inside a map for some position of a block; never empty."""
        parts = []
        for (a, b), step, start, width, n in zip(block, self.step, self.start, self.size, size, strict=True):
            before = min(width - 1, max(0, -((b - 1) * step + start)))
            parts.append((before, max(before + 1, min(width, n - a * step - start))))
        return tuple(parts)

    def cut(self, part: Block) -> Window:
        """A part of the window."""
        start = tuple(a + before for a, (before, _) in zip(self.start, part, strict=True))
        return Window(self.step, start, tuple(end - before for before, end in part))

    def trimmed(self, rows: Tensor, size: Size, block: Block) -> tuple[Tensor, Window]:
        """Rows without what lies outside of a map for every position of a block."""
        part = self.reaching(size, block)
        for d, (before, end) in enumerate(part):
            rows = rows.narrow(2 + d, before, end - before)
        return rows, self.cut(part)

    def over(self, values: Tensor, block: Block) -> Tensor:
        """What the windows of a block hold of a map (C, *size), zeros outside: (positions, *self.size, C)."""
        dims = len(self.size)
        padded = F.pad(values, [0, 1] * dims)
        index = []
        for d, ((a, b), step, start, width) in enumerate(zip(block, self.step, self.start, self.size, strict=True)):
            n = values.shape[1 + d]
            at = torch.arange(a, b)[:, None] * step + start + torch.arange(width)
            at = torch.where((at >= 0) & (at < n), at, n)
            shape = [1] * (2 * dims)
            shape[d], shape[dims + d] = b - a, width
            index.append(at.view(shape))
        found = padded.movedim(0, -1)[tuple(index)]  # (*positions, *window, C)
        return found.reshape(-1, *self.size, values.shape[0])


def way_back(program: Program, value: int, depth: int) -> list[Op]:
    """The operations before a value, last first, up to where `depth` activations have been passed on some way.

    They end at max-pools too, which have no straight lines of their own here.
    """
    passed, path = {value: 0}, []
    for op in reversed(program.ops):
        if op.target not in passed:
            continue
        count = passed[op.target] + isinstance(op, Bend)
        if count > depth or isinstance(op, MaxPool):
            continue
        path.append(op)
        for source in op.sources:
            passed[source] = max(passed.get(source, 0), count)
    return path


def is_map(program: Program, value: int, path: list[Op]) -> bool:
    """Whether all on the way are maps of as many dimensions, so that windows will do."""
    dims = len(program.shapes[value])
    return dims > 1 and all(isinstance(op, Conv | Sum | Bend) and len(program.shapes[op.target]) == dims for op in path)


class Windows:
    """The rows of one map, for one box.

    Args:
        program: the network, its numbers in the dtype of the arithmetic.
        path: the operations back from the map, as `way_back` gives them.
        ranges: of every value before the map; of one box, each (1, *shape).
    """

    def __init__(self, program: Program, path: list[Op], ranges: dict[int, Range]) -> None:
        self.program = program
        targets = {op.target for op in path}
        self.path = [op for op in reversed(program.ops) if op.target in targets]
        self.dtype = next(iter(ranges.values())).lower.dtype
        self.eps = torch.finfo(self.dtype).eps
        fast = self.dtype == torch.float32 and pick_precision("auto", torch.device("cpu")) == "bf16"
        self.rough = torch.bfloat16 if fast else self.dtype
        self.unit = 0.51 * torch.finfo(self.rough).eps  # how far a rounded number of rows may be off, as a share
        self.middles, self.far, self.cost = {}, {}, {}
        self.weights, self.slopes = {}, {}
        self.longest = 1  # numbers of a row
        for op in reversed(self.path):
            for source in op.sources:
                if source not in self.middles:  # what is known ends here
                    center, radius, _ = ranges[source].ball()
                    self.middles[source] = center
                    self.far[source], self.cost[source] = radius, radius * (1 + self.unit)
            self._forward(op, ranges)

    def _forward(self, op: Op, ranges: dict[int, Range]) -> None:
        """A value's middle, how far it may be from there, and what a row over it costs besides its way back."""
        eps, value = self.eps, op.target
        given, far = [self.middles[s] for s in op.sources], [self.far[s] for s in op.sources]
        if isinstance(op, Bend):
            known = ranges[op.sources[0]]
            slope = op.pieces.chord(known.lower, known.upper).to(self.rough)  # any slope makes a sound band
            self.slopes[value] = slope[0]
            slope = slope.to(self.dtype)
            low, high = op.pieces.band(slope, known.lower, known.upper)
            offset = low / 2 + high / 2
            made = slope * given[0] + offset
            size = (slope * given[0]).abs() + torch.maximum(low.abs(), high.abs())
            cost = torch.maximum(high - offset, offset - low) + 8 * eps * size
        else:
            made = apply(op, given, self.program.shapes[value])
            if isinstance(op, Sum):
                cost = 4 * eps * (sum(v.abs() for v in given) + made.abs())
            else:
                cost = self._layer(op, given[0], far[0])
        self.middles[value], self.cost[value] = made, cost
        if op is self.path[0]:  # the map itself: rows over it are the first ones, nothing was rounded
            return
        known = ranges[value]
        self.far[value] = torch.maximum(known.upper - made, made - known.lower).clamp(min=0)
        self.cost[value] = cost + self.unit * self.far[value]

    def _layer(self, op: Conv, middle: Tensor, far: Tensor) -> Tensor:
        """What a layer's rounding costs: of its weights, where rows are rough, and of its sums."""
        layer, sums = op.layer, (op.fan + 8) * self.eps
        weight = layer.weight.to(self.rough)
        if _in_taps(layer.geometry):
            self.weights[op.target] = weight.movedim((0, 1), (-2, -1)).contiguous()
        else:
            self.weights[op.target] = weight.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight
        cost = op.forward(sums * (middle.abs() + far), absolute=True)
        if op.bias is not None:
            cost = cost + sums * op.bias.abs()
        if self.rough != self.dtype:
            off = (layer.weight - weight.to(self.dtype)).abs()
            if _in_taps(layer.geometry):  # each tap's product is rounded
                off = off + self.unit * layer.weight.abs()
            off = Affine(layer.geometry, off, None)
            cost = cost + off(far) * (1 + sums)
        return cost

    def extremes(self, value: int, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of some channels of a map: (channels, *size) each."""
        middle = self.middles[value][0, channels]
        spread = torch.empty_like(middle)
        for block in self._blocks(value, len(channels)):
            at = (slice(None), *(slice(a, b) for a, b in block))
            spread[at] = self._spread(value, channels, block).T.reshape(spread[at].shape).to(spread)
        # all of it is a sum of what isn't negative: its own rounding is a share of it
        spread = spread * (1 + self.unit + 2 * (self.longest + 8) * self.eps)
        return middle - spread, middle + spread

    def _blocks(self, value: int, channels: int) -> list[Block]:
        """Positions in blocks: those at a border apart, whose windows can be trimmed."""
        positions = tuple(self.program.shapes[value][1:])
        windows = {value: Window(*((n,) * len(positions) for n in (1, 0, 1)))}
        inner: Block = tuple((0, n) for n in positions)
        for op in self.path:
            window, shape = windows[op.target], self.program.shapes[op.target]
            if isinstance(op, Conv):
                here = window.inner(shape[1:], positions)
                inner = tuple((max(a, c), max(a, c, min(b, d))) for (a, b), (c, d) in zip(inner, here, strict=True))
                window = window.through(op.layer.geometry)
            for source in op.sources:
                windows[source] = windows[source] | window if source in windows else window
            self.longest = max(self.longest, self.program.shapes[op.sources[0]][0] * math.prod(window.size))
        each = max(1, round((AT_ONCE / (channels * self.longest)) ** (1 / len(positions))))
        cuts = [sorted({0, a, b, n, *range(a, b, each)}) for n, (a, b) in zip(positions, inner, strict=True)]
        return list(itertools.product(*(itertools.pairwise(c) for c in cuts)))

    def _spread(self, value: int, channels: Tensor, block: Block) -> Tensor:
        """Half the width of the bounds of a block: (positions, channels)."""
        shapes, dims = self.program.shapes, len(block)
        eye = torch.eye(shapes[value][0], dtype=self.rough)[channels]
        known = {value: (eye.view(1, len(eye), *[1] * dims, -1), Window((1,) * dims, (0,) * dims, (1,) * dims))}
        spread = torch.zeros(math.prod(b - a for a, b in block), len(channels), dtype=self.dtype)
        for op in self.path:
            rows, window = known.pop(op.target)
            rows, window = window.trimmed(rows, shapes[op.target][1:], block)
            spread += self._paid(op.target, rows, window, block)
            for source, row, place in self._through(op, rows, window, block):
                if source in known:
                    other, its = known[source]
                    both = place | its
                    row, place = place.padded(row, both) + its.padded(other, both), both
                    spread += self.unit * self._paid(source, row, place, block, self.far)
                known[source] = (row, place)
        for source, (rows, window) in known.items():
            rows, window = window.trimmed(rows, shapes[source][1:], block)
            spread += self._paid(source, rows, window, block)
        return spread

    def _paid(self, value: int, rows: Tensor, window: Window, block: Block, cost: dict | None = None) -> Tensor:
        """|rows|·cost, (positions, channels)."""
        cost = (self.cost if cost is None else cost)[value][0]
        values = (window.over(cost, block).flatten(1) * (1 + self.unit)).to(self.rough)
        rows = rows.abs().flatten(2)
        found = values @ rows[0].T if len(rows) == 1 else torch.matmul(rows, values[:, :, None])[..., 0]
        return found.to(self.dtype)

    def _through(self, op: Op, rows: Tensor, window: Window, block: Block) -> list[tuple[int, Tensor, Window]]:
        """Rows' way back through an operation: (source, rows, window) for each source."""
        if isinstance(op, Bend):
            return [(op.sources[0], rows * window.over(self.slopes[op.target], block)[:, None], window)]
        if isinstance(op, Sum):
            return [(s, rows if sign > 0 else -rows, window) for s, sign in zip(op.sources, op.signs, strict=True)]
        g, size = op.layer.geometry, tuple(op.outputs[1:])
        if not window.inside(size, block):  # there is no output outside: a row must not go back from there
            rows = rows * window.over(rows.new_ones(1, *size), block)[:, None]
        weight = self.weights[op.target]
        if op.pointwise and all(s == 1 for s in g.stride):
            return [(op.sources[0], rows * weight.flatten(), window.through(g))]
        if _in_taps(g):
            return [(op.sources[0], *self._by_taps(op, rows, window, block))]
        first = rows.flatten(0, 1).movedim(-1, 1)
        made = TRANSPOSED[g.dims](first, weight, None, g.stride, 0, 0, g.groups, g.dilation).movedim(1, -1)
        return [(op.sources[0], made.reshape(*rows.shape[:2], *made.shape[1:]), window.through(g))]

    def _by_taps(self, op: Conv, rows: Tensor, window: Window, block: Block) -> tuple[Tensor, Window]:
        """A transposed convolution as one matrix product for each tap of the kernel, without what falls outside."""
        g, weight = op.layer.geometry, self.weights[op.target]
        place = window.through(g)
        part = place.reaching(tuple(op.inputs[1:]), block)
        sizes = (end - before for before, end in part)
        made = torch.zeros(*rows.shape[:2], *sizes, g.inputs, dtype=self.dtype)
        for tap in itertools.product(*map(range, g.kernel)):
            taken, put = [], []
            for i, step, width, (before, end) in zip(tap, g.dilation, window.size, part, strict=True):
                first, last = max(0, before - i * step), min(width, end - i * step)
                taken.append(slice(first, max(first, last)))
                put.append(slice(first + i * step - before, max(first, last) + i * step - before))
            some = rows[(..., *taken, slice(None))]
            if some.numel():
                made[(..., *put, slice(None))] += (some.flatten(0, -2) @ weight[tap]).view(*some.shape[:-1], -1)
        return made.to(self.rough), place.cut(part)


def _in_taps(g: Geometry) -> bool:
    """Whether a layer's way back is taken tap by tap."""
    return g.inputs >= WIDE and g.groups == 1 and set(g.stride) == {1}
