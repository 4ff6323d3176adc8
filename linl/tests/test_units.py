"""The units themselves: formulas, ranges, and that they survive everything torch does to a module."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl import LiNLU, PartialLinear
from linl.units import FixedPartial, FixedTwoSlope

DOUBLE = torch.float64


def line(dtype=DOUBLE):
    return torch.linspace(-3, 3, 61, dtype=dtype)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.75, 1.0])
def test_linlu_is_the_published_formula(p):
    x = line()
    unit = LiNLU(p).double()
    with torch.no_grad():
        unit.p.fill_(p)
    torch.testing.assert_close(unit(x), p * x - (1 - p) * torch.minimum(torch.zeros(()), x), rtol=0, atol=1e-15)


def test_linlu_ends():
    x = line()
    assert torch.equal(LiNLU(0.5).double()(x), 0.5 * torch.relu(x))
    assert torch.equal(LiNLU(1.0).double()(x), x)
    assert LiNLU().p.item() == 0.75


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish()],
    ids=lambda a: type(a).__name__,
)
def test_partial_goes_from_the_activation_to_the_identity(activation):
    x = line()
    unit = PartialLinear(activation).double()
    assert torch.equal(unit(x), activation(x))
    with torch.no_grad():
        unit.alpha.fill_(0.3)
    torch.testing.assert_close(unit(x), 0.3 * x + 0.7 * activation(x), rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        unit.alpha.fill_(1.0)
    torch.testing.assert_close(unit(x), x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=["two-slope", "any"])
def test_alphas_gradient(activation):
    unit = PartialLinear(activation, alpha=0.3).double()
    x = (line() + 0.01).requires_grad_()  # not on the kink
    assert torch.autograd.gradcheck(lambda x, a: torch.func.functional_call(unit, {"alpha": a}, x), (x, unit.alpha))


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9, 1.0])
def test_the_two_units_are_one_family(p):
    """LiNLU_p = p · PartialLinear(ReLU) with alpha = 2 − 1/p."""
    x = line()
    a, b = LiNLU(p).double(), PartialLinear(nn.ReLU(), 2 - 1 / p).double()
    with torch.no_grad():
        a.p.fill_(p), b.alpha.fill_(2 - 1 / p)
    torch.testing.assert_close(a(x), p * b(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bad", [0.49, 1.01, -1.0, math.nan])
def test_p_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"outside \[0.5, 1\]"):
        LiNLU(bad)


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="negative"):
        PartialLinear(alpha=-0.1)


def test_projection_is_a_step_of_its_own():
    net = nn.Sequential(LiNLU(), PartialLinear(), LiNLU(channels=3))
    with torch.no_grad():
        net[0].p.fill_(1.4), net[1].alpha.fill_(-0.2), net[2].p.copy_(torch.tensor([0.1, 0.7, 2.0]))
    x = torch.randn(2, 3)
    y = net[0](x)
    assert net[0].p.item() == pytest.approx(1.4), "forward must not clamp"
    torch.testing.assert_close(y, torch.where(x > 0, 1.4 * x, 1.8 * x))
    linl.project_(net)
    assert net[0].p.item() == 1.0 and net[1].alpha.item() == 0.0
    torch.testing.assert_close(net[2].p.data, torch.tensor([0.5, 0.7, 1.0]))
    with torch.no_grad():
        net[1].alpha.fill_(1.3)
    linl.project_(net)
    assert net[1].alpha.item() == pytest.approx(1.3), "alpha has no upper clamp in the published code"


def test_penalty():
    net = nn.Sequential(PartialLinear(alpha=0.0), PartialLinear(alpha=0.5), PartialLinear(alpha=2.0), LiNLU())
    value = linl.penalty(net, weight=0.25)
    assert value.item() == pytest.approx(0.25 * (1 + 0.75 + 3))
    value.backward()
    assert net[0].alpha.grad.item() == 0, "zero at alpha = 0, as METHODS derives"
    assert net[1].alpha.grad.item() == pytest.approx(-2 * 0.25 * 0.5)
    assert net[2].alpha.grad.item() == pytest.approx(2 * 0.25 * 2)
    assert linl.penalty(nn.Sequential(LiNLU())).item() == 0
    assert linl.penalty(nn.Linear(2, 2)).item() == 0


def test_param_groups_hold_each_parameter_once():
    net = nn.Sequential(nn.Linear(3, 3), LiNLU(), nn.Linear(3, 3), PartialLinear())
    weights, units = linl.param_groups(net, lr=0.1, unit_lr=0.01, weight_decay=1e-4, unit_weight_decay=0.0)
    assert [weights["lr"], units["lr"], weights["weight_decay"], units["weight_decay"]] == [0.1, 0.01, 1e-4, 0.0]
    assert {id(p) for p in units["params"]} == {id(net[1].p), id(net[3].alpha)}
    ids = [id(p) for group in (weights, units) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())
    assert linl.param_groups(net, lr=0.1)[1]["lr"] == 0.1
    assert len(linl.param_groups(nn.Linear(2, 2), lr=0.1)) == 1
    torch.optim.SGD(linl.param_groups(net, lr=0.1), momentum=0.9)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        (LiNLU(1.0), nn.Identity),
        (LiNLU(0.999), FixedTwoSlope),
        (PartialLinear(alpha=0.0), nn.ReLU),
        (PartialLinear(nn.GELU(), 0.0), nn.GELU),
        (PartialLinear(alpha=0.3), nn.LeakyReLU),
        (PartialLinear(alpha=0.9), nn.Identity),
        (PartialLinear(alpha=0.899), nn.LeakyReLU),
        (PartialLinear(nn.GELU(), 0.3), FixedPartial),
        (LiNLU(0.7, channels=4), FixedTwoSlope),
        (PartialLinear(nn.ReLU(), 0.7, channels=4), FixedTwoSlope),
    ],
    ids=str,
)
def test_harden(unit, kind):
    x = torch.randn(5, 4, 3)
    net = nn.Sequential(copy.deepcopy(unit))
    hard = linl.harden(net)
    assert type(hard[0]) is kind and type(net[0]) is type(unit), "a new network; the old one is left alone"
    assert not list(hard.parameters())
    want = x if kind is nn.Identity else net(x)
    torch.testing.assert_close(hard(x), want)


def test_harden_takes_a_threshold():
    assert type(linl.harden(nn.Sequential(LiNLU(0.97)), threshold=0.95)[0]) is nn.Identity
    assert type(linl.harden(nn.Sequential(PartialLinear(alpha=0.95)), threshold=0.99)[0]) is nn.LeakyReLU


def test_a_unit_is_linear_only_if_all_its_channels_are():
    unit = LiNLU(1.0, channels=3)
    assert unit.is_linear()
    with torch.no_grad():
        unit.p[1] = 0.9
    assert not unit.is_linear()


def test_nonlinearity_table():
    table = linl.nonlinearity(nn.Sequential(LiNLU(0.75), PartialLinear(alpha=1.0), PartialLinear(nn.GELU())))
    assert list(table.columns) == ["name", "kind", "parameter", "slope_neg", "slope_pos", "linear"]
    assert table["kind"].tolist() == ["linlu", "partial", "partial"]
    assert table.loc[0, ["parameter", "slope_neg", "slope_pos"]].tolist() == [0.75, 0.5, 0.75]
    assert table["linear"].tolist() == [False, True, False]
    assert math.isnan(table.loc[2, "slope_neg"])


UNITS = [lambda: LiNLU(0.7), lambda: PartialLinear(nn.GELU(), 0.3), lambda: PartialLinear(alpha=0.3)]


@pytest.mark.parametrize("make", UNITS, ids=["linlu", "partial-gelu", "partial-relu"])
class TestSurvives:
    def net(self, make):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), make()).eval()

    def test_deepcopy_and_state_dict(self, make):
        net, other = self.net(make), self.net(make)
        with torch.no_grad():
            net[2].theta.add_(0.1)
        other.load_state_dict(net.state_dict())
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(other(x), net(x)) and torch.equal(copy.deepcopy(net)(x), net(x))

    def test_safetensors(self, make, tmp_path):
        from safetensors.torch import load_model, save_model

        net, other = self.net(make), self.net(make)
        with torch.no_grad():
            net[2].theta.add_(0.1)
        save_model(net, str(tmp_path / "net.safetensors"))
        load_model(other, str(tmp_path / "net.safetensors"))
        assert other[2].theta.item() == net[2].theta.item()

    def test_autocast_keeps_bf16(self, make):
        net = self.net(make).train()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(torch.randn(2, 3, 8, 8))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert net[2].theta.grad.dtype == torch.float32

    def test_channels_last_stays(self, make):
        net = self.net(make).to(memory_format=torch.channels_last)
        y = net(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_compile(self, make):
        """Through dynamo and AOT autograd, forward and backward, without a graph break."""
        net, x = self.net(make).train(), torch.randn(2, 3, 8, 8)
        compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
        for n in (net, compiled):
            n(x).square().sum().backward()
        torch.testing.assert_close(compiled(x), net(x))
        for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)

    def test_export(self, make):
        net, x = self.net(make), torch.randn(2, 3, 8, 8)
        exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), net(x))


def test_timms_walker_hardens_units():
    from timm.utils import reparameterize_model

    net = nn.Sequential(nn.Linear(3, 3), LiNLU(1.0), nn.Linear(3, 3), LiNLU(0.6)).eval()
    x = torch.randn(2, 3)
    plain = reparameterize_model(net)
    torch.testing.assert_close(plain(x), net(x))
    assert type(plain[1]) is nn.Identity and not linl.units.units_of(plain)


def test_one_step_of_training_moves_p_and_stays_in_range():
    net = nn.Sequential(nn.Linear(3, 8), LiNLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(linl.param_groups(net, lr=0.1, unit_lr=10.0))
    F.cross_entropy(net(torch.randn(16, 3)), torch.randint(0, 2, (16,))).backward()
    optimizer.step()
    moved = net[1].p.item()
    linl.project_(net)
    assert moved != 0.75 and 0.5 <= net[1].p.item() <= 1.0
