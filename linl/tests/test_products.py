"""A convolution's outputs and gradients as products: torch's, in float64, and no more work than is needed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from linl.products import Geometry, convolve, input_gradient, kernel_gradient

KERNELS, STRIDES, PADDINGS = ((1, 1), (3, 3), (3, 1)), ((1, 1), (2, 2), (1, 2)), ((0, 0), (1, 1), (2, 0))


@pytest.mark.parametrize("kernel, stride, padding", itertools.product(KERNELS, STRIDES, PADDINGS))
@pytest.mark.parametrize("size", [(6, 5), (4, 4), (2, 2), (3, 2), (2, 1)])
def test_products_are_the_convolution_and_its_gradients(kernel, stride, padding, size):
    """Pixels that no output sees (strides), outputs that see only the border (wide paddings), and all in between."""
    geometry = Geometry(kernel, stride, padding)
    x = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, *kernel, dtype=torch.float64, requires_grad=True)
    if 0 in geometry.outs(size):
        with pytest.raises(RuntimeError, match="size"):
            F.conv2d(x, weight, None, stride, padding)
        return
    y = F.conv2d(x, weight, None, stride, padding)
    g = torch.randn_like(y)
    y.backward(g)
    assert geometry.outs(size) == y.shape[2:]
    for got, right in (
        (convolve(x, weight, geometry), y), (input_gradient(g, weight, geometry, size), x.grad),
        (kernel_gradient(x, g, geometry), weight.grad),
    ):  # fmt: skip
        assert got.shape == right.shape and (got - right).abs().max() < 1e-10


def test_what_sees_the_same_is_one_product():
    """Two pixels by two, 3×3 around each: one dense layer, and not a zero in it."""
    geometry, x, weight = Geometry((3, 3), (1, 1), (1, 1)), torch.randn(8, 5, 2, 2), torch.randn(4, 5, 3, 3)
    g = torch.randn(8, 4, 2, 2)
    for work in (lambda: convolve(x, weight, geometry), lambda: input_gradient(g, weight, geometry, (2, 2)),
                 lambda: kernel_gradient(x, g, geometry)):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == 2 * 8 * (4 * 4) * (4 * 5)  # a convolution counts 9 taps of 4 pixels


def test_they_can_be_differentiated():
    geometry = Geometry((3, 3), (2, 1), (1, 1))
    x, weight = torch.randn(2, 2, 3, 2).double(), torch.randn(3, 2, 3, 3).double()
    g = torch.randn(2, 3, *geometry.outs((3, 2))).double()
    for tensor in (x, weight, g):
        tensor.requires_grad_(True)
    assert gradcheck(lambda x, weight: convolve(x, weight, geometry), (x, weight))
    assert gradcheck(lambda g, weight: input_gradient(g, weight, geometry, (3, 2)), (g, weight))
    assert gradcheck(lambda x, g: kernel_gradient(x, g, geometry), (x, g))


def test_an_empty_batch():
    geometry, weight = Geometry((3, 3), (1, 1), (1, 1)), torch.randn(4, 5, 3, 3)
    assert convolve(torch.randn(0, 5, 2, 2), weight, geometry).shape == (0, 4, 2, 2)
    assert input_gradient(torch.randn(0, 4, 2, 2), weight, geometry, (2, 2)).shape == (0, 5, 2, 2)
