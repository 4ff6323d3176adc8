"""Shrunk networks: the same function, everywhere, with exactly the channels that something needs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl import shrinking
from linl.tests.random_networks import network
from linl.tests.small_nets import ACTIVATIONS, NETS, make

D = torch.float64


def apart(net: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        a, b = net.eval()(x.clone()), small(x.clone())
    assert a.shape == b.shape and a.isfinite().all()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()


def widths(net: nn.Module) -> list[tuple[int, int]]:
    """(outputs, inputs in all) of every layer."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return [(len(m.weight), m.weight.shape[1] * getattr(m, "groups", 1)) for m in layers]


def checked(net: nn.Module, x: torch.Tensor, *sizes: tuple[int, ...]) -> nn.Module:
    """The shrunk network, compared on the example and on images of other sizes."""
    before = copy.deepcopy(net.state_dict())
    small = linl.shrink(net, x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any("check failed" in note for note in small.shrink_report.notes.values())
    for size in ((), *sizes):
        at = torch.randn(5, *x.shape[1 : len(x.shape) - len(size)], *size, dtype=x.dtype)
        assert apart(net, small, at) <= 1e-10
    return small


def convs(*layers: nn.Module, norm: bool = True) -> nn.Sequential:
    """Layers in float64 and eval mode, every BatchNorm with statistics and shifts of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2), module.bias.data.uniform_(0.5, 1)
    return net


def kill_(layer: nn.Module, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    layer.weight.data[rows or []] = 0
    layer.weight.data[:, columns or []] = 0


IMAGE = torch.zeros(2, 3, 7, 6, dtype=D)


# --- one rule at a time ----------------------------------------------------------------------------


def test_a_dead_units_constant_goes_into_the_next_bias():
    net = convs(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    kill_(net[0], rows=[0, 1, 2])
    net[0].bias.data[:3] = torch.tensor([2.0, -1.0, 3.0])
    small = checked(net, torch.zeros(2, 3, dtype=D))
    assert widths(small) == [(2, 3), (4, 2), (2, 4)]
    expected = net[2].weight[:, [0, 2]] @ torch.tensor([2.0, 3.0], dtype=D)
    assert torch.allclose(small.get_submodule("2").bias, expected)
    row = small.shrink_report.table.iloc[0]
    assert row[["inputs", "outputs", "outputs_left", "weights", "weights_left"]].tolist() == [3, 5, 2, 15, 6]
    assert linl.shrink(net).shrink_report.table.equals(small.shrink_report.table), "the example may be left out"


def test_what_nothing_reads_goes_and_so_does_what_only_that_read():
    net = convs(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    kill_(net[4], columns=[0, 1])  # units 0 and 1 of the second layer are unread
    net[2].weight.data[2:, 3] = 0  # which alone read unit 3 of the first
    assert widths(checked(net, torch.zeros(2, 3, dtype=D))) == [(4, 3), (2, 4), (2, 2)]


def test_without_padding_constants_go_into_biases():
    net = convs(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4))
    kill_(net[0], rows=[0, 2, 5])
    small = checked(net, IMAGE, (9, 5))
    assert widths(small) == [(3, 3), (4, 3)] and small.get_submodule("1").num_features == 3
    mirrored = convs(*net[:3], nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"))
    kill_(mirrored[0], rows=[0, 2, 5])
    assert widths(checked(mirrored, IMAGE, (9, 5))) == [(3, 3), (4, 3)], "a mirrored constant is one too"


def test_with_padding_constants_go_onto_one_of_them_and_zeros_go_altogether():
    net = convs(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU())
    kill_(net[0], rows=[0, 2, 5])
    with torch.no_grad():
        constants = net[:3](IMAGE)[0, [0, 2, 5], 0, 0]
    assert (constants > 0).any() and apart(net, net, IMAGE) == 0
    kept = int((constants > 0).sum())
    assert kept >= 2
    assert widths(checked(net, IMAGE, (9, 5), (3, 4))) == [(4, 3), (4, 4)], "three that live and one constant"
    net[1].bias.data[[0, 2, 5]] = -99.0
    assert widths(checked(net, IMAGE, (9, 5))) == [(3, 3), (4, 3)]


def test_two_padded_readers_share_the_constant_that_is_kept():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(6, 2, 5, padding=2)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + self.c(y)

    net = Two().double()
    kill_(net.a, rows=[0, 1, 2])
    net.a.bias.data[:3] = torch.tensor([0.5, 2.0, 1.0])
    assert widths(checked(net, IMAGE, (4, 5))) == [(4, 3), (2, 4), (2, 4)]


def test_pools_and_flattenings():
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = convs(*layers, nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, 2))
    kill_(net[0], rows=[1, 3])
    assert widths(checked(net, IMAGE)) == [(4, 3), (4, 16), (2, 4)]
    pooled = convs(*layers[:3], nn.AvgPool2d(3, 2, padding=1), nn.Flatten(), nn.Linear(54, 2))
    kill_(pooled[0], rows=[1, 3])
    assert widths(checked(pooled, torch.zeros(2, 3, 8, 7, dtype=D))) == [(6, 3), (2, 54)], "no constant at the border"
    pooled[3].count_include_pad = False
    assert widths(checked(pooled, torch.zeros(2, 3, 8, 7, dtype=D))) == [(4, 3), (2, 36)]


class Block(nn.Module):
    """A residual block that also gives what it read."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 4, 3, padding=1, bias=False) for i in (3, 4, 4))
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.second(self.first(x).relu()))
        return self.head((x + y).relu())


def test_channels_of_a_shortcut_go_together_or_not_at_all():
    net = convs(Block())
    net[0].norm.bias.data.zero_()
    kill_(net[0].second, rows=[1, 2])
    assert widths(checked(net, IMAGE, (5, 5))) == widths(net), "the other operand lives"
    kill_(net[0].stem, rows=[2])
    net[0].norm.running_mean[2] = 0
    assert widths(checked(net, IMAGE, (5, 5))) == [(3, 3), (4, 3), (3, 4), (2, 3)]


def test_a_branch_that_is_constant_goes_as_a_whole():
    for shift in (0.0, 0.7):
        net = convs(Block())
        kill_(net[0].second, rows=[0, 1, 2, 3])
        net[0].norm.bias.data.fill_(shift)
        net[0].norm.running_mean.zero_()
        small = checked(net, IMAGE, (5, 5))
        assert widths(small) == [(4, 3), (2, 4)] and linl.cost.depth(small) == 2
        assert sum(p.numel() for p in small.parameters()) == 4 * 27 + 10 + (4 if shift else 0)
        assert small.shrink_report.table["weights_left"].tolist() == [108, 0, 0, 8]
        folded = linl.fold(small, IMAGE, objective="depth")
        assert apart(net, folded, torch.randn_like(IMAGE)) <= 1e-10


def test_groups_stay_equally_large_and_whole_groups_go():
    net = convs(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    kill_(net[0], rows=[0, 1])
    assert widths(checked(net, IMAGE)) == widths(net), "two inputs of one group, none of the other"
    kill_(net[0], rows=[5])
    assert widths(checked(net, IMAGE)) == [(4, 3), (8, 4), (2, 8)], "one of each"
    kill_(net[4], columns=[4, 5, 6, 7])
    small = checked(net, IMAGE)
    assert widths(small) == [(1, 3), (4, 1), (2, 4)] and small.get_submodule("2").groups == 1


def test_depthwise_convolutions_go_channel_by_channel():
    layers = [nn.Conv2d(3, 6, 1, bias=False), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)]
    net = convs(*layers, nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 2, 1))
    kill_(net[0], rows=[0])
    kill_(net[2], rows=[1])
    kill_(net[5], columns=[2])
    small = checked(net, IMAGE, (9, 5))
    assert widths(small) == [(3, 3), (3, 3), (2, 3)] and small.get_submodule("2").groups == 3


def test_zero_channels_that_are_added_and_channels_that_are_joined():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 7, 3, 2, padding=1)
            self.c, self.gate = nn.Conv2d(14, 5, 1), nn.Parameter(torch.rand(14, 1, 1))

        def forward(self, x):
            y = F.pad(self.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)) + self.b(x)
            return self.c(torch.cat([y, y.relu()], 1) * self.gate)

    net = Odd().double()
    kill_(net.a, rows=[0, 1])
    kill_(net.b, rows=[0, 1, 6])
    small = checked(net, IMAGE, (9, 5))
    assert widths(small) == [(3, 3), (4, 3), (5, 8)] and small.gate.shape == (8, 1, 1)


def test_activations_by_channel_are_cut_as_well():
    for act in (nn.PReLU(5), linl.LiNLU(0.6, channels=5), linl.PartialLinear(nn.ReLU6(), 0.3, channels=5)):
        net = convs(nn.Linear(3, 5), act, nn.Linear(5, 2))
        with torch.no_grad():
            next(act.parameters()).copy_(torch.linspace(0.6, 0.9, 5))
        kill_(net[0], rows=[1, 2])
        small = checked(net, torch.zeros(2, 3, dtype=D))
        assert widths(small) == [(3, 3), (2, 3)] and next(
            small.get_submodule("1").parameters()
        ).tolist() == pytest.approx([0.6, 0.825, 0.9])


def test_a_layer_without_a_live_channel_keeps_one():
    net = convs(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    kill_(net[0], rows=list(range(6)))
    assert widths(checked(net, IMAGE)) == [(1, 3), (1, 1), (2, 1)]


def test_what_is_not_understood_stays_and_is_named():
    import timm

    shared = nn.Linear(4, 4)
    net = convs(nn.Linear(3, 4), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    kill_(net[0], rows=[1])
    small = checked(net, torch.zeros(2, 3, dtype=D))
    assert widths(small) == widths(net) and "used more than once" in str(small.shrink_report.notes)
    options = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
    transformer = timm.create_model("vit_tiny_patch16_224", act_layer=nn.ReLU, **options).double().eval()
    kill_(transformer.blocks[0].mlp.fc1, rows=list(range(10)))
    small = checked(transformer, torch.zeros(2, 3, 16, 16, dtype=D))
    assert widths(small)[-3:] == [(22, 8), (8, 22), (3, 8)], "its units are cut, what attention mixes is not"
    assert any("LayerNorm" in note for note in small.shrink_report.notes.values())
    with pytest.raises(ValueError, match=r"clamp"):
        linl.shrink(nn.Sequential(nn.Linear(2, 2), Clamp()))


class Clamp(nn.Module):
    def forward(self, x):
        return x.clamp(-1, 1)


# --- all of them together --------------------------------------------------------------------------


def wreck_(net: nn.Module, seed: int, share: float = 0.4, whole: float = 0.05) -> None:
    """Zeros: a share of every layer's rows, of some layers all; columns of some, single weights of others."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            weight, kind = module.weight.data, torch.rand((), generator=generator)
            weight[torch.rand(len(weight), generator=generator) < (1 if kind > 1 - whole else share)] = 0
            if kind < 0.5 and weight.shape[1] > 1:
                weight[:, torch.rand(weight.shape[1], generator=generator) < 0.3] = 0
            if kind > 0.8:
                weight[torch.rand(weight.shape, generator=generator) < 0.8] = 0


@pytest.mark.parametrize("seed", range(20))
def test_networks_at_random_are_equal(seed):
    made = network(seed, "wild")
    wreck_(made.net, seed)
    checked(made.net, made.example)


@pytest.mark.parametrize("kind", NETS)
def test_every_activation_is_carried_exactly(kind):
    for seed, activation in enumerate(ACTIVATIONS):
        net, shape = make(kind, activation, seed)
        wreck_(net, seed)
        small = checked(net, torch.zeros(2, *shape, dtype=D))
        assert small.shrink_report.share < 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet20", {"shortcut": "A"}), ("resnet20", {"shortcut": "B"}), ("vgg16", {})],
)
def test_our_networks_are_equal_and_really_smaller(name, options):
    net = linl.models.create(name, width=0.25, **options).double()
    x = torch.randn(16, 3, 32, 32, dtype=D)
    wreck_(net, 1, 0.2, whole=0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.bias.data.uniform_(-0.5, 0.5)
    with torch.no_grad():
        net.train()(x)  # statistics under which a signal gets through
    for module in net.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.clamp_(min=0.1)  # 0 in dead channels, which would blow up whatever is rounded
    small = checked(net, x[:2], *([(40, 24)] if name != "vgg16" else []))
    y = net(x)
    assert (y[0] - y[1]).abs().max() > 1e-3, "the outputs depend on the inputs"
    folded = linl.fold(small, x[:2], objective="macs")
    runs = linl.verify(small, folded, x[:2]).table
    assert len(runs) > 1 and runs["equal"].all()
    whole = linl.verify(net, folded, x[:2]).table
    assert whole["where"].tolist() == ["output"] and whole["equal"].all(), "runs of the shrunk network, not of this one"
    table = linl.measure(net, small, x[:1], batches=()).table
    for cost in ("gmacs", "mbytes", "parameters"):
        assert table[cost].iloc[1] < 0.9 * table[cost].iloc[0]


def test_from_masks_to_a_small_network_that_trains():
    net = linl.models.create("resnet20", width=0.5)
    with pytest.warns(UserWarning, match="no weight is left"):
        pruned = linl.prune(net, "random", 0.999).eval()
    x = torch.randn(4, 3, 32, 32)
    small = linl.shrink(pruned)
    assert torch.allclose(pruned(x), small(x), atol=1e-5) and next(small.parameters()).dtype == torch.float32
    assert small.shrink_report.share < 0.1 and small.input_size == (3, 32, 32)
    F.cross_entropy(small.train()(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    assert linl.graph.clone(small).shrink_report is not None


def test_a_dead_rate_counts_what_shrinking_finds():
    """Units that are static are what goes, where nothing is tied and everything is read."""
    net = convs(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 2))
    kill_(net[0], rows=[0, 3, 4])
    kill_(net[2], rows=[1])
    rate, small = linl.dead_rate(net, torch.randn(5, 6, dtype=D)), linl.shrink(net)
    gone = small.shrink_report.table
    assert (rate.table["static"] * rate.table["units"]).tolist() == (gone["outputs"] - gone["outputs_left"])[
        :2
    ].tolist()
    assert linl.dead_rate(small, torch.randn(5, 6, dtype=D)).static == 0


def test_a_cut_that_is_wrong_is_not_handed_out(monkeypatch):
    """A plan that forgets a constant: the comparison at the end must notice."""
    net = convs(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    kill_(net[0], rows=[0, 1])
    net[0].bias.data[:2] = 1.0
    monkeypatch.setattr(shrinking, "_like", lambda old, new: nn.Parameter(new.to(old) * 1.01))
    small = linl.shrink(net)
    assert "the check failed" in small.shrink_report.notes["output"]
    assert widths(small) == widths(net) and apart(net, small, torch.randn(4, 3, dtype=D)) == 0


def test_the_example_is_asked_for_where_it_must_be():
    with pytest.raises(ValueError, match="pass example=, one input batch"):
        linl.shrink(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="doesn't run on this example"):
        linl.shrink(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
