"""Constants that meet a value: what they are by channel, and that folding and bounds take them in or leave them."""

import operator

import pytest
import torch
from torch import nn

import linl
from linl import constants
from linl.graph import trace

D = torch.float64


@pytest.mark.parametrize(
    ("shape", "meets", "last"),
    [
        ((), (2, 3, 5, 5), False),
        ((1,), (2, 3, 5, 5), False),
        ((1, 1, 1, 1), (2, 3, 5, 5), False),
        ((3, 1, 1), (2, 3, 5, 5), False),
        ((1, 3, 1, 1), (2, 3, 5, 5), False),
        ((3,), (2, 3), False),
        ((1, 3), (2, 3), False),
        ((7,), (2, 5, 7), True),
        ((1, 1, 7), (2, 5, 7), True),
        ((5, 1), (2, 5, 7), False),
    ],
)
def test_a_number_for_each_channel(shape, meets, last):
    value = torch.rand(shape)
    told, last_axis = constants.by_channel(value, meets)
    x = torch.rand(meets)
    assert last_axis == last
    shown = told if last else told.view(-1, *[1] * (len(meets) - 2))
    assert torch.equal(x * value, x * shown) and (x * value).shape == meets


@pytest.mark.parametrize(
    ("shape", "meets"),
    [
        ((5, 5), (2, 3, 5, 5)),  # by position
        ((3, 5, 5), (2, 3, 5, 5)),
        ((2, 1, 1, 1), (2, 3, 5, 5)),  # by example
        ((2, 3), (2, 3)),
        ((1, 1, 1, 1, 1), (2, 3, 5, 5)),  # makes an axis more
    ],
)
def test_what_differs_otherwise_is_none(shape, meets):
    assert constants.by_channel(torch.rand(shape), meets) is None


class Standardized(nn.Module):
    """Mean and deviation inside the network, a learnt scale by channel, numbers: one affine map in all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(()))

    def forward(self, x):
        x = self.a((x - self.mean) / self.std)
        x = 1 + x * self.scale.view(-1, 1, 1)
        return self.shift + self.b(x - 0.5)


@torch.no_grad()
def same(net, small, x):
    want = net(x)
    assert (small(x) - want).abs().max() <= 1e-10 * max(1, want.abs().max())


def test_one_affine_map_is_one_layer():
    torch.manual_seed(0)
    net, x = Standardized().double().eval(), torch.randn(2, 3, 9, 9, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert [type(m) for m in small.children()] == [nn.Conv2d]
    assert sorted(small.state_dict()) == ["a.bias", "a.weight"], "what was merged is gone"
    same(net, small, x)
    same(net, small, torch.randn(3, 3, 20, 14, dtype=D))
    row = small.fold_report.table.iloc[0]
    assert row["numbers_before"] == sum(p.numel() for p in net.parameters()), "buffers aren't learnt"


def test_bounds_of_a_network_that_standardizes_its_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(Standardized(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).double().eval()
    box = linl.Box(torch.zeros(3, 6, 6, dtype=D), torch.ones(3, 6, 6, dtype=D))
    bounds = linl.bounds.bound(net, box, "crown")
    y = net(torch.rand(500, 3, 6, 6, dtype=D))
    assert (y >= bounds.output.lower - 1e-9).all() and (y <= bounds.output.upper + 1e-9).all()
    folded = linl.bounds.bound(linl.fold(net, torch.rand(1, 3, 6, 6, dtype=D), objective="depth"), box, "crown")
    for a, b in ((bounds.output.lower, folded.output.lower), (bounds.output.upper, folded.output.upper)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


class Tokens(nn.Module):
    """As in a vision transformer: a scale and a shift on the last axis, between two dense layers."""

    def __init__(self):
        super().__init__()
        from timm.layers import LayerScale

        self.a, self.c = nn.Linear(6, 5), nn.Linear(5, 2)
        self.scale, self.shift = LayerScale(5, 0.3), nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x):
        return self.c(self.scale(self.a(x)) + self.shift)


def test_the_last_axis_of_tokens():
    torch.manual_seed(0)
    net, x = Tokens().double().eval(), torch.randn(2, 7, 6, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 1 and sorted(small.state_dict()) == ["a.bias", "a.weight"]
    same(net, small, x)


def test_timms_layer_scale_on_images():
    from timm.layers import LayerScale2d

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale2d(4, 0.2), nn.Conv2d(4, 2, 1)).double().eval()
    x = torch.randn(1, 3, 6, 6, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 1
    same(net, small, x)


def test_a_layer_scale_in_place_on_a_value_that_others_read_stays():
    from timm.layers import LayerScale2d

    torch.manual_seed(0)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale, self.b = nn.Conv2d(3, 4, 1), LayerScale2d(4, 0.2, inplace=True), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.a(x)
            before = y.relu().mean((2, 3), keepdim=True)
            return self.b(self.scale(y)) + before[:, :2]

    net, x = Reads().double().eval(), torch.randn(2, 3, 6, 6, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 2
    same(net, small, x)


class Meets(nn.Module):
    """A constant between two layers, as `how` has it."""

    def __init__(self, how, value):
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.c = nn.Parameter(value)

    def forward(self, x):
        return self.b(self.how(self.a(x), self.c))


@pytest.mark.parametrize(
    ("how", "value"),
    [
        (operator.add, torch.rand(5, 5)),  # by position
        (operator.add, torch.rand(4, 5, 5)),
        (lambda x, c: c - x, torch.rand(4, 1, 1)),  # nobody rewrites this
        (lambda x, c: x * c.exp(), torch.rand(4, 1, 1)),  # computed of it
        (lambda x, c: x + c[0], torch.rand(4, 4, 1, 1)),
        (lambda x, c: torch.add(x, c, alpha=2), torch.rand(4, 1, 1)),
        (lambda x, c: x / c, torch.zeros(4, 1, 1)),
    ],
    ids=["a plane", "an image", "c - x", "exp", "a part", "alpha", "by 0"],
)
def test_what_is_no_constant_by_channel_stays(how, value):
    torch.manual_seed(0)
    net, x = Meets(how, value).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 2 and "c" in small.state_dict()
    torch.testing.assert_close(small(x), net(x), atol=1e-10, rtol=1e-10, equal_nan=True)


def test_a_tensor_that_something_else_reads_stays_for_it():
    torch.manual_seed(0)

    class Twice(Meets):
        def forward(self, x):
            return self.b(self.a(x) + self.mean).relu() - self.mean[0]

    net, x = Twice(operator.add, torch.zeros(())).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    net.register_buffer("mean", torch.rand(4, 1, 1, dtype=D))
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 1 and "mean" in small.state_dict() and "c" not in small.state_dict()
    same(net, small, x)


def test_what_the_network_changes_is_no_constant():
    torch.manual_seed(0)

    class Sets(Meets):
        def forward(self, x):
            self.seen.view(-1).fill_(2.0)
            return self.b(self.a(x) + self.seen)

    net, x = Sets(None, torch.zeros(())).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    net.register_buffer("seen", torch.zeros(4, 1, 1, dtype=D))
    assert constants.written(trace(net).graph) == {"seen"}
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 2
    same(net, small, x)


def test_padding_moves_past_a_constant_that_is_named_first():
    torch.manual_seed(0)
    net = Meets(lambda x, c: c + x, torch.rand(4, 1, 1))
    net.b = nn.Conv2d(4, 3, 3, padding=1)
    net, x = net.double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    padded = linl.pad_first(net, x)
    small = linl.fold(padded, x, objective="depth")
    assert linl.cost.depth(small) == 1
    same(padded, small, x)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(padded(x)[inner], net(x)[inner], atol=1e-10, rtol=1e-10)


def test_in_place_on_a_value_that_others_read():
    torch.manual_seed(0)

    class Aside(Meets):
        def forward(self, x):
            y = self.a(x)
            z = 2 * y
            y += 1
            return self.b(y) + z[:, :3].relu()

    net, x = Aside(None, torch.zeros(())).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    same(net, linl.fold(net, x, objective="depth"), x)


def test_a_layers_own_tensor_is_never_taken_from_it():
    torch.manual_seed(0)

    class Borrows(Meets):
        def forward(self, x):
            return self.b(self.a(x).relu() * self.a.bias.view(-1, 1, 1))

    net, x = Borrows(None, torch.zeros(())).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert "a.bias" in small.state_dict()
    same(net, small, x)


def test_views_of_an_attribute_are_told_from_what_is_computed():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return x + self.c.view(1, -1)[:, :, None].unsqueeze(-1) + self.c[:2].sum()

    traced = trace(Reads())
    told = {node.name: constants.reads_nothing(node) for node in traced.graph.nodes}
    assert told == {"x": False, "c": True, "view": True, "getitem": True, "unsqueeze": True, "add": False,
                    "getitem_1": False, "sum_1": False, "add_1": False, "output": False}  # fmt: skip
    (view,) = (node for node in traced.graph.nodes if node.name == "unsqueeze")
    assert constants.value_of(traced, view).shape == (1, 4, 1, 1)


def test_branches_that_start_from_the_number_0():
    """MobileOne adds its branches to 0: every block becomes one convolution, as timm's own walker makes it."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("mobileone_s0", pretrained=False).eval().double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(1, 3, 32, 32, dtype=D)
    small = linl.fold(net, x, objective="depth")
    assert not [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    walked = timm.utils.reparameterize_model(net)
    convs = [sum(isinstance(m, nn.Conv2d) for m in each.modules()) for each in (small, walked)]
    assert convs[0] == convs[1]
    same(net, small, x)
