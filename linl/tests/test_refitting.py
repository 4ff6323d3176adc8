"""Blocks replaced by the layer that is nearest to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl


class Skipped(nn.Module):
    """A residual block, its ReLU inside."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x):
        return x + self.body(x)


def neck(a, b, stride=1):
    return nn.Sequential(
        nn.Conv2d(a, 3 * a, 1, bias=False), nn.BatchNorm2d(3 * a), nn.ReLU6(),
        nn.Conv2d(3 * a, 3 * a, 3, stride, 1, groups=3 * a), nn.ReLU6(), nn.Conv2d(3 * a, b, 1),
    )  # fmt: skip


def network():
    layers = [nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), neck(4, 6, 2), Skipped(6), nn.ReLU(), neck(6, 5)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))]
    net = nn.Sequential(*layers, *head).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture
def images():
    return torch.randn(200, 2, 15, 13, dtype=torch.float64)


def between(net, name, images):
    """What a module reads and gives."""
    seen = []
    hook = net.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    with torch.no_grad():
        net(images)
    hook.remove()
    return seen[0]


def test_a_block_that_is_linear_here_is_found_again(images):
    """Its ReLU never bends: the regression finds the function itself."""
    block = nn.Sequential(nn.Conv2d(2, 5, 3, 2), nn.ReLU(), nn.Conv2d(5, 3, (1, 3), dilation=(1, 2)))
    block[0].bias.data += 100
    net = nn.Sequential(block, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 7 * 2, 2)).double().eval()
    made = linl.refit(net, ["0"], images, ridge=0.0)
    check = linl.verify(net, made, images)
    assert check.largest <= 1e-10 * check.scale and linl.cost.depth(made) == 2 and linl.cost.depth(net) == 3
    assert made.refit_report.table["missed"].item() < 1e-10


def folded(block, x):
    """A block without its activations, as one layer, by the public functions."""
    bare = linl.harden(linl.linearize(block, "partial", start=1.0)).eval()
    return linl.fold(linl.pad_first(bare, x), x, objective="depth")


def error(layer, x, y):
    return ((layer(x) - y) ** 2).sum()


@pytest.mark.parametrize("name", ["2", "3", "5", "8"])
def test_no_other_layer_is_nearer(images, name):
    """The squared error has no slope at the solution, by every weight; the report says what runs show."""
    net = network()
    made = linl.refit(net, [name], images, ridge=0.0, norms=False)
    x, y = between(net, name, images)
    new, bare, row = made.get_submodule(name), folded(net.get_submodule(name), x), made.refit_report.table.iloc[0]
    slopes, steep = (torch.autograd.grad(error(m, x, y), list(m.parameters())) for m in (new, bare))
    assert len(slopes) == 2 and max(map(_largest, slopes)) < 1e-9 * max(map(_largest, steep))
    axes = (0, *range(2, y.ndim))
    variance = ((y - y.mean(axes, keepdim=True)) ** 2).sum()
    assert row["missed"] == pytest.approx((error(new, x, y) / variance).item(), rel=1e-8)
    assert row["missed_bare"] == pytest.approx((error(bare, x, y) / variance).item(), rel=1e-8)
    assert row["missed"] < row["missed_bare"] and row["numbers"] == new.get_parameter(_weight(new))[0].numel() + 1


def _largest(t):
    return t.abs().max().item()


def _weight(net):
    return next(name for name, p in net.named_parameters() if p.ndim > 1)


def test_each_block_mends_the_errors_of_those_before_it(images):
    """Given in any order; the second's regression is on what the first's replacement gives."""
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = linl.refit(net, ["5", "2"], images, ridge=0.0, norms=False)
    assert made.refit_report.table["block"].tolist() == ["2", "5"]
    x, y = between(made, "5", images)[0], between(net, "5", images)[1]
    slopes = torch.autograd.grad(error(made.get_submodule("5"), x, y), list(made.get_submodule("5").parameters()))
    assert max(map(_largest, slopes)) < 1e-8 * (y**2).sum()
    alone = linl.refit(net, ["5"], images, ridge=0.0, norms=False)
    assert error(made.get_submodule("5"), x, y) < error(alone.get_submodule("5"), x, y)
    assert not net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert linl.cost.depth(made) == linl.cost.depth(net) - 4
    assert "missed" in made.refit_report._repr_html_()


def test_norms_change_nothing_until_it_is_trained(images):
    """In evaluation; in training they normalize. `fold_norms` takes them in."""
    net = network()
    plain, made = (linl.refit(net, ["2", "3"], images, norms=norms) for norms in (False, True))
    assert linl.verify(plain, made, images).equal
    small = linl.fold_norms(made)
    assert linl.verify(made, small, images).equal
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.get_submodule("2").modules())
    y = between(made.train(), "2", images)[1]
    was = between(made.eval(), "2", images)[1]
    assert (y.mean((0, 2, 3)) - was.mean((0, 2, 3))).abs().max() < 1e-2 and not torch.equal(y, was)


@pytest.mark.parametrize("norms", [False, True])
def test_units_change_nothing_until_they_are_trained(images, norms):
    """Linear at first; a gradient reaches each, and a trained one is a fixed activation in the folded network."""
    net = network()
    plain, made = (linl.refit(net, ["2", "8"], images, norms=norms, units=units) for units in ([], ["8", "2"]))
    assert linl.verify(plain, linl.harden(made), images).equal
    (a, b) = linl.units.units_of(made).values()
    assert a.alpha.item() == b.alpha.item() == 1 and linl.units.units_of(plain) == {}
    made(images).square().sum().backward()
    assert all(unit.alpha.grad.abs() > 0 for unit in (a, b))
    a.alpha.data.fill_(1.25), b.alpha.data.fill_(0.5)
    bent = linl.harden(made, threshold=float("inf"))
    assert linl.verify(made, linl.fold(bent, images[:2], objective="macs"), images).equal
    assert linl.verify(plain, bent, images).equal is False


@pytest.mark.parametrize("name", ["2", "3", "5"])
def test_pointwise_it_is_the_nearest_of_its_kind(images, name):
    """Strided, with a skip that pads twice, and plain: no slope at the solution; farther off than a whole kernel."""
    net, images = network(), images[:40]  # so few that every output is fitted to
    made, whole = (linl.refit(net, [name], images, ridge=0.0, norms=False, pointwise=one) for one in ([name], []))
    x, y = between(net, name, images)
    new = made.get_submodule(name)
    assert new.kernel_size == (1, 1) and new(x).shape == y.shape
    slopes = torch.autograd.grad(error(new, x, y), list(new.parameters()))
    assert max(map(_largest, slopes)) < 1e-8 * (y**2).sum()
    row, wider = (one.refit_report.table.iloc[0] for one in (made, whole))
    assert wider["missed"] < row["missed"] < min(1, row["missed_bare"]) and row["layer"].startswith("1×1, ")
    bare = folded(net.get_submodule(name), x)
    middle = bare.get_parameter(_weight(bare))
    middle = middle * F.pad(
        torch.ones_like(middle[:, :, :1, :1]), [size // 2 for size in middle.shape[:1:-1] for _ in "ab"]
    )
    bare.get_parameter(_weight(bare)).data.copy_(middle)
    variance = ((y - y.mean((0, 2, 3), keepdim=True)) ** 2).sum()
    for column, layer in (("missed", new), ("missed_bare", bare)):
        assert row[column] == pytest.approx((error(layer, x, y) / variance).item(), rel=1e-8)


def test_weights_stay_small_enough_for_bfloat16(images):
    """Channels that are nearly one another's multiples: hardly held they are told apart by weights that cancel."""
    net = network()
    with torch.no_grad():
        net[0].weight[1:] = net[0].weight[:1] + 1e-4 * net[0].weight[1:]
        net[0].bias[1:] = net[0].bias[:1]

    bare, made = (linl.refit(net, ["2"], images, norms=False, **ridge) for ridge in ({"ridge": 1e-12}, {}))
    largest = [_largest(one.get_submodule("2").get_parameter(_weight(one.get_submodule("2")))) for one in (bare, made)]
    assert largest[1] < largest[0] / 100
    missed = [one.refit_report.table["missed"].item() for one in (bare, made)]
    assert missed[0] <= missed[1] < missed[0] + 0.02, "and hardly anything more is missed"


def test_a_pointwise_layer_vanishes_into_its_neighbour(images):
    """Nothing is left of the block: the narrow layer before it takes it in."""
    net = network()
    made = linl.refit(net, ["3"], images, norms=False, pointwise=["3"])
    small = linl.fold(made, images[:2], objective="macs")
    assert linl.verify(made, small, images).equal
    without = nn.Sequential(*(module for name, module in net.named_children() if name != "3")).eval()
    without = linl.fold(without, images[:2], objective="macs")
    assert linl.cost.depth(small) == linl.cost.depth(without)
    costs = linl.measure(small, without, images[:1], batches=()).table
    assert costs["gmacs"].nunique() == costs["parameters"].nunique() == 1


def test_it_can_be_tuned_nearer_still():
    """Gradients reach every replaced layer."""
    net = network().float()
    made = linl.refit(net, ["2", "5"], torch.randn(200, 2, 15, 13)).train()
    made(torch.randn(8, 2, 15, 13)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_networks_from_the_libraries():
    """timm's inverted bottlenecks, of every stride, skip and kernel size."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("efficientnet_lite0", num_classes=3).eval()
    names = [name for name, m in net.named_modules() if type(m).__name__ == "InvertedResidual"]
    made = linl.refit(net, names[:3:2], torch.randn(40, 3, 64, 64))
    assert len(made.refit_report.table) == 2 and (made.refit_report.table["missed"] < 1).all()
    assert linl.cost.depth(made) == linl.cost.depth(net) - 4


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([], "no blocks"),
        (["9"], "no module '9' in Sequential"),
        (["2", "2"], "2 is named twice"),
        (["8", "8.0"], "8.0 is part of 8"),
        (["1"], "1 is not one layer without its activations: nothing"),
        (["2.3"], "2.3 is a convolution in groups"),
    ],
)
def test_what_cannot_be_replaced(images, blocks, said):
    with pytest.raises(ValueError, match=said):
        linl.refit(network(), blocks, images)


def test_more_that_cannot_be_replaced(images):
    net = network()
    with pytest.raises(ValueError, match=r"2 images are 12 outputs of 5, too few for 55 weights each: give 37"):
        linl.refit(net, ["5"], images[:2, :, :5, :9])
    for asked in ("units", "pointwise"):
        with pytest.raises(ValueError, match=rf"{asked} = \['3'\]: not among the blocks that are replaced, 2, 5"):
            linl.refit(net, ["2", "5"], images, **{asked: ["5", "3"]})
    with pytest.raises(ValueError, match="pointwise = '8': 5 → 3 is no convolution"):
        linl.refit(net, ["8"], images, pointwise=["8"])
    kinds = (
        {"kernel_size": 3},
        {"kernel_size": (3, 2)},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 2, "dilation": 2},
    )
    for uneven in (nn.Conv2d(2, 2, padding=int(i > 0), **kind) for i, kind in enumerate(kinds)):
        with pytest.raises(ValueError, match="pointwise = '0': .* doesn't pad half of its kernel on every side"):
            linl.refit(nn.Sequential(uneven).double().eval(), ["0"], images, pointwise=["0"])
    for told in ("same", "valid"):
        with pytest.raises(
            ValueError, match=f"0 is a convolution that says '{told}' for its padding: give it in numbers"
        ):
            linl.refit(nn.Sequential(nn.Conv2d(2, 3, 3, padding=told)).double().eval(), ["0"], images)
    with pytest.raises(ValueError, match="train mode"):
        linl.refit(net.train(), ["2"], images)
    twice = nn.Sequential(layer := nn.Conv2d(2, 2, 1), nn.ReLU(), layer).double().eval()
    with pytest.raises(ValueError, match="0 is called 2 times"):
        linl.refit(twice, ["0"], images)
    two = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1))).double().eval()
    with pytest.raises(ValueError, match="0 is not one layer without its activations"):
        linl.refit(two, ["0"], images)
