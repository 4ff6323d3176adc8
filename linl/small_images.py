"""Convolutions on images of a few pixels, whose kernels' gradient is one matrix product on a processor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS, PIXELS_APART = 4, 64
"""Output images of at most so many pixels are small; the second where the kernel moves by more than one pixel. Measured
with two threads of an EPYC, 128 images: 2 to 4 times as fast as torch 2.13's own; above these sizes not faster."""


@contextlib.contextmanager
def one_product_where_images_are_small(net: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """While this lasts, convolutions with small images sum their kernels' gradient in one product (CPU, bf16 only).

    torch's CPU library takes each image's share by itself. With 512 channels and 2×2 pixels that is several times
    slower than the product of all pixels of the batch with all that they have seen, which is the same sum.
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
        trained = torch.is_grad_enabled() and weight.requires_grad
        if not (mixed and trained and x.dim() == 4 and _small(module, x)):
            return nn.Conv2d._conv_forward(module, x, weight, bias)
        y = _OneProduct.apply(x.bfloat16(), weight.bfloat16(), module.stride, module.padding)
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


def _small(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether its output has few pixels."""
    ways = zip(x.shape[-2:], module.padding, module.kernel_size, module.stride, strict=True)
    high, wide = ((side + 2 * padding - kernel) // stride + 1 for side, padding, kernel, stride in ways)
    return high * wide <= (PIXELS if module.stride == (1, 1) else PIXELS_APART)


class _OneProduct(torch.autograd.Function):
    """A convolution without bias: torch's, but for the kernel's gradient."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            sizes = ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1
            of_x = torch.ops.aten.convolution_backward(g, x, weight, None, *sizes, [True, False, False])[0]
        return of_x, kernel_gradient(x, g, weight.shape[-2:], ctx.stride, ctx.padding), None, None


def kernel_gradient(x: Tensor, g: Tensor, kernel: tuple, stride: tuple, padding: tuple) -> Tensor:
    """The gradient of a convolution's kernel as one product.

    Args:
        x: inputs (N, C, H, W).
        g: gradient of the outputs (N, D, h, w).
        kernel, stride, padding: of both directions.

    Returns: (D, C, *kernel).
    """
    (high, wide), (down, right), (top, left) = kernel, stride, padding
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    h, w = g.shape[-2:]
    seen = [
        x[:, i : i + down * (h - 1) + 1 : down, j : j + right * (w - 1) + 1 : right]
        for i in range(high) for j in range(wide)
    ]  # fmt: skip
    columns = torch.cat(seen, dim=-1).flatten(0, 2)
    product = g.permute(1, 0, 2, 3).flatten(1) @ columns
    return product.view(len(product), high, wide, x.shape[-1]).permute(0, 3, 1, 2)
