"""Compressed networks: the same function on the box, and as small as the states allow."""

import copy

import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.tests.brute import small_net
from linl.tests.small_nets import ACTIVATIONS, NETS, make


def difference(net, tiny, box) -> float:
    x = torch.cat([box.sample(3000), box.corners(1000)])
    with torch.no_grad():
        a, b = net(x), tiny(x)
    assert a.shape == b.shape
    return ((a - b).abs().max() / max(1.0, a.abs().max())).item()


@pytest.mark.parametrize("seed", range(20))
def test_small_networks_are_equal_on_the_box(seed):
    net, inputs = small_net(seed)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    tiny = linl.compress(net, linl.analyse(net, box))
    assert difference(net, tiny, box) <= 1e-10
    assert sum(p.numel() for p in tiny.parameters()) <= sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_network_is_equal_on_the_box(kind, activation):
    net, shape = make(kind, activation, seed=1)
    box = Box.around(4 * torch.rand(*shape), 0.5)
    tiny = linl.compress(net, linl.analyse(net, box, "crown"))
    assert difference(net, tiny, box) <= 1e-10
    assert not any(type(m).__module__.startswith("linl") for m in tiny.modules())


def test_the_difference_of_both_is_bounded_to_nothing():
    """Not samples: bounds on original − compressed over the whole box, from the solver's own model."""
    net, inputs = small_net(9)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    tiny = linl.compress(net, linl.analyse(net, box))
    assert linl.cost.depth(tiny) < linl.cost.depth(net)

    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = copy.deepcopy(net), copy.deepcopy(tiny)

        def forward(self, x):
            return self.a(x) - self.b(x)

    from linl.bounds import bound
    from linl.crown import Pass
    from linl.milp import Model
    from linl.program import Bend
    from linl.reading import program

    read = program(Difference().eval(), (inputs,))
    walk, known = Pass(read, box), {}
    found = bound(read, box)
    for op in read.bends:
        known[op.site] = found.inputs[op.site]
    assert isinstance(read.bends[0], Bend)
    # a unit that asks for |difference| > 1e-4 can't be: the solver finds it impossible
    last = copy.copy(read)
    last.ops = [*read.ops, Bend((read.output,), len(read.shapes), "end", read.bends[0].pieces, len(read.bends))]
    last.shapes = [*read.shapes, read.shapes[read.output]]
    model = Model(last, walk.ranges[0], known, len(read.bends))
    for unit in range(2):
        for bend, up in ((1e-4, True), (-1e-4, False)):
            assert model.cross(unit, bend, up, found.output, 30).verdict == "impossible"


def test_inactive_units_go_and_dependent_ones_are_merged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    net[0].bias.data[:2] = -50  # two that are never on
    net[0].bias.data[2:7] = 50  # five that are always on, of three inputs: two depend on the others
    box = Box.around(torch.zeros(3), 1.0)
    state = linl.analyse(net, box)
    tiny = linl.compress(net, state)
    row = tiny.compress_report.table.iloc[0]
    assert (row["inactive"], row["merged"], row["left"]) == (2, 2, 4)
    assert difference(net, tiny, box) <= 1e-10
    assert difference(net, tiny, Box.around(torch.zeros(3), 500.0)) > 1e-3, "outside the box it need not be equal"


def test_a_layer_that_never_bends_is_merged_into_the_next():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    net[0].bias.data = torch.tensor([50.0, 50, 50, -50, -50]).double()
    box = Box.around(torch.zeros(3), 1.0)
    tiny = linl.compress(net, linl.analyse(net, box))
    assert linl.cost.depth(tiny) <= 2
    assert difference(net, tiny, box) <= 1e-10


def test_a_network_that_is_constant_becomes_a_constant():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    net[0].bias.data -= 50
    box = Box.around(torch.zeros(3), 1.0)
    tiny = linl.compress(net, linl.analyse(net, box))
    assert sum(p.numel() for p in tiny.parameters()) == 2
    assert difference(net, tiny, box) <= 1e-12


def test_channels_that_are_off_everywhere_are_cut_out():
    torch.manual_seed(0)
    net, shape = make("convolutions", "relu")
    net[1].bias.data[:3] = -99.0
    box = Box.around(torch.rand(*shape), 0.5)
    tiny = linl.compress(net, linl.analyse(net, box, "interval"))
    first = next(m for m in tiny.modules() if isinstance(m, nn.Conv2d))
    assert first.out_channels <= 3 and difference(net, tiny, box) <= 1e-10


def _pinned(*layers):
    """Dense layers' biases far from 0: nearly every unit is stable."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias.data = 9 * torch.randn(len(module.bias))
    return net.double().eval()


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (_pinned(nn.Linear(2, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 2), nn.Flatten()), (2,)),
        (_pinned(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 2, 2), nn.Flatten()), (2, 4, 4)),
        (_pinned(nn.Linear(2, 4), nn.ReLU(), nn.Hardtanh(), nn.Linear(4, 2)), (2,)),
        (_pinned(nn.Linear(2, 8), linl.PartialLinear(nn.ReLU6(), 0.3, channels=8), nn.Linear(8, 2)), (2,)),
    ],
)
def test_views_constants_and_units_by_channel_are_cut_right(net, shape):
    for module in net.modules():
        if isinstance(module, linl.PartialLinear):
            module.alpha.data = torch.linspace(0.1, 1.4, 8, dtype=torch.float64)
    box = Box.around(torch.rand(*shape), 0.01)
    assert difference(net, linl.compress(net, linl.analyse(net, box)), box) <= 1e-10


def test_a_convolution_without_channels_is_a_constant():
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten()]
    net = _pinned(*layers, nn.Linear(3, 2))
    net[0].bias.data.fill_(-99.0)
    box = Box.around(torch.rand(2, 5, 5), 1.0)
    assert difference(net, linl.compress(net, linl.analyse(net, box)), box) <= 1e-10


def test_small_rows_are_neither_lost_nor_built_upon():
    """A row of 1e-14 that depends on no other and that a weight of 1e14 reads; one of 1e-7 among large ones."""
    for units, size in ((3, 1e-14), (8, 1e-7)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 2)).double().eval()
        net[0].bias.data.fill_(50.0)
        net[0].weight.data[:2, 2] = 0  # two dimensions, and the small row is the third
        net[0].weight.data[2] *= size
        net[0].bias.data[2] *= size
        net[2].weight.data[:, 2] /= size
        box = Box.around(torch.zeros(3), 1.0)
        tiny = linl.compress(net, linl.analyse(net, box))
        assert difference(net, tiny, box) <= 1e-10
        assert max(p.abs().max() for p in tiny.parameters()) < 1e4


def test_an_activation_in_place_changes_nothing_that_is_read_elsewhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.six = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU6(inplace=True)

        def forward(self, x):
            h = self.a(x)
            return self.b(self.six(h.relu())) + h

    net = Twice().double().eval()
    net.a.bias.data.fill_(5.0)
    box = Box.around(torch.zeros(3), 2.0)
    state = linl.analyse(net, box)
    assert (state.codes[0] == 1).all(), "the first activation goes"
    assert difference(net, linl.compress(net, state), box) <= 1e-10


def test_the_result_is_an_ordinary_network(tmp_path):
    net, inputs = small_net(3)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    tiny = linl.compress(net.float(), linl.analyse(net, box))
    assert next(tiny.parameters()).dtype == torch.float32
    assert len(linl.measure(net, tiny, torch.zeros(1, inputs), batches=()).table) == 2
    folded = linl.fold(tiny, torch.zeros(1, inputs), objective="depth")
    assert linl.verify(tiny, folded, box.sample(10).float()).equal


def test_the_state_of_another_network_is_refused():
    net, inputs = small_net(3)
    state = linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    other = nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="another network"):
        linl.compress(other, state)


def test_a_guard_warns_or_falls_back():
    net, inputs = small_net(3)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    tiny = linl.compress(net, linl.analyse(net, box))
    inside, outside = box.sample(5), 9 * torch.ones(2, inputs, dtype=torch.float64)
    watched = linl.guard(tiny, box)
    assert torch.equal(watched(inside), tiny(inside)) and watched.outside == 0
    with pytest.warns(UserWarning, match="2 of 7 inputs lie outside"):
        watched(torch.cat([inside, outside]))
    watched = linl.guard(copy.deepcopy(tiny), box)
    assert watched.half().lower.dtype == torch.float64 and torch.equal(watched.double().upper, box.upper)
    safe = linl.guard(tiny, box, fallback=net)
    mixed = torch.cat([outside[:1], inside, outside[1:]])
    assert torch.allclose(safe(mixed), net(mixed), atol=1e-10) and safe.outside == 2
    assert torch.equal(safe(outside), net(outside))
    assert linl.guard(tiny, box, fallback=net)(torch.full((1, inputs), torch.nan).double()).isnan().all()
    with pytest.raises(ValueError, match="slack"):
        linl.guard(tiny, box, slack=-1)
