"""A convolution's outputs and both its gradients as matrix products, without the border's zeros.

All of them can be differentiated in their turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image: sizes of the kernel, the strides and the paddings, high and wide."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def outs(self, ins: tuple[int, int]) -> tuple[int, int]:
        """How many outputs there are, high and wide, of so many inputs; 0 where the kernel is larger."""
        ways = zip(ins, self.padding, self.kernel, self.stride, strict=True)
        high, wide = (max(0, side + 2 * padding - kernel + stride) // stride for side, padding, kernel, stride in ways)
        return high, wide

    def taps(self, way: int, outs: int, ins: int) -> list[list[int | None]]:
        """In one direction, which tap of the kernel lies between each output and each input; None where none does."""
        starts = [out * self.stride[way] - self.padding[way] for out in range(outs)]
        return [[i - start if 0 <= i - start < self.kernel[way] else None for i in range(ins)] for start in starts]

    def both(self, outs: tuple[int, int], ins: tuple[int, int]) -> tuple[list, list]:
        """`taps` of both directions, rows first."""
        return self.taps(0, outs[0], ins[0]), self.taps(1, outs[1], ins[1])


@dataclass(frozen=True)
class _Group:
    """Neighbours, in one direction, that are joined to the same ones on the other side."""

    ours: slice
    theirs: slice
    taps: list[list[int]]  # of each of ours, to each of theirs


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The convolution without bias. All outputs that see the same inputs are one product, without the border's zeros.

    Two pixels by two, and a kernel of 3×3 around each, are a single dense layer with four ninths of the products that
    nine taps of four outputs make.

    Args:
        x: inputs (N, C, H, W).
        weight: the kernel (D, C, kh, kw), in the inputs' dtype.
        geometry: kernel, stride and padding.

    Returns: outputs (N, D, h, w), channels last.
    """
    outs, pixels = geometry.outs(x.shape[2:]), x.permute(0, 2, 3, 1)
    y, taps = _zeros(x, weight.shape[0], outs), weight.permute(2, 3, 0, 1)
    for high, wide in _groups(*geometry.both(outs, x.shape[2:])):
        product = pixels[:, high.theirs, wide.theirs].flatten(1) @ _dense(taps, high.taps, wide.taps).t()
        _put(y, high, wide, product)
    return y


def input_gradient(g: Tensor, weight: Tensor, geometry: Geometry, ins: tuple[int, int]) -> Tensor:
    """The gradient of `convolve`'s inputs.

    Args:
        g: gradient of the outputs (N, D, h, w).
        weight: the kernel (D, C, kh, kw), in the same dtype.
        geometry: kernel, stride and padding.
        ins: height and width of the inputs.

    Returns: (N, C, *ins), channels last.
    """
    pixels, taps = g.permute(0, 2, 3, 1), weight.permute(2, 3, 0, 1)
    of_x = _zeros(g, weight.shape[1], ins)
    for high, wide in _groups(*(_turned(way) for way in geometry.both(g.shape[2:], ins))):
        matrix = _dense(taps, _turned(high.taps), _turned(wide.taps))
        _put(of_x, high, wide, pixels[:, high.theirs, wide.theirs].flatten(1) @ matrix)
    return of_x


def kernel_gradient(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `convolve`'s kernel: a product a tap, of all pixels that it joins in the batch.

    Args:
        x: inputs (N, C, H, W).
        g: gradient of the outputs (N, D, h, w), in the same dtype.
        geometry: kernel, stride and padding.

    Returns: (D, C, kh, kw).
    """
    ways = zip(geometry.both(g.shape[2:], x.shape[2:]), geometry.stride, geometry.kernel, strict=True)
    rows, columns = ([_joined(taps, tap, stride) for tap in range(kernel)] for taps, stride, kernel in ways)
    x, g = x.permute(2, 3, 0, 1), g.permute(2, 3, 0, 1)
    of_weight = x.new_empty(g.shape[3], *geometry.kernel, x.shape[3])
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row and column:
                outputs, inputs = g[row[0], column[0]].flatten(0, 2), x[row[1], column[1]].flatten(0, 2)
                of_weight[:, i, j] = outputs.t() @ inputs
            else:
                of_weight[:, i, j] = 0
    return of_weight.permute(0, 3, 1, 2)


def _zeros(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Images of zeros, channels last; no view of anything, so that a layer behind may change them in place."""
    as_given = {"dtype": like.dtype, "device": like.device}
    return torch.empty(len(like), channels, *size, **as_given, memory_format=torch.channels_last).zero_()


def _put(images: Tensor, high: _Group, wide: _Group, product: Tensor) -> None:
    """Writes a group's product to its pixels."""
    sizes = len(images), len(high.taps), len(wide.taps), images.shape[1]
    images.permute(0, 2, 3, 1)[:, high.ours, wide.ours] = product.view(sizes)


def _groups(rows: list, columns: list) -> Iterator[tuple[_Group, _Group]]:
    """Every group of rows with every group of columns."""
    wide = list(_alike(columns))
    return ((high, one) for high in _alike(rows) for one in wide)


def _alike(taps: list[list[int | None]]) -> Iterator[_Group]:
    """Groups of one direction; those that are joined to nothing are in none."""
    spans = [[other for other, tap in enumerate(row) if tap is not None] for row in taps]
    start = 0
    for end in range(1, len(taps) + 1):
        if end == len(taps) or spans[end] != spans[start]:
            if span := spans[start]:
                theirs = slice(span[0], span[-1] + 1)
                yield _Group(slice(start, end), theirs, [row[theirs] for row in taps[start:end]])
            start = end


def _turned(taps: list[list[int | None]]) -> list[list[int | None]]:
    """The same taps, from each input to each output."""
    return [list(row) for row in zip(*taps, strict=True)]


def _dense(taps: Tensor, rows: list[list[int]], columns: list[list[int]]) -> Tensor:
    """The matrix of outputs that all see the same inputs, (outs·D, ins·C), from taps (kh, kw, D, C)."""
    matrix = taps.new_empty(len(rows), len(columns), taps.shape[2], len(rows[0]), len(columns[0]), taps.shape[3])
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            matrix[a, b] = taps[row[0] : row[-1] + 1, column[0] : column[-1] + 1].permute(2, 0, 1, 3)
    return matrix.flatten(0, 2).flatten(1)


def _joined(taps: list[list[int | None]], tap: int, stride: int) -> tuple[slice, slice] | None:
    """The outputs that a tap joins to inputs, and those inputs; None where there are none."""
    pairs = [(out, row.index(tap)) for out, row in enumerate(taps) if tap in row]
    if not pairs:
        return None
    (first, seen), (last, seen_last) = pairs[0], pairs[-1]
    return slice(first, last + 1), slice(seen, seen_last + 1, stride)
