"""The dear ways to settle units: slopes and linear programs, branch and bound, and a mixed-integer solver."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from linl.branching import Branching
from linl.crown import Pass
from linl.evidence import Evidence, Question, cut
from linl.milp import Model, NoModel
from linl.program import Bend
from linl.ranges import Range
from linl.states import UNDECIDED
from linl.triangles import relaxed

ROUNDS = ((2.0, 0.0), (10.0, 10.0), (30.0, math.inf))  # seconds of branch and bound and of the solver, for a question
PARTS, EACH = 12, 0.5  # of the box, for the ends of a unit's range, and seconds for each question that rests on them
FEW, SMALL = 8, 20_000  # questions, and numbers of the layers before, up to which linear programs are the quicker way
KEPT = 1 << 28  # numbers that searches under way may keep for later, all together


class Settling:
    """Whatever is left to try, layer by layer, for what points and plain bounds leave undecided.

    Args:
        known: it is added to.
        unit_limit: seconds of the solver for one question, and half as many of branch and bound.
    """

    def __init__(self, known: Evidence, unit_limit: float) -> None:
        self.known, self.unit_limit = known, unit_limit
        self.program, self.box, self.state = known.program, known.box, known.state

    def solve(self) -> None:
        """Optimized slopes for what is left; then sharper bounds of all before it, branch and bound, and the solver."""
        self._refine(self._optimize)
        if not self.state.decided:
            last = max(site for site, codes in enumerate(self.state.codes) if (codes == UNDECIDED).any())
            self._refine(self._settle, last)

    def _refine(self, work, last: int = -1) -> None:
        """One walk, layer by layer: `work` on each activation's undecided units, sharper bounds before the last."""
        walk, known = self.known.walk(), {}
        for op in self.program.ops:
            if isinstance(op, Bend):
                value = op.sources[0]
                self.known.clip(op, walk)
                before = self.known.first.ranges.get(value)
                if before is not None:
                    walk.ranges[value] = walk.ranges[value] & before
                if len(self.known.undecided(op.site)):
                    work(op, walk, known)
                if op.site < last:
                    self._sharpen(op, walk)
                    self._sharpen_by_parts(op, walk)
                self.known.clip(op, walk)
                known[op.site] = walk.ranges[value]
            with torch.no_grad():
                walk.step(op)

    def _settle(self, op: Bend, walk: Pass, known: dict[int, Range]) -> None:
        """All that is left to try for an activation's undecided units.

        Either of branch and bound and the solver may take forever over what the other does at once, and one unit over
        what is nothing for another, so all are tried a little before any gets more; branch and bound comes first,
        since its proofs are checked without a solver.
        """
        self._optimize(op, walk, known)
        notes: list[str] = []
        made = cache(lambda: relaxed(walk, op.sources[0]))
        searches: dict[Question, Branching] = {}  # by linear programs: a later round goes on with them
        try:
            for branching, asking in ROUNDS:
                self._branch(op, walk, min(branching, self.unit_limit / 2), searches, made)
                if len(self.known.undecided(op.site)) and asking:
                    notes = self._ask(op, walk, known, min(asking, self.unit_limit))
        finally:
            self.state.notes += notes if len(self.known.undecided(op.site)) else []

    def _optimize(self, op: Bend, walk: Pass, known: dict[int, Range]) -> None:
        """CROWN with slopes of each unit's own, for the sides that are open."""
        questions, value = self.known.questions(op), op.sources[0]
        if not questions or walk.exact(value):
            return
        questions = self.by_program(op, walk, questions)
        size = self._rows_at_once(value)
        for start in range(0, len(questions), size):
            some = questions[start : start + size]
            units = torch.tensor([unit for unit, _, _ in some])
            signs = torch.tensor([-1.0 if up else 1.0 for _, _, up in some])
            bound, shares = walk.optimized(value, units, signs)
            for i, (unit, bend, up) in enumerate(some):
                if (-bound[i] > bend) if up else (bound[i] < bend):
                    continue  # what proves nothing isn't used further on: a certificate needs no slopes for it
                walk.ranges[value] = cut(walk.ranges[value], unit, up, (-bound[i] if up else bound[i]).item())
                kept = {target: share[i] for target, share in shares.items()}
                self.state.shares[op.site, unit, -1 if up else 1] = kept
            self.known.left()
        with torch.no_grad():
            self.known.learn(op, walk, "optimized")

    def by_program(self, op: Bend, walk: Pass, questions: list[Question]) -> list[Question]:
        """A few questions about a small network by linear programs, in a tenth of the time that gradient ascent takes;
        returns those that ascent may still settle, which knows no more than the program does. Of what the program
        says slopes alone are used: multipliers need branch and bound's form of a proof."""
        value, left = op.sources[0], []
        made = relaxed(walk, value, SMALL) if len(questions) <= FEW else None
        if made is None:
            return questions
        nothing = torch.full(made.open.shape, -1, dtype=torch.int8)
        for unit, bend, up in questions:
            sign = -1.0 if up else 1.0
            solved = made.ask(unit, sign).solve(nothing, self.known.left())
            if solved is None:
                left.append((unit, bend, up))
                continue
            if solved.point is not None and solved.least < sign * bend:  # else no point of the box is past the bend
                self.known.look(solved.point[None], "solver")
            walk.choose({target: share[None] for target, share in solved.share.items()})
            bound = walk.least(value, torch.tensor([unit]), torch.tensor([sign]))[0].item()
            walk.choose({})
            if bound >= sign * bend:
                walk.ranges[value] = cut(walk.ranges[value], unit, up, sign * bound)
                self.state.shares[op.site, unit, int(sign)] = solved.share
                with torch.no_grad():
                    self.known.learn(op, walk, "optimized")
            elif solved.least >= sign * bend:
                left.append((unit, bend, up))
        return left

    def _rows_at_once(self, value: int) -> int:
        before = [op for op in self.program.upto(value) if isinstance(op, Bend)]
        return max(1, (1 << 23) // max(1, sum(self.program.shapes[op.sources[0]].numel() for op in before)))

    def _sharpen(self, op: Bend, walk: Pass) -> None:
        """Optimized slopes for both sides of every open unit, whose range later bounds and the solver rest on."""
        value, opened = op.sources[0], walk.open(op)
        if walk.exact(value):
            return
        for units in opened.split(self._rows_at_once(value)) if len(opened) else ():  # of nothing, split gives one part
            for sign in (1, -1):
                bound, shares = walk.optimized(value, units, torch.full((len(units),), float(sign)))
                walk.ranges[value] = walk.ranges[value].narrowed(
                    units, **({"lower": bound[None]} if sign > 0 else {"upper": -bound[None]})
                )
                for i, unit in enumerate(units.tolist()):
                    self.state.shares[op.site, unit, sign] = {target: share[i] for target, share in shares.items()}
                self.known.left()
        with torch.no_grad():
            self.known.learn(op, walk, "optimized")

    def _sharpen_by_parts(self, op: Bend, walk: Pass) -> None:
        """The ends of every open unit's range by a few parts of the box, where many questions rest on them."""
        value = op.sources[0]
        behind = sum(int((codes == UNDECIDED).sum()) for codes in self.state.codes[op.site + 1 :])
        if behind <= FEW or walk.exact(value):
            return
        made = cache(lambda: relaxed(walk, value))
        until = time.perf_counter() + min(EACH * behind, self.known.left() / 4)
        for unit, sign in product(walk.open(op).tolist(), (1, -1)):
            seconds = until - time.perf_counter()
            search = Branching(walk, value, unit, float(sign), math.inf, lambda points: False, made)
            if seconds <= 0 or made() is None:
                break
            found = search.raised(PARTS, seconds)
            if found is None:
                continue
            leaves, end = found
            known = walk.ranges[value]
            if end > (known.lower if sign > 0 else -known.upper).flatten()[unit]:
                walk.ranges[value] = cut(known, unit, sign < 0, sign * end)
                self.state.trees[op.site, unit, sign] = leaves
        with torch.no_grad():
            self.known.learn(op, walk, "branching")

    def _search(self, op: Bend, walk: Pass, question: Question, made: Callable) -> Branching:
        unit, bend, up = question
        codes, sign = self.state.codes[op.site], -1 if up else 1

        def settled(points: Tensor) -> bool:
            if len(points):
                self.known.look(points, "corners")
            return bool(codes[unit] != UNDECIDED)

        return Branching(walk, op.sources[0], unit, float(sign), sign * bend, settled, made)

    def _branch(self, op: Bend, walk: Pass, most: float, searches: dict[Question, Branching], made: Callable) -> None:
        """Branch and bound, unit by unit, for so many seconds each; what was begun is gone on with."""
        questions = self.known.questions(op)
        for unit, bend, up in questions:
            if self.state.codes[op.site][unit] == UNDECIDED:
                search = searches.pop((unit, bend, up), None) or self._search(op, walk, (unit, bend, up), made)
                leaves = search.run(min(self.known.left(), most))
                if leaves is None and search.kept * len(questions) < KEPT:
                    searches[unit, bend, up] = search
                elif leaves is not None:
                    self.state.trees[op.site, unit, -1 if up else 1] = leaves
                    self._believe(op, walk, unit, bend, up, "branching")

    def _ask(self, op: Bend, walk: Pass, known: dict[int, Range], most: float) -> list[str]:
        """The solver, unit by unit, for so many seconds each; returns what it couldn't settle, in words."""
        notes: list[str] = []
        try:
            with torch.no_grad():
                model = Model(self.program, walk.ranges[0], known, op.site)
        except NoModel as why:
            return [f"{op.name}: not put to the solver ({why})"]
        for unit, bend, up in self.known.questions(op):
            if self.state.codes[op.site][unit] != UNDECIDED:
                continue
            with torch.no_grad():
                answer = model.cross(unit, bend, up, walk.ranges[op.sources[0]], min(self.known.left(), most))
                if answer.verdict == "impossible":
                    self._believe(op, walk, unit, bend, up, "solver")
                elif answer.point is not None:
                    self.known.look(torch.stack([answer.point, self.box.center[0]]), "solver")
            if self.state.codes[op.site][unit] == UNDECIDED and answer.point is not None:
                self.known.attack(op.site, torch.tensor([unit]), answer.point[None], 1.0 if up else -1.0)
            if answer.verdict == "open":
                notes.append(f"{op.name} {unit}: the solver said {answer.status!r} after {answer.seconds:.1f} s")
            elif self.state.codes[op.site][unit] == UNDECIDED:
                why = "it may cross its bend, by less than the solver's tolerance, but no point does"
                notes.append(f"{op.name} {unit}: {why}")
        return notes

    def _believe(self, op: Bend, walk: Pass, unit: int, bend: float, up: bool, proof: str) -> None:
        walk.ranges[op.sources[0]] = cut(walk.ranges[op.sources[0]], unit, up, bend)
        with torch.no_grad():
            self.known.learn(op, walk, proof)
