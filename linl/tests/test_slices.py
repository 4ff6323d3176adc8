"""Segments and slices: every piece and polygon, against the network itself, sampled densely."""

import matplotlib
import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.program import MaxPool
from linl.reading import program
from linl.regions import along, count, draw_slice, in_plane, maps
from linl.tests.small_nets import ACTIVATIONS, NETS, make

matplotlib.use("Agg")


def pieces_at(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every unit's piece, and every max-pool's winners, at inputs (N, *shape), (N, units and windows)."""
    read = program(net, x.shape[1:])
    values, found = read.run(x), []
    for op in read.bends:
        seen, real = values[op.sources[0]], op.pieces.bending(read.shapes[op.sources[0]])
        above = [(seen > bend) & bends for bend, bends in zip(op.pieces.bends, real, strict=True)]
        found.append(sum(part.flatten(1).long() for part in above))
    found += [op.largest(values[op.sources[0]])[1].flatten(1) for op in read.ops if isinstance(op, MaxPool)]
    return torch.cat(found, 1)


def inside(made, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n random points inside each polygon, and the polygon of each."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for cell in made.cells:
        shares = torch.rand(n, len(cell), dtype=torch.float64, generator=generator) + 0.02
        points.append((shares / shares.sum(1, keepdim=True)) @ made.points[cell])
    return torch.cat(points), torch.arange(made.count).repeat_interleave(n)


def is_right(net: nn.Module, made, tolerance: float = 1e-9, n: int = 10) -> None:
    """Areas add up; each polygon's map is the network inside of it; patterns are one a polygon and differ between."""
    left, right, bottom, top = made.window
    assert made.complete and abs(made.areas.sum() / ((right - left) * (top - bottom)) - 1) < 1e-9
    points, cell = inside(made, n)
    matrices, values = made.maps()
    mine = (matrices[cell] @ (points - made.centers[cell])[:, :, None])[..., 0] + values[cell]
    theirs = net(made.inputs(points)).flatten(1)
    assert (mine - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))
    big = made.areas > 1e-9 * made.areas.sum()  # the others are as thin as rounding
    seen = pieces_at(net, made.inputs(points)).view(made.count, n, -1)[big]
    assert (seen == seen[:, :1]).all()
    assert len(seen[:, 0].unique(dim=0)) == len(seen)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_a_slice_is_the_network(kind, activation):
    net, shape = make(kind, activation)
    corners = 3 * torch.randn(3, *shape, dtype=torch.float64)
    made = in_plane(net, *corners, window=6.0)
    assert made.count > 10
    is_right(net, made)


@torch.no_grad()
def test_a_slice_holds_every_pattern_that_sampling_finds():
    net, shape = make("dense", "relu")
    made = in_plane(net, *3 * torch.randn(3, *shape, dtype=torch.float64), window=8.0)
    left, right, bottom, top = made.window
    box = Box(torch.tensor([left, bottom], dtype=torch.float64), torch.tensor([right, top], dtype=torch.float64))
    sampled = pieces_at(net, made.inputs(box.sample(200_000))).unique(dim=0)
    known = pieces_at(net, made.inputs(made.centers))
    assert {tuple(p) for p in sampled.tolist()} <= {tuple(p) for p in known.tolist()}
    assert len(sampled) > 0.8 * made.count


@torch.no_grad()
def test_a_slice_of_a_plane_counts_what_count_counts():
    """Two inputs: the plane is all there is, and the window a box."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    a, b, c = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    made = in_plane(net, a, b, c, window=(-1, 2, -1.5, 1))
    found = count(net, Box(torch.tensor([-1.0, -1.5]), torch.tensor([2.0, 1.0])))
    assert made.count == found.count > 15
    weight, bias, number = maps(net, found)
    x = found.points
    assert torch.allclose((weight @ x[:, :, None])[..., 0] + bias, net(x), atol=1e-12)
    assert 1 < number.max() + 1 <= found.count


POOLS = {
    "overlapping, padded": nn.MaxPool2d(3, 2, padding=1), "spread": nn.MaxPool2d(2, 1, dilation=2),
    "no squares": nn.MaxPool2d((1, 3), (2, 1), padding=(0, 1)), "everything": nn.MaxPool2d(6),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("first", ["pixels", "dead units", "equal numbers"])
def test_max_pools_of_every_sort_and_their_ties(first, pool):
    """On pixels; on units that are 0 together; on pairs of channels, rows or columns that are equal."""
    layers = [nn.Conv2d(2, 2, 1, bias=False), nn.Identity() if first == "pixels" else nn.ReLU()]
    net = nn.Sequential(*layers, POOLS[pool], nn.Conv2d(2, 2, 1), nn.ReLU()).double().eval()
    if first == "dead units":
        net[0].weight.data = -net[0].weight.data.abs()
    corners = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    if first == "equal numbers":
        corners[..., ::2] = corners[..., 1::2]
    made = in_plane(net, *corners, window=5.0)
    assert made.count > 6
    is_right(net, made)


@torch.no_grad()
def test_a_window_is_cut_into_its_upper_envelope():
    """As many parts as numbers that are the largest somewhere: no line goes on where a third number is larger."""
    for seed in range(8):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 12)), nn.MaxPool1d(12), nn.Flatten()).double().eval()
        a, b, c = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        made = in_plane(net, a, b, c, window=(-3, 3, -3, 3))
        ticks = torch.linspace(-3, 3, 601, dtype=torch.float64)
        winners = net[0](torch.cartesian_prod(ticks, ticks)).argmax(1).unique()
        assert made.count == len(winners)
        is_right(net, made)


def test_a_small_block_gives_the_same(monkeypatch):
    net, shape = make("residual", "relu")
    corners = 3 * torch.randn(3, *shape, dtype=torch.float64)
    whole, line = in_plane(net, *corners, window=6.0), along(net, *corners[:2])
    monkeypatch.setattr(linl.slices, "BLOCK", 1000)
    monkeypatch.setattr(linl.segments, "BLOCK", 1000)
    parts, pieces = in_plane(net, *corners, window=6.0), along(net, *corners[:2])
    assert parts.count == whole.count and len(parts.points) > len(whole.points)
    with torch.no_grad():
        is_right(net, parts, n=3)
    assert torch.allclose(pieces.breaks, line.breaks, atol=1e-12) and pieces.layer == line.layer


def test_faces_of_zeros_are_not_cut():
    """Dead units without a bias are zero on whole faces, and all faces of a cone meet in one point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    net = net.double().eval()
    origin, b, c = torch.zeros(3), torch.tensor([1.0, 0.2, 0.1]), torch.tensor([0.0, 1.0, -0.3])
    made = in_plane(net, origin, b, c, window=(-1, 1, -1, 1))
    small = in_plane(net, origin, b, c, window=(-1e-4, 1e-4, -1e-4, 1e-4))
    assert made.count == small.count > 6 and made.count < 30
    with torch.no_grad():
        is_right(net, made)
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)).double()
    dead[0].bias.data.fill_(-100.0)
    assert in_plane(dead.eval(), origin, b, c).count == along(dead, origin, b).count == 1
    through = along(net, -b, 2 * b)  # every breakpoint of a network without biases is at the origin
    assert through.count == 2 and abs(float(through.breaks[1]) - 1 / 3) < 1e-12


@torch.no_grad()
def test_faces_that_nearly_coincide_leave_no_polygon_over_another():
    """Down to what can't be told apart: a line that seems to touch two corners and yet crosses elsewhere."""
    first, second = nn.Linear(2, 5).double(), nn.Linear(5, 3).double()
    second.weight.data = torch.tensor(
        [[1.0, -1, 1, 1, 1], [0.3, 0.5, -0.2, 0.1, 0.7], [1.0, -0.5, -0.5, 0, 0]]
    ).double()
    second.bias.data = torch.tensor([0.0, -0.01, 0.0], dtype=torch.float64)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU()).eval()
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for power in torch.arange(8, 15, 0.1, dtype=torch.float64):
        eps = float(10**-power)
        weight = [[0.3, 0.7], [0.3 + eps, 0.7], [0.3, 0.7 - eps], [0.3, 0.7], [-0.6, -1.4]]
        first.weight.data = torch.tensor(weight, dtype=torch.float64)
        first.bias.data = torch.tensor([0.1, 0.1, 0.1, 0.1 + eps, -0.2 + eps], dtype=torch.float64)
        made = in_plane(net, *corners, window=3.0)
        assert abs(made.areas.sum() / 9 - 1) < 1e-12, eps
        points, cell = inside(made, 4)
        matrices, values = made.maps()
        mine = (matrices[cell] @ (points - made.centers[cell])[:, :, None])[..., 0] + values[cell]
        assert (mine - net(made.inputs(points))).abs().max() < 1e-9


def nearly_equal_units(seed: int) -> tuple[nn.Sequential, torch.Tensor]:
    """Layers of ten units of which three are distinct, up to a sign and about 1e-8 to 1e-14; a third with max-pools."""
    torch.manual_seed(seed)
    eps = float(10 ** -(8 + 6.5 * torch.rand((), dtype=torch.float64)))
    pool = [nn.Unflatten(1, (2, 5)), nn.MaxPool1d(3, 1, padding=1), nn.Flatten()] if seed % 3 == 0 else []
    layers = [nn.Linear(2, 10), *(pool if seed % 2 else []), nn.ReLU(), nn.Linear(10, 10), nn.LeakyReLU(0.1)]
    layers += [*([] if seed % 2 else pool), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2)]
    net = nn.Sequential(*layers).double().eval()
    for layer in (m for m in net if isinstance(m, nn.Linear) and len(m.weight) > 4):
        same, sign = torch.randint(0, 3, (10,)), torch.randint(0, 2, (10, 1)).double() * 2 - 1
        for t in (layer.weight.data, layer.bias.data[:, None]):
            t[:] = sign * t[same] + eps * torch.randn(t.shape).double() * (torch.rand(10, 1) < 0.7)
    return net, torch.randn(3, 2).double()


@torch.no_grad()
def test_what_is_nearly_equal_is_tiled_too():
    """Each point of the window in one polygon, though lines differ by rounding alone."""
    for seed in (6, 45, 47, 59, 61, 123, 165, 213):
        net, corners = nearly_equal_units(seed)
        made = in_plane(net, *corners, window=4.0)
        assert abs(made.areas.sum() / 16 - 1) < 1e-9, seed
        points, cell = inside(made, 3)
        matrices, values = made.maps()
        mine = (matrices[cell] @ (points - made.centers[cell])[:, :, None])[..., 0] + values[cell]
        assert (mine - net(made.inputs(points))).abs().max() < 1e-9
        line = along(net, *corners[:2])
        at = torch.rand(100, dtype=torch.float64)
        assert (line.breaks.diff() > 0).all() and (line(at) - net(line.inputs(at))).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "hardtanh", "prelu", "linlu", "partial relu6"])
@pytest.mark.parametrize("kind", NETS)
def test_a_segment_is_the_network(kind, activation):
    net, shape = make(kind, activation)
    a, b = 4 * torch.randn(2, *shape, dtype=torch.float64)
    line = along(net, a, b)
    at = torch.rand(5000, dtype=torch.float64)
    y = net(line.inputs(at))
    assert (line(at) - y).abs().max() <= 1e-10 * max(1.0, float(y.abs().max()))
    middles = (line.breaks[1:] + line.breaks[:-1]) / 2
    assert line.complete and line.count > 4 and line.table["breakpoints"].sum() == line.count - 1
    seen = pieces_at(net, line.inputs(middles))
    assert (seen[1:] != seen[:-1]).any(1).all()
    dense = torch.linspace(0, 1, 4001, dtype=torch.float64)
    assert len(pieces_at(net, line.inputs(dense)).unique(dim=0)) <= line.count
    ends = torch.searchsorted(line.breaks, dense).clamp(1, line.count) - 1
    same = (dense[:, None] - line.breaks).abs().amin(1) > 1e-9
    assert (pieces_at(net, line.inputs(dense))[same] == seen[ends][same]).all()


def test_pictures_side_by_side():
    import matplotlib.pyplot as plt

    net, shape = make("dense", "relu")
    corners = 3 * torch.randn(3, *shape, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2)
    first = draw_slice(net, *corners, ax=axes[0], images=[torch.rand(3, 4, 4)] * 3)
    second = draw_slice(first.slice, ax=axes[1], color="class", classes=["one", "two", "three"], lines=False)
    assert first is axes[0] and first.slice is second.slice and first.get_xlim() == second.get_xlim()
    drawn = [ax.collections[0] for ax in axes]
    assert all(len(one.get_paths()) == first.slice.count for one in drawn)
    colors = [len({tuple(c) for c in one.get_facecolors().round(6)}) for one in drawn]
    assert colors[0] > 0.9 * first.slice.count
    figure.canvas.draw()
    plt.close(figure)
    with pytest.raises(ValueError, match="unknown color"):
        draw_slice(net, *corners, color="rainbow")
    with pytest.raises(ValueError, match="give a, b and c"):
        draw_slice(net)
    with pytest.raises(ValueError, match="2 images"):
        draw_slice(net, *corners, images=[0, 0])


def test_a_resnet():
    """ResNet20's layers on small images: convolutions, residual sums, a shortcut that pads and subsamples."""
    torch.manual_seed(0)
    net = linl.models.create("resnet20", num_classes=10, input_size=(3, 16, 16), width=0.5).eval()
    x = torch.randn(3, 3, 16, 16)
    made = in_plane(net, *x, window=0.02)
    assert made.count > 30
    with torch.no_grad():
        is_right(net.double(), made, n=2)


def test_time_that_is_up_is_told():
    net, shape = make("residual", "relu")
    a, b, c = 4 * torch.randn(3, *shape, dtype=torch.float64)
    made, line = in_plane(net, a, b, c, time_limit=1e-6), along(net, a, b, time_limit=1e-6)
    assert not made.complete and "time was up" in repr(made) and made.maps()[0].shape == (0, 2, 2)
    assert not line.complete and "time was up" in repr(line) and line.count == 0


def test_bad_input_is_refused():
    net, shape = make("dense", "relu")
    a, b, c = torch.randn(3, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="on one line"):
        in_plane(net, a, b, a + 2 * (b - a))
    with pytest.raises(ValueError, match="same point"):
        in_plane(net, a, a, c)
    with pytest.raises(ValueError, match="same point"):
        along(net, a, a)
    with pytest.raises(ValueError, match="shapes"):
        along(net, a, b[:2])
    with pytest.raises(ValueError, match="no finite numbers"):
        along(net, a, b * torch.nan)
    with pytest.raises(ValueError, match="has no area"):
        in_plane(net, a, b, c, window=(0, 0, 1, 2))
    with pytest.raises(ValueError, match="left, right, bottom, top"):
        in_plane(net, a, b, c, window=(0, 1))
    for wrong in (in_plane, along):
        with pytest.raises(ValueError, match="time_limit"):
            wrong(net, a, b, *([c] if wrong is in_plane else []), time_limit=-1)
    with pytest.raises(ValueError, match="train mode"):
        along(net.train(), a, b)
