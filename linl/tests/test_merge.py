"""The algebra: each rule against the layers run one after the other by torch, in float64."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from linl import merge as algebra
from linl.merge import CannotMerge, merge

D = torch.float64


def dense(outputs, inputs):
    return algebra.dense(torch.randn(outputs, inputs, dtype=D), torch.randn(outputs, dtype=D))


def scale(n, dims=0):
    return algebra.scale(torch.randn(n, dtype=D), torch.randn(n, dtype=D), dims)


def conv(outputs, inputs, kernel, stride=1, padding=0, dilation=1, groups=1, dims=2, bias=True):
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * dims
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=D)
    return algebra.conv(weight, torch.randn(outputs, dtype=D) if bias else None, stride, padding, dilation, groups)


def apply(layer, x):
    """torch's own function for a layer: nothing of linl's arithmetic but the weights."""
    g = layer.geometry
    if not g.dims:
        return F.linear(x, layer.weight, layer.bias) if g.groups == 1 else x * layer.weight.flatten() + layer.bias
    x = F.pad(x, [side for pair in reversed(g.padding) for side in pair])
    y = {1: F.conv1d, 2: F.conv2d}[g.dims](x, layer.weight, None, g.stride, 0, g.dilation, g.groups)
    return y if layer.bias is None else y + layer.bias.view(*layer.bias.shape, *[1] * (g.dims + 1 - layer.bias.ndim))


def close(got, want, factor=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= factor * max(1, want.abs().max())


PAIRS = [
    (lambda: scale(6), lambda: scale(6), (4, 6)),
    (lambda: dense(7, 6), lambda: dense(3, 7), (4, 6)),
    (lambda: dense(7, 6), lambda: scale(7), (4, 6)),
    (lambda: scale(6), lambda: dense(3, 6), (4, 6)),
    (lambda: conv(4, 6, 3, padding=1), lambda: scale(4, 2), (2, 6, 7, 9)),
    (lambda: conv(4, 6, 3, 2, 1, 2, 2), lambda: scale(4, 2), (2, 6, 11, 9)),
    (lambda: conv(6, 6, 5, 1, 2, 1, 6), lambda: scale(6, 2), (2, 6, 8, 8)),
    (lambda: conv(4, 6, 3, padding=1), lambda: conv(5, 4, 3), (2, 6, 7, 9)),
    (lambda: conv(4, 6, 3, 2, 1), lambda: conv(5, 4, 3), (2, 6, 11, 14)),  # strided first: 7×7
    (lambda: conv(8, 6, 3, 1, 1, 2, 2), lambda: conv(4, 8, (2, 3), 2, 0, (1, 2), 4), (2, 6, 15, 17)),
    (lambda: conv(12, 12, 3, 1, 1, 1, 12), lambda: conv(4, 12, 1), (2, 12, 6, 5)),
    (lambda: conv(12, 6, 1), lambda: conv(12, 12, 3, 1, 1, 1, 12), (2, 6, 6, 5)),  # a bias map
    (lambda: scale(6, 2), lambda: conv(4, 6, 3, 2, 1), (2, 6, 8, 9)),  # BatchNorm before a padded convolution
    (lambda: conv(12, 8, 3, 1, 0, 1, 4), lambda: conv(6, 12, 3, 1, 0, 1, 6), (2, 8, 9, 9)),  # groups 4 and 6: 2
    (lambda: conv(4, 6, 5, 3, 2, dims=1), lambda: conv(5, 4, 3, 2, 0, 2, dims=1), (2, 6, 61)),
    (lambda: conv(4, 6, (1, 3), 1, (0, 1)), lambda: conv(5, 4, (3, 1), 1, (1, 0)), (2, 6, 7, 8)),
    (lambda: conv(4, 6, 2, 2), lambda: conv(5, 4, 3, 1, 1), (2, 6, 8, 10)),  # patches, then a padded kernel
    (lambda: conv(4, 6, 3, 1, 2, bias=False), lambda: conv(5, 4, 3, 1, 1), (2, 6, 8, 10)),  # padded to the full
    (lambda: conv(4, 6, 3, 1, ((0, 1), (2, 0))), lambda: conv(5, 4, 2, 2), (2, 6, 8, 10)),
    (lambda: algebra.copy(6, (2, 2), ((0, 0), (0, 0))), lambda: conv(5, 6, 3, 1, 1), (2, 6, 8, 9)),
    (lambda: algebra.copy(6, (1, 1), ((-1, 2), (0, -2))), lambda: conv(5, 6, 3), (2, 6, 8, 9)),
    (lambda: conv(6, 6, 3, 1, 1), lambda: algebra.average_pool(6, (2, 2), (2, 2), ((0, 0),) * 2), (2, 6, 8, 9)),
    (lambda: algebra.average_pool(6, (3, 3), (2, 2), ((1, 1),) * 2), lambda: conv(5, 6, 3), (2, 6, 9, 11)),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "shape"), PAIRS)
def test_the_merged_layer_is_both(first, second, shape):
    first, second, x = first(), second(), torch.randn(shape, dtype=D)
    want = apply(second, apply(first, x))
    merged = merge(first, second, shape[2:])
    close(apply(merged, x), want)
    close(merged(x), want)


def test_random_pairs_are_exact_or_refused_for_a_reason():
    """Kernel, stride, padding, dilation and groups of both at random: what isn't refused is exact everywhere."""
    random.seed(0)
    merged = refused = 0
    for _ in range(300):
        dims, (g1, g2) = random.choice((1, 2)), random.choices((1, 2, 3, 6), k=2)
        one = lambda *among: tuple(random.choice(among) for _ in range(dims))  # noqa: E731, B023
        first = conv(6, 12, one(1, 2, 3), one(1, 2, 3), one(0, 0, 1, 2), one(1, 2), g1, dims, random.random() < 0.5)
        second = conv(12, 6, one(1, 2, 3), one(1, 2), one(0, 0, 1, 2), one(1, 2), g2, dims, random.random() < 0.5)
        x = torch.randn(2, 12, *(random.randint(21, 25) for _ in range(dims)), dtype=D)
        want = apply(second, apply(first, x))
        try:
            close(apply(merge(first, second, x.shape[2:]), x), want)
            merged += 1
        except CannotMerge:
            assert second.geometry.padded
            refused += 1
            naive = apply(merge(first, second, x.shape[2:], border="interior"), x)
            assert naive.shape == want.shape and (naive - want).abs().max() > 1e-6, "refused without need"
    assert merged > 100 and refused > 30


def test_strided_first_convolution_has_the_right_kernel():
    merged = merge(conv(4, 3, 3, 2, 1), conv(5, 4, 3), (15, 15))
    assert merged.geometry.kernel == (7, 7) and merged.geometry.stride == (2, 2)


def test_groups_are_expanded_only_as_far_as_needed():
    groups = lambda g1, g2: merge(conv(12, 12, 1, groups=g1), conv(12, 12, 1, groups=g2)).geometry.groups  # noqa: E731
    assert [groups(12, 12), groups(4, 6), groups(12, 3), groups(1, 12), groups(2, 3)] == [12, 2, 3, 1, 1]


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_side_by_side(stride):
    """3×3, 1×1, an average pool and (at stride 1) the identity, as in a multi-branch block."""
    x = torch.randn(2, 6, 9, 11, dtype=D)
    parts = [conv(6, 6, 3, stride, 1), conv(6, 6, 1, stride), conv(6, 6, 3, stride, 2, 2, 3),
             algebra.average_pool(6, (3, 3), (stride,) * 2, ((1, 1),) * 2), conv(6, 6, 5, stride, 2)]  # fmt: skip
    parts += [algebra.copy(6, (1, 1), ((0, 0),) * 2)] if stride == 1 else []
    for count in range(1, len(parts) + 1):
        for some in itertools.combinations(parts, count):
            merged = algebra.merge_sum(some, (9, 11))
            close(apply(merged, x), sum(apply(part, x) for part in some))


def test_a_bias_map_goes_on_through_what_follows():
    x = torch.randn(2, 3, 9, 7, dtype=D)
    layers = [conv(8, 3, 1), conv(8, 8, 3, 1, 1, 1, 8), conv(4, 8, 1), conv(5, 4, 3, 2)]
    merged, size, want = layers[0], (9, 7), x
    for layer in layers[1:]:
        merged = merge(merged, layer, size)
    for layer in layers:
        want = apply(layer, want)
    assert merged.geometry.bias == "map" and merged.bias.shape == want.shape[1:]
    close(apply(merged, x), want)
    beside = conv(5, 3, 3, 2, 0)  # 9×7 to 4×3, as the chain
    close(apply(algebra.merge_sum([merged, beside], size), x), want + apply(beside, x))


def test_a_convolution_before_a_dense_layer_becomes_dense():
    x = torch.randn(2, 3, 9, 7, dtype=D)
    first, second = conv(4, 3, 3, 2, 1), dense(5, 4 * 5 * 4)
    want = F.linear(apply(first, x).flatten(1), second.weight, second.bias)
    merged = algebra.as_dense(merge(first, algebra.as_image_layer(second, 4, (5, 4)), (9, 7)), (9, 7))
    assert merged.weight.shape == (5, 3 * 9 * 7)
    close(F.linear(x.flatten(1), merged.weight, merged.bias), want)


def test_a_pool_behind_a_1x1_layer_is_the_layer_behind_the_pool():
    x = torch.randn(2, 3, 6, 6, dtype=D)
    first, pool = conv(4, 3, 1), algebra.average_pool(4, (6, 6), (6, 6), ((0, 0),) * 2)
    merged = merge(first, pool, (6, 6))
    assert merged.geometry.uniform and merged.geometry.weights() == 12
    close(algebra.pooled(merged)(F.avg_pool2d(x, 6)), F.avg_pool2d(apply(first, x), 6))
    assert not merge(conv(4, 3, 3), pool, (8, 8)).geometry.uniform


def test_three_in_a_row_in_either_order():
    x = torch.randn(2, 6, 13, 14, dtype=D)
    a, b, c = conv(8, 6, 3, 2, 1, 1, 2), conv(6, 8, 3, 1, 0, 2, 2), conv(4, 6, 2, 1, 0)
    want = apply(c, apply(b, apply(a, x)))
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c))):
        close(apply(merged, x), want)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_in_evaluation(affine):
    norm = torch.nn.BatchNorm2d(5, eps=1e-3, affine=affine).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3)
    if affine:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    record = algebra.batchnorm(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, 2)
    x = torch.randn(2, 5, 4, 4, dtype=D)
    torch.testing.assert_close(apply(record, x), norm(x), rtol=1e-12, atol=1e-12)


def test_what_has_no_exact_merge_is_refused_with_words():
    cases = [
        (conv(4, 6, 3), dense(3, 4), "2 spatial dimensions meet 0"),
        (dense(7, 6), dense(3, 5), "7 outputs meet 5 inputs"),
        (conv(4, 6, 3, 1, 1), conv(5, 4, 3, 1, 1), "differs at the border"),
        (conv(4, 6, 1), algebra.conv(torch.ones(5, 4, 3, 3), None, 1, 1, mode="reflect"), "reflect padding in between"),
        (algebra.conv(torch.ones(4, 6, 3, 3), None, 1, 1, mode="circular"), conv(5, 4, 3, 1, 1), "circular padding"),
    ]
    for first, second, words in cases:
        with pytest.raises(CannotMerge, match=words):
            merge(first, second, (9, 9))
    with pytest.raises(CannotMerge, match="different strides"):
        algebra.merge_sum([conv(4, 6, 3, 2, 1), conv(4, 6, 4, 1)], (6, 6))


def test_the_order_of_a_chain_is_chosen_by_its_cost():
    """25088 → 4096 → 4096 → 1000: the last pair first is four times cheaper."""
    a, b, c = (algebra.Geometry(i, o) for i, o in ((25088, 4096), (4096, 4096), (4096, 1000)))
    from_left = algebra.multiplications(a, b) + algebra.multiplications(algebra.compose(a, b), c)
    from_right = algebra.multiplications(b, c) + algebra.multiplications(a, algebra.compose(b, c))
    assert from_left / from_right > 4


@pytest.mark.parametrize(
    ("kernels", "groups", "dims"),
    [((3, 3), 1, 2), ((2, 3), 1, 2), ((2, 2), 2, 2), (((3, 2), (1, 3)), 1, 2), ((3, 3), 1, 1), ((2, 2), 1, 3)],
)
def test_few_products_give_what_many_give(kernels, groups, dims, monkeypatch):
    """Large kernels by values at points (Toom and Cook) against a product for each pair of positions."""
    first, second = (conv(64 * groups, 64 * groups, k, groups=groups, dims=dims) for k in kernels)
    used = []
    asked = algebra._few_products
    monkeypatch.setattr(algebra, "_few_products", lambda *layers: used.append(asked(*layers)) or used[-1])
    quick = merge(first, second)
    monkeypatch.setattr(algebra, "_few_products", lambda *layers: False)
    close(quick.weight, merge(first, second).weight, 1e-12)
    assert used == [True]


def test_gaps_small_layers_and_wide_kernels_take_the_plain_way():
    layers = [
        (conv(64, 64, 3, stride=2), conv(64, 64, 3)),
        (conv(64, 64, 3, dilation=2), conv(64, 64, 3)),
        (conv(32, 64, 3), conv(64, 32, 3)),
        (conv(64, 64, 5), conv(64, 64, 3)),
        (conv(64, 64, (1, 3)), conv(64, 64, (3, 1))),
    ]
    for first, second in layers:
        g, h = first.geometry, second.geometry
        smallest = min(g.inputs, g.outputs, h.outputs)
        assert not algebra._few_products(g, h, algebra.compose(g, h), smallest)


def test_a_pool_before_a_large_dense_layer_takes_no_memory():
    """One position of a uniform kernel is kept; the others are the same numbers."""
    pool, last = algebra.average_pool(6, (7, 7), (7, 7), ((0, 0),) * 2), conv(5, 6, 1)
    for pair in ((pool, last), (conv(6, 4, 1), pool)):
        merged = merge(*pair, (7, 7))
        assert merged.geometry.uniform and merged.weight.untyped_storage().nbytes() <= 8 * 36
        x = torch.randn(2, merged.geometry.inputs, 7, 7, dtype=D)
        close(merged(x), pair[1](pair[0](x)))
