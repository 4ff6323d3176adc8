"""The algebra: each rule against the two layers run one after the other, in float64."""

import pytest
import torch
import torch.nn.functional as F

from linl import merge as algebra
from linl.merge import CannotMerge, Conv, Dense, Scale, merge

D = torch.float64


def dense(outputs, inputs):
    return Dense(torch.randn(outputs, inputs, dtype=D), torch.randn(outputs, dtype=D))


def scale(n):
    return Scale(torch.randn(n, dtype=D), torch.randn(n, dtype=D))


def conv(outputs, inputs, kernel, stride=1, padding=0, dilation=1, groups=1):
    two = lambda n: (n, n)  # noqa: E731
    weight = torch.randn(outputs, inputs // groups, kernel, kernel, dtype=D)
    return Conv(weight, torch.randn(outputs, dtype=D), two(stride), two(padding), two(dilation), groups)


def apply(layer, x):
    if isinstance(layer, Dense):
        return F.linear(x, layer.weight, layer.bias)
    if isinstance(layer, Scale):
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * layer.scale.view(shape) + layer.shift.view(shape)
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


PAIRS = [
    (lambda: scale(6), lambda: scale(6), (4, 6)),
    (lambda: dense(7, 6), lambda: dense(3, 7), (4, 6)),
    (lambda: dense(7, 6), lambda: scale(7), (4, 6)),
    (lambda: scale(6), lambda: dense(3, 6), (4, 6)),
    (lambda: conv(4, 6, 3, padding=1), lambda: scale(4), (2, 6, 7, 9)),
    (lambda: conv(4, 6, 3, 2, 1, 2, 2), lambda: scale(4), (2, 6, 11, 9)),
    (lambda: conv(6, 6, 5, 1, 2, 1, 6), lambda: scale(6), (2, 6, 8, 8)),
]


@pytest.mark.parametrize(("first", "second", "shape"), PAIRS)
def test_the_merged_layer_is_both(first, second, shape):
    first, second, x = first(), second(), torch.randn(shape, dtype=D)
    want = apply(second, apply(first, x))
    got = apply(merge(first, second), x)
    assert (got - want).abs().max() <= 1e-10 * max(1, want.abs().max())


def test_three_in_a_row_in_either_order():
    a, b, c, x = dense(7, 6), dense(5, 7), dense(3, 5), torch.randn(4, 6, dtype=D)
    want = apply(c, apply(b, apply(a, x)))
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c))):
        torch.testing.assert_close(apply(merged, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_in_evaluation(affine):
    norm = torch.nn.BatchNorm2d(5, eps=1e-3, affine=affine).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3)
    if affine:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    record = algebra.batchnorm_scale(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    x = torch.randn(2, 5, 4, 4, dtype=D)
    torch.testing.assert_close(apply(record, x), norm(x), rtol=1e-12, atol=1e-12)


def test_what_has_no_rule_is_refused_with_words():
    with pytest.raises(CannotMerge, match="no rule for Conv into Dense"):
        merge(conv(4, 6, 3), dense(3, 4))
    with pytest.raises(CannotMerge, match="7 outputs meet 5 inputs"):
        merge(dense(7, 6), dense(3, 5))


def test_cost_counts_weights():
    assert algebra.cost(dense(3, 4)) == 12 and algebra.cost(conv(4, 6, 3)) == 216 and algebra.cost(scale(5)) == 5
