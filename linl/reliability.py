"""Which unit to cut at, learned while cutting: reliability branching on linear programs over triangles.

A part of the domain that its program leaves open is cut at an open ReLU. Which one decides whether ten parts are a
proof or ten thousand aren't. So both halves are tried, a few steps of the dual simplex each, until a unit's gains are
known well enough to be guessed from how far it is from either piece (Achterberg, Koch and Martin, Operations Research
Letters 33, 2005). Depth first: what changes between two programs is little, and the solver goes on from the last.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from linl.triangles import Solved, Triangles

KNOWN = 1  # trials of either half, after which a unit's gains are guessed
AHEAD = 3  # units in a row that are no better than the best so far, before that one is taken
STEPS = 20  # of the dual simplex, for a trial
LEAST = 1e-6  # of what is asked, in a product of two gains, so that the other still counts


@dataclass
class Part:
    """A part of the domain, with what the solver's last word says to bound it with.

    Attributes:
        fixed: (units,) int8, the piece that a unit is assumed to be in, −1 for none.
        share, pull: slopes below and multipliers, as in `linl.triangles.Solved`.
    """

    fixed: np.ndarray
    share: dict[int, Tensor]
    pull: dict[int, Tensor]


@dataclass
class _Open:
    """A part that is to be solved: `unit` was cut last, `far` from this piece where the whole's value was `least`."""

    fixed: np.ndarray
    unit: int = -1
    far: float = 0.0
    least: float = -math.inf


class Tree:
    """The search for one question: is sign·unit nowhere below `end`?

    Args:
        program: others may ask it something else in between.
        unit, sign, end: the question.
        look: takes one input (1, *shape); whether the question is settled by it.

    Attributes:
        parts: those that hold by the solver's word, and are for someone else to bound.
        solved: how many parts were.
    """

    def __init__(
        self, program: Triangles, unit: int, sign: float, end: float, look: Callable[[Tensor], bool] | None = None
    ) -> None:
        self.program, self.unit, self.sign, self.end, self.look = program, unit, sign, end, look
        units = len(program.open)
        self.open, self.parts, self.solved = [_Open(np.full(units, -1, dtype=np.int8))], [], 0
        # to either piece: what units gained for a share moved, how often, and of all together beside the first guess
        self.gains, self.trials, self.ratio = np.zeros((2, units)), np.zeros((2, units), dtype=int), np.zeros((2, 2))

    def grow(self, until: float) -> bool:
        """Goes on until no part is open; whether there is none then: time is up, a point was found, or there is no
        answer and nothing to cut.

        Args:
            until: by `time.perf_counter`.
        """
        self.program.ask(self.unit, self.sign)
        while self.open:
            if time.perf_counter() > until:
                return False
            part = self.open.pop()
            solved = self.program.solve(part.fixed, _left(until))
            if solved is None:  # no time, or no answer: there may be one for its halves
                if self.program.late or not self.cut_anywhere(part.fixed):
                    self.open.append(part)
                    return False
                continue
            self.solved += 1
            if part.unit >= 0:
                self._learn(part.unit, int(part.fixed[part.unit]), part.far, solved.least - part.least)
            if solved.least >= self.end:
                self.parts.append(Part(part.fixed, solved.share, solved.pull))
            elif self.look and self.look(solved.point[None]):
                self.open.append(part)  # settled otherwise, and not by this part
                return False
            elif solved.apart.any():
                self._cut(part.fixed, solved, until)
            elif not self.cut_anywhere(part.fixed):
                self.open.append(part)
                return False
        return True

    def cut_anywhere(self, fixed: np.ndarray) -> bool:
        """Cuts a part, (units,) int8, of which the solver knows no better unit to cut at; whether there is one."""
        left = self.program.open & (fixed < 0)
        if left.any():
            unit = int(np.argmax(np.where(left, np.minimum(self.program.above, self.program.below), -1.0)))
            self.open += [_Open(_with(fixed, unit, piece)) for piece in (0, 1)]
        return bool(left.any())

    def raised(self, count: int, until: float) -> list[Part]:
        """So many parts at most, always the lowest cut: the least of their values is what is known of the whole's.

        Args:
            count: of parts.
            until: by `time.perf_counter`.
        """
        self.program.ask(self.unit, self.sign)
        number = itertools.count()

        def solved() -> tuple[float, int, np.ndarray, Solved] | None:
            fixed = self.open.pop().fixed
            found = self.program.solve(fixed, _left(until))
            return found and (found.least, next(number), fixed, found)

        parts = [whole for whole in [solved()] if whole]
        while 0 < len(parts) < count and parts[0][3].apart.any():
            self._cut(parts[0][2], parts[0][3], until)
            halves = [solved(), solved()]
            if not all(halves):
                break
            heapq.heapreplace(parts, halves[0])
            heapq.heappush(parts, halves[1])
        return [Part(fixed, found.share, found.pull) for _, _, fixed, found in parts]

    def _cut(self, fixed: np.ndarray, solved: Solved, until: float) -> None:
        """At the unit that lifts both halves most, or the first that leaves only one of them open."""
        units = np.flatnonzero(solved.apart.all(0))
        floor = LEAST * self.program.price
        guessed = np.prod([np.maximum(self._expected(piece, solved)[units], floor) for piece in (0, 1)], axis=0)
        basis, best, highest, worse = self.program.solver.getBasis(), int(units[0]), -1.0, 0
        for place in np.argsort(-guessed):
            unit, score = int(units[place]), guessed[place]
            if self.trials[:, unit].min() < KNOWN and time.perf_counter() < until:
                least = [self._tried(fixed, unit, piece, solved, basis, until) for piece in (0, 1)]
                if max(least) >= self.end:
                    best = unit
                    break
                score = math.prod(max(value - solved.least, floor) for value in least)
            best, highest, worse = (unit, score, 0) if score > highest else (best, highest, worse + 1)
            if worse >= AHEAD:
                break
        far = solved.apart[:, best]
        halves = [_Open(_with(fixed, best, piece), best, float(far[piece]), solved.least) for piece in (0, 1)]
        expected = [self._expected(piece, solved)[best] for piece in (0, 1)]
        self.open += sorted(halves, key=lambda half: -expected[half.fixed[best]])  # the harder half is next

    def _tried(self, fixed: np.ndarray, unit: int, piece: int, solved: Solved, basis, until: float) -> float:
        """A half's least value, as far as a few steps tell; what was assumed before is in place again."""
        self.program.assume(_with(fixed, unit, piece))
        least = self.program.least(_left(until), STEPS)
        self.program.assume(fixed)
        self.program.solver.setBasis(basis)
        far, gain = float(solved.apart[piece, unit]), least - solved.least
        self._learn(unit, piece, far, gain)
        if math.isfinite(gain):
            self.ratio[piece] += max(gain, 0.0), far * solved.weight[unit]
        return least

    def _learn(self, unit: int, piece: int, far: float, gain: float) -> None:
        if far > 0 and math.isfinite(gain):
            self.gains[piece, unit] += max(gain, 0.0) / far
            self.trials[piece, unit] += 1

    def _expected(self, piece: int, solved: Solved) -> np.ndarray:
        """By how much a piece assumed is guessed to lift the least value, unit by unit: by its gains, or its weight."""
        gains, trials, (lifted, guessed) = self.gains[piece], self.trials[piece], self.ratio[piece]
        first = solved.weight * (lifted / guessed if lifted > 0 and guessed > 0 else 1.0)
        return solved.apart[piece] * np.where(trials > 0, gains / np.maximum(trials, 1), first)


def _with(fixed: np.ndarray, unit: int, piece: int) -> np.ndarray:
    half = fixed.copy()
    half[unit] = piece
    return half


def _left(until: float) -> float:
    """Seconds; never none at all, so that the solver is the one to say that its time is up."""
    return max(1e-3, until - time.perf_counter())
