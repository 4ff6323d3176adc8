"""The two-hidden-layer network: the original wherever that is promised, of the size foretold."""

import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.shallowing import compare, exact_at
from linl.tests.brute import dense_net

SQUARE = Box(-torch.ones(2), torch.ones(2))


def net_of(act: nn.Module, inputs: int = 2) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(inputs, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 2)]
    return nn.Sequential(*layers).double().eval()


TWO = [nn.ReLU(), nn.LeakyReLU(0.1), linl.LiNLU(0.7), linl.PartialLinear(nn.ReLU(), 0.3)]


@pytest.mark.parametrize(
    ("act", "patterns"), [*((act, p) for act in TWO for p in ("feasible", "all")), (nn.Hardtanh(-0.5, 0.5), "feasible")]
)
def test_it_is_the_network_outside_the_shells(act, patterns):
    net = net_of(act)
    made = linl.shallow(net, SQUARE, patterns, sharpness=1e5)
    row = compare(net, made, SQUARE, 100_000).iloc[0]
    assert row["exact"] > 0.999 and row["error_exact"] < 1e-10
    assert [type(m) for m in made] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert made[1].weight.dtype == torch.float64
    assert (made[1].out_features, made[3].out_features) == made.shallow_report.units


@pytest.mark.parametrize("seed", [0, 1, 3, 6, 8])
def test_random_networks_of_up_to_three_layers(seed):
    net, n = dense_net(seed, 9)
    box = Box(-torch.ones(n), torch.ones(n))
    row = compare(net, linl.shallow(net, box, sharpness=1e7), box, 100_000).iloc[0]
    assert row["exact"] > 0.99 and row["error_exact"] < 1e-9


def test_the_number_of_units_is_known_beforehand():
    net = net_of(nn.ReLU())
    every = linl.shallow(net, SQUARE, "all").shallow_report
    # layer 1: two inputs; both sides of 3 units, and of 3 units after each of 2³ patterns
    assert every.regions == 2**6 and every.units == (2 + 2 * 3 + 2 * 3 * 2**3, 3 * 2**6)
    assert every.unshared == 6 * 2**6
    few = linl.shallow(net, SQUARE).shallow_report
    assert few.regions == linl.regions.count(net, SQUARE).count < every.regions
    assert few.units[0] < every.units[0] and few.units[1] == 3 * few.regions


def test_the_shells_shrink_as_one_over_the_sharpness():
    net = net_of(nn.ReLU())
    shares = [
        1 - compare(net, linl.shallow(net, SQUARE, sharpness=h), SQUARE).iloc[0]["exact"] for h in (1e2, 1e3, 1e4)
    ]
    assert 4 < shares[0] / shares[1] < 12 and 6 < shares[1] / shares[2] < 16


def test_what_is_promised_is_not_more_than_what_holds():
    """Inside the shells the output differs, and `exact_at` knows."""
    net = net_of(nn.ReLU())
    made = linl.shallow(net, SQUARE, sharpness=30.0)
    x = SQUARE.sample(20_000)
    where, apart = exact_at(made, x), (net(x) - made(x)).abs().amax(1)
    assert 0.1 < where.double().mean() < 0.95 and apart[where].max() < 1e-12
    assert (apart[~where] > 1e-6).double().mean() > 0.5


def test_a_unit_on_its_bend_everywhere_does_not_count_twice():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double()
    net[0].bias.data.fill_(-0.3)
    for patterns in ("feasible", "all"):
        made = linl.shallow(net.eval(), SQUARE, patterns)
        row = compare(net, made, SQUARE).iloc[0]
        assert row["exact"] > 0.99 and row["error_exact"] < 1e-10


def test_images_and_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    box = Box.unit((1, 2, 3))
    made = linl.shallow(net, box, sharpness=1e3)
    row = compare(net, made, box, 20_000).iloc[0]
    assert made[1].weight.dtype == torch.float32 and row["exact"] > 0.5 and row["error_exact"] < 1e-3


def test_bad_input_is_refused():
    net = net_of(nn.ReLU())
    with pytest.raises(ValueError, match="unknown patterns"):
        linl.shallow(net, SQUARE, "some")
    with pytest.raises(ValueError, match="sharpness"):
        linl.shallow(net, SQUARE, sharpness=0.0)
    with pytest.raises(ValueError, match="width at every position"):
        linl.shallow(net, Box(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="not all regions are known"):
        linl.shallow(net, SQUARE, time_limit=1e-9)
    wide = nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Linear(30, 1)).eval()
    with pytest.raises(ValueError, match="too many"):
        linl.shallow(wide, SQUARE, "all")
    with pytest.raises(ValueError, match="train mode"):
        linl.shallow(net.train(), SQUARE)
