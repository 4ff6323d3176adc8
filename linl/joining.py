"""What a run of links is as one layer: its geometry, and the layer itself.

Which parts of a run join first matters twice: for the work, and because some layers have a single layer only
with what is behind them (a convolution and what cuts its border off again). So every split is tried, on
geometries alone; numbers are multiplied once, in the order found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from linl import affine
from linl import merge as algebra
from linl.affine import Affine, CannotMerge, Geometry
from linl.chains import Fork
from linl.operations import Link
from linl.whole import pulled, whole, whole_geometry

WIDEST = 50_000_000
"""Numbers of the largest dense matrix that layers with padding in between are pulled into: 400 MB in float64."""


def geometry_of(links: Sequence[Link | Fork], border: str, matrix: bool = True) -> Geometry:
    """The geometry of consecutive links as one layer.

    Raises:
        CannotMerge: there is no such layer, under this border.
    """
    joint = Joint(links, border, matrix)
    every = 0, len(links)
    if every not in joint.ways:
        raise CannotMerge(joint.reasons[every])
    return joint.ways[every].geometry


def merged(links: Sequence[Link | Fork], border: str) -> Affine:
    """The links as one layer, in float64, multiplied in the order that costs least (a matrix chain)."""
    return Joint(links, border).layer(0, len(links))


@dataclass(frozen=True)
class Way:
    """How links i … j−1 become one layer.

    Attributes:
        geometry: of the layer.
        work: multiply-adds that joining takes.
        cut: where its second part begins; i where there is nothing to join.
        kind: "composed" of both parts, "pulled" (the second, read at one position, through the first link), or
            "exact": taken over from the joint under that border.
    """

    geometry: Geometry
    work: int
    cut: int
    kind: str = "composed"


class Joint:
    """All runs of consecutive links that are one layer.

    Attributes:
        ways: (i, j) to how links i … j−1 become one.
        reasons: for the others, why they don't.
    """

    def __init__(self, links: Sequence[Link | Fork], border: str, matrix: bool = True) -> None:
        """`matrix`: whether one dense matrix over the whole image may be made of layers that pad."""
        self.links, self.border, self.matrix = links, border, matrix
        self.ways: dict[tuple[int, int], Way] = {}
        self.reasons: dict[tuple[int, int], str] = {}
        ends = matrix and border != "exact" and any(map(_at_one_position, links))
        self.exact = Joint(links, "exact") if ends else None
        for length in range(1, len(links) + 1):
            for i in range(len(links) - length + 1):
                try:
                    self.ways[i, i + length] = self._way(i, i + length)
                except CannotMerge as reason:
                    self.reasons[i, i + length] = str(reason)

    def _way(self, i: int, j: int) -> Way:
        # what is read at one position can be exact: no border is worth an error there
        if self.exact and _at_one_position(self.links[j - 1]) and (i, j) in self.exact.ways:
            return replace(self.exact.ways[i, j], kind="exact")
        if j == i + 1:
            return Way(_own_geometry(self.links[i], self.border, self.matrix), 0, i)
        found = self._composed(i, j)
        if found is None and self.matrix and self.links[i].size and _at_one_position(self.links[j - 1]):
            found = self._pulled(i, j)
        if found is None:  # why the last link doesn't join what is before it
            if (i, j - 1) not in self.ways:
                raise CannotMerge(self.reasons[i, j - 1])
            if (j - 1, j) not in self.ways:
                raise CannotMerge(self.reasons[j - 1, j])
            self._compose(i, j - 1, j)
        return found

    def _composed(self, i: int, j: int) -> Way | None:
        """The cheapest split whose parts compose; one without a bias map before all others."""
        splits, best = [], None
        for k in range(i + 1, j):
            if (i, k) in self.ways and (k, j) in self.ways:
                a, b = self.ways[i, k], self.ways[k, j]
                splits.append((a.work + b.work + algebra.multiplications(a.geometry, b.geometry), k))
        for work, k in sorted(splits):
            try:
                geometry = self._compose(i, k, j)
            except CannotMerge:
                continue
            if best is None or geometry.bias != "map":
                best = Way(geometry, work, k)
            if geometry.bias != "map":
                break
        return best

    def _compose(self, i: int, k: int, j: int) -> Geometry:
        first, second = self.ways[i, k].geometry, self.ways[k, j].geometry
        if second.dims == 0 < first.dims:  # a layer of features behind an image of one position
            second = affine.lifted(second, first.dims)
        total = algebra.compose(first, second, self.links[i].size, self.border)
        if total.mode != "zeros" and total.padded and any(link.flat for link in self.links[k:j]):
            raise CannotMerge(f"{total.mode} padding before a dense layer")
        return total

    def _pulled(self, i: int, j: int) -> Way | None:
        """The rest as a dense matrix, pulled through the first link."""
        if (i + 1, j) not in self.ways:
            return None
        first, rest = self.links[i], self.ways[i + 1, j]
        outputs, channels = rest.geometry.outputs, _channels(first)
        largest = outputs * max(channels * math.prod(first.size), _numbers(self.links[i + 1], rest.geometry))
        if largest > WIDEST:
            raise CannotMerge(f"one dense matrix over the whole image would have {largest:,} numbers")
        bias = "channel" if rest.geometry.bias != "none" or _biased(first) else "none"
        geometry = whole_geometry(channels, outputs, first.size, bias)
        return Way(geometry, rest.work + outputs * _work(first), i + 1, "pulled")

    def layer(self, i: int, j: int) -> Affine:
        """Links i … j−1 as one layer."""
        way = self.ways[i, j]
        if way.kind == "exact":
            return self.exact.layer(i, j)
        if way.cut == i:
            return _own_layer(self.links[i], self.border)
        if way.kind == "pulled":
            return _pulled(self.links[i], self.layer(i + 1, j))
        first, second = self.layer(i, way.cut), self.layer(way.cut, j)
        if second.geometry.dims == 0 < first.geometry.dims:
            second = affine.as_lifted(second, first.geometry.dims)
        return algebra.merge(first, second, self.links[i].size, self.border)


# --- one link --------------------------------------------------------------------------------------


def _own_geometry(link: Link | Fork, border: str, matrix: bool) -> Geometry:
    if isinstance(link, Link):
        if link.reshapes:
            raise CannotMerge("a flattening that moves numbers about, with no dense layer behind it")
        return link.geometry
    parts = [geometry_of(branch, border, matrix) if branch else identity_of(link) for branch in link.branches]
    return algebra.compose_sum(parts, link.size)


def identity_of(fork: Fork) -> Geometry:
    """The geometry of a fork's empty branch."""
    dims = len(fork.size)
    return affine.copy_geometry(fork.channels, (1,) * dims, ((0, 0),) * dims)


def _own_layer(link: Link | Fork, border: str) -> Affine:
    if isinstance(link, Link):
        return link.layer()
    parts = []
    for branch, sign in zip(link.branches, link.signs, strict=True):
        dims = len(link.size)
        part = merged(branch, border) if branch else affine.copy(link.channels, (1,) * dims, ((0, 0),) * dims)
        parts.append(_signed(part, sign))
    return algebra.merge_sum(parts, link.size)


def _signed(part: Affine, sign: int) -> Affine:
    if sign > 0:
        return part
    return replace(part, weight=-part.weight, bias=None if part.bias is None else -part.bias)


# --- read at one position --------------------------------------------------------------------------


def _at_one_position(link: Link | Fork) -> bool:
    """Whether a link's value is features, or an image of one position."""
    out = link.out if isinstance(link, Fork) else link.geometry.output_size(link.size)
    return link.flat or math.prod(out) == 1


def _channels(link: Link | Fork) -> int:
    return link.channels if isinstance(link, Fork) else link.geometry.inputs


def _numbers(link: Link | Fork, geometry: Geometry) -> int:
    """Numbers of the image that a link reads, given a geometry that begins with it."""
    return geometry.inputs * math.prod(link.size)


def _biased(link: Link | Fork) -> bool:
    if isinstance(link, Fork):
        return any(_biased(inner) for branch in link.branches for inner in branch)
    return link.geometry.bias != "none"


def _work(link: Link | Fork) -> int:
    """Multiply-adds of pulling one row through a link."""
    if isinstance(link, Fork):
        return sum(_work(inner) for branch in link.branches for inner in branch)
    g = link.geometry
    return 0 if link.reshapes else math.prod((g.outputs, g.inputs // g.groups, *g.kernel, *g.output_size(link.size)))


def _pulled(link: Link | Fork, rest: Affine) -> Affine:
    """rest(link(x)) as a dense layer over the whole image."""
    if isinstance(link, Link):
        if link.reshapes:
            return whole(rest, link.geometry.inputs, link.size)
        return pulled(link.layer(), rest, link.size)
    linear, bias, weight = replace(rest, bias=None, geometry=replace(rest.geometry, bias="none")), rest.bias, 0
    for branch, sign in zip(link.branches, link.signs, strict=True):
        part = linear if branch else whole(linear, link.channels, link.size)
        for inner in reversed(branch):
            part = _pulled(inner, part)
        part = _signed(part, sign)
        weight = weight + part.weight
        if part.bias is not None:
            bias = part.bias if bias is None else bias.reshape(-1) + part.bias
    bias = None if bias is None else affine.wide(bias).reshape(-1)
    kind = "none" if bias is None else "channel"
    return Affine(whole_geometry(link.channels, len(weight), link.size, kind), weight, bias)
