"""What is known of a network's units while they are analysed: points seen, bounds proved, and what is still open."""

from __future__ import annotations

import math
import time
from functools import cached_property

import torch
from torch import Tensor

from linl.boxes import Box
from linl.crown import Pass
from linl.program import Bend, Program
from linl.ranges import Range
from linl.states import PROOFS, UNDECIDED, UNSTABLE, Stability
from linl.witnesses import Witnesses

Question = tuple[int, float, bool]
"""A unit, a bend, and whether it is to be above it (or below)."""
RESTARTS = 16  # points by chance that each unit left is attacked from


class TimeIsUpError(Exception):
    """The time limit was met."""


class Evidence:
    """What is known of every unit, and the ways to learn more that are cheap.

    Args:
        read: the network.
        box: the domain.
        method: as `linl.stability.analyse` takes it.
        limit: seconds for all, or None.
        seed: of points by chance.

    Attributes:
        state: that an analysis ends with.
        first: the last whole walk, with the ranges that it found.
    """

    def __init__(self, read: Program, box: Box, method: str, limit: float | None, seed: int) -> None:
        self.program, self.box, self.limit = read, box, limit or math.inf
        self.began = time.perf_counter()
        self.generator = torch.Generator().manual_seed(seed)
        self.first: Pass | None = None
        counts = [read.shapes[op.sources[0]].numel() for op in read.bends]
        inf = [torch.full((n,), torch.inf, dtype=torch.float64) for n in counts]
        self.state = Stability(
            names=[op.name for op in read.bends], shapes=[read.shapes[op.sources[0]] for op in read.bends], box=box,
            codes=[torch.full((n,), UNDECIDED, dtype=torch.int8) for n in counts],
            proofs=[torch.zeros(n, dtype=torch.int8) for n in counts], lower=[-t for t in inf], upper=inf,
            when=[torch.full((n,), torch.nan) for n in counts], witnesses=Witnesses(read, box), method=method,
            fingerprint=read.fingerprint(),
        )  # fmt: skip

    def go_on_from(self, state: Stability) -> None:
        """Takes over what an earlier analysis settled."""
        mine = self.state
        state.refuse_other(mine.fingerprint)
        if not (torch.equal(state.box.lower, self.box.lower) and torch.equal(state.box.upper, self.box.upper)):
            raise ValueError("the state given is of another box: leave it out")
        for name in ("codes", "proofs", "lower", "upper", "when"):
            setattr(mine, name, [t.clone() for t in getattr(state, name)])
        mine.witnesses, mine.shares = state.witnesses.copy(self.program), dict(state.shares)
        mine.trees, mine.seconds = dict(state.trees), dict(state.seconds)

    def left(self) -> float:
        """Seconds until the limit.

        Raises:
            TimeIsUpError: there are none.
        """
        left = self.limit - (time.perf_counter() - self.began)
        if left <= 0:
            raise TimeIsUpError
        return left

    def seen(self) -> int:
        """How many units have been seen on two pieces."""
        return sum(int(self.state.witnesses.unstable(op.site).sum()) for op in self.program.bends)

    def attack(self, site: int, units: Tensor, starts: Tensor, sign: float) -> None:
        """Ascent (sign 1) or descent from each unit's own start, then, for those left, from points by chance."""
        if len(self.program.bends[site].pieces.bends) == 1:  # two pieces: what was seen on that side needs no attack
            seen = self.state.witnesses.high[site] if sign > 0 else self.state.witnesses.low[site]
            units, starts = units[seen[units] < 0], starts[seen[units] < 0]
        if not len(units):
            return
        with torch.enable_grad():
            self.state.witnesses.attack(site, units, starts, torch.full((len(units),), sign))
        self.note_witnesses()
        units = units[torch.isin(units, self.undecided(site))]
        for some in units.split(max(1, (1 << 22) // (RESTARTS * self.box.lower.numel()))):
            if not len(some):
                return
            each = some.repeat_interleave(RESTARTS)
            points = self.box.sample(len(each), self.generator)
            with torch.enable_grad():
                self.state.witnesses.attack(site, each, points, torch.full((len(each),), sign))
            self.note_witnesses()
            self.left()

    def questions(self, op: Bend) -> list[Question]:
        """What has to be impossible for each undecided unit to be stable."""
        found, bends = [], op.pieces.bends
        low, high = self.state.witnesses.low[op.site], self.state.witnesses.high[op.site]
        units = self.undecided(op.site)
        middle = self._pieces_at_center[op.site][0]
        for unit in units.tolist():
            piece = int(middle[unit])
            if piece < 0:  # the centre lies on a bend: whichever side has been seen, else below
                piece = len(bends) if high[unit] >= 0 else 0
            ask = len(bends) > 1  # a point in the middle piece counts as low and as high
            if piece > 0 and (ask or low[unit] < 0):
                found.append((unit, bends[piece - 1], False))
            if piece < len(bends) and (ask or high[unit] < 0):
                found.append((unit, bends[piece], True))
        return found

    @cached_property
    def _pieces_at_center(self) -> list[Tensor]:
        return self.state.witnesses.pieces_at(self.box.center)

    def walk(self) -> Pass:
        return Pass(self.program, self.box)

    def clip(self, op: Bend, walk: Pass) -> None:
        """A walk's range cut to what is known already."""
        shape = self.state.shapes[op.site]
        lower, upper = (t[op.site].view(1, *shape) for t in (self.state.lower, self.state.upper))
        walk.ranges[op.sources[0]] = walk.ranges[op.sources[0]] & Range(lower, upper)

    def learn(self, op: Bend, walk: Pass, proof: str) -> None:
        """Takes over a walk's range, and settles the units that it shows stable."""
        site, state, range_ = op.site, self.state, walk.ranges[op.sources[0]]
        state.lower[site] = torch.maximum(state.lower[site], range_.lower[0].flatten())
        state.upper[site] = torch.minimum(state.upper[site], range_.upper[0].flatten())
        shape = state.shapes[site]
        piece = op.pieces.piece(state.lower[site].view(shape), state.upper[site].view(shape)).flatten()
        news = (piece >= 0) & (state.codes[site] == UNDECIDED)
        state.codes[site][news] = piece[news]
        state.proofs[site][news] = PROOFS.index(proof)
        state.when[site][news] = time.perf_counter() - self.began

    def undecided(self, site: int) -> Tensor:
        return (self.state.codes[site] == UNDECIDED).nonzero()[:, 0]

    def look(self, points: Tensor, source: str) -> None:
        """Points as witnesses for undecided units."""
        wanted = [codes == UNDECIDED for codes in self.state.codes]
        self.state.witnesses.look(points, source, wanted)
        self.note_witnesses()

    def note_witnesses(self) -> None:
        for site, codes in enumerate(self.state.codes):
            news = self.state.witnesses.unstable(site) & (codes == UNDECIDED)
            codes[news] = UNSTABLE
            self.state.when[site][news] = time.perf_counter() - self.began

    def corner_of(self, row: Tensor) -> Tensor:
        """Where rows (1, n, *shape) are least over the box."""
        return torch.where(row[0] < 0, self.box.upper[0], self.box.lower[0])

    def look_at_corners(self, row: Tensor) -> None:
        """The two corners where rows (1, n, *shape) are least and greatest; n may be 0."""
        if row.shape[1]:
            for corner in (self.corner_of(row), self.corner_of(-row)):
                self.look(corner, "corners")


def cut(known: Range, unit: int, up: bool, end: float) -> Range:
    """A range, one unit's upper (`up`) or lower end moved in."""
    at = known.lower.new_full((1, 1), end)
    return known.narrowed(torch.tensor([unit]), **{"upper" if up else "lower": at})
