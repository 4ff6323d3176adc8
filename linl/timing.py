"""Milliseconds of layers that aren't built yet: what folding for latency chooses by."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from linl.affine import Affine, Geometry, Size
from linl.cost import LatencyTable
from linl.planning import Timer
from linl.rewriting import modules_of


def layer_timer(batch: int, like: Tensor) -> Timer:
    """A timer for `plan`: layers with random numbers on inputs of `batch` items, in like's dtype, on its device."""
    table = LatencyTable()

    def ms(geometry: Geometry, size: Size, kind: str, flat: bool) -> float:
        if kind == "copy" and not geometry.padded:
            return 0.0
        if geometry.bias == "none" and kind == "conv":  # a bias costs nothing; noise must not say otherwise
            geometry = replace(geometry, bias="channel")
        shape = (batch, geometry.inputs, *size)
        return table.ms(f"{geometry} {kind} {flat}", lambda: _sample(geometry, size, kind, flat), shape, like)

    return ms


def built(layer: Affine, size: Size, flat: bool) -> nn.Module:
    """A layer as a module of its own, bias map and all."""
    modules, bias_map = modules_of(layer, size, flat)
    row = nn.Sequential(*(module for _, module in modules))
    return (row if bias_map is None else Shifted(row, bias_map)).eval()


class Shifted(nn.Module):
    """A layer and its bias map."""

    def __init__(self, layer: nn.Module, bias_map: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("bias_map", bias_map)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).add_(self.bias_map)


class _Doubled(nn.Module):
    """An addition."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _sample(geometry: Geometry, size: Size, kind: str, flat: bool) -> nn.Module:
    if kind == "add":
        return _Doubled()
    if kind == "scale":
        return _NORMS[geometry.dims](geometry.inputs)
    shape = (geometry.outputs, geometry.inputs // geometry.groups, *geometry.kernel)
    biases = {
        "none": lambda: None,
        "channel": lambda: torch.randn(geometry.outputs),
        "map": lambda: torch.randn(geometry.outputs, *geometry.output_size(size)),
    }
    weight = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
    return built(Affine(geometry, weight, biases[geometry.bias]()), size, flat)
