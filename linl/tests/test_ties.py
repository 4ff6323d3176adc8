"""Ends of intervals that lie at zero: as exact sums of fractions say, however many there are."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linl import Box, ties
from linl.bounds import bound

LAYERS = [
    (nn.Linear(12, 7), (12,)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 4)),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (4, 7, 6)),
    (nn.Conv2d(2, 4, 3, padding=2, stride=3), (2, 6, 5)),
    (nn.Conv2d(4, 8, 3, dilation=2, groups=4), (4, 7, 6)),
    (nn.Conv1d(3, 5, 3, stride=2, padding=1), (3, 9)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
]


def windows(layer: nn.Module, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """What each output of each channel reads, padding written out."""
    if isinstance(layer, nn.Linear):
        return [[x]] * layer.out_features
    sides = [side for n in reversed(layer.padding) for side in (n, n)]
    x = F.pad(x, sides)
    spans = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    steps = [range(0, n - span + 1, s) for n, span, s in zip(x.shape[1:], spans, layer.stride, strict=True)]
    wide, each = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    found = []
    for first in (c // each * wide for c in range(layer.out_channels)):
        parts = [[slice(a, a + span, d) for a, span, d in zip(at, spans, layer.dilation, strict=True)]
                 for at in itertools.product(*steps)]  # fmt: skip
        found.append([x[(slice(first, first + wide), *part)].flatten() for part in parts])
    return found


def extremes(layer: nn.Module, box: Box) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """The least and the greatest of each output without its bias, by channel."""
    found = []
    for sides in ((box.lower[0], box.upper[0]), (box.upper[0], box.lower[0])):
        ends = []
        for weight, low, high in zip(layer.weight, *(windows(layer, side) for side in sides), strict=True):
            w = weight.flatten().tolist()
            pairs = [zip(w, a.tolist(), b.tolist(), strict=True) for a, b in zip(low, high, strict=True)]
            ends.append([sum(Fraction(v) * Fraction(a if v > 0 else b) for v, a, b in pair) for pair in pairs])
        found.append(ends)
    return tuple(found)


def tied(layer: nn.Module, shape: tuple[int, ...], seed: int) -> tuple[nn.Module, Box]:
    """A layer whose biases put an end of each channel as near to zero as floats can; some channels of one sign."""
    torch.manual_seed(seed)
    weight = torch.randn(layer.weight.shape, dtype=torch.float64)
    weight[:1], weight[1:2] = weight[:1].abs(), -weight[1:2].abs()
    layer.double().weight.data, layer.bias.data = weight, torch.zeros(len(weight), dtype=torch.float64)
    lower = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) > 0.3)
    box = Box(lower, lower + torch.rand(shape, dtype=torch.float64))
    low, high = extremes(layer, box)
    bias = [float(-random.Random(seed + c).choice([a, b])[-1]) for c, (a, b) in enumerate(zip(low, high, strict=True))]
    layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return nn.Sequential(layer, nn.ReLU()).eval(), box


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_ends_near_zero_are_those_of_exact_arithmetic(layer, shape, seed):
    net, box = tied(layer, shape, seed)
    low, high = extremes(layer, box)
    bias = layer.bias.tolist()
    for method in ("interval", "crown"):
        made = bound(net, box, method).inputs[0]
        near = 0
        for c, b in enumerate(bias):
            lower, upper = (side[0, c].flatten().tolist() for side in (made.lower, made.upper))
            for ends, exact, away in ((lower, low[c], math.inf), (upper, high[c], -math.inf)):
                for end, value in zip(ends, exact, strict=True):
                    past = Fraction(math.nextafter(end, away))
                    assert (value + Fraction(b) - Fraction(end)) * (1 if away > 0 else -1) >= 0, "a bound is broken"
                    if abs(value + Fraction(b)) < 1e-15:
                        near += 1
                        assert (past - value - Fraction(b)) * (1 if away > 0 else -1) > 0, "the nearest float"
        assert near >= len(bias), "an end of each channel at least"


def test_ends_without_a_product_cost_no_exact_sum(monkeypatch):
    """Half a thousand of them behind a pool; one that isn't plain is summed, while there is work left to be spent."""
    sums = []
    monkeypatch.setattr(ties, "_sum", lambda terms, made=ties._sum: sums.append(1) or made(terms))
    net = nn.Sequential(nn.AvgPool2d(4), nn.ReLU()).eval()
    lower = torch.zeros(512, 4, 4, dtype=torch.float64)
    made = bound(net, Box(lower, lower + 1), "interval").inputs[0]
    assert (made.lower == 0).all() and (made.upper > 0).all() and not sums
    layer, box = tied(nn.Linear(12, 7), (12,), 0)
    bound(layer, box, "interval")
    assert len(sums) >= 6
    before = len(sums)
    monkeypatch.setattr(ties, "WORK", 3 * 12)
    made = bound(layer, box, "interval").inputs[0]
    assert len(sums) == before + 3, "work for three sums of twelve products"
    monkeypatch.setattr(ties, "AT_ONCE", 24)
    again = bound(layer, box, "interval").inputs[0]
    assert torch.equal(made.lower, again.lower) and torch.equal(made.upper, again.upper) and len(sums) == before + 6


def test_whole_numbers_sum_as_fractions_do():
    generator = random.Random(0)
    for _ in range(300):
        numbers = [
            generator.choice((generator.gauss(0, 1), 1e-300 * generator.random(), 0.0, 5e-324, -1e200))
            for _ in range(9)
        ]
        pairs = [(number, generator.gauss(0, 1) * 10.0 ** generator.randint(-20, 90)) for number in numbers]
        pairs = pairs[: generator.randint(0, 9)]
        assert ties._sum(pairs) == sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
