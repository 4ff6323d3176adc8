"""Convolutions on images of a few pixels, which a processor trains faster as matrix products."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.products import Geometry, convolve, input_gradient, kernel_gradient

PIXELS, PIXELS_OF_KERNELS = 4, 16
"""Up to so many output pixels a convolution is products throughout; up to the second its kernel's gradient alone (but
not where the kernel is one pixel itself: torch takes those as a product too). What it gives is measured in
notebooks/experiments/epoch_speed.ipynb, side by side with torch's own."""
CHANNELS, LEAST, LEAST_OF_KERNELS = 128, 2**19, 2**22
"""With fewer channels products are too thin; and images × channels in × channels out from which they pay, throughout
and for the kernel's gradient alone: below, calling them costs more than is saved. Two threads of an EPYC."""


@contextlib.contextmanager
def products_where_images_are_small(net: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """While this lasts, convolutions with small images are matrix products (CPU, bf16 only).

    On few pixels torch's CPU library is several times slower than products over the whole batch, which are the same
    sums.

    Args:
        net: changed while this lasts.
        device, precision: of the training; elsewhere nothing is changed.
    """
    changed = []
    if device.type == "cpu" and precision == "bf16":
        changed = [module for module in net.modules() if _plain(module)]
    for module in changed:
        module._conv_forward = _Forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module._conv_forward


@dataclass(frozen=True)
class _Forward:
    """Stands in for a module's own forward pass; a copy of the module, or a file of it, has torch's instead."""

    module: nn.Conv2d

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = self.module
        mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        mixed &= torch.float64 not in (x.dtype, weight.dtype)  # which autocast leaves alone
        trained = torch.is_grad_enabled() and weight.requires_grad
        geometry = Geometry(module.kernel_size, module.stride, module.padding)
        way = _way(x, weight, geometry) if mixed and trained and x.dim() == 4 else None
        if way is None:
            return nn.Conv2d._conv_forward(module, x, weight, bias)
        y = way.apply(x.bfloat16(), weight.bfloat16(), geometry)
        return y if bias is None else y + bias.bfloat16()[:, None, None]

    def __reduce__(self):
        return functools.partial, (nn.Conv2d._conv_forward, self.module)


def _plain(module: nn.Module) -> bool:
    """A convolution over all channels, its kernel dense and at most 3 wide, its border zeros of a stated width."""
    return (
        type(module) is nn.Conv2d
        and "_conv_forward" not in vars(module)  # somebody's own, or ours already
        and module.groups == 1
        and module.dilation == (1, 1)
        and max(module.kernel_size) <= 3
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _way(x: Tensor, weight: Tensor, geometry: Geometry) -> type[torch.autograd.Function] | None:
    """What is by products; None where nothing is."""
    out, into = weight.shape[:2]
    pixels, size = math.prod(geometry.outs(x.shape[2:])), len(x) * out * into
    if x.shape[1] != into or min(out, into) < CHANNELS or not pixels:
        return None
    one_by_one = max(geometry.kernel) == 1
    if pixels <= PIXELS and size >= LEAST and (pixels == 1 or not one_by_one):
        return _AllByProducts
    few = pixels <= (PIXELS if one_by_one else PIXELS_OF_KERNELS)
    return _KernelByProducts if few and size >= LEAST_OF_KERNELS else None


class _AllByProducts(torch.autograd.Function):
    """A convolution without bias, all of it by products."""

    @staticmethod
    def forward(ctx, x, weight, geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return convolve(x, weight, geometry)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x = input_gradient(g, weight, ctx.geometry, x.shape[2:]) if ctx.needs_input_grad[0] else None
        return of_x, kernel_gradient(x, g, ctx.geometry), None


class _KernelByProducts(torch.autograd.Function):
    """A convolution without bias: torch's, but for the kernel's gradient."""

    @staticmethod
    def forward(ctx, x, weight, geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, None, geometry.stride, geometry.padding)

    @staticmethod
    def backward(ctx, g):
        (x, weight), geometry, of_x = ctx.saved_tensors, ctx.geometry, None
        if ctx.needs_input_grad[0]:
            sizes = geometry.stride, geometry.padding, (1, 1), False, (0, 0), 1
            of_x = torch.ops.aten.convolution_backward(g, x, weight, None, *sizes, [True, False, False])[0]
        return of_x, kernel_gradient(x, g, geometry), None
