"""Regions of odd networks: every activation, dead and duplicate units, sums, groups, pools, inputs from 1e-8 to 1e8."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import linl
from linl import Box
from linl.program import Bend, Dense, Program, Sum
from linl.reading import program
from linl.regions import affine_at, along, count, in_plane, maps
from linl.tests.test_locality import least_distances
from linl.tests.test_slices import is_right

ODD = [
    nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5), nn.LeakyReLU(0.0), nn.LeakyReLU(1.0), nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.4), linl.LiNLU(0.5), linl.LiNLU(1.0), linl.PartialLinear(nn.ReLU(), 0.0),
    linl.PartialLinear(nn.ReLU(), 1.0), linl.PartialLinear(nn.ReLU6(), 1.7),
]  # fmt: skip
POOLS = [nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(2, 1)]
SCALES = (1.0, 1e-8, 1e8, 1e-4)


class Branches(nn.Module):
    """act(f(x)) − g(x)."""

    def __init__(self, first: nn.Module, second: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.act = first, second, act

    def forward(self, x):
        return self.act(self.first(x)) - self.second(x)


def pick(kinds: list):
    return kinds[int(torch.randint(0, len(kinds), ()))]


def dense(inputs: int, widest: int) -> nn.Sequential:
    a, b, c = (int(n) for n in torch.randint(1, widest + 1, (3,)))
    both = Branches(nn.Linear(a, a), nn.Linear(a, a, bias=False), pick(ODD))
    layers = [nn.Linear(inputs, a), pick(ODD), nn.BatchNorm1d(a), both, nn.Linear(a, b, bias=False), pick(ODD)]
    return nn.Sequential(*layers, nn.Linear(b, c), pick(ODD), nn.Linear(c, 2))


def convolutions() -> nn.Sequential:
    c = 2 * int(torch.randint(1, 3, ()))
    layers = [nn.Conv2d(2, c, 3, pick([1, 2]), padding=1), nn.BatchNorm2d(c), pick(ODD), nn.ZeroPad2d((0, 1, 1, 0))]
    layers += [pick(POOLS), nn.Conv2d(c, c, 3, padding=1, groups=2), pick(ODD)]
    layers += [Branches(nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), pick(ODD)), nn.Flatten(), nn.LazyLinear(3), pick(ODD)]
    return nn.Sequential(*layers, nn.Linear(3, 2))


def odd(seed: int, images: bool, inputs: int = 4, widest: int = 7) -> tuple[nn.Sequential, torch.Size, float]:
    """A network in float64, its input's shape and the size of its inputs' numbers."""
    torch.manual_seed(seed)
    scale, shape = SCALES[seed % len(SCALES)], (2, 7, 6) if images else (inputs,)
    net = (convolutions() if images else dense(inputs, widest)).eval()
    net(torch.zeros(1, *shape))
    for layer in (m for m in net.double().modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        layer.weight.data *= 1.5
        for t in (layer.weight.data, layer.bias.data if layer.bias is not None else torch.zeros(9)):
            if seed % 5 == 0 and len(layer.weight) > 2:
                t[1], t[2] = -2 * t[0], 0  # a unit on the other's bend, and a dead one
    net[0].weight.data /= scale
    return net, torch.Size(shape), scale


@torch.no_grad()
@pytest.mark.parametrize("images", [False, True])
def test_planes_segments_and_pieces(images):
    for seed in range(6 if images else 24):
        net, shape, scale = odd(seed, images)
        x = 2 * scale * torch.randn(3, *shape, dtype=torch.float64)
        x[0] *= seed % 3 > 0  # at times the origin
        made = in_plane(net, *x, window=4 * scale)
        is_right(net, made, n=3)
        line, at = along(net, *x[:2]), torch.rand(200, dtype=torch.float64)
        y = net(line.inputs(at))
        assert (line.breaks.diff() > 0).all()
        assert (line(at) - y).abs().max() <= 1e-10 * max(1.0, float(y.abs().max()))
        piece = affine_at(net, x[1])
        if seed % 5:  # autograd can't tell a dead unit's slope from rounding
            for mine, theirs in zip((piece.radius, piece.radius_l2), least_distances(net, x[1]), strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4)


def enumerated(read: Program, box: Box, least: float = 1e-7) -> int:
    """Regions by trying every piece of every unit, in order, with linear programs; a unit on its bend has one piece."""
    lower, upper = box.lower[0].numpy(), box.upper[0].numpy()
    free = (upper > lower).nonzero()[0]
    start = np.zeros((1 + len(free), len(lower)))
    start[0] = (lower + upper) / 2
    start[np.arange(1, 1 + len(free)), free] = ((upper - lower) / 2)[free]

    def holds_a_ball(sides: list) -> bool:
        rows = np.array([*(row for row, _ in sides), *np.eye(len(free)), *-np.eye(len(free))])
        ends = np.array([*(end for _, end in sides), *[1.0] * (2 * len(free))])
        cost = np.append(np.zeros(len(free)), -1.0)
        wide = np.append(rows, np.ones((len(rows), 1)), 1)  # rows have length 1
        answer = linprog(cost, wide, ends, bounds=[(None, None)] * len(free) + [(0, None)], method="highs")
        return answer.status == 0 and -answer.fun > least

    def units(at: int, values: dict, sides: list, made: list) -> int:
        op = read.ops[at]
        given, unit = values[op.sources[0]], len(made)
        if unit == given.shape[1]:
            return layers(at + 1, {**values, op.target: np.stack(made, 1)}, sides)
        real, total = op.pieces.bending(torch.Size([given.shape[1]])).numpy()[:, unit], 0
        bends, slopes = op.pieces.bends, [float(s.expand(given.shape[1])[unit]) for s in op.pieces.slopes]
        column, largest = given[:, unit], max(np.abs(given).sum(0).max(), *map(abs, bends))
        length, ends = np.linalg.norm(column[1:]), [i for i in range(len(bends)) if real[i]]
        for piece in [0, *(i + 1 for i in ends)]:
            more, possible = [], True
            sharp = [(i, -1.0) for i in ends if i < piece][-1:] + [(i, 1.0) for i in ends if i >= piece][:1]
            for i, sign in sharp:  # sign · (value − bend) ≤ 0
                beyond = sign * (column[0] - bends[i])
                if length > 1e-11 * largest:
                    more.append((sign * column[1:] / length, -beyond / length))
                else:
                    possible &= sign < 0 if abs(beyond) <= 1e-11 * largest else beyond < 0
            if possible and holds_a_ball(sides + more):
                i = max(0, piece - 1)
                after = slopes[piece] * column
                after[0] += op.pieces.values[i] - slopes[piece] * bends[i]
                total += units(at, values, sides + more, [*made, after])
        return total

    def layers(at: int, values: dict, sides: list) -> int:
        if at == len(read.ops):
            return 1
        op = read.ops[at]
        given = [values[source] for source in op.sources]
        if isinstance(op, Bend):
            return units(at, values, sides, [])
        if isinstance(op, Sum):
            made = sum(sign * value for sign, value in zip(op.signs, given, strict=True))
        else:
            assert isinstance(op, Dense)
            made = given[0] @ op.weight.numpy().T
            made[0] += 0 if op.bias is None else op.bias.numpy()
        return layers(at + 1, {**values, op.target: made}, sides)

    return layers(0, {0: start}, [])


@torch.no_grad()
def test_counts():
    for seed in range(16):
        inputs = 1 + seed % 3
        net, _, scale = odd(seed, False, inputs, 3)
        lower, upper = -2 * scale * torch.ones(inputs).double(), 2 * scale * torch.ones(inputs).double()
        if inputs > 1 and seed % 4 == 0:
            lower[0] = upper[0] = 0.3 * scale  # no width there
        box = Box(lower, upper)
        found = count(net, box)
        assert found.count == enumerated(program(net, box.shape), box), seed
        weight, bias, _ = maps(net, found)
        assert ((weight @ found.points[:, :, None])[..., 0] + bias - net(found.points)).abs().max() < 1e-9
