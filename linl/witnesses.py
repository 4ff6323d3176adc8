"""Inputs at which a unit is seen in one piece of its activation, and in another: proof that it isn't stable.

Points are looked for in float32, cheaply, and believed only after an interval evaluation in float64 at that very
point, whose rounding is accounted for. Where they come from: given images, points and corners by chance, the
corners at which linear bounds take their extremes, and gradient ascent from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linl.boxes import Box
from linl.crown import Pass
from linl.program import Bend, Program

SOURCES = ("images", "samples", "corners", "attack", "solver")
"""Where a witness came from, by number."""
CHUNK = 1 << 24  # numbers of a block of points


class Witnesses:
    """For every unit, the points at which it was lowest and highest, as far as they lie in different pieces.

    Attributes:
        points: (n, *shape) float64, inside the box.
        low, high: for each activation, (units,) int32: number of a point in a lower, in a higher piece; −1 unknown.
        source: for each activation, (units,) int8: where the second of the two came from; −1 while not both are known.
    """

    def __init__(self, program: Program | None, box: Box) -> None:
        self.program, self.box = program, box
        self.light = None if program is None else program.to(torch.float32)
        counts = [] if program is None else [program.shapes[op.sources[0]].numel() for op in program.bends]
        self.points = torch.zeros(0, *box.shape, dtype=torch.float64)
        self.low = [torch.full((n,), -1, dtype=torch.int32) for n in counts]
        self.high = [torch.full((n,), -1, dtype=torch.int32) for n in counts]
        self.source = [torch.full((n,), -1, dtype=torch.int8) for n in counts]

    def copy(self, program: Program) -> Witnesses:
        """The same for another reading of the same network."""
        made = Witnesses(program, self.box)
        made.points = self.points
        for name in ("low", "high", "source"):
            setattr(made, name, [t.clone() for t in getattr(self, name)])
        return made

    def unstable(self, site: int) -> Tensor:
        """Units seen in two pieces; (units,) bool."""
        return self.source[site] >= 0

    def look(self, points: Tensor, source: str, wanted: list[Tensor] | None = None) -> None:
        """Runs points (n, *shape) through the network and keeps those that show something new.

        Args:
            points: inside the box.
            source: one of `SOURCES`.
            wanted: for each activation, the units that matter, bool; None for all.
        """
        step = max(1, CHUNK // max(shape.numel() for shape in self.program.shapes))
        for some in points.split(step):
            self._look(some, SOURCES.index(source), wanted)

    def _look(self, points: Tensor, source: int, wanted: list[Tensor] | None) -> None:
        with torch.no_grad():
            values = self.light.run(points.float())
        found: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for op in self.program.bends:
            missing = ~self.unstable(op.site)
            if wanted is not None:
                missing &= wanted[op.site]
            units = missing.nonzero()[:, 0]
            if len(units):
                units, *ends = self._promising(op, units, values[op.sources[0]].flatten(1))
            if len(units):
                found.append((op.site, units, *ends))
        if not found:
            return
        used = torch.cat([torch.cat([low, high]) for _, _, low, high in found]).unique()
        exact = self.box.clip(points[used].double())  # a float32 number need not be inside of a thin box
        place = torch.zeros(len(points), dtype=torch.long)
        place[used] = torch.arange(len(used))
        pieces = self.pieces_at(exact)
        taken = torch.zeros(len(used), dtype=torch.bool)
        news = []
        for site, units, low, high in found:
            for at, store, better in ((place[low], self.low, -1), (place[high], self.high, 1)):
                piece = pieces[site][at, units]
                first, last = 0, len(self.program.bends[site].pieces.bends)
                shows = (piece >= 0) & ((piece < last) if better < 0 else (piece > first)) & (store[site][units] < 0)
                taken[at[shows]] = True
                news.append((store[site], units[shows], at[shows]))
        number = len(self.points) + taken.cumsum(0) - 1
        self.points = torch.cat([self.points, exact[taken]])
        for store, units, at in news:
            store[units] = number[at].int()
        for site, units, _, _ in found:
            both = (self.low[site][units] >= 0) & (self.high[site][units] >= 0)
            self._settle(site, units[both], source)

    def _promising(self, op: Bend, units: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Units that may show something new in `seen` (n, all units), and where each of them is least and greatest.

        Most looks late in an analysis show nothing, and float32 says so at once: what it sees in one piece, a
        thousandth of the layer's largest value away from any other, needs no interval evaluation.
        """
        (least, low), (most, high) = seen[:, units].min(0), seen[:, units].max(0)
        bends, near = op.pieces.bends, 1e-3 * seen.abs().amax()
        new = (self.low[op.site][units] < 0) & (least - near < bends[-1])
        new |= (self.high[op.site][units] < 0) & (most + near > bends[0])
        return units[new], low[new], high[new]

    def _settle(self, site: int, units: Tensor, source: int) -> None:
        """Two points are a witness if their pieces differ."""
        if not len(units):
            return
        if not len(self.program.bends[site].pieces.bends) > 1:  # a lower and a higher piece of two: they do
            self.source[site][units] = source
            return
        pair = torch.stack([self.low[site][units], self.high[site][units]]).long()
        points, back = pair.unique(return_inverse=True)  # many units share a point
        pieces = self.pieces_at(self.points[points])[site]
        here = pieces[back, units]
        self.source[site][units[here[0] != here[1]]] = source
        same = units[here[0] == here[1]]  # both in a middle piece: keep looking for either
        self.low[site][same] = self.high[site][same] = -1

    def pieces_at(self, points: Tensor) -> list[Tensor]:
        """For each activation, the piece that each unit is in at each point, (n, units) int8; −1 at a bend.

        From intervals around the point in float64, so rounding can't make a piece up; a value that may lie on a
        bend counts for neither side.
        """
        found: list[list[Tensor]] = [[] for _ in self.program.bends]
        step = max(1, CHUNK // (8 * max(shape.numel() for shape in self.program.shapes)))
        with torch.no_grad():
            for some in points.split(step):
                walk = Pass(self.program, Box(some, some, batch=True), back=False, ties=False)
                for op in self.program.ops:
                    if isinstance(op, Bend):
                        known = walk.ranges[op.sources[0]]
                        strictly = _inside(op, known.lower, known.upper)
                        found[op.site].append(strictly.flatten(1))
                        if op is self.program.bends[-1]:
                            break
                    walk.step(op)
        return [torch.cat(parts) if parts else torch.zeros(0, 0, dtype=torch.int8) for parts in found]

    def attack(self, site: int, units: Tensor, starts: Tensor, signs: Tensor, steps: int = 30) -> None:
        """Signed gradient steps that drive units up (sign 1) or down (−1), each from a start of its own.

        Args:
            site: the activation.
            units: flat positions, (n,).
            starts: (n, *shape).
            signs: (n,).
            steps: gradient steps; their length falls from a quarter of the box to nothing.
        """
        op = self.light.bends[site]
        path = Program(self.light.upto(op.sources[0]), self.light.shapes, op.sources[0])
        lower, upper = self.box.lower[0].float(), self.box.upper[0].float()
        at, signs = self.box.clip(starts.float()), signs.float()
        for step in range(steps):
            at = at.detach().requires_grad_()
            value = path.run(at)[op.sources[0]].flatten(1).gather(1, units[:, None])[:, 0]
            slope = torch.autograd.grad((signs * value).sum(), at)[0]
            length = 0.25 * (upper - lower) * (1 - step / steps)
            moved = self.box.clip((at + length * slope.sign()).detach())
            if torch.equal(moved, at):  # at corners, as it would be after every later step
                break
            at = moved
        self.look(at.detach(), "attack")


def _inside(op: Bend, lower: Tensor, upper: Tensor) -> Tensor:
    """The piece whose inside holds [lower, upper], −1 where it touches a bend; int8."""
    found = torch.full(lower.shape, -1, dtype=torch.int8)
    edges = op.pieces.edges
    for number in range(len(op.pieces.slopes)):
        found[(lower > edges[number]) & (upper < edges[number + 1])] = number
    return found
