"""What a network's values and gradients say about each of its activations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import linl
from linl import signals
from linl.tests.test_dead_rates import dense

D = torch.float64


def small(seed: int = 0, act=nn.ReLU) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), act(), nn.Linear(8, 5), act(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def batch(n: int = 300, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, dtype=D, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def test_by_hand():
    """Units x, −x, always on, always off; inputs 1, 2, −1, −2, 3, 4, 5, −3."""
    net = nn.Sequential(dense([[1], [-1], [0], [0]], [0, 0, 1, -1]), nn.ReLU(), dense([[1, 1, 1, 1]], [0]))
    x = torch.tensor([[1.0], [2.0], [-1.0], [-2.0], [3.0], [4.0], [5.0], [-3.0]], dtype=D)
    row = signals.signs(net, x, batch_size=3).loc["1"]
    assert row["units"] == 4 and row["steady"] == 0.5
    assert row["rate"] == pytest.approx((5 / 8 + 3 / 8 + 1 + 0) / 4)
    half = -(5 / 8 * math.log2(5 / 8) + 3 / 8 * math.log2(3 / 8))
    assert row["entropy"] == pytest.approx(2 * half / 4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_cap_is_a_bend_too(inplace):
    """Three units around 3: between the bends, beyond the cap, and on both sides of it."""
    x = torch.tensor([[-1.0], [1.0]], dtype=D)
    net = nn.Sequential(dense([[1], [1], [4]], [3, 9, 4]), nn.ReLU6(inplace=inplace))
    row = signals.signs(net, x).loc["1"]
    assert row["steady"] == pytest.approx(2 / 3) and row["rate"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_in_place_activations_are_read_before_they_write():
    net = small()
    there = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in net))
    x, _ = batch()
    left, right = signals.signs(net, x), signals.signs(there, x)
    assert left.to_numpy().tolist() == right.to_numpy().tolist()
    tanh = nn.Sequential(net[0], nn.Sigmoid(), net[2])
    assert 0 < signals.signs(tanh, x)["rate"].item() < 1, "a sigmoid's output is always above 0, its input isn't"


def test_pulls_are_the_slope_of_the_loss_and_untuned_its_end():
    """By finite differences, and by putting the identity there by hand."""
    net, (x, y) = small(), batch()
    lin = linl.linearize(net, "partial", start=0.0)

    def loss(position: int, alpha: float) -> float:
        unit = list(linl.units.units_of(lin).values())[position]
        nn.init.constant_(unit.alpha, alpha)
        value = F.cross_entropy(lin(x), y).item()
        nn.init.zeros_(unit.alpha)
        return value

    step = 1e-6
    for i, (pull, grown) in enumerate(zip(signals.pulls(net, x, y, 77), signals.untuned(net, x, y, 77), strict=True)):
        assert pull == pytest.approx((loss(i, step) - loss(i, 0)) / step, rel=1e-4)
        by_hand = nn.Sequential(*(nn.Identity() if k == 1 + 2 * i else m for k, m in enumerate(net)))
        assert grown == pytest.approx((F.cross_entropy(by_hand(x), y) - F.cross_entropy(net(x), y)).item(), rel=1e-10)


def test_without_takes_some_away_and_leaves_the_rest():
    net, (x, _) = small(), batch()
    names = linl.nonlinearity(linl.linearize(net, "partial"))["name"].tolist()
    assert torch.equal(signals.without(net, [])(x), net(x))
    first = signals.without(net, names[:1])
    torch.testing.assert_close(first(x), net[2:](net[0](x)), rtol=1e-12, atol=1e-12)
    assert len(linl.linearize(first, "partial").linearize_notes) == 0 and len(linl.units.units_of(first)) == 0
    with pytest.raises(ValueError, match=r"no activation 'nowhere': choose from 1, 3"):
        signals.without(net, ["nowhere"])


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_every_signal_on_real_networks(name):
    torch.manual_seed(0)
    net = linl.models.create(name, 10, (3, 32, 32), width=0.25).eval()
    x, y = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
    before = [p.clone() for p in net.state_dict().values()]
    box = linl.Box.around(x[0].double(), 1e-4) if name == "resnet20" else None
    table = signals.read(net, x, y, box=box, batch_size=8)
    assert list(table.columns) == list(signals.SIGNS)
    assert table.index.tolist() == linl.nonlinearity(linl.linearize(net, "partial"))["name"].tolist()
    assert table["certified"].notna().all() == (box is not None)
    for share in ("rate", "entropy", "dynamic", "steady", *(["certified"] if box is not None else [])):
        assert table[share].between(0, 1).all()
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True)), "it was left alone"
    if name == "resnet20":  # plain ReLUs without static units
        assert (1 - table["rate"]).tolist() == pytest.approx(table["dynamic"].tolist())


def test_what_is_proved_was_seen():
    """A unit proved to stay on one piece on the images' hull was seen on one piece on every image."""
    net, (x, y) = small(), batch()
    table = signals.read(net.train(), 0.05 * x, y, box=linl.Box.hull(0.05 * x), method="exact")
    assert net.training, "its mode is left alone, too"
    assert (table["certified"] <= table["steady"] + 1e-12).all() and table["certified"].max() > 0
    assert signals.read(net, x, y)["certified"].isna().all(), "nothing was to be proved"


def test_bad_input():
    net, (x, y) = small(), batch()
    with pytest.raises(ValueError, match="0 images, 0 labels"):
        signals.read(net, x[:0], y[:0])
    with pytest.raises(ValueError, match="300 images, 10 labels"):
        signals.read(net, x, y[:10])


# --- against a referee -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "least"), [(5, 1.0), (6, 0.8857), (7, 0.7857), (8, 0.7381)])
def test_the_bar_of_few_activations_is_the_printed_one(n, least):
    """Critical values of Spearman's rho, two-sided 5 %: Zar, J. Am. Stat. Assoc. 67 (1972), table 1."""
    generator = np.random.default_rng(n)
    found = [signals.by_chance([range(n)], [generator.permutation(n)]) for _ in range(60)]
    found += [signals.by_chance([range(n)], [range(n)])]
    for i in range(n - 1):  # neighbours change places: the orders near the best one
        swapped = list(range(n))
        swapped[i], swapped[i + 1] = i + 1, i
        found.append(signals.by_chance([range(n)], [swapped]))
    assert {p <= signals.LEVEL for rho, p in found if abs(rho) >= least - 1e-4} == {True}
    assert {p > signals.LEVEL for rho, p in found if abs(rho) < least - 1e-4} == {True}


def test_four_activations_can_never_be_beyond_chance():
    assert signals.by_chance([[1, 2, 3, 4]], [[5, 6, 7, 8]]) == (pytest.approx(1), pytest.approx(2 / 24))
    assert [signals.can_tell(n) for n in (1, 2, 3, 4, 5, 19)] == [False] * 4 + [True] * 2


def test_chance_with_ties_is_scipys():
    sign, referee = [0, 0, 0, 1, 2, 2, 5], [3, 1, 1, 2, 6, 4, 5]
    rho, p = signals.by_chance([sign], [referee])
    wanted = stats.permutation_test(
        (sign,), lambda x: abs(stats.spearmanr(x, referee).statistic), permutation_type="pairings",
        n_resamples=math.inf, alternative="greater",
    )  # fmt: skip
    assert rho == pytest.approx(wanted.statistic) and p == pytest.approx(wanted.pvalue)


def test_chance_of_many_activations_is_near_the_t_distribution():
    generator = np.random.default_rng(1)
    for n, weight in ((15, 0.5), (35, 0.3), (35, -0.4)):
        referee = generator.normal(size=n)
        sign = weight * referee + generator.normal(size=n)
        rho, p = signals.by_chance([sign], [referee])
        wanted = stats.spearmanr(sign, referee)
        assert rho == pytest.approx(wanted.statistic) and p == pytest.approx(wanted.pvalue, abs=0.01)
        assert (rho, p) == signals.by_chance([sign], [referee]), "the same each time"


def test_more_runs_of_one_network_are_not_more_activations():
    sign, referee = [[1, 2, 3, 4, 5, 6]], [[1, 2, 4, 3, 5, 6]]
    assert signals.by_chance(3 * sign, 3 * referee) == pytest.approx(signals.by_chance(sign, referee))
    unlike = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    assert signals.by_chance(unlike, 2 * referee) == pytest.approx((0, 1)), "runs that say the reverse of each other"


def test_what_has_no_order_is_refused():
    for row in ([1, 1, 1], [1, math.nan, 2]):
        with pytest.raises(ValueError, match="has no order"):
            signals.by_chance([row], [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"signs of shape \(1, 2\), referees of \(1, 3\)"):
        signals.by_chance([[1, 2]], [[1, 2, 3]])
