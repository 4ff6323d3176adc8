"""Layers read at one position: one dense matrix over the whole image, exact whatever the borders.

A layer that reads all of an image and has one output position doesn't care how the layers before it pad. Its
weight goes back through each of them by the adjoint: a transposed convolution, then what padding copied returns
to where it was copied from, and what padding made up is dropped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linl.affine import Affine, Geometry, Size, as_dense, pad_argument, wide

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

AT_ONCE = 2**24
"""Numbers of an image batch that goes back through a layer at once: 128 MiB."""


def whole_geometry(inputs: int, outputs: int, size: Size, bias: str = "channel") -> Geometry:
    """The geometry of a dense layer over an (inputs, *size) image, as a convolution of that kernel."""
    ones = (1,) * len(size)
    return Geometry(inputs, outputs, tuple(size), ones, ((0, 0),) * len(size), ones, bias=bias)


def whole(layer: Affine, channels: int, size: Size) -> Affine:
    """A layer of one output position as a dense layer over its whole (channels, *size) input, padding resolved.

    Args:
        layer: over images, or a dense one that reads their features.
        channels, size: of the image.
    """
    g = layer.geometry
    if g.mode != "zeros" and g.padded:
        unit = torch.eye(g.outputs, dtype=torch.float64, device=layer.weight.device)
        weight = _returned(layer, unit.view(-1, g.outputs, *[1] * g.dims), size)
        bias = None if layer.bias is None else wide(layer.bias).reshape(-1)
    else:
        flat = as_dense(layer, size if g.dims else ())
        weight, bias = wide(flat.weight).view(-1, channels, *size), wide(flat.bias)
    return Affine(whole_geometry(channels, g.outputs, size, "none" if bias is None else "channel"), weight, bias)


def pulled(first: Affine, second: Affine, size: Size) -> Affine:
    """The dense layer over the whole image that computes second(first(x)).

    Args:
        first: over images, with any padding.
        second: of one output position, reads what first gives.
        size: spatial size of first's input.
    """
    g = first.geometry
    between = g.output_size(size)
    last = whole(second, g.outputs, between)
    bias = last.bias
    if first.bias is not None:
        shift = wide(first.bias)
        shift = (shift if shift.ndim > 1 else shift.view(-1, *[1] * g.dims)).expand(g.outputs, *between)
        moved = last.weight.flatten(1) @ shift.flatten()
        bias = moved if bias is None else moved + bias
    weight = _returned(first, last.weight, size)
    return Affine(whole_geometry(g.inputs, len(weight), size, "none" if bias is None else "channel"), weight, bias)


def _returned(layer: Affine, rows: Tensor, size: Size) -> Tensor:
    """The adjoint of a layer's linear part, applied to rows (N, outputs, *output size): (N, inputs, *size)."""
    largest = max(rows[0].numel(), layer.geometry.inputs * math.prod(_reach(layer.geometry, size)))
    parts = rows.split(max(1, AT_ONCE // largest))
    weight = wide(layer.weight)
    return torch.cat([adjoint(layer.geometry, weight, part, size) for part in parts])


def adjoint(g: Geometry, weight: Tensor, y: Tensor, size: Size) -> Tensor:
    """A convolution's linear part the other way: (N, outputs, *output size) to (N, inputs, *size)."""
    # positions after the last that the layer reads: a stride leaves them over
    spare = tuple((n - span - 1) % step for n, span, step in zip(_reach(g, size), g.span, g.stride, strict=True))
    x = TRANSPOSED[g.dims](y, weight, None, g.stride, 0, spare, g.groups, g.dilation)
    if g.mode == "zeros":  # what padding made up is cut off, what it cut off gets zeros
        back = tuple((-low, -high) for low, high in g.padding)
        return F.pad(x, pad_argument(back)) if any(side for pair in back for side in pair) else x
    for i, (n, pair) in enumerate(zip(size, g.padding, strict=True)):
        if any(pair):
            at = _sources(n, pair, g.mode).to(x.device)
            real = at >= 0
            back = x.new_zeros(*x.shape[: 2 + i], n, *x.shape[3 + i :])
            x = back.index_add_(2 + i, at[real], x[(slice(None),) * (2 + i) + (real,)])
    return x


def _reach(g: Geometry, size: Size) -> Size:
    """Spatial size of the padded input."""
    return tuple(n + low + high for n, (low, high) in zip(size, g.padding, strict=True))


def _sources(n: int, pair: tuple[int, int], mode: str) -> Tensor:
    """Which of n positions each position of the padded image holds; −1: none, a zero."""
    numbers = torch.arange(1, n + 1, dtype=torch.float64).view(1, 1, -1)
    return F.pad(numbers, pair, "constant" if mode == "zeros" else mode).flatten().long() - 1
