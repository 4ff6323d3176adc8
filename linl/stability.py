"""Which units of which activations never leave one linear piece on a box, each with its proof.

A funnel, cheapest evidence first. Points that show a unit in two pieces settle that it is unstable; bounds settle
that it is stable: intervals, CROWN, CROWN with optimized slopes, branch and bound, then a mixed-integer solver.
What none of them settles is "undecided". Data alone never makes a unit stable here: it can only make it unstable.

The states are those of Kumar et al. (arXiv 1905.11428) and Serra et al. (2001.00218, 2102.07804): "inactive" if the
input of the activation is never above 0 on the box, "active" if never below. For a unit with three pieces (ReLU6,
Hardtanh) the first is "inactive", the second "active", the third "saturated".
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from linl.boxes import Box
from linl.crown import Pass
from linl.evidence import Evidence, TimeIsUpError
from linl.program import Bend
from linl.reading import program
from linl.settling import Settling
from linl.states import UNDECIDED, Stability

METHODS = ("interval", "local", "crown", "exact")
SAMPLES = 2048  # points and corners by chance that every analysis starts with, for networks of up to …
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
        unit_time_limit: seconds of the solver for one question, and half as many of branch and bound before (30 at
            most), in the last of three rounds; those before take less.
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
    known = Evidence(program(net, box.shape), box, method, time_limit, seed)
    if state is not None:
        known.go_on_from(state)
    return _Funnel(known, method, unit_time_limit).run(images)


class _Funnel:
    """One analysis under way."""

    def __init__(self, known: Evidence, method: str, unit_limit: float) -> None:
        self.known, self.method = known, method
        self.program, self.box, self.state = known.program, known.box, known.state
        self.settling = Settling(known, unit_limit)
        self.images, self.next_size = torch.zeros(0), 0  # not looked at yet; how many at once

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
                self._stage("solver", self.settling.solve)
        except TimeIsUpError:
            self.state.notes.append(f"stopped after {self.known.limit:g} s")
        return self.state

    def _stage(self, name: str, work) -> None:
        began = time.perf_counter()
        try:
            if name in ("interval", "points") or not self.state.decided:
                work()
        finally:
            spent = self.state.seconds.get(name, 0.0) + time.perf_counter() - began
            self.state.seconds[name] = spent

    def intervals(self) -> None:
        """Intervals through the whole network."""
        walk = self.known.walk()
        for op in self.program.ops:
            if isinstance(op, Bend):
                self.known.learn(op, walk, "interval")
            walk.step(op)
        self.known.first = walk

    def points(self, images: Tensor | None) -> None:
        """Points by chance, the corners that settle units of exact bounds, then given images."""
        self.known.look(self.box.center, "samples")  # what the solver is asked is put from there
        n = min(SAMPLES, max(16, WORK // sum(shape.numel() for shape in self.program.shapes)))
        chance = self.known.generator
        self.known.look(self.box.sample(n // 2, chance), "samples")
        self.known.look(self.box.corners(n // 2, chance), "corners")
        budget = 4 * n  # of corners in all: a wide convolution has more units than it pays to visit one by one
        for op in self.program.bends:
            if self.known.first.exact(op.sources[0]) and budget > 0:
                units = self.known.undecided(op.site)[:budget]
                budget -= len(units)
                for some in units.split(max(1, WORK // max(1, self.box.lower.numel()))):
                    _, row = self.known.first.least(op.sources[0], some, torch.ones(len(some)))
                    self.known.look_at_corners(row)
                    self.known.left()
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
            before = self.known.seen()
            self.known.look(self.box.clip(some.cpu().float()), "images")
            self.next_size *= 2
            self.known.left()
            if not patient and self.known.seen() == before:
                return

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
                self.known.learn(op, walk, "local")
            walk.step(op)
            self.known.left()

    def crown(self) -> None:
        """CROWN, layer by layer; where a bound leaves a unit open, the corner it was taken at is tried."""
        walk = self.known.walk()
        for op in self.program.ops:
            if isinstance(op, Bend):
                self.known.clip(op, walk)
                later = any((codes == UNDECIDED).any() for codes in self.state.codes[op.site + 1 :])
                units = walk.open(op) if later else self.known.undecided(op.site)
                if len(units) and not walk.exact(op.sources[0]):
                    self._tighten(op, walk, units, attack=self.method == "exact")
            walk.step(op)
            self.known.left()
        self.known.first = walk

    def _tighten(self, op: Bend, walk: Pass, units: Tensor, attack: bool) -> None:
        value, widest = op.sources[0], max(shape.numel() for shape in self.program.shapes)
        tried: list[tuple[Tensor, Tensor, float]] = []
        for some in units.split(max(1, (1 << 25) // widest)):
            both = []
            for sign in (1.0, -1.0):
                bound, row = walk.least(value, some, torch.full((len(some),), sign))
                both.append(sign * bound)
                tried.append((some, self.known.corner_of(row), -sign))
            walk.ranges[value] = walk.ranges[value].narrowed(some, *both)
            self.known.left()
        self.known.learn(op, walk, "crown")
        for some, corners, _ in tried:
            open_ = torch.isin(some, self.known.undecided(op.site))
            if open_.any():
                self.known.look(corners[open_], "corners")
        if not attack:
            return
        self.settling.by_program(op, walk, self.known.questions(op))
        self.known.learn(op, walk, "optimized")
        for some, corners, sign in tried:
            open_ = torch.isin(some, self.known.undecided(op.site))
            self.known.attack(op.site, some[open_], corners[open_], sign)
