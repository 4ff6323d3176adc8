"""Regions on a box: the same as enumeration, Zaslavsky's number, proved from both sides, honest when time is up."""

import math
import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.regions import count
from linl.tests.brute import dense_net, patterns


def cube(n: int, side: float = 2.0) -> Box:
    return Box(-torch.ones(n) * side / 2, torch.ones(n) * side / 2)


def agrees_with_enumeration(seed: int, most: int) -> int:
    net, n = dense_net(seed, most)
    found = count(net, cube(n))
    mine = torch.cat(found.patterns, 1)
    assert found.count == found.lower == found.upper == len(mine), found
    assert {tuple(p) for p in mine.tolist()} == patterns(net, -np.ones(n), np.ones(n)), seed
    return found.count


@pytest.mark.parametrize("seed", range(30))
def test_count_is_that_of_enumeration(seed):
    agrees_with_enumeration(seed, 10 if seed in (4, 21) else 7)


def general_position(inputs: int, units: int, seed: int) -> nn.Sequential:
    """One hidden layer whose hyperplanes touch a small ball, so that every crossing lies in a large box."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, 1)).double().eval()
    net[0].weight.data = torch.randn(units, inputs, generator=generator, dtype=torch.float64)
    net[0].bias.data = torch.randn(units, generator=generator, dtype=torch.float64)
    return net


@pytest.mark.parametrize(("inputs", "units"), [(1, 12), (2, 9), (3, 7), (4, 6)])
def test_one_layer_in_general_position_has_zaslavskys_number(inputs, units):
    net = general_position(inputs, units, seed=inputs)
    assert count(net, cube(inputs, 1e4)).count == sum(math.comb(units, j) for j in range(inputs + 1))


def bent(act: nn.Module, seed: int = 0, widths=(3, 5, 4)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), act)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 2)).double().eval()


KINDS = {
    "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "linlu": linl.LiNLU(0.7), "hardtanh": nn.Hardtanh(-0.4, 0.3),
    "partial": linl.PartialLinear(nn.ReLU(), 0.4), "prelu": nn.PReLU(),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_region_is_affine_and_every_point_has_its_region(kind):
    """Sampled points lie in regions that were found, and each region is seen."""
    net = bent(KINDS[kind])
    found = count(net, cube(3))
    assert found.count is not None and found.count > 20
    known = {tuple(p) for p in torch.cat(found.patterns, 1).tolist()}
    assert len(known) == found.count
    read, points = linl.reading.program(net, (3,)), torch.cat([cube(3).sample(100_000), found.points])
    values = read.run(points)
    bends = torch.tensor(read.bends[0].pieces.bends, dtype=torch.float64)
    pieces = torch.cat([torch.searchsorted(bends, values[op.sources[0]].contiguous()) for op in read.bends], 1)
    sampled = {tuple(p) for p in pieces[:100_000].unique(dim=0).tolist()}
    assert sampled <= known
    assert pieces[100_000:].tolist() == torch.cat(found.patterns, 1).tolist()
    assert len(sampled) > 0.8 * found.count


def test_a_bend_without_a_change_of_slope_is_none():
    act = nn.PReLU(5)
    act.weight.data = torch.tensor([1.0, 0.2, 1.0, 0.2, 1.0])
    net = nn.Sequential(nn.Linear(2, 5), act, nn.Linear(5, 1)).double().eval()
    only = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    only[0].weight.data, only[0].bias.data = net[0].weight.data[1::2], net[0].bias.data[1::2]
    assert count(net, cube(2, 20)).count == count(only, cube(2, 20)).count == 4
    assert count(bent(linl.LiNLU(1.0)), cube(3)).count == 1
    assert count(bent(linl.PartialLinear(nn.ReLU(), 1.0)), cube(3)).count == 1


def test_faces_that_coincide_and_dead_layers_are_settled_exactly():
    """No float can tell that two faces are one, or that all go through the origin; no cell is left for that."""
    first = nn.Linear(2, 6).double()
    with torch.no_grad():
        first.weight[1:3] = torch.stack([-first.weight[0], 3 * first.weight[0]])
        first.bias[1:3] = torch.stack([-first.bias[0], 3 * first.bias[0]])
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1)).double().eval()
    found = count(net, cube(2, 20))
    assert found.count == len(patterns(net, -10 * np.ones(2), 10 * np.ones(2)))
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1)).double()
    dead[0].weight.data = -dead[0].weight.data.abs()
    dead[0].bias.data.fill_(-5.0)
    assert count(dead.eval(), cube(2)).count == 1
    cones = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.ReLU()).double()
    inside = count(cones.eval(), cube(3))
    assert inside.count == count(cones, cube(3, 1e-3)).count > 14  # a cone is the same at every scale


def test_positions_without_width_are_constants():
    net, box = bent(nn.ReLU()), Box(torch.tensor([-1.0, 0.3, -1.0]), torch.tensor([1.0, 0.3, 1.0]))
    flat = nn.Sequential(nn.Linear(2, 5), *net[1:]).double().eval()
    flat[0].weight.data = net[0].weight.data[:, ::2]
    flat[0].bias.data = net[0].bias.data + 0.3 * net[0].weight.data[:, 1]
    assert count(net, box).count == count(flat, cube(2)).count > 5


def test_convolutions_and_sums_are_counted_too():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 1)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.last(torch.relu(self.second(x) + x).flatten(1))

    net = Skip().double().eval()
    box = Box(-torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    found = count(net, box)
    assert found.count is not None and found.count > 10
    values = linl.reading.program(net, (1, 2, 3)).run(box.sample(20_000))
    read = linl.reading.program(net, (1, 2, 3))
    seen = torch.cat([(values[op.sources[0]] > 0).flatten(1) for op in read.bends], 1).unique(dim=0).int().tolist()
    assert {tuple(p) for p in seen} <= {tuple(p) for p in torch.cat(found.patterns, 1).tolist()}


def test_time_that_is_up_leaves_sound_bounds_to_go_on_from():
    net = bent(nn.ReLU(), widths=(3, 7, 5))
    whole = count(net, cube(3))
    state, steps, last = None, 0, (0, math.inf)
    while state is None or state.count is None:
        state = count(net, cube(3), time_limit=max(0.02, whole.seconds / 8), state=pickle.loads(pickle.dumps(state)))
        assert state.lower <= whole.count <= state.upper
        assert state.lower >= last[0] and state.upper <= last[1]
        last, steps = (state.lower, state.upper), steps + 1
    assert steps > 1 and state.count == whole.count
    assert {tuple(p) for p in torch.cat(state.patterns, 1).tolist()} == {
        tuple(p) for p in torch.cat(whole.patterns, 1).tolist()
    }
    with pytest.raises(ValueError, match="another box"):
        count(net, cube(3, 3.0), state=state)
    with pytest.raises(ValueError, match="another network"):
        count(bent(nn.ReLU(), 1, (3, 7, 5)), cube(3), state=state)


def test_a_solver_that_lies_makes_no_proof(monkeypatch):
    """Cells that it calls empty without good multipliers are reported, not dropped."""
    from linl.cells import Cell

    net, told = bent(nn.ReLU()), Cell.largest
    whole = count(net, cube(3))
    monkeypatch.setattr(Cell, "largest", lambda self: (-1.0, told(self)[1], np.ones(len(self.spaces))))
    lied = count(net, cube(3))
    assert lied.count is None and lied.thin and lied.lower <= whole.count <= lied.upper
    monkeypatch.setattr(Cell, "largest", lambda self: None)
    mute = count(net, cube(3))
    assert mute.count is None and mute.lower <= whole.count <= mute.upper and "too thin" in repr(mute)


def test_bad_input_is_refused():
    net = bent(nn.ReLU())
    with pytest.raises(ValueError, match="lower is above upper"):
        count(net, Box(torch.ones(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="single point"):
        count(net, Box(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match="2 boxes"):
        count(net, Box(torch.zeros(2, 3), torch.ones(2, 3), batch=True))
    with pytest.raises(ValueError, match="time_limit"):
        count(net, cube(3), time_limit=0)
    with pytest.raises(ValueError, match="can't take"):
        count(net, cube(4))
    with pytest.raises(ValueError, match="GELU"):
        count(bent(nn.GELU()), cube(3))
    with pytest.raises(ValueError, match="max-pool"):
        count(nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2)).eval(), Box.unit((1, 2, 2)))
    with pytest.raises(ValueError, match="train mode"):
        count(net.train(), cube(3))


if __name__ == "__main__":  # python -m linl.tests.test_regions 300
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    total = sum(agrees_with_enumeration(number, 12) for number in range(many))
    print(f"{many} networks, {total} regions, the same as enumeration over all sign patterns")


def test_cells_thinner_than_floats_can_tell_are_settled():
    """Weights of 1e-8 and less beside ones of 0.1, as l1 leaves them: real slivers, and ones that aren't there."""
    sliver = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    sliver[0].weight.data = torch.tensor([[1e-9, -1.0], [1.0, 1.0]]).double()
    found = count(sliver, Box.unit((2,)))
    assert found.count == 2 and not found.thin, "the first unit is on where the second input is below 1e-9 of the first"
    gone = nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    gone[0].weight.data = torch.tensor([[2e-10, -0.05, -1e-8, -0.45], [-4e-9, -0.17, -0.48, 0.09]]).double()
    found = count(gone, Box.unit((4,)))
    assert found.count == 3 and not found.thin, "both on at once wants x3 below 5e-10·x0 and above 4e-8·x0"
