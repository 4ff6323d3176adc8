"""Bounds: sound on samples and corners, equal to brute force where they are exact, never wider by CROWN."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.bounds import METHODS, bound
from linl.crown import Pass, rounding
from linl.pieces import Pieces, pieces_of
from linl.program import picks
from linl.reading import program
from linl.tests.brute import extremes, small_net
from linl.tests.small_nets import ACTIVATIONS, NETS, make


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_bounds_hold_at_samples_and_corners(kind, activation):
    net, shape = make(kind, activation)
    box = Box.around(4 * torch.rand(*shape), 0.5)
    x = torch.cat([box.sample(2000), box.corners(2000)])
    read = program(net, shape)
    values = read.run(x)
    assert torch.allclose(values[read.output], net(x), rtol=0, atol=1e-10), "the program is the network"
    for dtype in (torch.float64, torch.float32):
        widths = {}
        for method in METHODS:
            found = bound(read, box, method, dtype)
            for op, range_ in zip(read.bends, found.inputs, strict=True):
                y = values[op.sources[0]]
                assert (y >= range_.lower).all() and (y <= range_.upper).all(), (method, op.name)
            y = values[read.output]
            assert (y >= found.output.lower).all() and (y <= found.output.upper).all()
            widths[method] = (found.output.upper - found.output.lower).sum()
        assert max(widths["crown"], widths["local"]) <= widths["interval"]
    if activation != "hardtanh":  # all but saturated, intervals know everything there
        assert widths["crown"] < 0.9 * widths["interval"], "CROWN finds nothing more"


@pytest.mark.parametrize("seed", range(6))
def test_bounds_enclose_the_exact_extremes(seed):
    net, inputs = small_net(seed)
    lower, upper = -np.ones(inputs), np.ones(inputs)
    box = Box(torch.tensor(lower), torch.tensor(upper))
    exact = extremes(net, lower, upper)
    for method in ("interval", "crown"):
        for range_, (low, high) in zip(bound(net, box, method).inputs, exact, strict=True):
            assert (range_.lower[0].numpy() <= low + 1e-9).all() and (range_.upper[0].numpy() >= high - 1e-9).all()
    first = bound(net, box, "interval").inputs[0]
    assert np.allclose(first.lower[0], exact[0][0], atol=1e-9), "intervals are exact behind one layer"


def test_several_boxes_at_once_are_the_boxes_one_by_one():
    net, shape = make("residual", "relu")
    x = 4 * torch.rand(3, *shape)
    for method in METHODS:
        together = bound(net, Box.around(x, 0.3, batch=True), method)
        for i in range(3):
            alone = bound(net, Box.around(x[i], 0.3), method)
            assert torch.allclose(together.output.lower[i], alone.output.lower[0], rtol=1e-9, atol=1e-9)


class Straight(nn.Module):
    """Two convolutions of any windows around a ReLU that is always on, with a way past them where that fits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dims = 1 + seed % 2
        conv = (nn.Conv1d, nn.Conv2d)[self.dims - 1]
        self.past = seed % 3 == 0
        pick = lambda low, high: tuple(torch.randint(low, high + 1, (self.dims,)).tolist())  # noqa: E731
        if self.past:
            self.first, self.second = conv(4, 6, 3, padding=1), conv(6, 4, 5, padding=2)
        else:
            self.first = conv(4, 6, pick(1, 3), pick(1, 2), pick(0, 2), pick(1, 2), groups=1 + seed % 2)
            self.second = conv(6, 4, pick(1, 3), pick(1, 3), pick(0, 3), pick(1, 2), groups=2 - seed % 2)
        self.first.bias.data += 100
        self.relu, self.last = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.second(self.relu(self.first(x)))
        return self.last(y + x if self.past else y)


@pytest.mark.parametrize("wide", [1, 512])
@pytest.mark.parametrize("seed", range(12))
def test_windows_hold_all_that_a_unit_reads(seed, wide, monkeypatch):
    """Where nothing bends, bounds from windows are exact: the affine map's own, at every border."""
    monkeypatch.setattr("linl.windows.WIDE", wide)
    net = Straight(seed).double().eval()
    shape = (4, 9, 7)[: 1 + net.dims]
    box = Box.around(torch.rand(*shape), 0.3)
    net.last = nn.Identity()
    zero, unit = torch.zeros(1, *shape).double(), torch.eye(4 * math.prod(shape[1:])).double().view(-1, *shape)
    jacobian = (net(unit) - net(zero)).flatten(1).detach()
    middle, half = net(box.center).flatten().detach(), 0.3 * jacobian.abs().sum(0)
    net.last = nn.ReLU().eval()
    read = program(net, shape)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 0.15)):
        walk, value = Pass(read, box, dtype), read.bends[1].sources[0]
        with torch.no_grad():
            for op in read.upto(value):
                walk.step(op)
            walk.tighten_locally(value, torch.arange(len(middle)))
        found = walk.ranges[value]
        assert (found.lower.flatten() <= middle - half + 1e-9).all()
        assert (found.upper.flatten() >= middle + half - 1e-9).all()
        assert (found.upper - found.lower).flatten().sum() <= (2 * half).sum() * (1 + near)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lines_lie_below_and_above(activation):
    pieces = pieces_of(ACTIVATIONS[activation], 0)
    generator = torch.Generator().manual_seed(0)
    ends = 8 * torch.randn(2, 500, generator=generator, dtype=torch.float64)
    lower, upper = ends.amin(0), ends.amax(0)
    lower[:20] = upper[:20]  # single points
    below, low, above, high = pieces.lines(lower, upper)
    share = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    x = lower + share * (upper - lower)
    y = ACTIVATIONS[activation].double()(x).detach()
    ACTIVATIONS[activation].float()
    assert torch.allclose(pieces(x), y, atol=1e-6), "the pieces are the activation"
    y = pieces(x)
    assert (below * x + low <= y + 1e-12).all() and (above * x + high >= y - 1e-12).all()
    least, most = pieces.range(lower, upper)
    assert torch.allclose(least, torch.minimum(y.amin(0), least), atol=1e-12), "a value below the range"
    assert torch.allclose(most, torch.maximum(y.amax(0), most), atol=1e-12), "a value above the range"
    ends = torch.stack([pieces(p) for p in pieces._points(lower, upper)])
    assert torch.equal(least, ends.amin(0)) and torch.equal(most, ends.amax(0)), "the range isn't reached"


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.5, 1.0), (-0.3, 0.2), (0.7, -0.1), (1.0, 1.0), (0.0, 0.9)])
def test_short_cuts_change_no_value(slopes):
    """A ReLU is computed by clamping, the range of what never falls from its ends: as by the rule for all."""
    x = torch.tensor([-2.0, -0.0, 0.0, 1.5], dtype=torch.float64)
    plain = Pieces((0.0,), (0.0,), tuple(torch.tensor(s, dtype=torch.float64) for s in slopes))
    by_channel = Pieces((0.0,), (0.0,), tuple(torch.full((4,), s, dtype=torch.float64) for s in slopes))
    assert (plain.clamp is not None) == (slopes == (0.0, 1.0)) and by_channel.clamp is None
    assert torch.equal(plain(x), by_channel(x)) and torch.equal(
        plain(x), slopes[1] * x.clamp(min=0) + slopes[0] * x.clamp(max=0)
    )
    assert plain.rises == (min(slopes) >= 0)
    six = pieces_of(nn.ReLU6(), 0)
    assert six.clamp == (0.0, 6.0) and pieces_of(nn.Hardtanh(-2, 1), 0).clamp == (-2.0, 1.0)
    assert Pieces((0.0, 6.0), (0.0, 3.0), six.slopes).clamp is None, "a jump is no clamping"


def test_rounding_can_not_break_a_bound():
    """A box that is a point: the exact value, computed with 50 digits, lies inside the interval."""
    from fractions import Fraction

    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 1))
    net[0].weight.data *= 1e4 * torch.rand(30, 1)
    x = torch.randn(40)
    net.eval()
    found = bound(net, Box(x, x), "crown", torch.float64).output

    def layer(weight, bias, values):
        rows = weight.detach().tolist()
        return [sum((Fraction(w) * v for w, v in zip(r, values, strict=True)), Fraction(b))
                for r, b in zip(rows, bias.detach().tolist(), strict=True)]  # fmt: skip

    hidden = [max(v, Fraction(0)) for v in layer(net[0].weight, net[0].bias, [Fraction(v) for v in x.tolist()])]
    (exact,) = layer(net[2].weight, net[2].bias, hidden)
    assert Fraction(found.lower.item()) <= exact <= Fraction(found.upper.item())
    assert found.upper.item() - found.lower.item() < 1e-9 * abs(float(exact)), "and the margin is small"
    for method in METHODS:
        rough = bound(net, Box(x, x), method, torch.float32).output
        assert Fraction(rough.lower.item()) <= exact <= Fraction(rough.upper.item()), method


def _in_order(x, weight, bias):
    """A dense layer in float32, one product after the other: (N, in) to (N, out)."""
    products = (x[:, None] * weight[None]).numpy()  # torch's own running sums are in float64
    return torch.from_numpy(np.add.accumulate(products, axis=2)[..., -1]) + bias


def _evaluated(net, x, order):
    """Every pre-activation and the output of a small dense network, in float32, its sums in some order."""
    seen, value = [], x.float()
    for layer in net:
        if isinstance(layer, nn.Linear):
            places = order(layer.in_features)
            value = _in_order(value[:, places], layer.weight.detach().float()[:, places], layer.bias.detach().float())
            seen.append(value)
        else:
            value = layer(value)
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_bounds_in_float32_hold_for_the_evaluation_in_float32(seed):
    """In whatever order its sums are taken; and for exact arithmetic (float64 is as good as that here)."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight *= torch.logspace(-2, 2, layer.in_features)[torch.randperm(layer.in_features)]
            layer.bias += 3 * torch.randn_like(layer.bias)
    x = 100 * torch.rand(1, 300).float()
    orders = [torch.arange, lambda n: torch.arange(n - 1, -1, -1), torch.randperm]
    with torch.no_grad():
        exact, value = [], x.double()
        for layer in copy.deepcopy(net).double():
            value = layer(value)
            exact += [value] if isinstance(layer, nn.Linear) else []
        seen = [exact, *(_evaluated(net, x, order) for order in orders)]
    for method in METHODS:
        found = bound(net, Box(x[0].double(), x[0].double()), method, torch.float32)
        for values in seen:
            for range_, value in zip([*found.inputs, found.output], values, strict=True):
                assert (value >= range_.lower).all() and (value <= range_.upper).all(), method


def test_the_worst_order_of_summation_stays_inside():
    """1 and then many halves of its last place: one after the other each is rounded away, together they aren't."""
    n, half = 2000, 2.0**-24
    net = nn.Sequential(nn.Linear(n, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, *[half] * (n - 1)]] * 2))
        net[2].weight.copy_(torch.tensor([[1.0, -1.0 + 2.0**-10]]))
        for layer in (net[0], net[2]):
            layer.bias.zero_()
    first, last = _evaluated(net, torch.ones(1, n), torch.arange)
    assert (first == 1.0).all(), "all but the first product were rounded away"
    for method in METHODS:
        found = bound(net, Box(torch.ones(n), torch.ones(n)), method, torch.float32)
        for range_, here, exact in zip((*found.inputs, found.output), (first, last), (1.0, 2.0**-10), strict=True):
            for value in (here.double(), torch.tensor(exact * (1 + (n - 1) * half), dtype=torch.float64)):
                assert (value >= range_.lower).all() and (value <= range_.upper).all(), method


def test_rounding_is_the_bound_that_is_needed_and_little_more():
    """γ of Higham's book (section 3.1) and room for six roundings more, but not for twenty."""
    eps = torch.finfo(torch.float32).eps
    for products in (10, 784, 9216, 100_000):
        needed = (products + 6) * eps / 2 / (1 - (products + 6) * eps / 2)  # γ, also of a slack that is rounded
        assert needed <= rounding(products, eps) <= (products + 20) * eps / 2 * (1 + products * eps)


def test_where_most_units_are_open_all_are_bounded():
    """The settled few are narrower then, as those that are asked; what lies behind them doesn't change."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).double().eval()
    net[2].bias.data[:2] = 50.0  # two of forty that are settled
    box = Box.around(torch.rand(8), 0.5)
    plain, asked = bound(net, box, "interval").inputs[1], bound(net, box, "crown").inputs[1]
    settled = (plain.lower > 0) | (plain.upper < 0)
    assert 2 <= settled.sum() <= 3 and settled[0, :2].all()
    narrower = (asked.upper - asked.lower) < 0.99 * (plain.upper - plain.lower)
    assert narrower.all()
    net[2].bias.data[:20] = 50.0  # half of them: not asked
    plain, asked = bound(net, box, "interval").inputs[1], bound(net, box, "crown").inputs[1]
    assert (
        torch.allclose(asked.lower[0, :20], plain.lower[0, :20], rtol=0, atol=1e-12)
        and asked.upper[0, 21] < plain.upper[0, 21]
    )


@pytest.mark.parametrize("kind", NETS)
def test_intervals_alone_are_those_that_crown_starts_from(kind):
    """In float32 rounding and radius are one product there: the same to its own rounding, around those in float64."""
    net, shape = make(kind, "relu")
    box = Box.around(torch.rand(*shape), 0.5)
    read = program(net, shape)
    alone, wide = (bound(read, box, "interval", dtype) for dtype in (torch.float32, torch.float64))
    walk = Pass(read, box, torch.float32)
    with torch.no_grad():
        for op in read.ops:
            walk.step(op)
    for mine, other, exact in zip(
        [*alone.inputs, alone.output],
        [*(walk.ranges[op.sources[0]] for op in read.bends), walk.ranges[read.output]],
        [*wide.inputs, wide.output],
        strict=True,
    ):
        assert torch.allclose(mine.lower, other.lower, rtol=1e-5, atol=1e-5)
        assert torch.allclose(mine.upper, other.upper, rtol=1e-5, atol=1e-5)
        assert (mine.lower <= exact.lower + 1e-12).all() and (mine.upper >= exact.upper - 1e-12).all()


def test_a_program_in_another_dtype_is_made_once():
    net, shape = make("residual", "relu")
    read = program(net, shape)
    first, second = read.to(torch.float32), read.to(torch.float32)
    assert all(a is b for a, b in zip(first.ops, second.ops, strict=True)) and read.to(torch.float64) is read
    read.ops = read.ops[:-1]
    assert len(read.to(torch.float32).ops) == len(first.ops) - 1, "operations that are gone"


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), nn.BatchNorm2d(4),
    nn.Conv2d(4, 8, 3, dilation=2, groups=4), nn.AvgPool2d(2, 1), nn.ZeroPad2d((1, 0, 2, -1)),
])  # fmt: skip
def test_a_unit_s_row_of_a_convolution(layer):
    """Channel by channel, as by the whole layer's way back and as by its forward pass."""
    net = nn.Sequential(layer, nn.ReLU()).eval()
    op = program(net, torch.Size((4, 7, 6))).ops[0]
    units = torch.randperm(math.prod(op.outputs), generator=torch.Generator().manual_seed(0))[:40]
    like = torch.zeros((), dtype=torch.float64)
    rows = op.first(units)
    assert torch.equal(rows, op.backward(picks(units, op.outputs, like)))
    assert op.first(units[:0]).shape == (0, 4, 7, 6)
    x = torch.rand(4, 7, 6, dtype=torch.float64)
    linear = (op.forward(x[None]) - op.forward(torch.zeros_like(x)[None])).flatten()[units]
    assert torch.allclose((rows * x).flatten(1).sum(1), linear, rtol=0, atol=1e-12)


def test_networks_from_the_libraries_can_be_bounded():
    net = linl.models.create("resnet18", width=0.125, stem="cifar").eval()
    box = Box.around(torch.rand(3, 32, 32), 1 / 255)
    y, widths = net.double()(box.sample(4)), {}
    for method in ("interval", "local"):
        found = bound(net, box, method, torch.float32)
        assert len(found.inputs) == 17
        assert (y >= found.output.lower).all() and (y <= found.output.upper).all()
        widths[method] = (found.inputs[-1].upper - found.inputs[-1].lower).mean()
    assert widths["local"] < 0.01 * widths["interval"], "seventeen layers of one activation's way back each"


def test_trained_units_are_bounded_as_they_stand():
    net, shape = make("dense", "relu")
    lin = linl.linearize(net.float(), "linlu").eval()
    box = Box.around(torch.rand(*shape), 0.2)
    y = lin.double()(box.sample(100)).detach()
    found = bound(lin, box)
    assert (y >= found.output.lower).all() and (y <= found.output.upper).all()


# --- what is refused -------------------------------------------------------------------------------


def test_boxes_refuse_nonsense():
    with pytest.raises(ValueError, match="lower is above upper"):
        Box(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="same"):
        Box(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="finite"):
        Box(torch.zeros(2), torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="eps"):
        Box.around(torch.zeros(2), -1)
    with pytest.raises(ValueError, match="no point in common"):
        Box.around(torch.full((2,), 9.0), 0.1, within=Box.unit((2,)))


def test_the_box_of_valid_pixels_follows_the_normalization():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    box = Box.unit((3, 2, 2), mean, std)
    images = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    images = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert box.contains(images).all()
    assert not box.contains(images * 1.01).any()


def test_a_clipped_point_is_inside_in_its_own_dtype():
    box = Box(torch.full((50,), 0.1), torch.full((50,), 0.3, dtype=torch.float64))
    assert box.contains(box.clip(torch.randn(200, 50))).all()


def test_far_bends_leave_room_for_their_own_rounding():
    """100 + 0.3·(x − 100) is rounded by ε·100, however small x is."""
    pieces = pieces_of(linl.PartialLinear(nn.Hardtanh(100.0, 101.0), 0.3), 0)
    x = torch.rand(2000, dtype=torch.float64)
    low, high = pieces.range(x, x)
    below, under, above, over = pieces.lines(x, x)
    alpha = float(pieces.slopes[0])
    from fractions import Fraction

    exact = [100 + Fraction(alpha) * (Fraction(v) - 100) for v in x.tolist()]
    for i, value in enumerate(exact):
        assert Fraction(below[i].item()) * Fraction(x[i].item()) + Fraction(under[i].item()) <= value
        assert Fraction(above[i].item()) * Fraction(x[i].item()) + Fraction(over[i].item()) >= value
    assert pieces.offset == 101 and (high - low).max() < 1e-12


def test_a_box_keeps_its_own_corners():
    x = torch.rand(3, dtype=torch.float64)
    box, kept = Box(x, x), x.clone()
    x += 1
    assert torch.equal(box.lower[0], kept) and box.lower.data_ptr() != box.upper.data_ptr()
    assert Box([0.1], [0.3]).lower.item() == 0.1
    assert Box.unit((2, 1, 1), torch.tensor([0.5, 0.5]), torch.ones(2)).contains(torch.zeros(1, 2, 1, 1)).all()
