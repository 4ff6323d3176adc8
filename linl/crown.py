"""Intervals forward, CROWN backward: a walk over a program that knows a range for every value.

Intervals go forward: |W|·radius around W·centre, layer by layer. CROWN (Zhang et al., NeurIPS 2018) goes
backward: each activation is put between two straight lines, so that a unit is bounded by a linear function of the
input, whose extreme over a box is known. Neither is always the tighter one: both are computed and intersected.
CROWN needs to be asked only for units whose sign the intervals leave open; no other unit's lines would change.

**Rounding.** A bound here holds for the network in exact arithmetic, *and* for its evaluation in the bounds' own
dtype. With u = ε/2, ε = torch.finfo(dtype).eps, a sum of n products is off by at most n·u·Σ|products|, in any order of
summation (Jeannerod and Rump, SIAM J. Matrix Anal. Appl. 34, 2013). A layer's range pays that twice, for its own
middle and for the evaluation that it has to hold. On the way back through CROWN a layer costs its evaluation's n and
the m products of a row's number; at the input, n for the row's product with it, once. `rounding` adds what casts,
additions and the sums of the slack itself take. In float64 this costs about 1e-12 of a bound. The float32 evaluation
of a network is *not* covered there, and of ends at zero that `linl.ties` settles only exact arithmetic is: a unit whose
range ends at 0 is inactive, and may be evaluated to 1e-17.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linl.boxes import Box
from linl.program import Bend, Conv, Dense, MaxPool, Op, Program, Reshape, Sum, picks
from linl.ranges import Range, outward
from linl.ties import settled
from linl.windows import Windows, is_map, way_back

DEPTH = 1  # activations that "local" goes back through
ROWS = 1 << 26  # numbers of a block of rows: 512 MiB in float64


class Pass:
    """One forward walk over a program, with what is known of each value so far."""

    def __init__(
        self, read: Program, box: Box, dtype: torch.dtype = torch.float64, back: bool = True, ties: bool = True
    ) -> None:
        """`back`: whether it will go backward too, which needs the rounding of each layer by itself; `ties`: whether
        ends that may be zero are settled in exact arithmetic."""
        self.program, self.dtype, self.eps = read, dtype, torch.finfo(dtype).eps
        self.back, self.ties = back, ties and dtype == torch.float64
        self.box = outward(box, dtype)
        self.ranges: dict[int, Range] = {0: self.box}
        self.cast = read.to(dtype)
        self.weights: dict[int, Op] = {op.target: op for op in self.cast.ops}
        self.slack: dict[int, Tensor | None] = {}  # what a unit of rows' weight at a value may be off by, per layer
        self.own: dict[int, Tensor] = {}  # the same of a layer that rows begin with: its weights, not rounded
        self.lines: dict[int, tuple[Tensor, ...]] = {}
        # where someone chose them for each row, by activation's target, (1, rows, *shape):
        self.chosen: dict[int, Tensor] = {}  # slopes below
        self.fixed: dict[int, Tensor] = {}  # pieces that units are assumed to be in, −1 where none
        self.pull: dict[int, Tensor] = {}  # multipliers of those assumptions

    def open(self, op: Bend) -> Tensor:
        """Flat positions of the units that, in some box, may leave their piece."""
        known = self.ranges[op.sources[0]]
        return (op.pieces.piece(known.lower, known.upper) < 0).any(0).flatten().nonzero()[:, 0]

    # --- forward ---------------------------------------------------------------------------------

    def step(self, op: Op) -> None:
        """The range of an operation's value from those it reads; intersected with what is known of it."""
        made, slack = self._forward(self.weights[op.target], [self.ranges[s] for s in op.sources])
        known = self.ranges.get(op.target)
        self.ranges[op.target] = made if known is None else made & known
        self.slack[op.target] = slack

    def _forward(self, op: Op, given: list[Range]) -> tuple[Range, Tensor | None]:
        """The range, and what (per unit of a row's weight) coming back through this operation may be off by."""
        first, eps = given[0], self.eps
        if isinstance(op, Dense | Conv):
            center, radius, largest = first.ball()
            ahead, back = op.fans
            middle, unit = op.forward(center), rounding(2 * ahead, eps)
            bias = 0 if op.bias is None else op.bias.abs()
            if not self.back:  # |W|·radius and its slack in one: both are |W| times something
                spread = op.forward(radius.add_(largest, alpha=unit), absolute=True) + unit * bias
                made, rows = Range(middle - spread, middle + spread), None
            else:
                spread, size = op.forward(torch.cat([radius, largest]), absolute=True).split(len(center))
                size, outputs = size + bias, math.prod(middle.shape[1:])
                slack = unit * size
                made = Range(middle - spread - slack, middle + spread + slack)
                self.own[op.target] = rounding(ahead, eps) * size
                # a row's product with this sums all outputs, and so does the one with the bias
                rows = rounding(ahead + back, eps) * (1 + outputs * eps) * size + outputs * eps * bias
            return (settled(op, first, largest, made, unit) if self.ties else made), rows
        if isinstance(op, Sum):
            lower, upper = 0, 0
            for sign, value in zip(op.signs, given, strict=True):
                lower = lower + (value.lower if sign > 0 else -value.upper)
                upper = upper + (value.upper if sign > 0 else -value.lower)
            size = sum(value.largest for value in given)
            if op.constant is not None:
                lower, upper, size = lower + op.constant, upper + op.constant, size + op.constant.abs()
            slack = 4 * eps * size
            constant = 0 if op.constant is None else size[0].numel() * eps * op.constant.abs()
            return Range(lower - slack, upper + slack), slack + constant
        if isinstance(op, Reshape):
            shape = self.program.shapes[op.target]
            made = Range(first.lower.reshape(-1, *shape), first.upper.reshape(-1, *shape))
            return made, torch.zeros_like(made.lower)
        if isinstance(op, MaxPool):  # the largest of what can be smallest, and of what can be largest: no rounding
            made = Range(op.forward(first.lower), op.forward(first.upper))
            return made, torch.zeros_like(made.lower)
        lower, upper = op.pieces.range(first.lower, first.upper)
        if not op.pieces.rounds:
            return Range(lower, upper), torch.zeros_like(lower)
        slack = 8 * eps * (op.pieces.largest_slope(lower) * (first.largest + op.pieces.offset) + op.pieces.offset)
        return Range(lower - slack, upper + slack), torch.zeros_like(slack)  # the lines bring their own

    # --- backward --------------------------------------------------------------------------------

    def tighten(self, value: int, units: Tensor, path: list[Op] | None = None) -> None:
        """CROWN bounds of some units (flat positions) of a value, intersected with its range.

        With a path, the last operations before the value, they start from what is known there, not from the input.
        """
        path = self.program.upto(value) if path is None else path
        if not len(units) or adds_nothing(path):
            return
        widest = max(math.prod(shape) for shape in self.program.shapes)
        for some in units.split(max(1, ROWS // (4 * widest * len(self.ranges[value].lower)))):
            self.ranges[value] = self.ranges[value].narrowed(some, *self.extremes(value, some, path))

    def tighten_locally(self, value: int, units: Tensor) -> None:
        """Bounds of some units from `DEPTH` activations back, intersected with the value's range."""
        path = way_back(self.cast, value, DEPTH)
        if not len(units) or adds_nothing(path):
            return
        if not is_map(self.cast, value, path):
            self.tighten(value, units, path[::-1])
            return
        shape, known = self.program.shapes[value], self.ranges[value]
        channels = (units // math.prod(shape[1:])).unique()
        near = {v for op in path for v in (op.target, *op.sources)}
        lower, upper = known.lower.clone(), known.upper.clone()
        for box in range(len(lower)):
            each = {v: Range(*(t[box][None] for t in (self.ranges[v].lower, self.ranges[v].upper))) for v in near}
            low, high = Windows(self.cast, path, each).extremes(value, channels)
            better = Range(lower[box, channels], upper[box, channels]) & Range(low, high)
            lower[box, channels], upper[box, channels] = better.lower, better.upper
        self.ranges[value] = Range(lower, upper)

    def exact(self, value: int) -> bool:
        """Whether the intervals are exact, but for rounding: one layer, and what works number by number."""
        path = self.program.upto(value)
        return adds_nothing(path) and not any(isinstance(op, Bend) for op in path)

    def extremes(self, value: int, units: Tensor, path: list[Op]) -> tuple[Tensor, Tensor]:
        """CROWN's lower and upper bounds of some units; (boxes, units) each."""
        both = torch.cat([torch.ones(len(units)), -torch.ones(len(units))])
        low, _ = self.least(value, units.repeat(2), both, path)
        return low[:, : len(units)], -low[:, len(units) :]

    def least(
        self,
        value: int,
        units: Tensor,
        signs: Tensor,
        path: list[Op] | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """CROWN's lower bound of sign·unit for some units of a value.

        Args:
            value: its number.
            units: flat positions, (n,).
            signs: 1 or −1, (n,).
            path: as in `tighten`.
            seen: is given the rows over every activation's output, by its target.

        Returns: the bounds (boxes, n), and the row over the input they come from, (boxes or 1, n, *shape): the
            corner that the bound is taken at has the upper end where the row is negative.
        """
        path = self.program.upto(value) if path is None else path
        like = self.ranges[0].lower
        signs = signs.to(like)
        last = self.weights[path[-1].target] if path else None  # no layer: units of the input itself
        if isinstance(last, Dense | Conv):  # the rows' way through the last layer is its weights
            shaped = signs.view(-1, *[1] * len(self.program.shapes[last.sources[0]]))
            rows = {last.sources[0]: (last.first(units) * shaped)[None]}
            low, row = self.lowest(rows, path[:-1], seen)
            if last.bias is not None:
                low = low + signs * last.bias.broadcast_to(self.program.shapes[value]).flatten()[units]
            # the row's product with the bias is one number here; its rounding is in the layer's own
            return low - self.own[value].flatten(1)[:, units], row
        rows = picks(units, self.program.shapes[value], like) * signs.view(-1, *[1] * len(self.program.shapes[value]))
        return self.lowest({value: rows[None]}, path, seen)

    def optimized(
        self, value: int, units: Tensor, signs: Tensor, steps: int = 20, rate: float = 0.2
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`least` with slopes below chosen for each unit by gradient ascent (Xu et al., ICLR 2021), for one box.

        Any slope between the least and the greatest of an activation's pieces gives a sound line, so every step's
        bound is sound and the best of all is kept.

        Args:
            value, units, signs: as in `least`.
            steps: of Adam.
            rate: its step length, in shares of the way from the least slope to the greatest.

        Returns: bounds (n,), and the shares they were had with: by activation's target (n, *shape), float32.
        """
        bends = [op for op in self.program.upto(value) if isinstance(op, Bend)]
        share = {op.target: self.first_share(op, len(units)).requires_grad_() for op in bends}
        best = torch.full((len(units),), -torch.inf, dtype=self.dtype)
        kept = {target: t.detach().float() for target, t in share.items()}
        steady = {target: (torch.zeros_like(t), torch.zeros_like(t)) for target, t in share.items()}
        for step in range(steps + 1):
            with torch.enable_grad():
                self.choose({target: rounded(t) for target, t in share.items()})
                bound, _ = self.least(value, units, signs)
            better = bound[0].detach() > best
            best = torch.where(better, bound[0].detach(), best)
            for target, t in share.items():
                kept[target][better] = t.detach().float()[better]
            if not share or step == steps or bool((best >= 0).all()):
                break
            slopes = torch.autograd.grad(bound.sum(), list(share.values()), allow_unused=True)
            for (target, t), slope in zip(share.items(), slopes, strict=True):
                if slope is not None:
                    ascend_(t, slope, *steady[target], step + 1, rate)
        self.choose({})
        return best, kept

    def choose(
        self, share: dict[int, Tensor], fixed: dict[int, Tensor] | None = None, pull: dict[int, Tensor] | None = None
    ) -> None:
        """For each row slopes below, and what is assumed of units; by activation's target, (n, *shape).

        Args:
            share: shares of the way from the least slope to the greatest.
            fixed: the piece (0 or 1, of two) that a unit is assumed to be in, −1 for none. The bounds then hold
                where the assumptions do.
            pull: multipliers of the assumptions (Wang et al., Beta-CROWN, NeurIPS 2021, section 3.2); what is below 0
                is one of the range's other end. Where nothing is assumed, of its lower end, and below 0 of its upper.
        """
        self.chosen, self.fixed, self.pull = {}, {}, {}
        for op in self.program.ops:
            if op.target in share:
                low, high = op.pieces.slope_range(self.ranges[0].lower)
                open_ = (op.pieces.piece(*self._ends(op)) < 0)[:, None]
                below = self.lines_of(op)[0]
                own = low + share[op.target].to(self.dtype)[None] * (high - low)
                self.chosen[op.target] = torch.where(open_, own, below)
        for target, pieces in (fixed or {}).items():
            self.fixed[target] = pieces[None]
            side = torch.where(pieces == 0, -1, 1)  # of what is at least the end, or at most
            self.pull[target] = (pull[target].to(self.dtype) * side)[None]

    def _ends(self, op: Bend) -> tuple[Tensor, Tensor]:
        known = self.ranges[op.sources[0]]
        return known.lower, known.upper

    def first_share(self, op: Bend, rows: int) -> Tensor:
        """The shares that CROWN's own slopes are, for each of some rows."""
        low, high = op.pieces.slope_range(self.ranges[0].lower)
        below = self.lines_of(op)[0][0]
        return ((below - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).expand(rows, *below.shape[1:]).clone()

    def lowest(
        self, rows: dict[int, Tensor], path: list[Op], seen: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """A lower bound of Σ rows·value over each box.

        Args:
            rows: for each value, (boxes or 1, n, *shape).
            path: the operations between the input and these values.
            seen: as in `least`.

        Returns: (boxes, n), and the row over the input.
        """
        total: Tensor | float = 0.0
        size: Tensor | float = 0.0  # of all that is summed: the sum itself is rounded, too
        like = next(iter(rows.values()))
        n = like.shape[1]
        for op in reversed(path):
            here = rows.pop(op.target, None)
            if here is None:
                continue
            op = self.weights[op.target]
            if seen is not None and isinstance(op, Bend):
                seen[op.target] = here
            lost = _dot(here.abs(), self.slack[op.target])
            total, size = total - lost, size + lost
            for source, sign, back, constant in self._back(op, here):
                total, size = total + constant, size + abs(constant)
                back = back if sign > 0 else -back
                if source in rows:
                    back = rows[source] + back
                    total = total - self.eps * _dot(back.abs(), self.ranges[source].largest)
                rows[source] = back
        for value, left in rows.items():  # the input, or where the path begins
            center, radius, largest = self.ranges[value].ball()
            at, around = _dot(left, center), _dot(left.abs(), radius)
            total = total + at - around - rounding(center[0].numel(), self.eps) * _dot(left.abs(), largest)
            size = size + at.abs() + around
        bound = total - 4 * (len(path) + 2) * self.eps * size
        shape = self.program.shapes[0]
        return bound.expand(len(self.ranges[0].lower), n), rows.get(0, like.new_zeros(1, n, *shape))

    def _back(self, op: Op, here: Tensor):
        """A row's way back through one operation: (source, sign, rows, constant) for each source."""
        if isinstance(op, Dense | Conv):
            back = op.backward(here.flatten(0, 1))
            constant = 0.0 if op.bias is None else _dot(here, op.bias.expand(self.program.shapes[op.target])[None])
            yield op.sources[0], 1, back.view(*here.shape[:2], *back.shape[1:]), constant
        elif isinstance(op, Sum):
            for i, (source, sign) in enumerate(zip(op.sources, op.signs, strict=True)):
                yield source, sign, here, 0.0 if i or op.constant is None else _dot(here, op.constant[None])
        elif isinstance(op, Reshape):
            yield op.sources[0], 1, here.reshape(*here.shape[:2], *self.program.shapes[op.sources[0]]), 0.0
        elif isinstance(op, MaxPool):
            yield self._back_from_max(op, here)
        else:
            below, low, above, high = self.lines_of(op)
            up, down = here.clamp(min=0), here.clamp(max=0)
            largest = self.ranges[op.sources[0]].largest[:, None]
            slack = 8 * self.eps * torch.maximum(below.abs(), above.abs()) * largest
            slack = slack + (here.shape[2:].numel() + 8) * self.eps * torch.maximum(low.abs(), high.abs())
            constant = _dot(up, low) + _dot(down, high) - _dot(up - down, slack)
            back = up * below + down * above
            pull = self.pull.get(op.target)
            if pull is not None:  # pull·(z − end) ≥ 0 wherever the assumptions hold
                bend, pieces = op.pieces.bends[0], self.fixed[op.target]
                low, high = (end[:, None] for end in self._ends(op))
                low, high = torch.where(pieces == 1, bend, low), torch.where(pieces == 0, bend, high)
                end = torch.where(pull > 0, low, torch.where(pull < 0, high, 0))
                back = back - pull
                constant = constant + _dot(pull, end)
                constant = constant - self.eps * (here.shape[2:].numel() + 8) * _dot(pull.abs(), largest + abs(bend))
            yield op.sources[0], 1, back, constant

    def _back_from_max(self, op: MaxPool, here: Tensor):
        """Below, a maximum is the number with the greatest lower bound; above, that number where no other can reach
        its lower bound, else the greatest upper bound of all."""
        known, inputs = self.ranges[op.sources[0]], self.program.shapes[op.sources[0]]
        low, at = op.largest(known.lower)
        alone = low >= self._second(op, known, at)
        high = self.ranges[op.target].upper
        up, down = here.clamp(min=0), here.clamp(max=0)
        straight = up + torch.where(alone[:, None], down, 0)
        bent = torch.where(alone[:, None], 0, down)
        boxes = max(len(here), len(at))
        index = at.flatten(2)[:, None].expand(boxes, here.shape[1], *at.flatten(2).shape[1:])
        rows = straight.flatten(3).expand(boxes, -1, -1, -1)
        back = rows.new_zeros(boxes, here.shape[1], inputs[0], math.prod(inputs[1:])).scatter_add(3, index, rows)
        # several windows may choose one number: their weights are added up
        slack = self.eps * math.prod(at.shape[2:]) * known.largest
        constant = _dot(bent, high) - _dot(back.view(*back.shape[:2], *inputs).abs(), slack)
        return op.sources[0], 1, back.view(*back.shape[:2], *inputs), constant

    @staticmethod
    def _second(op: MaxPool, known: Range, at: Tensor) -> Tensor:
        """The greatest upper bound in each window but the winner's."""
        upper = known.upper
        place = torch.arange(math.prod(upper.shape[2:]), dtype=upper.dtype).view(1, 1, *upper.shape[2:])
        values, places = op.windows(upper), op.windows(place, -1.0)
        mine = places == at[..., None].to(places.dtype)
        return torch.where(mine, -torch.inf, values).amax(-1)

    def lines_of(self, op: Bend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An activation's lines: slope and intercept below, slope and intercept above; (boxes, 1 or rows, *shape)."""
        if op.target not in self.lines:
            known = self.ranges[op.sources[0]]
            self.lines[op.target] = tuple(t[:, None] for t in op.pieces.lines(known.lower, known.upper))
        below, low, above, high = self.lines[op.target]
        if op.target in self.chosen:
            known = self.ranges[op.sources[0]]
            below = self.chosen[op.target]
            low, _ = op.pieces.band(below, known.lower[:, None], known.upper[:, None])
        if op.target in self.fixed:
            pieces = self.fixed[op.target]
            slope, offset = (torch.nan_to_num(t).to(below) for t in op.pieces.straight(pieces))
            sure = pieces >= 0
            below, above = torch.where(sure, slope, below), torch.where(sure, slope, above)
            low, high = torch.where(sure, offset, low), torch.where(sure, offset, high)
        return below, low, above, high


def rounding(products: int, eps: float) -> float:
    """What a sum of products may be off by, as a share of the sum of their magnitudes, which is rounded likewise; with
    room for a few more additions and casts.

    Args:
        products: how many; of two such sums that are compared both together.
        eps: of the dtype.
    """
    return (products + 16) * (eps / 2) * (1 + products * eps)


def adds_nothing(path: list[Op]) -> bool:
    """Whether the way back along a path can't be tighter than intervals: one layer mixes numbers, nothing branches."""
    mixing = [op for op in path if isinstance(op, Dense) or (isinstance(op, Conv) and not op.pointwise)]
    return len(mixing) <= 1 and not any(len(op.sources) > 1 for op in path)


def rounded(value: Tensor) -> Tensor:
    """A number as it will be kept, in float32; its gradient as if it weren't rounded."""
    return value + (value.detach().float().to(value.dtype) - value.detach())


@torch.no_grad()
def ascend_(
    value: Tensor, slope: Tensor, mean: Tensor, square: Tensor, step: int, rate: float, most: float = 1.0
) -> None:
    """One step of Adam within [0, most]; torch's own costs three seconds of imports at its first use."""
    mean.lerp_(slope, 0.1)
    square.lerp_(slope.square(), 0.001)
    value += rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    value.clamp_(0, most)


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Σ over positions: rows (B or 1, n, *shape) with values (B or 1, [1 or n,] *shape); (B or 1, n)."""
    if values.ndim == rows.ndim:
        if values.shape[1] > 1:
            return (rows * values).flatten(2).sum(2)
        values = values[:, 0]
    flat = values.flatten(1)
    if len(rows) == len(flat) == 1:
        return (rows[0].flatten(1) @ flat[0])[None]
    return torch.matmul(rows.flatten(2), flat[:, :, None])[..., 0]
