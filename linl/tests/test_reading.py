"""A network read as a program: unusual wiring as it is, and what can't be read refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl import Box
from linl.bounds import bound
from linl.reading import NoBoundRule, program


@pytest.mark.parametrize(
    ("net", "shape", "told"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.GELU()), (3,), "GELU"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2, ceil_mode=True)), (1, 9, 9), "MaxPool2d"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveMaxPool2d(2)), (1, 8, 8), "AdaptiveMaxPool2d"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), (3,), "LayerNorm"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), (1, 8, 8), "reflect"),
    ],
)
def test_operations_without_a_bound_are_refused_by_name(net, shape, told):
    with pytest.raises(NoBoundRule, match=told):
        bound(net.eval(), Box.unit(shape))


def test_wrong_networks_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="train mode"):
        bound(net, Box.unit((3,)))
    net.eval()
    with pytest.raises(ValueError, match="can't take inputs of shape"):
        bound(net, Box.unit((4,)))
    with pytest.raises(ValueError, match="unknown method"):
        bound(net, Box.unit((3,)), "deeppoly")
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers"):
        bound(net, Box.unit((3,)))


# --- networks of unusual wiring --------------------------------------------------------------------


class Wired(nn.Module):
    """Two dense layers, wired by a function (net, x)."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.wired = nn.Linear(4, 4), nn.Linear(4, 4), forward

    def forward(self, x):
        return self.wired(self, x)


def _in_place_read_again(net, x):
    h = net.a(x)
    r = nn.functional.relu(h, inplace=True)
    return net.b(r + h)


def _in_place_by_another_name(net, x):
    h = net.a(x)
    y = h
    h += 1
    return net.b(h.relu()) + y


def _with_a_value_nobody_reads(net, x):
    h = net.a(x).relu()
    net.b(h).relu()
    return net.b(net.a(h).relu())


@pytest.mark.parametrize("wired", [_in_place_read_again, _with_a_value_nobody_reads, lambda net, x: net.a(x.relu())])
def test_unusual_wiring_is_read_as_it_is(wired):
    torch.manual_seed(0)
    net = Wired(wired).double().eval()
    box = Box.around(torch.randn(4), 0.5)
    x = torch.cat([box.sample(200), box.corners(200)])
    y = net(x.clone()).detach()
    found = bound(net, box)
    assert (y >= found.output.lower).all() and (y <= found.output.upper).all()
    state = linl.analyse(net, box)
    assert state.decided and linl.verify_stability(net, state).ok
    assert torch.allclose(linl.compress(net, state)(x.clone()), y, rtol=0, atol=1e-10)


class Moody(nn.Module):
    """Computes one thing in training, another in evaluation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = F.dropout(self.a(x).relu(), 0.5, self.training)
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
        return self.b(F.dropout(h, training=False))


def test_only_evaluation_is_read():
    """Noise in training and dropout that is off are nothing to a bound; dropout that stays on is refused."""
    torch.manual_seed(0)
    net, box = Moody().double().eval(), Box.unit((4,))
    state = linl.analyse(net, box)
    assert state.decided and linl.verify_stability(net, state)
    x = box.sample(100)
    assert torch.allclose(linl.compress(net, state)(x), net(x), rtol=0, atol=1e-12)
    read = program(torch.fx.symbolic_trace(net), (4,))
    assert torch.allclose(read.run(x)[read.output], net(x), rtol=0, atol=1e-12)
    with pytest.raises(linl.graph.UntraceableError, match="something else in training than in evaluation"):
        linl.graph.trace(net)
    always = nn.Sequential(nn.Linear(4, 4), Wired(lambda net, x: F.dropout(x, 0.5))).eval()
    with pytest.raises(NoBoundRule, match="no bound is known for dropout"):
        program(always, (4,))


class OwnReLU(nn.ReLU):
    """Not what its name says."""

    def forward(self, x):
        return super().forward(x) + 1


def test_a_graph_that_is_not_the_network_is_refused():
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    hooked[1].register_forward_hook(lambda module, given, made: 2 * made)
    for net in (nn.Sequential(nn.Linear(4, 4), OwnReLU()), hooked):
        with pytest.raises(NoBoundRule, match="than what its graph shows"):
            program(net.eval(), (4,))
    with pytest.raises(linl.graph.UntraceableError, match="a is changed in place"):
        program(Wired(_in_place_by_another_name).eval(), (4,))
    huge = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double().eval()
    for p in huge.parameters():
        p.data *= 1e200
    with pytest.raises(ValueError, match="too large"):
        program(huge, (4,))


@pytest.mark.parametrize(
    "combine",
    [
        lambda net, x: 1 - x,
        lambda net, x: net.held - x,
        lambda net, x: torch.rsub(x, 0.5),
        lambda net, x: torch.add(x, net.held, alpha=0.3),
        lambda net, x: torch.sub(x, net.held, alpha=-2),
        lambda net, x: torch.sub(x.relu(), x, alpha=-1),
        lambda net, x: torch.rsub(x, (x - 0.1).relu()),
        lambda net, x: x.sub(0.25, alpha=2).relu() - x,
    ],
)  # fmt: skip
def test_sums_the_other_way_round_and_with_factors(combine):
    """Read (which is compared with the network), bounded soundly, settled as enumeration says, compressed equal."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 6), Wired(combine), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    net[1].register_buffer("held", torch.rand(6))
    net, box = net.double().eval(), Box.unit((3,))
    state = linl.analyse(net, box)
    assert state.decided
    points = torch.cat([box.sample(20_000), box.corners(8)])
    with torch.no_grad():
        inner = combine(net[1], net[0](points))
        assert linl.verify(net, linl.compress(net, state), points).equal
    on, off = (inner > 0).any(0), (inner < 0).any(0)
    codes = state.codes[-2]
    assert not (on & (codes == 0)).any() and not (off & (codes == 1)).any(), "a claim that a sample contradicts"
    assert linl.verify_stability(net, state)


def test_a_factor_on_a_value_that_moves_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), Wired(lambda net, x: torch.add(x, x.relu(), alpha=2))).eval()
    with pytest.raises(NoBoundRule, match="alpha = 2: multiply before it"):
        program(net, (4,))


def test_additions_and_views_that_move_numbers_about_are_refused():
    spread = nn.Sequential(nn.Conv1d(4, 4, 1), Wired(lambda net, x: x + torch.ones(4, 5)), nn.Flatten()).eval()
    with pytest.raises(NoBoundRule, match="spreads"):
        program(spread, (4, 1))
    with pytest.raises(NoBoundRule, match="view"):
        program(nn.Sequential(nn.Linear(4, 1), Wired(lambda net, x: x.view(-1))).eval(), (4,))
