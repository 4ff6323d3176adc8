"""The algebra of affine layers: from (weight, bias, geometry) to (weight, bias, geometry).

Pure functions on small records; no modules, no graphs. All arithmetic is float64, whatever comes in;
`folding` casts back at the end. Reading order is the network's: `merge(first, second)` computes
second(first(x)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """y[c] = scale[c]·x[c] + shift[c], channel by channel: BatchNorm in evaluation, or a plain factor.

    Attributes:
        scale, shift: (C,).
    """

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Dense:
    """y = weight·x + bias.

    Attributes:
        weight: (out, in).
        bias: (out,).
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Conv:
    """A convolution as torch has it, zero-padded.

    Attributes:
        weight: (out, in / groups, *kernel).
        bias: (out,).
        stride, padding, dilation: one number a spatial dimension.
        groups: of the channels.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Affine = Scale | Dense | Conv


class CannotMerge(ValueError):  # noqa: N818 - an answer, not a fault
    """These two layers have no exact merge; the message says why."""


def batchnorm_scale(mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Scale:
    """BatchNorm in evaluation: scale = γ/√(var + ε), shift = β − mean·scale. All arguments (C,)."""
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return Scale(scale, shift if bias is None else shift + bias.double())


def merge(first: Affine, second: Affine) -> Affine:
    """The one layer that computes second(first(x)).

    Raises:
        CannotMerge: no rule for the pair, or none that is exact.
    """
    rule = _RULES.get((type(first), type(second)))
    if rule is None:
        raise CannotMerge(f"no rule for {type(first).__name__} into {type(second).__name__}")
    return rule(first, second)


def _scale_scale(first: Scale, second: Scale) -> Scale:
    return Scale(first.scale * second.scale, first.shift * second.scale + second.shift)


def _scale_dense(first: Scale, second: Dense) -> Dense:
    _same(len(first.scale), second.weight.shape[1])
    return Dense(second.weight * first.scale, second.bias + second.weight @ first.shift)


def _dense_scale(first: Dense, second: Scale) -> Dense:
    _same(len(first.weight), len(second.scale))
    return Dense(first.weight * second.scale[:, None], first.bias * second.scale + second.shift)


def _dense_dense(first: Dense, second: Dense) -> Dense:
    _same(len(first.weight), second.weight.shape[1])
    return Dense(second.weight @ first.weight, second.weight @ first.bias + second.bias)


def _conv_scale(first: Conv, second: Scale) -> Conv:
    _same(len(first.weight), len(second.scale))
    factor = second.scale.view(-1, *[1] * (first.weight.ndim - 1))
    return replace(first, weight=first.weight * factor, bias=first.bias * second.scale + second.shift)


def _same(produced: int, expected: int) -> None:
    if produced != expected:
        raise CannotMerge(f"{produced} outputs meet {expected} inputs")


_RULES = {
    (Scale, Scale): _scale_scale,
    (Scale, Dense): _scale_dense,
    (Dense, Scale): _dense_scale,
    (Dense, Dense): _dense_dense,
    (Conv, Scale): _conv_scale,
}


def cost(layer: Affine) -> int:
    """Weights that a layer multiplies with, at each output position."""
    return layer.scale.numel() if isinstance(layer, Scale) else layer.weight.numel()


def zeros_like_bias(weight: Tensor) -> Tensor:
    """A zero bias for a layer that has none."""
    return torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
