"""The affine piece at a point: the network within its radius, and no further; by every face's own gradient."""

import pytest
import torch
from torch import nn

from linl import Box
from linl.program import Bend, MaxPool
from linl.reading import program
from linl.regions import affine_at
from linl.tests.small_nets import ACTIVATIONS, NETS, make
from linl.tests.test_slices import pieces_at


def least_distances(net: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """By autograd, unit by unit and pair by pair: the least distance to a face in the sup norm and in L2."""
    read = program(net, x.shape)
    found = []
    for op in read.ops:
        if not isinstance(op, Bend | MaxPool):
            continue

        def inputs(at, source=op.sources[0]):
            return read.run(at[None])[source].flatten()

        value, slopes = inputs(x), torch.autograd.functional.jacobian(inputs, x).flatten(1)
        if isinstance(op, Bend):
            for bend, real in zip(op.pieces.bends, op.pieces.bending(read.shapes[op.sources[0]]), strict=True):
                found.append(((value - bend).abs()[real.flatten()], slopes[real.flatten()]))
        else:
            shape = read.shapes[op.sources[0]]
            here = op.windows(value.view(1, *shape))[0].flatten(0, -2)
            ways = op.windows(slopes.T.reshape(-1, *shape), 0.0).flatten(1, -2)  # (inputs, windows, size)
            first = here.argmax(1)
            ahead = here.gather(1, first[:, None]) - here
            faces = ways.gather(2, first.expand(len(ways), -1)[..., None]) - ways
            known = here.isfinite().flatten()
            found.append((ahead.flatten()[known], faces.flatten(1).T[known]))
    gaps, slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
    moves = slopes.norm(dim=1) > 0
    gaps, slopes = torch.cat([gaps[moves], gaps.new_tensor([torch.inf])]), slopes[moves]
    sizes = (torch.cat([norms, norms.new_ones(1)]) for norms in (slopes.abs().sum(1), slopes.norm(dim=1)))
    return tuple(float((gaps / size).min()) for size in sizes)


@pytest.mark.parametrize("activation", ["relu", "hardtanh", "partial above 1"])
@pytest.mark.parametrize("kind", NETS)
def test_the_radius_is_the_least_of_all_faces(kind, activation, monkeypatch):
    net, shape = make(kind, activation)
    points = 2 * torch.randn(4, *shape, dtype=torch.float64)
    for x in points:
        sup, l2 = least_distances(net, x)
        for directions in (48, 1 << 20, 8):  # bounds by chance, exact ones, by chance for few inputs too
            monkeypatch.setattr("linl.locality.DIRECTIONS", directions)
            monkeypatch.setattr("linl.locality.SAFE", 5.0 if directions > 8 else 1e4)
            piece = affine_at(net, x)
            for mine, theirs in ((piece.radius, sup), (piece.radius_l2, l2)):  # rounding is taken off
                assert (1 - 1e-6) * theirs <= mine <= theirs * (1 + 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
def test_the_piece_at_a_point_reaches_as_far_as_it_says(kind):
    net, shape = make(kind, "leaky")
    x = 2 * torch.randn(*shape, dtype=torch.float64)
    piece = affine_at(net, x)
    home = pieces_at(net, x[None])
    way = torch.randn(2000, *shape, dtype=torch.float64)
    corners, ball = way.sign(), way / way.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    for step, radius in ((corners, piece.radius), (ball, piece.radius_l2)):
        near = x + 0.999 * radius * step
        assert (pieces_at(net, near) == home).all()
        assert (piece.linear(near.flatten(1)) - net(near)).abs().max() < 1e-10
    assert abs(affine_at(net, Box.around(x, piece.radius / 3)).share - 3) < 1e-6
    layer, unit = piece.nearest
    op = next(op for op in program(net, shape).ops if op.name == layer)
    if isinstance(op, MaxPool):
        return
    start = x.clone().requires_grad_()
    with torch.enable_grad():
        value = program(net, shape).run(start[None])[op.sources[0]].flatten()[unit]
        slope = torch.autograd.grad(value, start)[0]
    beyond = x - 1.001 * piece.radius * slope.sign() * value.sign()
    assert (pieces_at(net, beyond[None]) != home).any()


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_by_chance_hold(activation):
    """Every face's gradient is as short as its bound says."""
    from linl.locality import _Local

    net, shape = make("residual", activation)
    local = _Local(program(net, shape), 2 * torch.randn(*shape, dtype=torch.float64), None)
    local._bound()
    for faces in local.faces.values():
        source = faces.op.sources[0]
        rows = faces.rows(torch.arange(len(faces.unit)), local.program.shapes[source].numel())
        norms = local.here.back(source, rows).norm(dim=1)
        assert (norms <= faces.norm).all() and (faces.norm <= 12 * norms + 1e-12).all()


def test_on_a_face_the_radius_is_zero_but_what_never_moves_is_no_face():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.ReLU()).double().eval()
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.3, 0.7], [1.0, 0.0]])
        net[0].bias[:] = torch.tensor([0.1, 0.1, 0.1, 0.0])
        net[2].weight[:] = torch.tensor([[0.1, 0.2, -(0.1 + 0.2), 0.0], [1.0, 0.0, 0.0, 1.0]])  # 0 but for rounding
    piece = affine_at(net, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert piece.radius == pytest.approx(0.5) and piece.nearest == ("1", 3)
    on = affine_at(net, torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert on.radius == on.radius_l2 == 0 and on.nearest == ("1", 3)


def test_where_nothing_bends_the_piece_is_everywhere():
    for act in (nn.Identity(), nn.LeakyReLU(1.0)):
        net = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)).double().eval()
        piece = affine_at(net, torch.randn(3))
        assert piece.radius == piece.radius_l2 == torch.inf and piece.nearest is None and "everywhere" in repr(piece)


def test_ties_in_a_max_pool():
    """Two numbers that are equal at the point are a face there; two that are equal all around are none."""
    pool = nn.Sequential(nn.Conv1d(1, 1, 1), nn.MaxPool1d(2), nn.Flatten()).double().eval()
    assert affine_at(pool, torch.tensor([[1.0, 1.0, 0.0, 3.0]])).radius == 0
    same = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten()).double().eval()
    with torch.no_grad():
        same[0].weight[:] = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
        same[0].bias[:] = 0.0
    piece = affine_at(same, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert piece.nearest == ("2", 1) and piece.radius == pytest.approx(0.5)


def test_bad_input_is_refused():
    net, shape = make("dense", "relu")
    a, b = torch.randn(2, *shape)
    with pytest.raises(ValueError, match="2 boxes"):
        affine_at(net, Box.around(torch.stack([a, b]), 0.1, batch=True))
    with pytest.raises(ValueError, match="train mode"):
        affine_at(net.train(), a)
