"""Last layers fitted anew to what the network gave before; fewer channels for them to read."""

import itertools

import pytest
import torch
from torch import nn

import linl
from linl.masks import mask_, masks_of
from linl.regression import Sums
from linl.tests.test_refitting import Skipped, between, network

TINY = 1e-13


@pytest.fixture
def images():
    return torch.randn(200, 2, 15, 13, dtype=torch.float64)


class Away(nn.Module):
    """A block that takes its layer, behind a norm, away from what it reads."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.last = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm(self.last(self.inner(x).relu_()))
        return x - y


def ending_in_norms():
    """A strided layer alone, a block with a norm behind its sum's layer, dense layers."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(2, 4, 3, 2, 1),
        nn.ReLU(),
        Away(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 3, 2, 2), nn.Identity()),
    ]
    head = [nn.Flatten(), nn.Sequential(nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 3))]
    net = nn.Sequential(*layers, *head).double().eval()
    norm = net[2].norm
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    return net


def disturbed(net, names):
    """A copy, its first layer other than it was, so that all behind it read something else."""
    made = linl.graph.clone(net)
    for name in names:
        made.get_submodule(name).weight.data.mul_(1 + 0.3 * torch.randn_like(made.get_submodule(name).weight))
    return made


BLOCKS = {"2": "2.last", "4": "4.0", "6": "6.2"}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_no_other_last_layer_is_nearer(images, name):
    """The squared error has no slope by any number of the last layer; the report says what runs show."""
    teacher = ending_in_norms()
    net = disturbed(teacher, ["0"])
    made = linl.reconstruct(net, teacher, [name], images, ridge=TINY)
    wanted, row = between(teacher, name, images)[1], made.reconstruction_report.table.iloc[0]
    slopes, errors = [], []
    for one in (net, made):
        x, last = between(one, name, images)[0], one.get_submodule(BLOCKS[name])
        error = ((one.get_submodule(name)(x) - wanted) ** 2).sum()
        slopes.append(max(g.abs().max() for g in torch.autograd.grad(error, list(last.parameters()))))
        errors.append(error.item())
    assert slopes[1] < 1e-7 * slopes[0]
    axes = [axis for axis in range(wanted.ndim) if axis != 1]
    variance = ((wanted - wanted.mean(axes, keepdim=True)) ** 2).sum().item()
    assert row["missed_before"] == pytest.approx(errors[0] / variance, rel=1e-6)
    assert row["missed"] == pytest.approx(errors[1] / variance, rel=1e-6) and row["missed"] < row["missed_before"]
    assert row["layer"] == BLOCKS[name] and row["channels"] == row["channels_left"]
    assert "missed" in made.reconstruction_report._repr_html_()


def test_what_was_lost_in_last_layers_is_found_again(images):
    """Nothing else being changed, the teacher itself is the nearest."""
    teacher = ending_in_norms()
    net = disturbed(teacher, BLOCKS.values())
    before = {name: t.clone() for one in (net, teacher) for name, t in one.state_dict().items()}
    made = linl.reconstruct(net, teacher, ["6", "2", "4"], images, ridge=TINY)
    assert made.reconstruction_report.table["block"].tolist() == ["2", "4", "6"]
    assert linl.verify(teacher, net, images).largest > 0.01
    assert linl.verify(teacher, made, images).largest < 1e-7
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    assert not any(module._forward_hooks for one in (net, made, teacher) for module in one.modules())


def test_ridge_holds_weights_to_what_they_were(images):
    teacher = ending_in_norms()
    net = disturbed(teacher, ["0"])
    held = linl.reconstruct(net, teacher, ["2"], images, ridge=1e12)
    assert torch.allclose(held[2].last.weight, net[2].last.weight, atol=1e-9)  # the bias alone is free
    missed = [
        linl.reconstruct(net, teacher, ["2"], images, ridge=ridge).reconstruction_report.table["missed"].item()
        for ridge in (1e-6, 1e-1, 1e3)
    ]
    assert missed == sorted(missed) and missed[0] < missed[-1]


def test_blocks_mend_what_replaced_ones_miss(images):
    """Closer to the network as it was, behind blocks that `refit` replaced; those themselves can be among them."""
    torch.manual_seed(0)
    net = network()
    made = linl.refit(net, ["3", "2"], images, norms=True, pointwise=["3"])
    better = linl.reconstruct(made, net, ["2", "3", "5"], images)
    told = better.reconstruction_report.table.set_index("block")
    assert (told["missed"] <= told["missed_before"] * (1 + 1e-9)).all()
    assert told.loc["5", "missed"] < 0.99 * told.loc["5", "missed_before"]
    with torch.no_grad():
        wanted = net[:6](images)
        errors = [((one[:6](images) - wanted) ** 2).sum().item() for one in (made, better)]
    assert errors[1] < errors[0] and linl.verify(better, linl.fold(better, images[:2], objective="macs"), images).equal


@pytest.mark.parametrize("size", [1, 4])
def test_needed_channels_are_those_that_are_missed_most(size):
    """Each goes that raises the error least: by brute force, every least squares without one more solved anew."""
    torch.manual_seed(size)
    x = torch.randn(300, 6 * size, dtype=torch.float64) @ torch.randn(6 * size, 6 * size, dtype=torch.float64)
    sums = Sums()
    sums.add(x, x @ torch.randn(6 * size, 3, dtype=torch.float64) + torch.randn(300, 3, dtype=torch.float64))
    stays = torch.ones(6, dtype=torch.bool)

    def error(stays):
        columns = stays.repeat_interleave(size)
        return sums.missed(*sums.solution(TINY, columns=columns))

    for left in (5, 4, 3, 2, 1):
        without = {i: error(stays & (torch.arange(6) != i)) for i in stays.nonzero()[:, 0].tolist()}
        stays[min(without, key=without.get)] = False
        assert torch.equal(sums.needed(left, size, TINY), stays)
    best = min(error(torch.tensor([i in chosen for i in range(6)])) for chosen in itertools.combinations(range(6), 5))
    assert error(sums.needed(5, size, TINY)) == pytest.approx(best)


@pytest.mark.parametrize("name", ["2", "3", "5"])
def test_narrower_blocks_are_the_ones_with_those_weights_gone(images, name):
    """Cut through depthwise layers and norms, names kept: the same as zeros where channels are no longer read."""
    net = network()
    had = net.get_submodule(name)
    made = linl.reconstruct(net, net, [name], images, channels={name: 2})
    new, row = made.get_submodule(name), made.reconstruction_report.table.iloc[0]
    assert row["channels_left"] == 2 < row["channels"] and 1e-6 < row["missed"] < 1 and row["missed_before"] < 1e-12
    assert [n for n, _ in new.named_modules()] == [n for n, _ in had.named_modules()]
    assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in had.parameters())
    last = [m for m in new.modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.in_channels == last.weight.shape[1] == 2
    x, wanted = between(net, name, images)
    slopes = torch.autograd.grad(((new(x) - wanted) ** 2).sum(), [last.weight, last.bias])
    assert max(g.abs().max() for g in slopes) < 1e-2 * (wanted**2).sum()  # as far as the ridge lets it
    assert linl.verify(made, linl.fold_norms(made), images).equal
    made.train()(images).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_more_channels_miss_less(images):
    net = network()
    missed = [
        linl.reconstruct(net, net, ["2"], images, channels={"2": left}).reconstruction_report.table["missed"].item()
        for left in (1, 4, 8, 12)
    ]
    assert missed == sorted(missed, reverse=True) and missed[-1] < 1e-12


class Block(nn.Module):
    """Two dense layers and what comes of them, by a function of (what is read, its two layers, a third one)."""

    def __init__(self, computed, size=3, hidden=12):
        super().__init__()
        self.first, self.last, self.side = nn.Linear(size, hidden), nn.Linear(hidden, size), nn.Linear(size, size)
        self.computed = computed

    def forward(self, x):
        return self.computed(x, self.first, self.last, self.side)


def vectors(block, n=200):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), block, nn.ReLU()).double().eval()
    return net, torch.randn(n, 3, dtype=torch.float64)


def by_head(x, first, last, side):
    return x + last(first(x).relu().view(-1, 12))


def by_branch(x, first, last, side):
    return x + last(first(x).relu()) if x.sum() > -1e9 else x


def to_itself(x, first, last, side):
    h = first(side(x)).relu()
    return x + last(h) - 0 * h.sum(1, keepdim=True)


@pytest.mark.parametrize("computed", [by_head, by_branch, to_itself])
def test_channels_that_cannot_be_cut_stay_all(computed):
    """The code counts on them, can't be traced, or reads them elsewhere: the block is fitted as it is."""
    block = Block(computed)
    net, x = vectors(block)
    plain, made = (linl.reconstruct(net, net, ["1"], x, channels=asked) for asked in ({}, {"1": 4}))
    row = made.reconstruction_report.table.iloc[0]
    assert row["channels_left"] == row["channels"] == 12 and abs(row["missed"]) < 1e-12
    assert linl.verify(plain, made, x).equal and not (made[1].last.weight == 0).any()


def test_a_branch_that_is_constant_is_no_obstacle():
    """`shrink` would make it a number; the block keeps it, and is narrower."""
    net, x = vectors(Block(lambda x, first, last, side: x + side(x) + last(first(x).relu())))
    net[1].side.weight.data.zero_()
    made = linl.reconstruct(net, net, ["1"], x, channels={"1": 4})
    left = made.reconstruction_report.table["channels_left"].item()
    assert left == len(made[1].first.weight) == made[1].last.weight.shape[1]
    assert left in (4, 12) and (left == 12) == (abs(made.reconstruction_report.table["missed"].item()) < 1e-12)


def test_an_output_that_the_norm_makes_nothing_of_hinders_no_cut(images):
    net = nn.Sequential(Away(4)).double().eval()
    net[0].norm.weight.data[1] = 0
    net[0].norm.weight.data[2] = 1e-9
    x = torch.randn(100, 4, 7, 7, dtype=torch.float64)
    made = linl.reconstruct(net, net, ["0"], x, channels={"0": 3})
    assert made.reconstruction_report.table["channels_left"].item() == 3 == len(made[0].inner.weight)
    stays = [
        i for i, row in enumerate(net[0].inner.weight) if any(torch.equal(row, kept) for kept in made[0].inner.weight)
    ]
    assert torch.equal(made[0].last.weight[1:3], net[0].last.weight[1:3][:, stays])
    assert made[0].last.weight.abs().max() < 1e3


@pytest.mark.parametrize("factor", [1e-7, 3e-8])
def test_in_float32_a_tiny_factor_does_no_harm(factor):
    """Behind a norm that has learnt to shut a channel no weights grow to what the rounding says."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(2, 4, 1), Away(4)).eval()
    teacher[1].norm.weight.data[0] = factor
    net, x = disturbed(teacher, ["0"]), torch.randn(100, 2, 9, 9)
    made = linl.reconstruct(net, teacher, ["1"], x)
    wanted = between(teacher, "1", x)[1]
    errors = [((between(one, "1", x)[1] - wanted) ** 2).mean() for one in (net, made)]
    assert errors[1] < errors[0] and made[1].last.weight.abs().max() < 100


def test_in_bfloat16_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), Away(4)).eval().to(torch.bfloat16)
    made = linl.reconstruct(net, net, ["1"], torch.randn(100, 2, 9, 9).bfloat16(), channels={"1": 5})
    assert made[1].last.weight.dtype == torch.bfloat16 and made[1].last.in_channels == 5


def test_what_is_frozen_stays_frozen(images):
    net = ending_in_norms().requires_grad_(False)
    made = linl.reconstruct(net, net, list(BLOCKS), images)
    assert made[2].last.bias is not None and not any(p.requires_grad for p in made.parameters())
    assert net[2].last.bias is None


def test_where_nothing_varies(images):
    """Hidden values that are all the same leave the bias to be found; a share of no variance is none."""
    teacher = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).double().eval()
    net = linl.graph.clone(teacher)
    net[0][0].weight.data.zero_()
    x = torch.randn(100, 3, dtype=torch.float64)
    made = linl.reconstruct(net, teacher, ["0"], x)
    assert torch.allclose(made(x)[0], teacher(x).mean(0)) and torch.equal(made[0][2].weight, net[0][2].weight)
    assert made.reconstruction_report.table["missed"].item() == pytest.approx(1)
    assert linl.reconstruct(teacher, net, ["0"], x).reconstruction_report.table["missed"].isna().all()


def test_inverted_bottlenecks_of_the_libraries():
    """timm's, their norms behind the last layers, in float32."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("efficientnet_lite0", num_classes=3).eval()
    names = [name for name, m in net.named_modules() if type(m).__name__ == "InvertedResidual"][:3]
    x = torch.randn(40, 3, 64, 64)
    made = linl.refit(net, names[:1], x, norms=False)
    better = linl.reconstruct(made, net, names, x, channels={names[1]: 32})
    told = better.reconstruction_report.table
    assert told["channels_left"].tolist()[1:] == [32, told["channels"][2]] and (told["missed"] < 1).all()
    assert told["missed"][2] < told["missed_before"][2]
    small = linl.fold(better, x[:1], objective="macs")
    assert linl.verify(better, small, x[:4]).equal


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([], "no blocks"),
        (["9"], "no module '9' in Sequential"),
        (["2", "2"], "2 is named twice"),
        (["6", "6.0"], "6.0 is part of 6"),
        (["1"], "1 has no convolution or dense layer"),
        (["0:2"], "no module '0:2'"),
    ],
)
def test_blocks_that_cannot_be(images, blocks, said):
    net = ending_in_norms()
    with pytest.raises(ValueError, match=said):
        linl.reconstruct(net, net, blocks, images)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU6()),
            r"0 doesn't end in 0\.0, its last layer: something",
        ),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softmax(1)), "something bends or mixes"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(2)), "something bends or mixes"),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), r"0\.1 is a convolution in groups"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            "0 is a convolution in groups, or",
        ),
        (nn.Conv2d(2, 2, 3, padding="same"), "0 is a convolution that says 'same'"),
    ],
)
def test_blocks_that_do_not_end_so(images, block, said):
    net = nn.Sequential(block).double().eval()
    with pytest.raises(ValueError, match=said):
        linl.reconstruct(net, net, ["0"], images)


def test_more_that_is_refused(images):
    net = network()
    for channels, said in (
        ({"3": 2}, "channels of 3: not among the blocks, 2, 5"),
        ({"2": 0}, r"channels of 2: 0 of the 12 that 2\.5 reads"),
        ({"2": 13}, r"channels of 2: 13 of the 12 that 2\.5 reads"),
    ):
        with pytest.raises(ValueError, match=said):
            linl.reconstruct(net, net, ["5", "2"], images, channels=channels)
    with pytest.raises(ValueError, match=r"ridge = 0: above 0"):
        linl.reconstruct(net, net, ["2"], images, ridge=0)
    with pytest.raises(ValueError, match="1 images are 6 outputs of 5, too few for 19 weights each: give 13"):
        linl.reconstruct(net, net, ["5"], images[:1, :, :5, :9])
    with pytest.raises(ValueError, match=r"channels of 2: 1\.5 of the 12"):
        linl.reconstruct(net, net, ["2"], images, channels={"2": 1.5})
    other = network()
    other[5] = nn.Sequential(other[5], nn.AvgPool2d(2)).eval()
    with pytest.raises(ValueError, match=r"5 gives \(5, 4, 4\) where the teacher's gives \(5, 2, 2\)"):
        linl.reconstruct(net, other, ["5"], images)
    twice = nn.Sequential(layer := nn.Conv2d(2, 2, 1), nn.ReLU(), layer).double().eval()
    with pytest.raises(ValueError, match="0 is called 2 times"):
        linl.reconstruct(twice, twice, ["0"], images)
    inside = nn.Sequential(nn.Sequential(layer, nn.ReLU(), layer)).double().eval()
    with pytest.raises(ValueError, match="no convolution or dense layer that is called once, as its last"):
        linl.reconstruct(inside, inside, ["0"], images)
    with pytest.raises(ValueError, match="train mode"):
        linl.reconstruct(net, network().train(), ["2"], images)
    masked = network()
    mask_(masked, masks_of(masked))
    with pytest.raises(ValueError, match="under masks"):
        linl.reconstruct(masked, net, ["2"], images)


def gated(x, first, last, side):
    return torch.sigmoid(4 * side(x)) * last(first(x).relu())


def nearly_linear(x, first, last, side):
    return 10 * x + 1e-3 * last(first(x)).relu()


def two_of_them(x, first, last, side):
    return x, last(first(x))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Block(gated), "something bends or mixes"),
        (Block(nearly_linear), "something bends or mixes"),
        (Block(two_of_them), "isn't called with one tensor, by position, or doesn't give one"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "1 has no weight of its own"),
    ],
)
def test_what_is_behind_depends_on_the_input(block, said):
    net, x = vectors(block)
    if isinstance(block, Block) and block.computed is two_of_them:
        net[2] = nn.Identity().eval()
    for images in (x, x[:1]):  # one alone says as much
        with pytest.raises(ValueError, match=said):
            linl.reconstruct(net, net, ["1"], images)


def test_layers_that_compute_something_else():
    from timm.layers import StdConv2d
    from timm.layers.conv2d_same import Conv2dSame

    for layer in (StdConv2d(2, 3, 1), Conv2dSame(2, 3, 3, stride=2)):
        net = nn.Sequential(layer).eval()
        with pytest.raises(ValueError, match=f"0, a {type(layer).__name__}, isn't an ordinary layer"):
            linl.reconstruct(net, net, ["0"], torch.randn(50, 2, 8, 8))


def test_layers_and_weights_that_others_have_too():
    x = torch.randn(50, 3, dtype=torch.float64)
    shared = nn.Linear(3, 3)
    twice = nn.Sequential(nn.Sequential(nn.Linear(3, 3), shared), nn.Sequential(nn.ReLU(), shared)).double().eval()
    with pytest.raises(ValueError, match=r"a weight of 0\.1 has several names \(0\.1\.weight, 0\.1\.bias, 1\.1"):
        linl.reconstruct(twice, twice, ["0", "1"], x)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double().eval()
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"a weight of 0 has several names \(0\.weight, 0\.bias, 1\.weight\)"):
        linl.reconstruct(tied, tied, ["0"], x)
    known = Block(lambda x, first, last, side: first(x)).double().eval()
    known.other = known.first
    with pytest.raises(ValueError, match=r"first has several names \(first, other\): untie"):
        linl.reconstruct(known, known, ["first"], x)


def test_a_block_alone_keeps_a_skip(images):
    """The sum's other part isn't the layer's to give."""
    teacher = nn.Sequential(nn.Conv2d(2, 4, 1), Skipped(4)).double().eval()
    net = disturbed(teacher, ["1.body.2"])
    made = linl.reconstruct(net, teacher, ["1"], images, ridge=TINY)
    assert linl.verify(teacher, made, images).largest < 1e-8
