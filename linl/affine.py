"""Affine layers as records: a weight, a bias and a geometry.

One record, `Affine`, stands for every layer that is linear up to a bias: a convolution of any kernel, stride,
padding, dilation and groups; a dense layer (a convolution over no dimension); BatchNorm in evaluation, a fixed
factor, an average pool, a zero padding, a subsampling (depthwise convolutions all). Arithmetic is float64,
whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


class CannotMerge(ValueError):  # noqa: N818 - an answer, not a fault
    """These layers have no exact merge; the message says why."""


@dataclass(frozen=True)
class Geometry:
    """Where an affine layer reads, everything of it but its numbers.

    Attributes:
        inputs, outputs: channels (features of a dense layer).
        kernel, stride, dilation: one number a spatial dimension; () for a dense layer.
        padding: zeros (before, after) in each dimension; below 0 cuts off.
        groups: of the channels.
        bias: "none", "channel" (one number a channel) or "map" (one a channel and output position).
        uniform: the same weight at every position of the kernel: an average pool and a 1×1 layer.
        mode: what padding holds, torch's `padding_mode`.
    """

    inputs: int
    outputs: int
    kernel: Size = ()
    stride: Size = ()
    padding: Padding = ()
    dilation: Size = ()
    groups: int = 1
    bias: str = "channel"
    uniform: bool = False
    mode: str = "zeros"

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.kernel)

    @property
    def span(self) -> Size:
        """Distance from the first to the last input that one output reads, in each dimension."""
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def padded(self) -> bool:
        """Whether anything is added at a border."""
        return any(side > 0 for pair in self.padding for side in pair)

    def output_size(self, size: Size) -> Size:
        """Spatial size of the output for an input of `size`."""
        return tuple(
            (n + low + high - span - 1) // step + 1
            for n, (low, high), span, step in zip(size, self.padding, self.span, self.stride, strict=True)
        )

    def weights(self) -> int:
        """Numbers that the layer multiplies with at each output position."""
        positions = 1 if self.uniform else math.prod(self.kernel)
        return self.outputs * (self.inputs // self.groups) * positions


@dataclass(frozen=True)
class Affine:
    """A layer: geometry, weight (outputs, inputs / groups, *kernel) and bias (outputs, [*output size]) or None.

    Numbers may come in any dtype; whatever is computed from them is float64.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer applied to (N, inputs, *size), or for a dense one to (…, inputs)."""
        g = self.geometry
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not g.dims:
            return F.linear(x, regrouped(self, 1).weight.to(x.dtype), bias)
        shaped = _padded(x, g)
        y = _CONV[g.dims](shaped, self.weight.to(x.dtype), None, g.stride, 0, g.dilation, g.groups)
        if bias is None:
            return y
        return y + (bias if bias.ndim > 1 else bias.view(-1, *[1] * g.dims))


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _padded(x: Tensor, g: Geometry) -> Tensor:
    if not any(side for pair in g.padding for side in pair):
        return x
    return F.pad(x, pad_argument(g.padding), "constant" if g.mode == "zeros" else g.mode)


def pad_argument(padding: Padding) -> list[int]:
    """Padding as torch.nn.functional.pad wants it: the last dimension first."""
    return [side for pair in reversed(padding) for side in pair]


# --- makers ----------------------------------------------------------------------------------------


def dense(weight: Tensor, bias: Tensor | None = None) -> Affine:
    """y = weight·x + bias.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,) or None.
    """
    outputs, inputs = weight.shape
    return Affine(Geometry(inputs, outputs, bias=_kind(bias)), weight, bias)


def conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size | int = 1,
    padding: Padding | Size | int = 0,
    dilation: Size | int = 1,
    groups: int = 1,
    mode: str = "zeros",
) -> Affine:
    """A convolution as torch has it, in one to three dimensions.

    Args:
        weight: (outputs, inputs / groups, *kernel).
        bias: (outputs,) or None.
        stride, padding, dilation: a number for every dimension, or one each; padding also as pairs (before, after).
        groups: as in torch.
        mode: of padding, as `padding_mode` in torch.
    """
    geometry = conv_geometry(tuple(weight.shape), bias is not None, stride, padding, dilation, groups, mode)
    return Affine(geometry, weight, bias)


def conv_geometry(shape, has_bias, stride=1, padding=0, dilation=1, groups=1, mode="zeros") -> Geometry:
    """The geometry of `conv` from its weight's shape, without the numbers."""
    dims = len(shape) - 2
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in _each(padding, dims))
    bias = "channel" if has_bias else "none"
    return Geometry(
        shape[1] * groups, shape[0], tuple(shape[2:]), _each(stride, dims), pairs, _each(dilation, dims), groups, bias,
        mode=mode,
    )  # fmt: skip


def scale_geometry(channels: int, dims: int, bias: str = "channel") -> Geometry:
    """The geometry of a factor and a shift for each channel."""
    ones = (1,) * dims
    return Geometry(channels, channels, ones, ones, ((0, 0),) * dims, ones, channels, bias)


def scale(factor: Tensor, shift: Tensor | None, dims: int) -> Affine:
    """y[c] = factor[c]·x[c] + shift[c] over `dims` spatial dimensions; both (C,)."""
    geometry = scale_geometry(len(factor), dims, _kind(shift))
    return Affine(geometry, wide(factor).view(-1, 1, *[1] * dims), wide(shift))


def batchnorm(mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, dims: int):
    """BatchNorm in evaluation: factor = γ/√(var + ε), shift = β − mean·factor.

    Args:
        mean, variance: the running statistics, (C,).
        eps: ε, the layer's own.
        weight, bias: γ and β, (C,), or None.
        dims: spatial dimensions, 0 for features.
    """
    factor = (wide(variance) + eps).rsqrt()
    if weight is not None:
        factor = factor * wide(weight)
    shift = -wide(mean) * factor
    return scale(factor, shift if bias is None else shift + wide(bias), dims)


def pool_geometry(channels: int, kernel: Size, stride: Size, padding: Padding) -> Geometry:
    """The geometry of an average pool that counts padding as zeros."""
    ones = (1,) * len(kernel)
    return Geometry(channels, channels, kernel, stride, padding, ones, channels, "none", uniform=True)


def adaptive_geometry(channels: int, out: Size, size: Size) -> Geometry:
    """An adaptive average pool's geometry for images of a size.

    Args:
        out: the size that it gives.

    Raises:
        CannotMerge: it averages over unequal numbers of positions.
    """
    if any(n % m for n, m in zip(size, out, strict=True)):
        told = ["×".join(map(str, each)) for each in (size, out)]
        raise CannotMerge(f"an adaptive pool from {told[0]} to {told[1]} positions is no even average")
    kernel = tuple(n // m for n, m in zip(size, out, strict=True))
    none = ((0, 0),) * len(size)
    if size == out:
        return copy_geometry(channels, kernel, none)
    return pool_geometry(channels, kernel, kernel, none)


def unrounded(geometry: Geometry, size: Size) -> Geometry:
    """A pool's geometry where rounding its output's size up (ceil_mode) is rounding it down.

    Raises:
        CannotMerge: it isn't.
    """
    spans = zip(size, geometry.padding, geometry.kernel, geometry.stride, strict=True)
    if any((n + sum(pair) - k) % s for n, pair, k, s in spans):
        raise CannotMerge("an average pool with ceil_mode")
    return geometry


def average_pool(channels: int, kernel: Size, stride: Size, padding: Padding, divisor: int | None = None) -> Affine:
    """An average pool that counts padding as zeros (torch's `count_include_pad=True`).

    Args:
        channels: of input and output.
        kernel, stride: a number for each dimension.
        padding: a pair (before, after) for each dimension.
        divisor: instead of the number of positions in the kernel.
    """
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or math.prod(kernel)), dtype=torch.float64)
    return Affine(pool_geometry(channels, kernel, stride, padding), weight, None)


def copy_geometry(channels: int, stride: Size, padding: Padding) -> Geometry:
    """The geometry of a layer that only pads, cuts off or takes every n-th position."""
    ones = (1,) * len(stride)
    return Geometry(channels, channels, ones, stride, padding, ones, channels, "none")


def copy(channels: int, stride: Size, padding: Padding) -> Affine:
    """Zero padding, cutting off and subsampling: every output is one input."""
    weight = torch.ones(channels, 1, *[1] * len(stride), dtype=torch.float64)
    return Affine(copy_geometry(channels, stride, padding), weight, None)


def _each(value, dims: int) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def _kind(bias: Tensor | None) -> str:
    return "none" if bias is None else "channel"


def wide(tensor: Tensor | None) -> Tensor | None:
    """float64, where arithmetic is done."""
    if tensor is None:
        return None
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # Apple's GPUs have no float64


# --- other forms of the same layer -----------------------------------------------------------------


def over_image(geometry: Geometry, channels: int, size: Size) -> Geometry:
    """A dense layer that reads a flattened (channels, *size) image, as a convolution of that kernel."""
    ones = (1,) * len(size)
    return replace(
        geometry, inputs=channels, kernel=tuple(size), stride=ones, padding=((0, 0),) * len(size), dilation=ones
    )


def as_image_layer(layer: Affine, channels: int, size: Size) -> Affine:
    """`over_image` with the numbers."""
    weight = layer.weight.reshape(layer.geometry.outputs, channels, *size)
    return Affine(over_image(layer.geometry, channels, size), weight, layer.bias)


def lifted(geometry: Geometry, dims: int) -> Geometry:
    """A layer of features as one of images with a single position."""
    ones = (1,) * dims
    return replace(geometry, kernel=ones, stride=ones, padding=((0, 0),) * dims, dilation=ones)


def as_lifted(layer: Affine, dims: int) -> Affine:
    """`lifted` with the numbers."""
    return Affine(lifted(layer.geometry, dims), layer.weight.view(*layer.weight.shape, *[1] * dims), layer.bias)


def as_dense(layer: Affine, size: Size) -> Affine:
    """A layer with one output position as a dense layer on the flattened input; padding is cut away."""
    g = layer.geometry
    full = regrouped(layer, 1).weight
    bias = None if layer.bias is None else layer.bias.reshape(-1)
    if g.kernel == tuple(size) and not any(side for pair in g.padding for side in pair):
        return dense(full.reshape(g.outputs, -1), bias)
    for i, (n, (low, _), step) in enumerate(zip(size, g.padding, g.dilation, strict=True)):
        at = torch.arange(g.kernel[i], device=full.device) * step - low
        inside = (at >= 0) & (at < n)
        cut = full.new_zeros(*full.shape[: 2 + i], n, *full.shape[3 + i :])
        full = cut.index_copy_(2 + i, at[inside], full.index_select(2 + i, inside.nonzero()[:, 0]))
    return dense(full.reshape(g.outputs, -1), bias)


def pooled(layer: Affine) -> Affine:
    """What follows the average pool in a uniform layer: a 1×1 layer."""
    g = layer.geometry
    ones = (1,) * g.dims
    weight = layer.weight[(..., *(slice(1),) * g.dims)] * math.prod(g.kernel)
    geometry = replace(g, kernel=ones, stride=ones, padding=((0, 0),) * g.dims, dilation=ones, uniform=False)
    return Affine(geometry, weight, layer.bias)


def regrouped(layer: Affine, groups: int) -> Affine:
    """The same layer with fewer groups (a divisor), zeros where a group didn't read."""
    g = layer.geometry
    if groups == g.groups:
        return layer
    inside, rows, columns = g.groups // groups, g.outputs // g.groups, g.inputs // g.groups
    spread = layer.weight.new_zeros(groups, inside, rows, inside, columns, *g.kernel)
    given = layer.weight.reshape(groups, inside, rows, columns, *g.kernel)
    for i in range(inside):
        spread[:, i, :, i] = given[:, i]
    weight = spread.reshape(g.outputs, g.inputs // groups, *g.kernel)
    return Affine(replace(g, groups=groups), weight, layer.bias)
