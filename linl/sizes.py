"""Whether a merge that was planned for one image size holds for every other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from linl.affine import CannotMerge, Geometry, Size
from linl.chains import Fork
from linl.joining import geometry_of
from linl.operations import Link


class Unfit(CannotMerge):
    """The network itself can't take images of this size."""


def any_size(links: Sequence[Link | Fork], border: str) -> bool:
    """Whether the one layer that the links become, as it is written, is theirs for inputs of every size that they take.

    Sizes matter by what is left over when strides divide them, along each axis by itself, and by how many taps of a
    kernel lie inside: as many others are tried around this one, and far beyond it.
    """
    size = links[0].size
    if not size:
        return True
    flat = any(link.flat for link in links)
    geometry = geometry_of(links, border)
    if geometry.bias == "map":
        return False
    written = _written(geometry, size, flat)
    fixed = [link for link in _inside(links) if not link.flat and (link.at is None or link.kind == "conv")]
    strides = math.prod(max(link.geometry.stride, default=1) for link in fixed)
    far = strides * sum(map(_reach, fixed))  # from there on no further tap can come to lie inside
    others = [*range(1 - strides, strides + 1), *range(far, far + strides)]
    for axis, more in itertools.product(range(len(size)), others):
        other = tuple(n + more * (i == axis) for i, n in enumerate(size))
        try:
            if _written(geometry_of(_resized(links, other), border), other, flat) != written:
                return False
        except Unfit:
            continue
        except CannotMerge:
            return False
    return True


def _reach(link: Link) -> int:
    """Positions that one output of a link is told by, padding included."""
    g = link.geometry
    return max(
        (k * d + abs(a) + abs(b) for k, d, (a, b) in zip(g.kernel, g.dilation, g.padding, strict=True)), default=0
    )


def _written(geometry: Geometry, size: Size, flat: bool) -> tuple[Geometry, Size]:
    """As `linl.rewriting.modules_of` writes it: an average over the whole image as one, whatever its size; what makes
    features of an image otherwise, as a dense layer of just so many."""
    if geometry.uniform and geometry.kernel == size and not geometry.padded:
        return replace(geometry, kernel=(0,) * len(size), stride=(0,) * len(size)), ()
    return geometry, size if flat else ()


def _inside(links: Sequence[Link | Fork]) -> list[Link]:
    """Every link, those of branches included."""
    found = []
    for link in links:
        found += [link] if isinstance(link, Link) else [inner for branch in link.branches for inner in _inside(branch)]
    return found


def _resized(links: Sequence[Link | Fork], size: Size) -> list[Link | Fork]:
    """The same links for an input of another size.

    Raises:
        Unfit: they can't take it.
        CannotMerge: one of them is no layer then.
    """
    made = []
    for link in links:
        if size and min(size) < 1:
            raise Unfit("nothing is left")
        if isinstance(link, Link):
            if link.flat and link.at is None and size != link.size:
                dense = link.kind != "copy" or link is not links[-1]
                raise (Unfit if dense else CannotMerge)("another number of features")
            link = replace(link, geometry=link.at(size) if link.at else link.geometry, size=size)
        else:
            branches = [_resized(branch, size) for branch in link.branches]
            outs = {_output(branch, size) for branch in branches}
            if len(outs) > 1:
                raise Unfit("branches of different sizes")
            link = replace(link, branches=branches, size=size, out=outs.pop())
        size = _output([link], size)
        made.append(link)
    if size and min(size) < 1:
        raise Unfit("nothing is left")
    return made


def _output(links: Sequence[Link | Fork], size: Size) -> Size:
    last = links[-1] if links else None
    if last is None or isinstance(last, Fork):
        return size if last is None else last.out
    return () if last.flat else last.geometry.output_size(last.size)
