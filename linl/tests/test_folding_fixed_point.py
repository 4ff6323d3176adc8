"""One fold is enough: what a second one would find, the first finds."""

import warnings

import pytest
import torch
from torch import nn

import linl
from linl import joining
from linl.graph import evaluating
from linl.merge import CannotMerge, Geometry, compose, copy
from linl.tests.random_networks import FAMILIES, network
from linl.tests.test_folding import same, shaken
from linl.whole import pulled

D = torch.float64


class Skip(nn.Module):
    """x − b(a(x)), the second with mirrors at its border."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")

    def forward(self, x):
        return x - self.b(self.a(x))


def padded(*options):
    return nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 1, 1, *options)


ONE = {
    "a norm of features between": lambda: [padded()[0], nn.Flatten(), nn.BatchNorm1d(252), nn.Linear(252, 5)],
    "padding inside": lambda: [*padded(), nn.Flatten(), nn.Linear(252, 5)],
    "cut again": lambda: [nn.ZeroPad2d(2), padded()[0], nn.ZeroPad2d((-2, -1, -2, -3)), nn.Conv2d(4, 2, 3)],
    "a pool over everything": lambda: [*padded(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()],
    "mirrors": lambda: [
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, (1, 2), 2, 2, padding_mode="reflect"), nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, (3, 2), padding=(1, 0), padding_mode="circular"), nn.Flatten(), nn.Linear(48, 7),
        nn.BatchNorm1d(7), nn.Linear(7, 2),
    ],
    "sums": lambda: [padded()[0], Skip(), Skip(), nn.Flatten(), nn.Linear(252, 5, bias=False)],
}  # fmt: skip


@pytest.mark.parametrize("make", ONE.values(), ids=ONE)
@pytest.mark.parametrize("border", ["exact", "interior"])
def test_one_layer_at_once_and_exact(make, border):
    torch.manual_seed(0)
    net = shaken(nn.Sequential(*make())).double().eval()
    x, other = torch.randn(2, 3, 7, 9, dtype=D), torch.randn(3, 3, 7, 9, dtype=D)
    small = linl.fold(net, x, objective="depth", border=border)
    assert linl.cost.depth(small) == 1 and small.fold_report.table["verdict"].tolist() == ["exact"]
    same(net, small, x), same(net, small, other)
    assert linl.cost.depth(linl.fold(small, x, objective="depth")) == 1


@pytest.mark.parametrize("objective", ["parameters", "macs"])
def test_one_matrix_only_where_it_pays(objective):
    net = shaken(nn.Sequential(*padded(), nn.Flatten(), nn.BatchNorm1d(252), nn.Linear(252, 5))).eval()
    assert linl.cost.depth(linl.fold(net, torch.randn(1, 3, 7, 9), objective=objective)) == 1
    net = nn.Sequential(nn.Conv2d(64, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Flatten(), nn.Linear(128, 50)).eval()
    kept = linl.fold(net, torch.randn(1, 64, 8, 8), objective=objective)
    assert [type(m) for m in kept.children() if not isinstance(m, nn.Flatten)] == [nn.Conv2d, nn.Linear]
    assert "would not pay" in kept.fold_report.table["reason"].iloc[-1]


def test_a_matrix_too_large_is_refused_by_its_numbers(monkeypatch):
    monkeypatch.setattr(joining, "WIDEST", 900)
    net = nn.Sequential(*padded(), nn.Flatten(), nn.Linear(252, 5)).double().eval()
    small = linl.fold(net, torch.randn(1, 3, 7, 9, dtype=D), objective="depth")
    assert linl.cost.depth(small) == 2
    assert "over the whole image would have 1,260 numbers" in small.fold_report.table["reason"].iloc[-1]


def test_pulling_is_the_adjoint_for_every_padding():
    x = torch.randn(3, 4, 9, 11, dtype=D)
    last = linl.merge.dense(torch.randn(5, 6, dtype=D), torch.randn(5, dtype=D))
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for stride, padding, dilation, groups in [(1, 1, 1, 1), (2, (2, 0), (1, 3), 2), (3, (1, 4), 2, 1)]:
            first = linl.merge.conv(torch.randn(6, 4 // groups, 3, 2, dtype=D), torch.randn(6, dtype=D), stride,
                                    padding, dilation, groups, mode)  # fmt: skip
            y = first(x)
            dense = linl.merge.dense(torch.randn(5, y[0].numel(), dtype=D), last.bias)
            one = pulled(first, linl.merge.as_image_layer(dense, 6, y.shape[2:]), x.shape[2:])
            torch.testing.assert_close(one(x)[..., 0, 0], dense(y.flatten(1)), atol=1e-11, rtol=1e-11)


def test_more_is_never_cut_off_than_there_is():
    """Nine columns of zeros, then ten columns cut off: one padding would cut ten of seven."""
    layers = [nn.ZeroPad2d((0, 9, 0, 0)), nn.Conv2d(3, 3, 1), nn.ZeroPad2d((-10, 0, 0, 0)), nn.Conv2d(3, 2, 1)]
    net, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 4, 7, dtype=D)
    same(net, linl.fold(net, x, objective="depth"), x)
    same(net, linl.pad_first(net, x), x)
    first, second = (copy(3, (1, 1), ((0, 0), pair)).geometry for pair in ((0, 9), (-10, 0)))
    with pytest.raises(CannotMerge, match="would cut 10 of 7 positions off"):
        compose(first, second, (4, 7))
    assert isinstance(compose(first, second, (4, 10)), Geometry)


@pytest.mark.parametrize("seed", range(42))
def test_a_second_fold_finds_nothing(seed):
    made = network(seed + 1000, FAMILIES[seed % 3])
    with warnings.catch_warnings(), evaluating(made.net):
        once = linl.fold(made.net, made.example, objective="depth")
        twice = linl.fold(once, made.example, objective="depth")
    assert linl.cost.depth(twice) == linl.cost.depth(once), made
    same(made.net, twice, made.example)
