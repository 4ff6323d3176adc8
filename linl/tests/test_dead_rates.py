"""Dead-neuron rates: against hand-computed values, an oracle that knows no graph, and the networks equal to one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linl
from linl.masks import masks_of
from linl.tests.small_nets import make

D = torch.float64


def dense(weight: list, bias: list) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    layer.weight.data, layer.bias.data = torch.tensor(weight, dtype=D), torch.tensor(bias, dtype=D)
    return layer


def conv(kernel: list, bias: float, padding: int = 0) -> nn.Conv1d:
    layer = nn.Conv1d(1, 1, len(kernel), padding=padding).double()
    layer.weight.data, layer.bias.data = torch.tensor([[kernel]], dtype=D), torch.tensor([bias], dtype=D)
    return layer


# --- by hand ---------------------------------------------------------------------------------------


def test_dense_units_by_hand():
    """Units: x, −x, no weight and bias −1, no weight and bias 1. Inputs 1, 2, −1, 0."""
    net = nn.Sequential(dense([[1], [-1], [0], [0]], [0, 0, -1, 1]), nn.ReLU(), dense([[1, 1, 1, 1]], [0]))
    rate = linl.dead_rate(net, torch.tensor([[1.0], [2.0], [-1.0], [0.0]], dtype=D))
    row = rate.table.iloc[0]
    assert (row["units"], row["channels"]) == (4, 4)
    assert row["dynamic"] == pytest.approx((2 / 4 + 3 / 4) / 4)  # x is 0 on two inputs, −x on three
    assert row["static"] == 2 / 4 and row["observed"] == 1 / 4  # the unit held at 1 is static, not 0
    assert (rate.dynamic, rate.static, rate.observed) == (row["dynamic"], row["static"], row["observed"])
    assert [row[f"{r}_channels"] for r in ("dynamic", "static", "observed")] == [rate.dynamic, 0.5, 0.25]
    assert rate.zero["1"].tolist() == [0.5, 0.75, 1.0, 0.0] and rate.fixed["1"].tolist() == [False, False, True, True]
    assert rate.inputs == 4


def test_positions_and_channels_by_hand():
    """Two channels on three positions: x itself, and x − 2. Inputs (1, −1, 3) and (1, 2, 3)."""
    layer = nn.Conv1d(1, 2, 1).double()
    layer.weight.data.fill_(1.0)
    layer.bias.data = torch.tensor([0.0, -2.0], dtype=D)
    rate = linl.dead_rate(nn.Sequential(layer, nn.ReLU()), torch.tensor([[[1.0, -1, 3]], [[1.0, 2, 3]]], dtype=D))
    row = rate.table.iloc[0]
    assert rate.zero["1"].tolist() == [[0, 0.5, 0], [1, 1, 0]]
    assert row["dynamic"] == pytest.approx(2.5 / 6) and row["observed"] == pytest.approx(2 / 6)
    assert row["dynamic_channels"] == 0 and row["observed_channels"] == 0, "no channel is 0 at all its positions"
    rate = linl.dead_rate(nn.Sequential(layer, nn.ReLU()), torch.tensor([[[1.0, -1, 2]], [[1.0, 2, 3]]], dtype=D))
    assert rate.table.iloc[0]["dynamic_channels"] == 1 / 4, "the second channel, for the first input"


def test_a_weight_that_reads_padding_alone_is_none():
    """The kernel's left tap is live alone: the leftmost position reads only the zero before the signal."""
    net = nn.Sequential(conv([1, 0, 0], 0.0, padding=1), nn.ReLU())
    rate = linl.dead_rate(net, torch.ones(1, 1, 4, dtype=D))
    assert rate.fixed["1"].tolist() == [[True, False, False, False]]
    assert rate.table.iloc[0][["static", "static_channels", "observed", "dynamic"]].tolist() == [0.25, 0, 0.25, 0]


def test_a_mask_counts_as_a_zero():
    net = linl.prune(nn.Sequential(dense([[1, 5], [3, 4]], [0, 0]), nn.ReLU()), rate=0.5)
    assert masks_of(net)["0"].tolist() == [[False, True], [False, True]]
    assert linl.dead_rate(net, torch.ones(1, 2)).static == 0
    net = linl.prune(nn.Sequential(dense([[1, 2], [3, 4]], [0, 0]), nn.ReLU()), rate=0.5)
    assert linl.dead_rate(net, torch.ones(1, 2)).static == 0.5


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = dense([[1, 0], [0, 1]], [0, 0]), dense([[0, 0], [0, 0]], [0, 0])

    def forward(self, x):
        y = F.relu(self.a(x))
        return (self.b(y) + y).relu(), self.b(y).relu()


def test_a_shortcut_is_an_incoming_weight_and_calls_are_told_apart():
    rate = linl.dead_rate(Shortcut(), torch.ones(1, 2))
    assert rate.table["static"].tolist() == [0, 0, 1], "the sum reads y itself, the last one nothing"
    assert rate.table["layer"].tolist() == ["relu", "relu_1", "relu_2"]


def test_a_layer_without_an_activation_between_counts_as_one_with_the_next():
    net = nn.Sequential(dense([[1], [0]], [0, 0]), dense([[1, 0], [0, 1]], [0, 0]), nn.ReLU())
    rate = linl.dead_rate(net, torch.ones(1, 1))
    assert rate.fixed["2"].tolist() == [False, True], "unit 1 reads a number that reads nothing"


def test_a_norms_factor_of_zero_cuts_off():
    net = nn.Sequential(dense([[1], [1]], [0, 0]), nn.BatchNorm1d(2).double(), nn.ReLU()).eval()
    net[1].weight.data = torch.tensor([0.0, 1.0], dtype=D)
    assert linl.dead_rate(net, torch.ones(1, 1)).fixed["2"].tolist() == [True, False]


def test_activations_that_are_never_zero_have_no_rate():
    x = torch.tensor([[1.0], [-1.0], [9.0]], dtype=D)
    acts = {
        nn.LeakyReLU(0.1): 0, linl.LiNLU(0.75): 0, linl.LiNLU(0.5): 1 / 3, linl.PartialLinear(nn.ReLU(), 0.0): 1 / 3,
        linl.PartialLinear(nn.ReLU(), 0.1): 0, nn.ReLU6(): 1 / 3, nn.GELU(): 0,
    }  # fmt: skip
    for act, dynamic in acts.items():
        assert linl.dead_rate(nn.Sequential(dense([[1]], [0]), act.double()), x).dynamic == pytest.approx(dynamic)


def test_channels_behind_a_dense_layer_on_tokens_are_last():
    layer = dense([[1], [-1], [0]], [0, 0, 0])
    rate = linl.dead_rate(nn.Sequential(layer, nn.ReLU()), torch.ones(2, 5, 1, dtype=D))
    assert rate.zero["1"].shape == (3, 5) and rate.table.iloc[0]["channels"] == 3
    assert rate.table.iloc[0]["dynamic_channels"] == pytest.approx(1 / 3)


# --- against an oracle -----------------------------------------------------------------------------


def oracle(net: nn.Sequential, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Dynamic shares and static units of every ReLU, by differentiating each stretch between two activations."""
    shares, fixed, x = [], [], images
    stretch: list[nn.Module] = []
    for module in net:
        if not isinstance(module, nn.ReLU):
            stretch.append(module)
            continue
        part = nn.Sequential(*stretch)
        reached = 0
        tries = 20 if any(isinstance(m, nn.MaxPool2d) for m in stretch) else 1  # which pass one number of each window
        for at in torch.randn(tries, 1, *x.shape[1:], dtype=D):
            jacobian = torch.autograd.functional.jacobian(part, at)
            reached = reached + jacobian[0].flatten(part(at).ndim - 1).abs().sum(-1)
        x = F.relu(part(x))
        fixed.append(reached == 0)
        shares.append(((x == 0) & ~fixed[-1]).double().mean(0))
        stretch = []
    return shares, fixed


def random_net(seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Convolutions, norms, pools and dense layers with some weights, rows and taps gone."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, 1 + seed % 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, padding=2, groups=2), nn.AvgPool2d(2) if seed % 3 else nn.MaxPool2d(2), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    net(torch.zeros(2, 2, 7, 6))
    net.double().eval()
    for module in net:
        if isinstance(module, nn.Linear | nn.Conv2d):
            gone = torch.rand(len(module.weight), generator=generator) < 0.3
            module.weight.data[gone] = 0
            module.weight.data[torch.rand(module.weight.shape, generator=generator) < 0.6] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.weight.data.normal_()
    return net, (2, 7, 6)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_agree_with_the_oracle(seed):
    net, shape = random_net(seed)
    images = torch.randn(9, *shape, dtype=D)
    rate = linl.dead_rate(net, images, batch_size=4)
    shares, fixed = oracle(net, images)
    for row, share, static in zip(rate.table.to_dict("records"), shares, fixed, strict=True):
        assert torch.equal(rate.fixed[row["layer"]], static)
        assert row["static"] == pytest.approx(static.double().mean().item(), abs=1e-12)
        assert row["dynamic"] == pytest.approx(share.mean().item(), abs=1e-12)
    total = sum(share.sum() for share in shares) / sum(share.numel() for share in shares)
    assert rate.dynamic == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_folding_changes_no_rate(seed):
    net, shape = random_net(seed)
    net = nn.Sequential(*net[:3], nn.Conv2d(4, 5, 1).double(), *net[3:]) if seed % 4 == 0 else net  # merged if it fits
    if seed % 4 == 0:
        net[4] = nn.Conv2d(5, 6, 3, padding=2).double()
        net[3].weight.data[1:3] = 0
    net = net.eval()
    images = torch.randn(8, *shape, dtype=D)
    folded = linl.fold(net, images, objective="depth")
    assert linl.cost.depth(folded) <= linl.cost.depth(net)
    before, after = linl.dead_rate(net, images), linl.dead_rate(folded, images)
    same = [f"{rate}{of}" for rate in ("dynamic", "static", "observed") for of in ("", "_channels")]
    assert (before.table[same] - after.table[same]).abs().max().max() == 0


def test_compressing_live_units_changes_no_rate_and_inactive_ones_were_counted_dead():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    net[0].bias.data = torch.tensor([-50.0, -50, 0, 0, 0, 0, 0, 0], dtype=D)
    net[2].bias.data.zero_()
    net[2].weight.data *= torch.tensor([-1.0, 1] * 4)
    box = linl.Box.around(torch.zeros(3), 1.0)
    state, images = linl.analyse(net, box), box.sample(200)
    tiny = linl.compress(net, state)
    before, after = linl.dead_rate(net, images, state=state), linl.dead_rate(tiny, images)
    left = after.table["units"].tolist()
    assert left == [6, 4], "two units are dead on the box, no other is stable"
    zeros = (before.table["dynamic"] * before.table["units"] - [2, 0]).tolist()
    assert zeros == pytest.approx((after.table["dynamic"] * after.table["units"]).tolist(), abs=1e-9)
    assert before.table["certified"].tolist() == [2 / 8, 0] and before.table["observed"].tolist() == [2 / 8, 0]
    assert (before.static, after.static) == (0, 0)
    with pytest.raises(ValueError, match="another network"):
        linl.dead_rate(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Tanh()), images, state=state)


def test_a_leaky_unit_that_is_inactive_is_not_certified_dead():
    net = nn.Sequential(dense([[1], [1]], [-9, 9]), nn.LeakyReLU(0.1), dense([[1, 1]], [0])).eval()
    box = linl.Box.around(torch.zeros(1), 1.0)
    rate = linl.dead_rate(net, box.sample(5), state=linl.analyse(net, box, "interval"))
    assert rate.table["certified"].tolist() == [0]


# --- what it is given, and what it leaves ----------------------------------------------------------


def test_batches_labels_and_whole_tensors_give_the_same():
    net, shape = random_net(1)
    images = torch.randn(10, *shape)  # another dtype than the network's
    whole = linl.dead_rate(net, images).table
    labelled = [(part, torch.zeros(len(part))) for part in images.split(4)]
    for batches in (images.split(3), labelled, iter(images.split(5))):
        assert whole.equals(linl.dead_rate(net, batches).table)
    assert whole.equals(linl.dead_rate(net, (images, torch.zeros(10).long())).table), "a batch with its labels"


def test_the_network_is_left_as_it_was():
    net, shape = make("residual", "relu")
    net.train()
    net[0].eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    rate = linl.dead_rate(net, images := 5 * torch.randn(6, *shape))
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert rate.table.equals(linl.dead_rate(net.eval(), images).table), "it is measured in eval mode"


def test_our_networks_and_transformers_are_measured():
    import timm

    net = linl.models.create("resnet20", width=0.25)
    assert len(linl.dead_rate(net, torch.randn(2, 3, 32, 32)).table) == 19
    transformer = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=8, num_heads=2, act_layer=nn.ReLU
    )
    with torch.no_grad():
        transformer.blocks[0].mlp.fc1.weight[:3] = 0
    rate = linl.dead_rate(transformer, torch.randn(2, 3, 16, 16))
    assert rate.table["channels"].tolist() == [32]
    assert rate.fixed["blocks.0.mlp.act"].all(1).tolist()[:4] == [True] * 3 + [False]
    norm_act = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), timm.layers.BatchNormAct2d(4))
    with torch.no_grad():
        norm_act[1].weight[0] = norm_act[0].weight[1] = 0
    assert linl.dead_rate(norm_act, torch.randn(2, 3, 8, 8)).static == 0.5


@pytest.mark.parametrize(
    ("net", "images", "message"),
    [
        (nn.Linear(2, 2), torch.ones(1, 2), "no activation"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(0, 2), "no image"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [], "no image"),
    ],
)
def test_what_cannot_be_measured_is_refused(net, images, message):
    with pytest.raises(ValueError, match=message):
        linl.dead_rate(net, images)


def test_dense_layers_are_shown_without_the_same_figures_by_channel():
    dense = linl.dead_rate(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3))
    conv = linl.dead_rate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), torch.rand(5, 1, 6, 6))
    assert "static_channels" in dense.table and "channels" not in dense._repr_html_()
    assert "static_channels" in conv._repr_html_()
