"""Scores against their formulas, and one step of pruning: how many, which, and in what order."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl.lookahead import Lookahead
from linl.masks import mask_, masks_of, prunable, raw_weight
from linl.pruning import CHOICES, SCORES, by_layer, lowest
from linl.scores import Given
from linl.tests.test_dead_rates import dense

D = torch.float64


def conv_net(seed: int = 0) -> nn.Sequential:
    """Convolutions with groups and norms, a pool, dense layers; float64, statistics of its own."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)]
    layers += [nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 7), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(7, 3)).double()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2), module.weight.data.normal_()
    return net


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 8, 8, dtype=D, generator=generator), torch.arange(n) % 3


def scored(net: nn.Module, name: str) -> dict:
    mask_(net, masks_of(net))
    given = batch() if SCORES[name].wants_batch else None
    return SCORES[name].of(net, Given(given, "cross_entropy", torch.Generator().manual_seed(0)))


def listed(values: dict, among: dict) -> list[tuple]:
    """(value, layer, position) of some weights, in order."""
    found = []
    for place, name in enumerate(values):
        at = among[name].flatten().nonzero()[:, 0].tolist()
        found += [(values[name].flatten()[i].item(), place, i) for i in at]
    return sorted(found)


def live_of(net: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in masks_of(net).values())


def randomly_masked(seed: int) -> nn.Module:
    net = conv_net(seed)
    mask_(net, {name: torch.rand(m.shape) < 0.7 for name, m in masks_of(net).items()})
    return net


# --- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_lamp_is_its_formula(seed):
    net = randomly_masked(seed)
    net[10].weight_orig.data.round_(decimals=0).clamp_(-1, 1)  # equal magnitudes, and zeros
    found = scored(net, "lamp")
    for name, layer in prunable(net).items():
        live = masks_of(net)[name]
        weights = raw_weight(layer)[live].tolist()
        order = sorted(range(len(weights)), key=lambda i: (abs(weights[i]), i))
        for place, i in enumerate(order):
            below = sum(weights[j] ** 2 for j in order[place:])
            expected = weights[i] ** 2 / below if below else 0
            assert found[name][live][i].item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert found[name][live].max() == pytest.approx(1) or not any(weights)


@pytest.mark.parametrize("seed", range(20))
def test_gradient_scores_are_finite_differences(seed):
    """|w·∂L/∂w| is |dL/ds| for the weight times s, at s = 1; of pruned weights it is 0."""
    net = randomly_masked(seed)
    images, labels = batch()
    for name, train in (("gradient", False), ("snip", True)):
        found = scored(net, name)
        plain = linl.harden_masks(net).eval()
        for module in plain:
            module.train(train and isinstance(module, nn.BatchNorm2d))

        def loss(layer, at, factor, plain=plain):
            with torch.no_grad():
                twin = copy.deepcopy(plain)
                twin.get_submodule(layer).weight[at] *= factor
                return F.cross_entropy(twin(images), labels).item()

        for layer in prunable(net):
            at = tuple(int(torch.randint(n, ())) for n in found[layer].shape)
            slope = (loss(layer, at, 1 + 1e-5) - loss(layer, at, 1 - 1e-5)) / 2e-5
            assert found[layer][at].item() == pytest.approx(abs(slope), abs=1e-8)
            assert not found[layer][~masks_of(net)[layer]].any()


def test_gradients_leave_statistics_modes_and_gradients_alone():
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    for name in SCORES:
        linl.prune(net, name, batch=batch())
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    pruned = linl.prune(net, "snip", batch=batch())
    assert torch.equal(pruned[1].running_mean, net[1].running_mean)


@pytest.mark.parametrize("seed", range(20))
def test_lookahead_is_the_distortion_of_three_layers(seed):
    """Park et al., section 2: ‖W₃W₂W₁ − W₃W₂'W₁‖ for one weight less, of three dense layers in a row."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    first, second, third = (net[i].weight.detach() for i in (0, 2, 4))
    found = scored(net, "lap")
    for k, j in itertools.product(range(5), range(4)):
        less = second.clone()
        less[k, j] = 0
        distortion = (third @ second @ first - third @ less @ first).norm().item()
        assert found["2"][k, j].item() == pytest.approx(distortion, rel=1e-10)
    assert torch.allclose(found["0"], first.abs() * second.norm(dim=0)[:, None], rtol=1e-12)
    assert torch.allclose(found["4"], third.abs() * second.norm(dim=1), rtol=1e-12)


def test_lookahead_through_norms_groups_pools_and_flattenings_by_hand():
    net = randomly_masked(0)
    found = scored(net, "lap")
    hard = linl.harden_masks(net)
    w0, w3, w8, w10 = (hard[i].weight.detach() for i in (0, 3, 8, 10))
    a0, a3 = ((n.weight / (n.running_var + n.eps).sqrt()).detach().abs() for n in (hard[1], hard[4]))
    into3 = a0 * w0.flatten(1).norm(dim=1)
    by_group = into3.view(2, 1, 2).expand(2, 3, 2).reshape(6, 2, 1, 1)
    out3 = a3 * w8.view(7, 6, 9).pow(2).sum((0, 2)).sqrt()
    assert torch.allclose(found["3"], w3.abs() * by_group * out3.view(6, 1, 1, 1), rtol=1e-12)
    columns = torch.stack([w3[:3, 0], w3[:3, 1], w3[3:, 0], w3[3:, 1]]).flatten(1).norm(dim=1)
    assert torch.allclose(found["0"], w0.abs() * (a0 * columns).view(4, 1, 1, 1), rtol=1e-12)
    into8 = (a3 * w3.flatten(1).norm(dim=1)).repeat_interleave(9)
    assert torch.allclose(found["8"], w8.abs() * into8 * w10.norm(dim=0)[:, None], rtol=1e-12)


class Residual(nn.Module):
    """x → a → ReLU → (b(·) + ·) → ReLU → c, twice read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*s).double() for s in ((2, 3), (3, 3), (3, 2), (3, 2)))

    def forward(self, x):
        y = self.a(x).relu()
        y = (self.b(y) + y).relu()
        return self.c(y) + self.d(y)


def test_lookahead_adds_squares_of_neighbours_and_a_shortcut_counts_one():
    net = Residual()
    found = scored(net, "lap")
    a, b, c, d = (getattr(net, name).weight.detach() for name in "abcd")
    after_a = (b.pow(2).sum(0) + 1).sqrt()  # b, and the shortcut
    after_b = (c.pow(2).sum(0) + d.pow(2).sum(0)).sqrt()
    before_c = (b.pow(2).sum(1) + 1).sqrt()
    assert torch.allclose(found["a"], a.abs() * after_a[:, None], rtol=1e-12)
    assert torch.allclose(found["b"], b.abs() * a.norm(dim=1) * after_b[:, None], rtol=1e-12)
    assert torch.allclose(found["c"], c.abs() * before_c, rtol=1e-12)


def test_lookahead_reaches_every_layer_of_our_networks():
    net = linl.models.create("resnet20", width=0.25).eval()
    around = Lookahead(linl.graph.trace(net))
    for layer in prunable(net):
        assert around.score(layer).shape == net.get_submodule(layer).weight.shape and around.score(layer).any()


@pytest.mark.parametrize("seed", range(20))
def test_synflow_is_the_sum_over_paths(seed):
    """The saliency of a weight is the sum over all paths through it of the product of |weights|."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    mask_(net, {name: torch.rand(m.shape) < 0.8 for name, m in masks_of(net).items()})
    found = scored(net, "synflow")
    first, second = (layer.weight.detach().abs() for layer in linl.harden_masks(net) if isinstance(layer, nn.Linear))
    paths = torch.zeros(2, 3, 2, dtype=D)
    for k, j, i in itertools.product(range(2), range(3), range(2)):
        paths[k, j, i] = second[k, j] * first[j, i]
    assert torch.allclose(found["0"], paths.sum(0), rtol=1e-12) and torch.allclose(found["2"], paths.sum(2), rtol=1e-12)


def test_synflow_keeps_a_path_where_magnitude_loses_a_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[2].weight.data *= 1e-3
    with pytest.warns(UserWarning, match="no weight is left in 2$"):
        broken = linl.prune(net, rate=0.8)
    assert broken.prune_report.collapsed == ["2"]
    whole = linl.prune(net, "synflow", rate=0.95)
    assert not whole.prune_report.collapsed
    x = torch.randn(64, 8)
    assert linl.harden_masks(whole)[2].weight.any() and whole(x).std(0).max() > 0


def test_layerwise_takes_the_same_share_of_every_layer():
    net = conv_net()
    for score in ("layer-magnitude", "lap"):
        table = linl.prune(net, score, 0.3).prune_report.table
        assert ((table["left"] - 0.7 * table["weights"]).abs() <= 1).all()
    assert table["left"].sum() == live_of(net) - round(0.3 * live_of(net))


# --- which go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_go_exactly_so_many_the_first_of_equals(seed):
    torch.manual_seed(seed)
    values = {name: torch.randint(0, 4, (3, 5)).double() for name in "abc"}
    among = {name: torch.rand(3, 5) < 0.7 for name in "abc"}
    flat = listed(values, among)
    for count in (0, 1, len(flat) // 2, len(flat)):
        assert listed(values, lowest(values, among, count)) == flat[:count]
        parts = by_layer(values, among, count)
        sizes = {n: int(among[n].sum()) for n in among}
        assert sum(int(p.sum()) for p in parts.values()) == count
        assert all(abs(int(parts[n].sum()) - count * sizes[n] / len(flat)) < 1 for n in among)


@pytest.mark.parametrize("score", SCORES)
def test_the_share_is_exact_and_masks_only_shrink(score):
    net, start = conv_net(), conv_net(1).state_dict()
    before = masks_of(net)
    steps = [(0.2, 0.02), (0.37, 0.1), (0.5, 0.2), (0.3, 0.0)]
    for step, (rate, ap) in enumerate(steps[: 2 if SCORES[score].rounds > 1 else 4]):
        live = live_of(net)
        net = linl.prune(net, score, rate, ap, start, batch=batch(), seed=step)
        after, table = masks_of(net), net.prune_report.table
        assert live_of(net) == live - round(rate * live)
        assert table["by_ap"].sum() == round(ap * live)
        assert table["by_score"].sum() == round(rate * live) - round(ap * live)
        assert all(not (after[name] & ~before[name]).any() for name in after)
        assert table["left"].sum() == live_of(net) and net.prune_report.share == live_of(net) / table["weights"].sum()
        before = after
    again = linl.prune(conv_net(), score, 0.2, 0.02, start, batch=batch())
    twin = linl.prune(conv_net(), score, 0.2, 0.02, start, batch=batch())
    assert all(torch.equal(m, masks_of(twin)[n]) for n, m in masks_of(again).items()), "the same once more"


def test_the_argument_is_untouched_and_norms_and_biases_stay():
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    pruned = linl.prune(net, rate=0.5)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
    kept = {n: t for n, t in linl.harden_masks(pruned).state_dict().items() if n.split(".")[0] in "14" or "bias" in n}
    assert len(kept) == 13 and all(torch.equal(t, before[n]) for n, t in kept.items())


def one_layer(weights: list) -> nn.Sequential:
    return nn.Sequential(dense([weights], [0]), nn.ReLU())


def test_ap_takes_the_negative_weights_that_moved_least_by_hand():
    """Magnitude takes 0.1 and −0.2 first; of the negative ones left −1 moved by 0.5, −2 by 0.1 and −3 by 0.3."""
    net = one_layer([0.1, -0.2, -1.0, -2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    start = one_layer([0.1, -0.2, -0.5, -2.1, -3.3, 4.0, 5.0, 6.0, 7.0, 8.0]).state_dict()

    def gone(**options) -> list[int]:
        pruned = linl.prune(net, "magnitude", 0.4, 0.2, start, **options)
        return (~masks_of(pruned)["0"][0]).nonzero()[:, 0].tolist()

    assert gone() == [0, 1, 3, 4]
    assert gone(activate="most-moved negative") == [0, 1, 2, 4]
    assert gone(activate="least-moved") == [0, 1, 5, 6], "either sign: those that didn't move at all"
    drawn = [tuple(gone(activate="random negative", seed=seed)) for seed in range(20)]
    assert set(drawn) == {(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4)}
    assert drawn == [tuple(gone(activate="random negative", seed=seed)) for seed in range(20)]
    alone = linl.prune(net, "magnitude", 0.4)
    assert (~masks_of(alone)["0"][0]).nonzero()[:, 0].tolist() == [0, 1, 2, 3], "X alone at p"


def test_what_ap_cannot_take_the_score_takes():
    net = one_layer([0.1, -0.2, 3.0, 4.0, 5.0, 6.0, -7.0, 8.0, 9.0, 10.0])
    table = linl.prune(net, rate=0.6, ap=0.4, start=net.state_dict()).prune_report.table
    assert table[["by_score", "by_ap", "left"]].to_numpy().tolist() == [[5, 1, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_ap_on_random_networks_is_a_sort(seed):
    net, start = randomly_masked(seed), conv_net(seed + 100).state_dict()
    pruned = linl.prune(net, "random", 0.3, 0.1, start, seed=seed)
    live, by_ap = live_of(net), int(pruned.prune_report.table["by_ap"].sum())
    alone = linl.pruning.pruned(
        net, "random", round(0.3 * live) - by_ap, 0, activate="least-moved", loss="cross_entropy", seed=seed
    )
    middle, layers = masks_of(alone), prunable(net)
    moves = {name: (raw_weight(layer) - start[f"{name}.weight"]).abs() for name, layer in layers.items()}
    negative = listed(moves, {name: middle[name] & (raw_weight(layer) < 0) for name, layer in layers.items()})
    taken = listed(moves, {name: middle[name] & ~masks_of(pruned)[name] for name in layers})
    assert by_ap == round(0.1 * live) and taken == negative[:by_ap]


def test_start_may_be_of_a_masked_or_a_plain_network():
    net = linl.prune(conv_net(), rate=0.2)
    plain, masked = conv_net(1).state_dict(), linl.prune(conv_net(1), rate=0.1).state_dict()
    a, b = (masks_of(linl.prune(net, rate=0.2, ap=0.1, start=start)) for start in (plain, masked))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_traced_linearized_and_other_peoples_networks_are_pruned():
    import timm

    linear = linl.linearize(linl.models.create("resnet20", width=0.5), "linlu")
    pruned = linl.prune(linear, "lap", 0.5)
    assert isinstance(pruned, torch.fx.GraphModule) and pruned.prune_report.share == pytest.approx(0.5, abs=1e-4)
    assert copy.deepcopy(pruned)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    options = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
    transformer = timm.create_model("vit_tiny_patch16_224", act_layer=nn.ReLU, **options)
    given = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    for score in ("gradient", "lap"):
        assert linl.prune(transformer, score, 0.5, batch=given).prune_report.share == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "size"}, "unknown score 'size': choose from magnitude"),
        ({"activate": "all"}, "unknown activate 'all': choose from least-moved negative"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"rate": 0}, "rate = 0"),
        ({"rate": 1.0}, "rate = 1.0"),
        ({"rate": math.nan}, "rate = nan"),
        ({"rate": 0.1, "ap": 0.2}, "ap = 0.2: AP's part of the rate, from 0 to 0.1"),
        ({"ap": -0.1}, "ap = -0.1"),
        ({"ap": 0.1}, "pass start="),
        ({"ap": 0.1, "start": {}}, "start is of another network: it has no 0.weight"),
        ({"ap": 0.1, "start": {"0.weight": torch.zeros(1)}}, "another shape of 0.weight"),
        ({"score": "gradient"}, "gradient is a gradient's score: pass batch="),
        ({"score": "snip"}, r"pass batch=\(images, labels\)"),
        ({"score": "synflow"}, "SynFlow must know how large an input is"),
    ],
)
def test_bad_settings_are_refused_in_a_line(options, message):
    with pytest.raises(ValueError, match=message):
        linl.prune(conv_net(), **options)


def test_numbers_that_are_none_and_nothing_left_are_refused():
    net = conv_net()
    net[8].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="a score in 8 is no finite number"):
        linl.prune(net)
    net = conv_net()
    mask_(net, {name: torch.zeros_like(m) for name, m in masks_of(net).items()})
    with pytest.raises(ValueError, match="no weight is left to prune"):
        linl.prune(net)
    assert set(CHOICES) == {"least-moved negative", "most-moved negative", "least-moved", "random negative"}
