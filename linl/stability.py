"""Which units of which activations never leave one linear piece on a box, each with its proof.

A funnel, cheapest evidence first. Points that show a unit in two pieces settle that it is unstable; bounds settle
that it is stable: intervals, CROWN, CROWN with optimized slopes, branch and bound, then a mixed-integer solver.
What none of them settles is "undecided". Data alone never makes a unit stable here: it can only make it unstable.

The states are those of Kumar et al. (arXiv 1905.11428) and Serra et al. (2001.00218, 2102.07804): "inactive" if the
input of the activation is never above 0 on the box, "active" if never below. For a unit with three pieces (ReLU6,
Hardtanh) the first is "inactive", the second "active", the third "saturated".
"""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from torch import Tensor, nn

from linl.boxes import Box
from linl.branching import Branching
from linl.crown import Pass
from linl.milp import Model, NoModel
from linl.program import Bend, Program
from linl.ranges import Range
from linl.reading import program
from linl.states import PROOFS, UNDECIDED, UNSTABLE, Stability
from linl.triangles import relaxed
from linl.witnesses import Witnesses

METHODS = ("interval", "local", "crown", "exact")
SAMPLES = 2048  # points and corners by chance that every analysis starts with, for networks of up to …
RESTARTS = 16  # points by chance that each unit left is attacked from
ROUNDS = ((2.0, 0.0), (10.0, 10.0), (30.0, math.inf))  # seconds of branch and bound and of the solver, for a question
PARTS, EACH = 12, 0.5  # of the box, for the ends of a unit's range, and seconds for each question that rests on them
FEW, SMALL = 8, 20_000  # questions, and numbers of the layers before, up to which linear programs are the quicker way
WORK = 1 << 24  # … so many numbers in all


def analyse(
    net: nn.Module,
    box: Box,
    method: str = "exact",
    time_limit: float | None = None,
    *,
    images: Tensor | None = None,
    unit_time_limit: float = 60.0,
    seed: int = 0,
    state: Stability | None = None,
) -> Stability:
    """The state of every unit of every activation on a box, proved.

    Args:
        net: in eval mode; activations with pieces (ReLU, ReLU6, LeakyReLU, LiNLU, …); left alone.
        box: one `Box` in the network's input space.
        method: "interval": intervals and some sampled points. "local": bounds from one activation back as well, for
            large convolutional networks. "crown": CROWN's bounds instead. "exact": attacks, optimized slopes,
            branch and bound and the mixed-integer solver too, until every unit is settled or time is up.
        time_limit: seconds for everything; None for no limit. What is settled by then is returned.
        images: (n, *shape), where to look for witnesses first; those outside the box are moved to its border.
        unit_time_limit: seconds of the solver for one question, and half as many of branch and bound before; each has
            a first try of a few seconds besides.
        seed: of the sampled points.
        state: an earlier answer for this network and box, to go on from.

    Raises:
        ValueError: an unknown method, train mode, several boxes, a box of another shape, weights that are no numbers.
        NoBoundRule: an activation or operation without a bound rule, by name.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if len(box) != 1:
        raise ValueError(f"{len(box)} boxes: a unit's state is of one box; take box[0], or the hull of them all")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit = {time_limit}: seconds above 0, or None")
    if not (isinstance(unit_time_limit, int | float) and unit_time_limit > 0):
        raise ValueError(f"unit_time_limit = {unit_time_limit}: seconds above 0 (math.inf for no limit)")
    funnel = _Funnel(program(net, box.shape), box, method, time_limit, unit_time_limit, seed)
    if state is not None:
        funnel.go_on_from(state)
    return funnel.run(images)


class _TimeIsUpError(Exception):
    """The time limit was met."""


class _Funnel:
    """One analysis under way."""

    def __init__(self, read: Program, box: Box, method: str, limit: float | None, unit_limit: float, seed: int) -> None:
        self.program, self.box, self.method = read, box, method
        self.limit, self.unit_limit = limit or math.inf, unit_limit
        self.began = time.perf_counter()
        self.generator = torch.Generator().manual_seed(seed)
        self.images, self.next_size = torch.zeros(0), 0  # not looked at yet; how many at once
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

    # --- stages ----------------------------------------------------------------------------------

    def run(self, images: Tensor | None) -> Stability:
        """All stages that the method has, as far as time allows."""
        try:
            with torch.no_grad():
                self._stage("interval", self.intervals)
                self._stage("points", lambda: self.points(images))
                if self.method == "local":
                    self._stage("local", self.local)
                elif self.method != "interval":
                    self._stage("crown", self.crown)
                    self._stage("points", lambda: self.look_at_images(patient=True))
            if self.method == "exact":
                self._stage("solver", self.solve)
        except _TimeIsUpError:
            self.state.notes.append(f"stopped after {self.limit:g} s")
        return self.state

    def _stage(self, name: str, work) -> None:
        began = time.perf_counter()
        try:
            if name in ("interval", "points") or not self.state.decided:
                work()
        finally:
            spent = self.state.seconds.get(name, 0.0) + time.perf_counter() - began
            self.state.seconds[name] = spent

    def left(self) -> float:
        """Seconds until the limit.

        Raises:
            _TimeIsUpError: there are none.
        """
        left = self.limit - (time.perf_counter() - self.began)
        if left <= 0:
            raise _TimeIsUpError
        return left

    def intervals(self) -> None:
        """Intervals through the whole network."""
        walk = self._pass()
        for op in self.program.ops:
            if isinstance(op, Bend):
                self._learn(op, walk, "interval")
            walk.step(op)
        self.first = walk

    def points(self, images: Tensor | None) -> None:
        """Points by chance, the corners that settle units of exact bounds, then given images."""
        self._look(self.box.center, "samples")  # what the solver is asked is put from there
        n = min(SAMPLES, max(16, WORK // sum(shape.numel() for shape in self.program.shapes)))
        for points, source in (
            (self.box.sample(n // 2, self.generator), "samples"), (self.box.corners(n // 2, self.generator), "corners"),
        ):  # fmt: skip
            self._look(points, source)
        budget = 4 * n  # of corners in all: a wide convolution has more units than it pays to visit one by one
        for op in self.program.bends:
            if self.first.exact(op.sources[0]) and budget > 0:
                units = self._undecided(op.site)[:budget]
                budget -= len(units)
                for some in units.split(max(1, WORK // max(1, self.box.lower.numel()))):
                    _, row = self.first.least(op.sources[0], some, torch.ones(len(some)))
                    self._corners(op.site, some, row)
                    self.left()
        if images is not None:
            self.images, self.next_size = self._fitting(images), n
            self.look_at_images(patient=self.method in ("interval", "local"))

    def look_at_images(self, patient: bool) -> None:
        """Images, twice as many each time, until every unit is settled; the impatient stop where nothing new was seen.

        Bounds and attacks then settle the last few units sooner than tens of thousands of images; the rest of the
        images comes after those, before the solver.
        """
        while len(self.images) and not self.state.decided:
            some, self.images = self.images[: self.next_size], self.images[self.next_size :]
            before = self._seen()
            self._look(self.box.clip(some.cpu().float()), "images")
            self.next_size *= 2
            self.left()
            if not patient and self._seen() == before:
                return

    def _seen(self) -> int:
        """How many units have been seen on two pieces."""
        return sum(int(self.state.witnesses.unstable(op.site).sum()) for op in self.program.bends)

    def _fitting(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.box.shape:
            raise ValueError(f"images have shape {tuple(images.shape[1:])}, the box {tuple(self.box.shape)}")
        if len(images) and not all(end.isfinite() for end in images.aminmax()):  # a third of isfinite's time
            raise ValueError("images hold values that are no finite numbers: leave those out")
        return images.detach()

    def local(self) -> None:
        """Bounds from one activation back, in float32, for all units of a layer at once."""
        walk = Pass(self.program, self.box, torch.float32)
        for op in self.program.ops:
            if isinstance(op, Bend):
                walk.tighten_locally(op.sources[0], walk.open(op))
                self._learn(op, walk, "local")
            walk.step(op)
            self.left()

    def crown(self) -> None:
        """CROWN, layer by layer; where a bound leaves a unit open, the corner it was taken at is tried."""
        walk = self._pass()
        for op in self.program.ops:
            if isinstance(op, Bend):
                self._clip(op, walk)
                later = any((codes == UNDECIDED).any() for codes in self.state.codes[op.site + 1 :])
                units = walk.open(op) if later else self._undecided(op.site)
                if len(units) and not walk.exact(op.sources[0]):
                    self._tighten(op, walk, units, attack=self.method == "exact")
            walk.step(op)
            self.left()
        self.first = walk

    def _tighten(self, op: Bend, walk: Pass, units: Tensor, attack: bool) -> None:
        value, widest = op.sources[0], max(shape.numel() for shape in self.program.shapes)
        tried: list[tuple[Tensor, Tensor, float]] = []
        for some in units.split(max(1, (1 << 25) // widest)):
            both = []
            for sign in (1.0, -1.0):
                bound, row = walk.least(value, some, torch.full((len(some),), sign))
                both.append(sign * bound)
                tried.append((some, self._corner_of(row), -sign))
            walk.ranges[value] = walk.ranges[value].narrowed(some, *both)
            self.left()
        self._learn(op, walk, "crown")
        for some, corners, _ in tried:
            open_ = torch.isin(some, self._undecided(op.site))
            if open_.any():
                self._look(corners[open_], "corners", op.site)
        if not attack:
            return
        self._by_program(op, walk, self._questions(op))
        self._learn(op, walk, "optimized")
        for some, corners, sign in tried:
            open_ = torch.isin(some, self._undecided(op.site))
            self._attack(op.site, some[open_], corners[open_], sign)

    def _attack(self, site: int, units: Tensor, starts: Tensor, sign: float) -> None:
        """Ascent (sign 1) or descent from each unit's own start, then, for those left, from points by chance."""
        if len(self.program.bends[site].pieces.bends) == 1:  # two pieces: what was seen on that side needs no attack
            seen = self.state.witnesses.high[site] if sign > 0 else self.state.witnesses.low[site]
            units, starts = units[seen[units] < 0], starts[seen[units] < 0]
        if not len(units):
            return
        with torch.enable_grad():
            self.state.witnesses.attack(site, units, starts, torch.full((len(units),), sign))
        self._note_witnesses()
        units = units[torch.isin(units, self._undecided(site))]
        for some in units.split(max(1, (1 << 22) // (RESTARTS * self.box.lower.numel()))):
            if not len(some):
                return
            each = some.repeat_interleave(RESTARTS)
            points = self.box.sample(len(each), self.generator)
            with torch.enable_grad():
                self.state.witnesses.attack(site, each, points, torch.full((len(each),), sign))
            self._note_witnesses()
            self.left()

    def solve(self) -> None:
        """Optimized slopes for what is left; then sharper bounds of all before it, branch and bound, and the solver."""
        self._refine(self._optimize)
        if not self.state.decided:
            last = max(site for site, codes in enumerate(self.state.codes) if (codes == UNDECIDED).any())
            self._refine(self._settle, last)

    def _refine(self, work, last: int = -1) -> None:
        """One walk, layer by layer: `work` on each activation's undecided units, sharper bounds before the last."""
        walk, known = self._pass(), {}
        for op in self.program.ops:
            if isinstance(op, Bend):
                value = op.sources[0]
                self._clip(op, walk)
                before = self.first.ranges.get(value)
                if before is not None:
                    walk.ranges[value] = walk.ranges[value] & before
                if len(self._undecided(op.site)):
                    work(op, walk, known)
                if op.site < last:
                    self._sharpen(op, walk)
                    self._clip(op, walk)
                    self._sharpen_by_parts(op, walk)
                self._clip(op, walk)
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
        searches: dict[tuple[int, bool], Branching] = {}
        made = cache(lambda: relaxed(walk, op.sources[0]))
        try:
            for branching, asking in ROUNDS:
                self._branch(op, walk, min(branching, self.unit_limit / 2), searches, made)
                if len(self._undecided(op.site)) and asking:
                    notes = self._ask(op, walk, known, min(asking, self.unit_limit))
        finally:
            self.state.notes += notes if len(self._undecided(op.site)) else []

    def _questions(self, op: Bend) -> list[tuple[int, float, bool]]:
        """(unit, bend, up): what has to be impossible for each undecided unit to be stable."""
        found, bends = [], op.pieces.bends
        low, high = self.state.witnesses.low[op.site], self.state.witnesses.high[op.site]
        units = self._undecided(op.site)
        middle = self._piece_at_center(op)
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

    def _piece_at_center(self, op: Bend) -> Tensor:
        return self.state.witnesses.pieces_at(self.box.center)[op.site][0]

    def _optimize(self, op: Bend, walk: Pass, known: dict[int, Range]) -> None:
        """CROWN with slopes of each unit's own, for the sides that are open."""
        questions, value = self._questions(op), op.sources[0]
        if not questions or walk.exact(value):
            return
        questions = self._by_program(op, walk, questions)
        size = self._rows_at_once(value)
        for start in range(0, len(questions), size):
            some = questions[start : start + size]
            units = torch.tensor([unit for unit, _, _ in some])
            signs = torch.tensor([-1.0 if up else 1.0 for _, _, up in some])
            bound, shares = walk.optimized(value, units, signs)
            for i, (unit, bend, up) in enumerate(some):
                if (-bound[i] > bend) if up else (bound[i] < bend):
                    continue  # what proves nothing isn't used further on: a certificate needs no slopes for it
                walk.ranges[value] = _cut(walk.ranges[value], unit, up, (-bound[i] if up else bound[i]).item())
                kept = {target: share[i] for target, share in shares.items()}
                self.state.shares[op.site, unit, -1 if up else 1] = kept
            self.left()
        with torch.no_grad():
            self._learn(op, walk, "optimized")

    def _by_program(self, op: Bend, walk: Pass, questions: list[tuple[int, float, bool]]):
        """A few questions about a small network by linear programs, in a tenth of the time that gradient ascent takes;
        returns those that ascent may still settle, which knows no more than the program does."""
        if len(questions) > FEW:
            return questions
        value, left = op.sources[0], []
        made = relaxed(walk, value, SMALL)
        for unit, bend, up in questions:
            sign = -1.0 if up else 1.0
            solved = made and made.ask(unit, sign).solve(torch.full(made.open.shape, -1, dtype=torch.int8), self.left())
            if solved is None:
                left.append((unit, bend, up))
                continue
            if solved.point is not None:
                self._look(solved.point[None], "solver", op.site)
            walk.choose({target: share[None] for target, share in solved.share.items()})
            bound = walk.least(value, torch.tensor([unit]), torch.tensor([sign]))[0].item()
            walk.choose({})
            if bound >= sign * bend:
                walk.ranges[value] = _cut(walk.ranges[value], unit, up, sign * bound)
                self.state.shares[op.site, unit, int(sign)] = solved.share
                with torch.no_grad():
                    self._learn(op, walk, "optimized")
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
                self.left()
        with torch.no_grad():
            self._learn(op, walk, "optimized")

    def _sharpen_by_parts(self, op: Bend, walk: Pass) -> None:
        """The ends of every open unit's range by a few parts of the box, where many questions rest on them."""
        value = op.sources[0]
        behind = sum(int((codes == UNDECIDED).sum()) for codes in self.state.codes[op.site + 1 :])
        if behind <= FEW or walk.exact(value):
            return
        made = cache(lambda: relaxed(walk, value))
        until = time.perf_counter() + min(EACH * behind, self.left() / 4)
        for unit in walk.open(op).tolist():
            for sign in (1, -1):
                seconds = until - time.perf_counter()
                search = Branching(walk, value, unit, float(sign), math.inf, lambda points: False, made)
                found = search.raised(PARTS, seconds) if seconds > 0 else None
                if found is None:
                    return
                leaves, end = found
                known = walk.ranges[value]
                if end > (known.lower if sign > 0 else -known.upper).flatten()[unit]:
                    walk.ranges[value] = _cut(known, unit, sign < 0, sign * end)
                    self.state.trees[op.site, unit, sign] = leaves
        with torch.no_grad():
            self._learn(op, walk, "branching")

    def _branch(self, op: Bend, walk: Pass, most: float, searches: dict[tuple[int, bool], Branching], made) -> None:
        """Branch and bound, unit by unit, for so many seconds each; what was begun is gone on with."""
        for unit, bend, up in self._questions(op):
            codes, sign = self.state.codes[op.site], -1 if up else 1

            def settled(points: Tensor, unit: int = unit, codes: Tensor = codes) -> bool:
                if len(points):
                    self._look(points, "corners", op.site)
                return bool(codes[unit] != UNDECIDED)

            if not settled(self.box.center):
                search = searches.get((unit, up))
                if search is None:
                    search = Branching(walk, op.sources[0], unit, float(sign), sign * bend, settled, made)
                    searches[unit, up] = search
                leaves = search.run(min(self.left(), most))
                if leaves is not None:
                    self.state.trees[op.site, unit, sign] = leaves
                    self._believe(op, walk, unit, bend, up, "branching")

    def _ask(self, op: Bend, walk: Pass, known: dict[int, Range], most: float) -> list[str]:
        """The solver, unit by unit, for so many seconds each; returns what it couldn't settle, in words."""
        notes: list[str] = []
        try:
            with torch.no_grad():
                model = Model(self.program, walk.ranges[0], known, op.site)
        except NoModel as why:
            return [f"{op.name}: not put to the solver ({why})"]
        for unit, bend, up in self._questions(op):
            if self.state.codes[op.site][unit] != UNDECIDED:
                continue
            with torch.no_grad():
                answer = model.cross(unit, bend, up, walk.ranges[op.sources[0]], min(self.left(), most))
                if answer.verdict == "impossible":
                    self._believe(op, walk, unit, bend, up, "solver")
                elif answer.point is not None:
                    self._look(torch.stack([answer.point, self.box.center[0]]), "solver", op.site)
            if self.state.codes[op.site][unit] == UNDECIDED and answer.point is not None:
                self._attack(op.site, torch.tensor([unit]), answer.point[None], 1.0 if up else -1.0)
            if answer.verdict == "open":
                notes.append(f"{op.name} {unit}: the solver said {answer.status!r} after {answer.seconds:.1f} s")
            elif self.state.codes[op.site][unit] == UNDECIDED:
                why = "it may cross its bend, by less than the solver's tolerance, but no point does"
                notes.append(f"{op.name} {unit}: {why}")
        return notes

    def _believe(self, op: Bend, walk: Pass, unit: int, bend: float, up: bool, proof: str) -> None:
        walk.ranges[op.sources[0]] = _cut(walk.ranges[op.sources[0]], unit, up, bend)
        with torch.no_grad():
            self._learn(op, walk, proof)

    # --- what is known ---------------------------------------------------------------------------

    def _pass(self) -> Pass:
        return Pass(self.program, self.box)

    def _clip(self, op: Bend, walk: Pass) -> None:
        """A walk's range cut to what is known already."""
        shape = self.state.shapes[op.site]
        lower, upper = (t[op.site].view(1, *shape) for t in (self.state.lower, self.state.upper))
        walk.ranges[op.sources[0]] = walk.ranges[op.sources[0]] & Range(lower, upper)

    def _learn(self, op: Bend, walk: Pass, proof: str) -> None:
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

    def _undecided(self, site: int) -> Tensor:
        return (self.state.codes[site] == UNDECIDED).nonzero()[:, 0]

    def _look(self, points: Tensor, source: str, site: int | None = None) -> None:
        """Points as witnesses for undecided units; with a site, for its units and those before it."""
        wanted = [codes == UNDECIDED for codes in self.state.codes]
        self.state.witnesses.look(points, source, wanted)
        self._note_witnesses()

    def _note_witnesses(self) -> None:
        for site, codes in enumerate(self.state.codes):
            news = self.state.witnesses.unstable(site) & (codes == UNDECIDED)
            codes[news] = UNSTABLE
            self.state.when[site][news] = time.perf_counter() - self.began

    def _corner_of(self, row: Tensor) -> Tensor:
        """Where rows (1, n, *shape) are least over the box."""
        return torch.where(row[0] < 0, self.box.upper[0], self.box.lower[0])

    def _corners(self, site: int, units: Tensor, row: Tensor) -> None:
        if len(units):
            for corner in (self._corner_of(row), self._corner_of(-row)):
                self._look(corner, "corners", site)


def _cut(known: Range, unit: int, up: bool, end: float) -> Range:
    """A range, one unit's upper (`up`) or lower end moved in."""
    at = known.lower.new_full((1, 1), end)
    return known.narrowed(torch.tensor([unit]), **{"upper" if up else "lower": at})
