"""Which links of a linear run should become one layer: the best set of merges, not the greedy one.

A plan cuts a chain into steps. Merging changes costs both ways (two 3×3 convolutions have fewer weights than
the one 5×5 they make, an inverted bottleneck has more than the one 3×3), so the best cut is found by dynamic
programming over all of them, the idea of Kim et al., ICML 2023, section 4, with the merged layer's cost
looked up, or measured on this machine, instead of a learned importance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from linl.affine import Geometry, Size
from linl.chains import Fork
from linl.joining import Joint, identity_of
from linl.operations import Link


@dataclass(frozen=True)
class Cost:
    """What a layer costs: layers (0 or 1), numbers stored, multiply-adds an example, milliseconds."""

    layers: int = 0
    numbers: int = 0
    macs: int = 0
    ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.layers + other.layers, self.numbers + other.numbers, self.macs + other.macs, self.ms + other.ms
        )


OBJECTIVES: dict[str, Callable[[Cost], tuple]] = {
    "latency": lambda c: (c.ms, c.layers, c.macs, c.numbers),
    "parameters": lambda c: (c.numbers, c.layers, c.macs),
    "macs": lambda c: (c.macs, c.layers, c.numbers),
    "depth": lambda c: (c.layers, c.macs, c.numbers),
}
"""What is made small, then what decides between equals."""


@dataclass
class Step:
    """Some links of a chain and what they become.

    Attributes:
        links: in order.
        geometry: of the one layer they become; None where they stay as they are.
        branches: for a kept fork, the plans of its branches.
        before, after: costs.
    """

    links: list[Link | Fork]
    geometry: Geometry | None
    before: Cost
    after: Cost
    branches: list[list[Step]] | None = None

    @property
    def size(self) -> Size:
        """Spatial size of the input."""
        return self.links[0].size

    @property
    def flat(self) -> bool:
        """Whether an image goes in and features come out."""
        return bool(self.size) and any(link.flat for link in self.links)


# --- costs -----------------------------------------------------------------------------------------


def cost_of(geometry: Geometry, size: Size, kind: str = "conv", flat: bool = False) -> Cost:
    """What a layer costs, without the time it takes.

    Args:
        size: spatial size of the input.
        kind: as in `Link`.
        flat: the layer turns an image into features, as a dense layer over all of it.
    """
    if kind in ("copy", "pool"):
        return Cost()
    out = geometry.output_size(size)
    positions = math.prod(out)
    bias = {"none": 0, "channel": geometry.outputs, "map": geometry.outputs * positions}[geometry.bias]
    if kind == "scale":
        return Cost(numbers=geometry.outputs + bias)
    weights = geometry.weights()
    if flat:  # written as a dense layer, groups spread out
        weights = geometry.outputs * geometry.inputs * (1 if geometry.uniform else math.prod(size))
    return Cost(1, weights + bias, weights * positions)


Timer = Callable[[Geometry, Size, str, bool], float]
"""Milliseconds of a layer: (geometry, size, kind, flat)."""


def plan(
    links: Sequence[Link | Fork],
    objective: str = "depth",
    border: str = "exact",
    timer: Timer | None = None,
    most: int | None = None,
    time_all: bool = False,
    matrix: bool = True,
) -> list[Step]:
    """The cheapest way to write consecutive links as layers.

    Args:
        links: of one chain.
        objective: a key of `OBJECTIVES`; "latency" needs the timer.
        border: "exact" or "interior".
        most: at most so many convolutions and dense layers become one: 1 only takes BatchNorms in.
        time_all: time even where there is nothing to choose.
        matrix: whether layers that pad may become one dense matrix over the whole image.

    Returns: steps in order, together all links.
    """
    price = OBJECTIVES[objective]
    choice = time_all or (layers_in(links) > 1 and most != 1)
    timer = timer if objective == "latency" and choice else None
    kept = [_kept(link, objective, border, timer, most, matrix) for link in links]
    joint = Joint(links, border, matrix).ways
    best: list[tuple] = [((), 0, Cost(), [])]  # price, steps, cost, steps of the cheapest plan for the first j links
    for j in range(1, len(links) + 1):
        ways = []
        for i in range(j):
            candidates = [kept[j - 1]] if i == j - 1 else []
            new = (i, j) in joint and (j > i + 1 or isinstance(links[i], Fork))
            if new and (most is None or layers_in(links[i:j]) <= most):
                candidates.append(_joined(links[i:j], kept[i:j], joint[i, j].geometry, timer))
            for candidate in filter(None, candidates):
                total = best[i][2] + candidate.after
                steps = [*best[i][3], candidate]
                ways.append((price(total), sum(map(calls, steps)), total, steps))
        best.append(min(ways, key=lambda way: way[:2]))
    return best[-1][3]


def calls(step: Step) -> int:
    """Layers and additions that a step leaves in the network."""
    return 1 + sum(calls(inner) for branch in step.branches or [] for inner in branch)


def layers_in(links: Sequence[Link | Fork]) -> int:
    """Convolutions and dense layers among the links and inside their forks."""
    count = 0
    for link in links:
        count += sum(map(layers_in, link.branches)) if isinstance(link, Fork) else link.kind == "conv"
    return count


def _kept(
    link: Link | Fork, objective: str, border: str, timer: Timer | None, most: int | None, matrix: bool = True
) -> Step:
    if isinstance(link, Fork):
        options = (objective, border, timer, most, False, matrix)
        branches = [plan(branch, *options) if branch else [] for branch in link.branches]
        steps = [step for branch in branches for step in branch]
        add = Cost() if timer is None else Cost(ms=timer(identity_of(link), link.out, "add", False))
        before, after = (sum((getattr(step, when) for step in steps), add) for when in ("before", "after"))
        return Step([link], None, before, after, branches)
    cost = cost_of(link.geometry, link.size, link.kind, link.flat)
    if link.numbers is not None:
        cost = replace(cost, numbers=link.numbers)
    cost = _timed(cost, link.geometry, link.size, link.kind, link.flat, timer)
    return Step([link], None, cost, cost)


def _joined(links: Sequence[Link | Fork], kept: Sequence[Step], geometry: Geometry, timer: Timer | None) -> Step | None:
    """The links as one layer; None where that can't pay."""
    if not layers_in(links):
        return None  # a pool and a factor are no convolution, and shouldn't become one
    before, cost = sum((step.before for step in kept), Cost()), joint_cost(links, geometry)
    flat = bool(links[0].size) and any(link.flat for link in links)
    if cost.numbers > LARGEST or (timer is not None and cost.macs > HOPELESS * max(1, before.macs)):
        return None
    return Step(list(links), geometry, before, _timed(cost, geometry, links[0].size, "conv", flat, timer))


def joint_cost(links: Sequence[Link | Fork], geometry: Geometry) -> Cost:
    """What the links cost as one layer, without the time."""
    return cost_of(geometry, links[0].size, "conv", bool(links[0].size) and any(link.flat for link in links))


LARGEST = 2**28
"""Numbers of the largest layer that is built: 2 GiB in float64."""

HOPELESS = 2.5
"""A layer with that many times the multiply-adds of what it replaces is not even timed."""


def _timed(cost: Cost, geometry: Geometry, size: Size, kind: str, flat: bool, timer: Timer | None) -> Cost:
    return cost if timer is None else replace(cost, ms=timer(geometry, size, kind, flat))
