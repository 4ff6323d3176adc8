"""The algebra of affine layers: from (weight, bias, geometry) to (weight, bias, geometry).

Pure functions on the records of `affine`; no modules, no graphs. Reading order is the network's:
`merge(first, second)` computes second(first(x)). What can be merged is decided on `Geometry` alone (`compose`,
`compose_sum`), so that a plan over hundreds of candidates costs no arithmetic.

**Borders.** second pads what first produced with zeros; one merged kernel sees first's own values there
instead. The linear part agrees nevertheless wherever first, continued beyond its output, no longer reads its
input (a 1×1 kernel never does). The bias doesn't agree, but it depends on no input: as a map, one number a
channel and position, it is exact. So `compose` answers exactly, with a bias map where needed, or refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from linl.affine import (
    Affine,
    CannotMerge,
    Geometry,
    Padding,
    Size,
    as_dense,
    as_image_layer,
    as_lifted,
    average_pool,
    batchnorm,
    conv,
    copy,
    dense,
    lifted,
    over_image,
    pooled,
    regrouped,
    scale,
    wide,
)

__all__ = [
    "Affine", "CannotMerge", "Geometry", "Padding", "Size", "as_dense", "as_image_layer", "as_lifted", "average_pool",
    "batchnorm", "compose", "compose_sum", "conv", "copy", "dense", "lifted", "merge", "merge_sum", "multiplications",
    "over_image", "pooled", "regrouped", "scale", "wide",
]  # fmt: skip

# --- one after the other ---------------------------------------------------------------------------


def compose(first: Geometry, second: Geometry, size: Size | None = None, border: str = "exact") -> Geometry:
    """The geometry of second(first(x)) as one layer.

    Kernel K = ((k₁−1)·d₁ + (k₂−1)·d₂·s₁)/d + 1 with d the greatest common divisor of both steps, stride s₁·s₂,
    padding p₁ + s₁·p₂, groups the greatest common divisor of both.

    Args:
        first, second: of equally many dimensions.
        size: spatial size of first's input; without it, an answer that holds for every size.
        border: "exact", or "interior" for a merge that may be wrong where second pads.

    Raises:
        CannotMerge: channels or dimensions that don't meet; more cut off than there is; under "exact", a border
            that no single layer has.
    """
    if first.outputs != second.inputs:
        raise CannotMerge(f"{first.outputs} outputs meet {second.inputs} inputs")
    if first.dims != second.dims:
        raise CannotMerge(f"{first.dims} spatial dimensions meet {second.dims}")
    if border == "exact" and (trouble := _border_trouble(first, second, size)):
        raise CannotMerge(trouble)
    if second.mode != "zeros" and second.padded:
        raise CannotMerge(f"{second.mode} padding in between")
    if first.bias == "map" and (size is None or border == "interior"):
        raise CannotMerge("a bias map holds for one size")
    kernel, dilation = [], []
    for k1, d1, k2, d2, s1 in zip(
        first.kernel, first.dilation, second.kernel, second.dilation, first.stride, strict=True
    ):
        step = math.gcd(d1 if k1 > 1 else 0, d2 * s1 if k2 > 1 else 0) or 1
        kernel.append(((k1 - 1) * d1 + (k2 - 1) * d2 * s1) // step + 1)
        dilation.append(step)
    padding = tuple(
        (p[0] + s * q[0], p[1] + s * q[1]) for p, q, s in zip(first.padding, second.padding, first.stride, strict=True)
    )
    if first.mode != "zeros" and any(low != high or low < 0 for low, high in padding):
        raise CannotMerge(f"{first.mode} padding, more on one side")
    _refuse_lost(padding, size)
    return Geometry(
        first.inputs, second.outputs, tuple(kernel),
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)), padding, tuple(dilation),
        math.gcd(first.groups, second.groups), _bias_after(first, second, size, border),
        _stays_uniform(first, second), first.mode,
    )  # fmt: skip


def _refuse_lost(padding: Padding, size: Size | None) -> None:
    """Cutting off more than there is, because padding of another layer comes first: torch can't."""
    for n, pair in zip(size or (), padding, strict=bool(size)):
        if min(pair) < -n:
            raise CannotMerge(f"one layer would cut {-min(pair)} of {n} positions off")


def _border_trouble(first: Geometry, second: Geometry, size: Size | None) -> str:
    """Why zeros around first's output differ from first itself continued there; "" if they don't."""
    for i in range(first.dims):
        p, step, span = first.padding[i], first.stride[i], first.span[i]
        beyond = _beyond(first, second, size, i)
        if beyond and first.mode != "zeros":
            return f"{first.mode} padding goes on where the second layer pads with zeros"
        if size is None:  # whatever the size: nothing is read from before, nor from after, the input
            low, high = second.padding[i]
            reads = (low > 0 and span - p[0] >= step) or (high > 0 and span > p[1])
        else:
            taps = range(0, span + 1, first.dilation[i])
            reads = any(0 <= z * step + tap - p[0] < size[i] for z in beyond for tap in taps)
        if reads:
            return "the second layer pads with zeros what the first would still fill: differs at the border"
    return ""


def _beyond(first: Geometry, second: Geometry, size: Size | None, i: int) -> list[int]:
    """Positions beyond first's output that second reads in dimension i (some, where the size isn't known)."""
    low, high = second.padding[i]
    if size is None:
        return [z for z, side in ((-1, low), (0, high)) if side > 0]
    between = first.output_size(size)[i]
    out = (between + low + high - second.span[i] - 1) // second.stride[i] + 1
    beyond = [*range(-low, 0), *range(between, between + high)]
    places = range(0, second.span[i] + 1, second.dilation[i])
    step = second.stride[i]
    return [z for z in beyond if any((z + low - at) % step == 0 and 0 <= (z + low - at) // step < out for at in places)]


def _sees_padding(first: Geometry, second: Geometry, size: Size | None) -> bool:
    return any(_beyond(first, second, size, i) for i in range(first.dims))


def _bias_after(first: Geometry, second: Geometry, size: Size | None, border: str) -> str:
    if "map" in (first.bias, second.bias):
        return "map"
    if first.bias == "none":
        return second.bias
    return "map" if border == "exact" and _sees_padding(first, second, size) else "channel"


def _stays_uniform(first: Geometry, second: Geometry) -> bool:
    one = (1,) * first.dims
    if first.uniform:
        return second.kernel == one and not second.padded
    return second.uniform and first.kernel == one and first.stride == one and not first.padded


def merge(first: Affine, second: Affine, size: Size | None = None, border: str = "exact") -> Affine:
    """The one layer that computes second(first(x)).

    Args:
        first, second: layers that follow each other.
        size, border: as in `compose`.

    Raises:
        CannotMerge: as `compose`.
    """
    geometry = compose(first.geometry, second.geometry, size, border)
    if geometry.bias == "map" and size is None:
        raise CannotMerge("the bias becomes a map at the border: the input's size is needed")
    bias = _composed_bias(first, second, geometry, size)
    return Affine(geometry, _composed_weight(first, second, geometry), bias)


def _composed_bias(first: Affine, second: Affine, geometry: Geometry, size: Size | None) -> Tensor | None:
    if first.bias is None:
        return second.bias
    g, first = second.geometry, replace(first, bias=wide(first.bias))
    if geometry.bias == "map":  # the bias's way through the second layer, zeros at the border and all
        between = first.geometry.output_size(size)
        filled = first.bias if first.bias.ndim > 1 else first.bias.view(-1, *[1] * g.dims)
        return second(filled.expand(g.inputs, *between)[None])[0]
    summed = wide(second.weight.flatten(2).sum(2, dtype=torch.float64) if g.dims else second.weight)
    blocks = summed.view(g.groups, g.outputs // g.groups, -1)
    moved = torch.bmm(blocks, first.bias.view(g.groups, -1, 1)).flatten()
    return moved if second.bias is None else moved + second.bias


def multiplications(first: Geometry, second: Geometry) -> int:
    """Multiply-adds that merging costs: what the best order of merging a chain is chosen by."""
    positions = math.prod(first.kernel) * math.prod(second.kernel)
    common, a, b = _blocks(first, second)
    inner = first.outputs // (common * a * b)
    return positions * common * a * b * (second.outputs // (common * b)) * inner * (first.inputs // (common * a))


def _blocks(first: Geometry, second: Geometry) -> tuple[int, int, int]:
    """(common groups, first's own within one, second's own within one); at most one of the last two above 1."""
    common = math.gcd(first.groups, second.groups)
    a, b = first.groups // common, second.groups // common
    return common, (1 if b > 1 else a), b


def _composed_weight(first: Affine, second: Affine, geometry: Geometry) -> Tensor:
    """The kernels convolved with each other, by the cheapest way there is."""
    if (
        geometry.uniform and math.prod(geometry.kernel) > 1
    ):  # one position says it all, and takes no memory for the rest
        one = _composed_weight(*(_at_one(layer) for layer in (first, second)), _one_position(geometry))
        return one.expand(*one.shape[:2], *geometry.kernel)
    g, h = first.geometry, second.geometry
    alone = math.prod(h.kernel) == 1
    if alone and h.groups == h.inputs == h.outputs:  # a factor for each output
        return wide(first.weight) * wide(second.weight).view(-1, *[1] * (1 + g.dims))
    if (
        math.prod(g.kernel) == 1 and g.groups == g.inputs == g.outputs and g.stride == (1,) * g.dims
    ):  # and for each input
        factors = wide(first.weight).view(h.groups, 1, -1, *[1] * g.dims)
        return (wide(second.weight).view(h.groups, -1, *second.weight.shape[1:]) * factors).view_as(second.weight)
    if alone and g.groups == h.groups == 1:
        product = _product(wide(second.weight).reshape(h.outputs, h.inputs), first.weight.reshape(g.outputs, -1))
        return product.view(h.outputs, g.inputs, *geometry.kernel)
    return _convolved(first, second, geometry)


def _at_one(layer: Affine) -> Affine:
    """A uniform layer's, or a 1×1 layer's, numbers at one position of the kernel."""
    weight = layer.weight[(..., *(slice(1),) * layer.geometry.dims)]
    return replace(layer, geometry=_one_position(layer.geometry), weight=weight)


def _one_position(g: Geometry) -> Geometry:
    ones = (1,) * g.dims
    return replace(g, kernel=ones, stride=ones, padding=((0, 0),) * g.dims, dilation=ones, uniform=False)


def _product(a: Tensor, b: Tensor, columns: int = 8192) -> Tensor:
    """a @ b in float64, some columns of b at a time: a float64 copy of all of it would be gigabytes."""
    out = a.new_empty(a.shape[0], b.shape[1])
    for start in range(0, b.shape[1], columns):
        part = slice(start, start + columns)
        torch.mm(a, wide(b[:, part]), out=out[:, part])
    return out


def _convolved(first: Affine, second: Affine, geometry: Geometry) -> Tensor:
    """The kernels convolved: one product of matrices for each pair of kernel positions, or where that is worth it for
    each position of the merged kernel."""
    g, h = first.geometry, second.geometry
    common, a, b = _blocks(g, h)
    blocks = common * a * b
    w1 = first.weight if g.groups == common * a else regrouped(first, common).weight
    inner = g.outputs // blocks
    # (positions, blocks, rows, columns): a block of the second's matrix times one of the first's
    w2 = second.weight.reshape(common, b, h.outputs // (common * b), a, inner, -1).permute(5, 0, 1, 3, 2, 4)
    w2 = wide(w2.reshape(-1, blocks, h.outputs // (common * b), inner))
    w1 = wide(w1.reshape(blocks, inner, g.inputs // (common * a), -1).permute(3, 0, 1, 2).contiguous())
    if _few_products(g, h, geometry, min(w2.shape[2], inner, w1.shape[3])):
        total = _by_points(w1, w2, g.kernel, h.kernel)
    else:
        total = _pair_by_pair(w1, w2, _places(g, geometry, (1,) * g.dims), _places(h, geometry, g.stride), geometry)
    total = total.view(*geometry.kernel, common, b, a, w2.shape[2], w1.shape[3])
    d = geometry.dims
    total = total.permute(d, d + 1, d + 3, d + 2, d + 4, *range(d))
    return total.reshape(geometry.outputs, geometry.inputs // geometry.groups, *geometry.kernel)


def _pair_by_pair(w1: Tensor, w2: Tensor, where1: list[Size], where2: list[Size], geometry: Geometry) -> Tensor:
    """(merged positions, blocks, rows, columns), a product for each pair of positions; exact zeros stay exact."""
    total = w1.new_zeros(math.prod(geometry.kernel), w1.shape[1], w2.shape[2], w1.shape[3])
    for v, at2 in enumerate(where2):
        for u, at1 in enumerate(where1):
            target = total[_number([i + j for i, j in zip(at1, at2, strict=True)], geometry.kernel)]
            if w1.shape[2] == 1:
                target.addcmul_(w2[v], w1[u])
            else:
                target.baddbmm_(w2[v], w1[u])
    return total


POINTS = (0.0, math.inf, 1.0, -1.0, 2.0)
"""Where polynomials are evaluated, as many of them as there are coefficients; more points would cost digits."""


def _few_products(g: Geometry, h: Geometry, geometry: Geometry, smallest: int) -> bool:
    """Whether `_by_points` applies, and saves: large matrices, kernels without gaps, neither of one position."""
    dense = all(k == a + b - 1 for k, a, b in zip(geometry.kernel, g.kernel, h.kernel, strict=True))
    saves = math.prod(g.kernel) * math.prod(h.kernel) > math.prod(geometry.kernel)
    return dense and saves and smallest >= 64 and max(geometry.kernel) <= len(POINTS)


def _by_points(w1: Tensor, w2: Tensor, kernel1: Size, kernel2: Size, rows: int = 128) -> Tensor:
    """`_pair_by_pair` by Toom and Cook: a kernel is a polynomial whose coefficients are matrices, a convolution a
    product of polynomials, and as many values as it has coefficients determine it. 25 products of matrices instead of
    81 for two 3×3 kernels, in float64 with an error of some hundred roundings."""
    at1, at2, back = w1.new_ones(1, 1), w1.new_ones(1, 1), w1.new_ones(1, 1)
    for k1, k2 in zip(kernel1, kernel2, strict=True):
        values = _powers(k1 + k2 - 1, k1 + k2 - 1).to(w1)
        at1, at2 = torch.kron(at1, _powers(k1 + k2 - 1, k1).to(w1)), torch.kron(at2, _powers(k1 + k2 - 1, k2).to(w1))
        back = torch.kron(back, torch.linalg.inv(values))
    first = (at1 @ w1.flatten(1)).view(-1, *w1.shape[1:])
    total = w1.new_empty(len(back), w1.shape[1], w2.shape[2], w1.shape[3])
    for part, made in zip(w2.split(rows, 2), total.split(rows, 2), strict=True):  # they stay in the cache
        second = (at2 @ part.flatten(1)).view(-1, *part.shape[1:])
        made.copy_((back @ torch.matmul(second, first).flatten(1)).view_as(made))
    return total


def _powers(points: int, coefficients: int) -> Tensor:
    """The matrix that evaluates a polynomial of so many coefficients at the first POINTS; at infinity: the last one."""
    last = [0.0] * (coefficients - 1) + [1.0]
    rows = [last if math.isinf(x) else [x**i for i in range(coefficients)] for x in POINTS[:points]]
    return torch.tensor(rows, dtype=torch.float64)


def _places(g: Geometry, merged: Geometry, step: Size) -> list[list[int]]:
    """Where each kernel position of `g` (whose inputs are `step` apart) lies in the merged kernel."""
    factors = [
        d * s // m if k > 1 else 0 for k, d, s, m in zip(g.kernel, g.dilation, step, merged.dilation, strict=True)
    ]
    return [[i * f for i, f in zip(at, factors, strict=True)] for at in itertools.product(*map(range, g.kernel))]


def _number(at: Sequence[int], kernel: Size) -> int:
    number = 0
    for i, k in zip(at, kernel, strict=True):
        number = number * k + i
    return number


# --- side by side ----------------------------------------------------------------------------------


def compose_sum(parts: Sequence[Geometry], size: Size) -> Geometry:
    """The geometry of Σ part(x) as one layer, for parts that read the same x.

    Args:
        parts: of equally many channels and dimensions.
        size: spatial size of x.

    Raises:
        CannotMerge: parts of different strides or channels, or with a padding that isn't zeros; more cut off
            than there is.
    """
    one = parts[0]
    if len(parts) == 1:
        return one
    outputs = {part.output_size(size) for part in parts}
    if len(outputs) > 1 or len({(p.inputs, p.outputs, p.dims) for p in parts}) > 1:
        raise CannotMerge("branches of different shapes")
    if any(part.mode != "zeros" for part in parts):
        raise CannotMerge("a branch whose padding isn't zeros")
    stride = _common_stride(parts, next(iter(outputs)))
    kernel, padding, dilation = [], [], []
    for i, n in enumerate(size):
        low = max(part.padding[i][0] for part in parts)
        steps = [low - part.padding[i][0] for part in parts] + [p.dilation[i] for p in parts if p.kernel[i] > 1]
        step = math.gcd(*steps) or 1
        reach = max(low - part.padding[i][0] + part.span[i] for part in parts)
        out = parts[0].output_size(size)[i]
        needed = (out - 1) * stride[i] + reach + 1 - n - low
        fits = [high for high in (low, 0) if high >= needed and (n + low + high - reach - 1) // stride[i] + 1 == out]
        kernel.append(reach // step + 1)
        padding.append((low, fits[0] if fits else needed))
        dilation.append(step)
    _refuse_lost(tuple(padding), size)
    kinds = {part.bias for part in parts}
    bias = "map" if "map" in kinds else "channel" if "channel" in kinds else "none"
    groups = math.gcd(*(part.groups for part in parts))
    uniform = all(part.uniform for part in parts) and len({(p.kernel, p.padding) for p in parts}) == 1
    return Geometry(
        one.inputs, one.outputs, tuple(kernel), stride, tuple(padding), tuple(dilation), groups, bias, uniform
    )


def _common_stride(parts: Sequence[Geometry], out: Size) -> Size:
    """The strides, which must agree where there is more than one output position."""
    found = []
    for i, n in enumerate(out):
        steps = {part.stride[i] for part in parts}
        if len(steps) > 1 and n > 1:
            raise CannotMerge("branches of different strides")
        found.append(max(steps))
    return tuple(found)


def merge_sum(parts: Sequence[Affine], size: Size) -> Affine:
    """The one layer that computes Σ part(x).

    Args:
        parts: layers with one input and outputs of one shape.
        size: as in `compose_sum`.

    Raises:
        CannotMerge: as `compose_sum`.
    """
    geometry = compose_sum([part.geometry for part in parts], size)
    if len(parts) == 1:
        return parts[0]
    shape = (geometry.outputs, geometry.inputs // geometry.groups, *geometry.kernel)
    weight = wide(parts[0].weight.new_zeros(())).new_zeros(shape)
    for part in parts:
        g = part.geometry
        places = tuple(
            slice((p[0] - q[0]) // m, (p[0] - q[0] + span) // m + 1, max(1, d // m) if k > 1 else 1)
            for p, q, span, d, m, k in zip(
                geometry.padding, g.padding, g.span, g.dilation, geometry.dilation, g.kernel, strict=True
            )
        )
        weight[(slice(None), slice(None), *places)] += wide(regrouped(part, geometry.groups).weight)
    biases = [_shaped_bias(part.bias, geometry) for part in parts if part.bias is not None]
    return Affine(geometry, weight, sum(biases[1:], biases[0]) if biases else None)


def _shaped_bias(bias: Tensor, geometry: Geometry) -> Tensor:
    return bias.view(-1, *[1] * geometry.dims) if geometry.bias == "map" and bias.ndim == 1 else bias
