"""Folding: what merges is exact in float64, what doesn't is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl.graph import clone
from linl.tests.test_linearize import network
from linl.units import units_of

D = torch.float64


def shaken(net):
    """BatchNorms with the statistics of a network that was trained somewhere."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2), nn.init.normal_(module.bias, 0, 0.2)
    return net


def hardened(net, linear):
    """The network's LiNL twin with the given unit numbers linear, hardened, in float64 eval mode."""
    twin = linl.linearize(shaken(clone(net)), "linlu").double().eval()
    with torch.no_grad():
        for i, unit in enumerate(units_of(twin).values()):
            unit.p.fill_(1.0 if i in linear else 0.5 + 0.4 * torch.rand(()).item())
    return linl.harden(twin)


def same(a, b, x):
    check = linl.verify(a, b, x)
    assert check.equal, check
    return check


NAMES = ["mlp", "alexnet", "vgg16", "resnet18", "mobilenetv2", "efficientnet_lite0"]


@pytest.mark.parametrize("name", NAMES)
def test_our_networks_fold_exactly(name):
    net = linl.models.create(name, width=0.125)
    count = len(linl.sites.activation_sites(linl.graph.trace(net)))
    hard = hardened(net, {0, count // 2, count - 1})
    side = 16 if name in ("mobilenetv2", "efficientnet_lite0") else 32  # depthwise float64 is slow
    x = torch.randn(2, 3, side, side, dtype=D)
    small = linl.fold(hard, x, objective="depth")
    same(hard, small, x)
    runs = linl.verify(hard, small, x).table
    assert len(runs) > 1 and runs["equal"].all(), "every merged run, at its own output"
    assert not [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not [m for m in small.modules() if isinstance(m, nn.Dropout | nn.Identity)]
    assert not small.training
    places = linl.sites.activation_sites(linl.graph.trace(small))
    assert len(places) == count - 3, "it is read as the original is"


def test_the_layout_of_googles_weights_folds():
    """timm's tf_efficientnet_lite: padding that depends on the size (Conv2dSame), and BatchNorms with activations."""
    import timm

    net = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    hard = hardened(net, {2, 3, 4, 10, 11, 12})
    x = torch.randn(1, 3, 35, 35, dtype=D)
    padded = linl.pad_first(hard, x, objective="macs")
    small = linl.fold(padded, x, objective="macs")
    assert linl.verify(padded, small, x).table["equal"].all()
    assert linl.cost.depth(small) < linl.cost.depth(net)


@pytest.mark.parametrize("label", ["torchvision resnet18", "timm mobilenetv2_100", "timm efficientnet_lite0"])
def test_no_batchnorm_is_left_in_other_peoples_networks(label):
    """torch.fx's own fuse leaves 52 of 52 in timm's MobileNetV2 (torch issue 122070)."""
    net = shaken(copy.deepcopy(network(label))).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=D)
    small = linl.fold(net, x, objective="depth")
    same(net, small, x)
    assert not [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("label", ["torchvision resnet18", "timm mobilenetv2_100", "timm efficientnet_lite0", "ours"])
def test_norms_alone_without_an_example(label):
    net = linl.models.create("mlp", 10, (3, 8, 8), width=0.05) if label == "ours" else copy.deepcopy(network(label))
    net = shaken(net).double().eval()
    before = copy.deepcopy(net.state_dict())
    small, x = linl.fold_norms(net), torch.randn(2, 3, *(8, 8) if label == "ours" else (37, 35), dtype=D)
    same(net, small, x)
    assert not [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert (small.fold_report.table["verdict"] == "exact").all() and not small.training
    assert len(small.fold_report.table) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not where_weights_lie(net) & where_weights_lie(small), "the copy shares memory with the original"


def where_weights_lie(net):
    return {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}


class Odd(nn.Module):
    """BatchNorms that can't be taken in by what is before them, each for another reason."""

    def __init__(self):
        super().__init__()
        self.twice, self.norm1, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.read, self.norm3 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.hooked, self.norm4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda module, args, out: 2 * out)
        self.plain, self.norm5, self.norm6 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)
        self.tokens, self.norm7 = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 5)
        self.last.weight = self.tokens.weight

    def forward(self, x):
        x = self.norm2(self.twice(F.relu(self.norm1(self.twice(x)))))
        y = self.read(x)
        x = self.norm4(self.hooked(self.norm3(y) + y))
        x = F.batch_norm(F.relu(self.norm6(self.norm5(self.plain(x)))), self.norm6.running_mean, self.norm6.running_var)
        return self.last(self.norm7(self.tokens(x.mean(3)[:, :1].expand(-1, 5, -1))))


def test_norms_that_stay_say_why():
    net, x = shaken(Odd()).double().eval(), torch.randn(2, 3, 5, 5, dtype=D)
    small = linl.fold_norms(net)
    same(net, small, x)
    table = small.fold_report.table.set_index("last")
    reasons = {
        "norm1": "used more than once", "norm2": "used more than once", "norm3": "elsewhere too", "norm4": "hook",
        "batch_norm": "called as a function", "norm7": "shared parameters",
    }  # fmt: skip
    assert set(table.index[table["verdict"] == "exact"]) == {"norm5", "norm6"}
    assert all(word in table.loc[name, "reason"] for name, word in reasons.items())
    assert small.last.weight is small.tokens.weight, "what was tied stays tied"
    net.last.weight = nn.Parameter(net.last.weight.detach().clone())
    told = linl.fold_norms(net).fold_report.table.set_index("last").loc["norm7", "reason"]
    assert "fold(net, example)" in told, "whether it works on features isn't known without an example"
    with pytest.raises(ValueError, match="is in train mode"):
        linl.fold_norms(net.train())


def test_a_folded_network_shares_no_memory_with_the_original():
    net, x = shaken(linl.models.create("vgg16", width=0.125)).eval(), torch.randn(1, 3, 32, 32)
    for objective in ("macs", "depth"):
        small = linl.fold(net, x, objective=objective, check=False)
        assert not where_weights_lie(net) & where_weights_lie(small)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)).eval()
    small = linl.fold(tail, torch.randn(2, 3, 4, 4), objective="depth", check=False)
    assert linl.cost.depth(small) == 1 and not where_weights_lie(tail) & where_weights_lie(small)


def test_the_last_hidden_layer_of_alexnet_disappears():
    """LiNLNet's −27 % at 224 pixels; here the same layers at a quarter of the width."""
    net = linl.models.create("alexnet", 10, width=0.25)
    hard = hardened(net, {6})
    x = torch.randn(2, 3, 32, 32, dtype=D)
    small = linl.fold(hard, x)
    before, after = (linl.measure(n, x, batches=()).table.iloc[0] for n in (hard, small))
    assert (before["depth"], after["depth"]) == (8, 7)
    fc7, norms = 1024 * 1024, sum(m.num_features * 2 for m in net.modules() if hasattr(m, "num_features"))
    biases = sum(m.out_features if isinstance(m, nn.Linear) else m.out_channels
                 for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d)) - 10  # fmt: skip
    assert before["parameters"] - after["parameters"] == fc7 + norms - biases


def test_dense_layers_in_a_row_with_dropout_and_views_between():
    net = nn.Sequential(
        nn.Linear(12, 40), nn.BatchNorm1d(40), nn.Identity(), nn.Dropout(0.5), nn.Linear(40, 30), nn.Flatten(),
        nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 16), nn.Identity(), nn.Linear(16, 3),
    )  # fmt: skip
    net = shaken(net).double().eval()
    x = torch.randn(5, 12, dtype=D)
    small = linl.fold(net, x, objective="parameters")
    same(net, small, x)
    shapes = [tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(20, 12), (3, 20)]
    report = small.fold_report
    assert (
        report.merged == 2 and (report.table["verdict"] == "exact").all() and report.table["layers"].tolist() == [3, 2]
    )


def test_a_bottleneck_is_merged_only_for_depth():
    """1024 → 8 → 1024 has 16 thousand weights, its product a million."""
    net = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64)).double().eval()
    x = torch.randn(3, 64, dtype=D)
    for objective in ("latency", "parameters", "macs"):
        kept = linl.fold(net, x, objective=objective)
        assert len(list(kept.modules())) == 3
        row = kept.fold_report.table.iloc[0]
        assert row["verdict"] == "refused" and f"would not pay ({objective}): 4,160 numbers" in row["reason"]
    merged = linl.fold(net, x, objective="depth")
    same(net, merged, x)
    assert linl.cost.depth(merged) == 1


def test_refusals_carry_their_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.pooled, self.shared = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.loose = nn.BatchNorm2d(4, track_running_stats=False)
            self.twice, self.fc1, self.fc2 = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.max_pool2d(self.norm(self.a(x)), 2)
            x = self.twice(self.shared(self.pooled(x))) + self.twice(self.shared(x))
            x = self.loose(x).mean((2, 3))
            h = self.fc1(x)
            return self.fc2(h) + h[:, :2]

    net = shaken_without_loose(Net()).double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=D)
    small = linl.fold(net, x)
    same(net, small, x)
    report = small.fold_report.table
    reasons = dict(zip(report["last"], report["reason"], strict=False))
    assert reasons["norm"] == "" and reasons["pooled"] == "max_pool2d in between"
    assert "more than once" in reasons["twice"]
    assert reasons["loose"] == "BatchNorm without running statistics"
    assert "used elsewhere too" in reasons["fc2"]
    assert set(report["verdict"]) == {"exact", "refused"} and small.fold_report._repr_html_()


def shaken_without_loose(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return net


def test_positive_factors_leave_torchs_own_activations():
    """p·LeakyReLU(x) = LeakyReLU(p·x): the factor joins the layer before, through a max-pool as well."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU()
    )
    hard = hardened(net, set())
    x = torch.randn(2, 3, 16, 16, dtype=D)
    small = linl.fold(hard, x)
    same(hard, small, x)
    kinds = {type(m) for m in small.modules()} - {type(small)}
    assert kinds == {nn.Conv2d, nn.MaxPool2d, nn.LeakyReLU}


class Skip(nn.Module):
    """A sum before an activation: no layer there can take the activation's factor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.last, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(4 * 25, 3)

    def forward(self, x):
        x = self.act(self.first(x))
        return self.head(self.last(x + self.second(x)).flatten(1))


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_a_factor_that_no_layer_before_takes_leaves_torchs_own_activations(per):
    """And goes into the next layer. The folded network is counted, proved about and made linear as any other."""
    x = torch.randn(2, 2, 5, 5, dtype=D)
    lin = linl.linearize(Skip().double(), "linlu", per=per, example=x).eval()
    for unit in units_of(lin).values():
        nn.init.uniform_(unit.p, 0.55, 0.9)
    hard = linl.harden(lin)
    small = linl.fold(hard, x)
    same(hard, small, x)
    kinds = {type(m) for m in small.modules()} - {type(small), nn.Conv2d, nn.Flatten, nn.Linear}
    assert kinds == ({nn.LeakyReLU} if per == "layer" else {nn.PReLU})
    counted = linl.measure(hard, small, x, batches=()).table
    assert counted["depth"].tolist() == [3, 3] and counted["activations"].tolist() == [2, 2]
    assert counted["parameters"].nunique() == 1, "slopes are no parameters"
    assert len(linl.nonlinearity(linl.linearize(small, "partial"))) == 2
    if per == "layer":
        state = linl.analyse(small, linl.Box.around(x[0], 1e-6)).table["state"]
        assert len(state) == 200 and state.isin(["active", "inactive"]).sum() > 190


def test_what_must_not_be_folded_is_said_before_any_work():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"in train mode: call .eval\(\) first"):
        linl.fold(net.train(), x)
    net.eval()[1].train()
    with pytest.raises(ValueError, match="1 is in train mode"):
        linl.fold(net, x)
    net.eval()
    with pytest.raises(ValueError, match="unknown objective 'speed'"):
        linl.fold(net, x, objective="speed")
    with pytest.raises(ValueError, match="unknown border 'any': choose from exact, interior"):
        linl.fold(net, x, border="any")
    with pytest.raises(ValueError, match=r"1 trainable units are left: call linl.harden"):
        linl.fold(nn.Sequential(nn.Linear(4, 4), linl.LiNLU()).eval(), x)


def test_the_argument_is_left_alone():
    net = shaken(linl.models.create("mlp", 10, (1, 8, 8), width=0.125)).eval()
    state = copy.deepcopy(net.state_dict())
    linl.fold(net, torch.randn(2, 1, 8, 8))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and len(state) == len(net.state_dict())


def test_verify_can_say_no():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    check = linl.verify(a, b, torch.randn(4, 3))
    assert not check.equal and check.largest > 1e-3 and not check.table["equal"].item()
    assert linl.verify(a, a, torch.randn(4, 3)).largest == 0
    with pytest.raises(ValueError, match="different shapes"):
        linl.verify(a, nn.Linear(3, 4), torch.randn(4, 3))


def test_folded_networks_save_load_and_export(tmp_path):
    def folded():
        torch.manual_seed(0)
        twin = hardened(linl.models.create("mlp", 10, (1, 8, 8), width=0.125), {3})
        return linl.fold(twin, x, objective="depth")  # what is measured faster may differ from call to call

    x = torch.randn(2, 1, 8, 8, dtype=D)
    small, other = folded(), folded()
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))
    torch.save(small.state_dict(), tmp_path / "small.pt")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    assert torch.equal(other(x), small(x))


def checked(net, x, objective="latency"):
    """Folds an eval-mode float64 network and compares; returns it with its report's reasons."""
    net = shaken(net).double().eval()
    small = linl.fold(net, x.double(), objective=objective)
    same(net, small, x.double())
    return small, small.fold_report.table["reason"].tolist()


def test_a_batchnorm_over_another_axis_stays():
    for outputs in (5, 7):
        net = nn.Sequential(nn.Linear(6, outputs), nn.BatchNorm1d(5), nn.ReLU())
        small, _ = checked(net, torch.randn(4, 5, 6))
        assert [type(m) for m in small.children()] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_flattening_that_moves_numbers_stays():
    small, _ = checked(nn.Sequential(nn.Linear(8, 16), nn.Flatten(), nn.Linear(64, 10)), torch.randn(2, 4, 8))
    assert linl.cost.depth(small) == 2
    net = nn.Sequential(nn.Linear(8, 6), nn.Flatten(0, 1), nn.Linear(6, 4))
    checked(net, torch.randn(2, 4, 8))


class Shared(nn.Module):
    """One factor, one weight, used in two places each."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.e, self.norm = linl.harden(linl.LiNLU(0.8)), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.c(self.act(self.b(self.act(self.a(x)))))
        return F.linear(F.relu(self.norm(self.e(x))), self.e.weight.t())


def test_what_is_shared_stays_as_it_is():
    _, reasons = checked(Shared(), torch.randn(3, 4))
    assert any("shared parameters: with the attribute e.weight" in reason for reason in reasons)


def test_hooked_layers_stay_and_keywords_are_understood():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(input=self.drop(input=self.a(input=x)))

    small, _ = checked(Net(), torch.randn(3, 4), objective="depth")  # by time, a busy machine may leave two
    assert linl.cost.depth(small) == 1
    net = Net().double().eval()
    net.a.register_forward_hook(lambda module, inputs, output: 2 * output)
    x = torch.randn(3, 4, dtype=D)
    assert torch.equal(linl.fold(net, x)(x), net(x)), "a hook may change something: nothing is merged over it"


@pytest.mark.parametrize(
    ("layers", "size", "every"),
    [
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)], 8, True),
        ([nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 5, 1)], 8, True),
        ([nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)], 8, True),
        ([nn.Conv2d(3, 4, 2, stride=2, bias=False), nn.Conv2d(4, 5, 3, padding=1)], 8, False),
        ([nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 5, 1)], 8, False),
        ([nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 5, 1)], 8, False),
        ([nn.Conv2d(3, 4, 1), nn.AvgPool2d(8), nn.Conv2d(4, 5, 1)], 8, False),
        ([nn.Conv2d(3, 4, 3, padding=6, dilation=6, bias=False), nn.Conv2d(4, 5, 3, padding=1)], 4, False),
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 6), nn.Flatten()], 8, False),
    ],
)
@torch.no_grad()
def test_what_holds_for_one_size_alone_says_so(layers, size, every):
    """And what doesn't say so holds for every size."""
    net = nn.Sequential(*layers).double().eval()
    folded = linl.fold(net, torch.randn(1, 3, size, size).double(), objective="depth")
    assert (
        folded.fold_report.merged and (not folded.fold_report.table["reason"].str.contains("positions").any()) == every
    )
    apart = []
    for other in range(size, size + 24):
        x = torch.randn(1, 3, other, other).double()
        try:
            a, b = net(x), folded(x)
            apart.append(a.shape != b.shape or (a - b).abs().max().item() > 1e-10)
        except RuntimeError:
            apart.append(True)
    assert any(apart) != every and not apart[0]
