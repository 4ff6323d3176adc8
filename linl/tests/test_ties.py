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
from linl.affine import Affine, conv_geometry
from linl.bounds import bound
from linl.crown import Pass
from linl.program import Conv, Program, picks

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


def random_convolution(chance: random.Random) -> tuple[Conv, Box]:
    """One of 1 to 3 dimensions, its padding different on both sides or negative, its bias 0, a channel's or a place's;
    on one to three boxes, whose ends are often 0."""
    while True:
        dims, groups = chance.randint(1, 3), chance.randint(1, 2)
        inputs, outputs = groups * chance.randint(1, 2), groups * chance.randint(1, 2)
        kernel, stride, dilation = ([chance.randint(1, most) for _ in range(dims)] for most in (3, 3, 2))
        padding = [(chance.randint(-1, 2), chance.randint(-1, 2)) for _ in range(dims)]
        size = [chance.randint(3, 5) for _ in range(dims)]
        geometry = conv_geometry((outputs, inputs // groups, *kernel), True, stride, padding, dilation, groups)
        if all(n + low + high >= span for n, (low, high), span in zip(size, padding, geometry.span, strict=True)):
            break
    weight = torch.randn(outputs, inputs // groups, *kernel).double()
    weight = weight * (torch.rand(weight.shape) > 0.2) if chance.random() < 0.5 else weight.abs()
    out, boxes = geometry.output_size(tuple(size)), chance.randint(1, 3)
    scale = 10.0 ** torch.arange(boxes).double().view(-1, *[1] * (dims + 1))
    lower = scale * torch.rand(boxes, inputs, *size).double()
    lower = lower * (torch.rand(lower.shape) > chance.choice([0.5, 1.0]))
    upper = lower + scale * torch.rand(lower.shape).double() * (torch.rand(lower.shape) > 0.5)
    least = Affine(geometry, weight.clamp(min=0), None)(lower) + Affine(geometry, weight.clamp(max=0), None)(upper)
    of_places = -least[chance.randrange(boxes)]
    of_channels = of_places.flatten(1)[:, -1].contiguous()
    bias = chance.choice([None, torch.zeros_like(of_channels), of_channels, of_places])
    made = Conv((0,), 1, "c", Affine(geometry, weight, bias), torch.Size((inputs, *size)), torch.Size((outputs, *out)))
    return made, Box(lower, upper, batch=True)


@pytest.mark.parametrize("seed", range(25))
def test_random_convolutions_on_several_boxes(seed):
    """No end is past that of exact arithmetic, and what is exactly 0 is told so."""
    torch.manual_seed(seed)
    op, box = random_convolution(random.Random(seed))
    count = math.prod(op.outputs)
    rows = op.backward(picks(torch.arange(count), op.outputs, torch.zeros((), dtype=torch.float64))).flatten(1)
    assert torch.equal(op.first(torch.arange(count)).flatten(1), rows)
    bias = [0.0] * count if op.bias is None else op.bias.broadcast_to(op.outputs).flatten().tolist()
    for back in (True, False):
        walk = Pass(Program([op], [op.inputs, op.outputs], 1), box, back=back)
        walk.step(op)
        for number in range(len(box.lower)):
            low, high = (side[number].flatten().tolist() for side in (box.lower, box.upper))
            made = walk.ranges[1]
            for unit, row in enumerate(rows.tolist()):
                for sign, end in ((1, made.lower), (-1, -made.upper)):
                    found = Fraction(end[number].flatten()[unit].item())
                    exact = sign * Fraction(bias[unit])
                    exact += sum(sign * Fraction(w) * Fraction(a if sign * w > 0 else b)
                                 for w, a, b in zip(row, low, high, strict=True) if w)  # fmt: skip
                    assert found <= exact and (exact != 0 or found == 0), (number, unit, sign)


def test_work_for_lower_ends_leaves_some_for_upper_ones(monkeypatch):
    layer = nn.Linear(12, 40, dtype=torch.float64)
    _, box = tied(layer, (12,), 0)
    low, high = extremes(layer, box)
    layer.bias.data = torch.tensor([-float((high if c % 2 else low)[c][0]) for c in range(40)], dtype=torch.float64)
    net = nn.Sequential(layer, nn.ReLU()).eval()

    def settled():
        made = bound(net, box, "interval").inputs[0]
        return [int((side[0].abs() < 6e-16).sum()) for side in (made.lower, made.upper)]

    assert min(settled()) >= 18
    monkeypatch.setattr(ties, "WORK", 12 * 12)  # of at most twelve products a sum
    assert min(settled()) >= 6 and max(settled()) <= 12


def test_ends_out_of_floats_reach_are_left_as_they_are():
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    layer.weight.data.fill_(1e10)
    box = Box(torch.full((3,), -1e299, dtype=torch.float64), torch.full((3,), 1e299, dtype=torch.float64))
    made = bound(nn.Sequential(layer, nn.ReLU()).eval(), box, "interval").inputs[0]
    assert (made.lower == -math.inf).all() and (made.upper == math.inf).all()


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
    whole = len(sums)
    monkeypatch.setattr(ties, "WORK", 3 * 12)
    made = bound(layer, box, "interval").inputs[0]
    some = len(sums) - whole
    assert 3 <= some < whole, "work for three sums of twelve products, and more where some are of zeros"
    monkeypatch.setattr(ties, "AT_ONCE", 24)
    again = bound(layer, box, "interval").inputs[0]
    assert torch.equal(made.lower, again.lower) and torch.equal(made.upper, again.upper)
    assert len(sums) == whole + 2 * some


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
