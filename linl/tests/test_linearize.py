"""linearize on other people's networks: nothing left nonlinear, nothing changed."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl.graph import UntraceableError, trace
from linl.sites import activation_sites
from linl.tests.small_nets import made
from linl.units import units_of


def torchvision_net(name):
    import torchvision.models as tv

    return getattr(tv, name)(num_classes=10)


def timm_net(name):
    import timm

    return timm.create_model(name, num_classes=10)


NETWORKS = {
    "torchvision alexnet": (torchvision_net, "alexnet", 7, 64),
    "torchvision vgg16": (torchvision_net, "vgg16", 15, 32),
    "torchvision vgg16_bn": (torchvision_net, "vgg16_bn", 15, 32),
    "torchvision resnet18": (torchvision_net, "resnet18", 17, 32),
    "torchvision mobilenet_v2": (torchvision_net, "mobilenet_v2", 35, 32),
    "timm mobilenetv2_100": (timm_net, "mobilenetv2_100", 35, 32),
    "timm efficientnet_lite0": (timm_net, "efficientnet_lite0", 33, 32),
}


@functools.cache
def network(label):
    make, name, _, _ = NETWORKS[label]
    torch.manual_seed(0)
    return make(name)


def halved(net):
    """The network with ½·ReLU for every ReLU, LeakyReLU and ReLU6."""

    class Half(nn.Module):
        def forward(self, x):
            return 0.5 * F.relu(x)

    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, name, Half())
    return net


@pytest.mark.parametrize("label", NETWORKS)
def test_units_and_equality(label):
    _, _, count, side = NETWORKS[label]
    net = network(label).eval()
    x = torch.randn(2, 3, side, side)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    partial, linlu = linl.linearize(net, "partial"), linl.linearize(net, "linlu")
    with torch.no_grad():
        for unit in units_of(linlu).values():
            unit.p.fill_(0.5)
        assert len(units_of(partial)) == len(units_of(linlu)) == count
        assert torch.equal(partial(x), net(x)), "alpha = 0 is the network itself"
        assert torch.equal(linlu(x), halved(net)(x)), "p = ½ is the network with ½·ReLU"
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), "the argument is left alone"
    assert not [m for m in linlu.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    assert set(state) <= set(linlu.state_dict()), "parameters keep their names"


@pytest.mark.parametrize("label", ["torchvision resnet18", "timm mobilenetv2_100", "timm efficientnet_lite0"])
def test_one_training_step_is_the_originals(label):
    """Weights and running statistics after a step; traced-through BatchNorms would stop learning here."""
    _, _, _, side = NETWORKS[label]
    original = copy.deepcopy(network(label)).train()
    twin = linl.linearize(original, "partial")
    assert twin.training
    x, y = torch.randn(4, 3, side, side), torch.arange(4)
    before = copy.deepcopy(twin.state_dict())
    for net in (original, twin):
        optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if not n.endswith("alpha")], lr=0.1)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    after, moved = twin.state_dict(), 0
    for name, value in original.state_dict().items():
        assert torch.equal(after[name], value), name
        moved += not torch.equal(before[name], value)
    assert moved > len(before) // 3
    assert any("running_mean" in name and not torch.equal(before[name], after[name]) for name in after)


def test_train_and_eval_still_switch():
    from timm.layers import DropPath

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.path, self.act = nn.Linear(8, 8), DropPath(0.5), nn.ReLU()

        def forward(self, x):
            return F.dropout(self.path(self.act(self.fc(x))), 0.5, self.training)

    net = linl.linearize(Net(), "partial")
    x = torch.randn(64, 8)
    assert not torch.equal(net.train()(x), net.train()(x))
    assert torch.equal(net.eval()(x), net.eval()(x))
    assert [type(m) for m in net.modules() if isinstance(m, nn.Dropout)] == [nn.Dropout]


def test_functional_activations_are_found():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = F.leaky_relu(self.a(x), 0.2)
            x = torch.tanh(self.b(x)).relu()
            x = F.gelu(x, approximate="tanh") + x.clamp(min=0)
            return F.softplus(x, 2.0) * torch.sigmoid(x)

    net, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    twin = linl.linearize(net, "partial")
    kinds = [type(unit.activation).__name__ for unit in units_of(twin).values()]
    assert kinds == ["LeakyReLU", "Tanh", "ReLU", "GELU", "ReLU", "Softplus", "Sigmoid"]
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=1e-15)
    assert units_of(twin)["gelu"].activation.approximate == "tanh"


def test_one_module_called_twice_gives_two_units():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    twin = linl.linearize(Net(), "linlu")
    assert list(units_of(twin)) == ["act", "act_1"]


def test_in_place_activations_keep_their_side_effect():
    """A pre-activation block whose shortcut reads what the in-place ReLU changed."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.fc(x)
            return self.fc(self.act(h)) + h

    net, x = Net(), torch.randn(5, 4)
    assert torch.equal(linl.linearize(net, "partial")(x), net(x))


def test_the_linlnet_unit_refuses_what_it_cannot_be():
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"1 \(GELU\), 3 \(Tanh\)"):
        linl.linearize(net, "linlu")
    assert len(units_of(linl.linearize(net, "partial"))) == 3


def test_a_dropped_cap_is_reported():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU6())
    assert linl.linearize(net, "linlu").linearize_notes == ["1: cap of ReLU6 dropped"]
    assert linl.harden(linl.linearize(net, "linlu")).linearize_notes, "kept on the way"
    assert linl.linearize(net, "partial").linearize_notes == []


@pytest.mark.parametrize("operation", [lambda x: x.clamp(-1, 1), lambda x: torch.maximum(x, -x), F.glu])
def test_what_bends_but_is_no_activation_is_refused_by_name(operation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return operation(F.relu(self.fc(x)))

    with pytest.raises(ValueError, match="clamp|maximum|glu"):
        linl.linearize(Net(), "partial")


def test_data_dependent_control_flow_is_refused_with_a_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x) if x.sum() > 0 else x

    with pytest.raises(UntraceableError, match="Net can't be traced"):
        linl.linearize(Net())


def test_a_forward_that_differs_in_training_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            x = self.act(self.fc(x))
            return (x, x + 1) if self.training else x

    with pytest.raises(UntraceableError, match="something else in training"):
        linl.linearize(Net())


def test_bad_arguments():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"unknown unit 'lu'.*linlu, partial"):
        linl.linearize(net, "lu")
    with pytest.raises(ValueError, match="per='neuron'"):
        linl.linearize(net, per="neuron")
    with pytest.raises(ValueError, match="no activation"):
        linl.linearize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="already"):
        linl.linearize(linl.linearize(net))
    with pytest.raises(ValueError, match="pass example="):
        linl.linearize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), per="channel")


def test_per_channel():
    net = network("timm mobilenetv2_100").eval()
    twin = linl.linearize(net, "partial", per="channel", example=torch.randn(2, 3, 32, 32))
    widths = {site.name: site.module for site in activation_sites(trace(net))}
    assert len(widths) == 35 and all(unit.alpha.ndim == 1 for unit in units_of(twin).values())
    assert units_of(twin)["bn1.act"].alpha.shape == (32,)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-5, atol=1e-5)
    ours = linl.models.create("resnet20")
    assert units_of(linl.linearize(ours, per="channel"))["act"].p.shape == (16,)


def test_units_take_device_dtype_and_start():
    twin = linl.linearize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double(), "linlu", start=0.6)
    unit = units_of(twin)["1"]
    assert unit.p.dtype == torch.float64 and unit.p.item() == pytest.approx(0.6)


def test_seventeen_rows():
    net = linl.models.create("resnet18", num_classes=10, input_size=(3, 32, 32))
    assert len(linl.nonlinearity(linl.linearize(net, "linlu"))) == 17


def test_a_units_name_never_takes_a_layers_place():
    net, x = (
        made(lambda s, x: torch.tanh(s.tanh(F.relu(s.relu(x)))), relu=nn.Linear(4, 4), tanh=nn.Linear(4, 4)),
        torch.randn(3, 4),
    )
    assert torch.equal(linl.linearize(net, "partial")(x), net(x))


def test_in_place_through_an_identity_and_on_a_view():
    x = torch.randn(3, 4)
    net = made(
        lambda s, x: s.fc(s.act(s.norm(x))) + x, fc=nn.Linear(4, 4), norm=nn.Identity(), act=nn.ReLU(inplace=True)
    )
    assert torch.equal(linl.linearize(net, "partial")(x.clone()), net(x.clone()))

    def forward(s, x):
        h = s.fc(x)
        return s.act(h.view(-1)).sum() + h

    net = made(forward, fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="in place on a view of something that is used later"):
        linl.linearize(net, "partial")


def test_dropout_that_ignores_the_mode_is_left_alone():
    off = made(lambda s, x: F.dropout(F.relu(s.fc(x)), 0.5, training=False), fc=nn.Linear(8, 8))
    x = torch.randn(4, 8)
    assert torch.equal(linl.linearize(off, "partial").train()(x), off(x))
    on = linl.linearize(
        made(lambda s, x: F.dropout(F.relu(s.fc(x)), 0.5, training=True), fc=nn.Linear(8, 8)), "partial"
    )
    assert not torch.equal(on.eval()(x), on.eval()(x)), "Monte-Carlo dropout stays on"


def test_attributes_buffers_and_optional_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.dropout = nn.Linear(4, 4), 0.5
            self.register_buffer("mean", torch.randn(4))

        def forward(self, x, mask=None, scale=2.0):
            x = F.relu(self.fc((x - self.mean[None]) / torch.tensor([2.0])))
            if mask is not None:
                x = x * mask
            return F.dropout(x, self.dropout, self.training) * scale

    net, x = Net().eval(), torch.randn(3, 4)
    twin = linl.linearize(net, "partial")
    assert torch.equal(twin(x), net(x))
    net.mean.zero_(), twin.mean.zero_()
    assert torch.equal(twin(x), net(x)), "a buffer stays a buffer"


@pytest.mark.parametrize(
    "layer", [nn.GLU(), nn.LSTM(4, 4), nn.TransformerEncoderLayer(4, 2, 8)], ids=lambda m: type(m).__name__
)
def test_layers_with_hidden_activations_are_refused_by_name(layer):
    net = made(lambda s, x: s.odd(F.relu(s.fc(x))), fc=nn.Linear(4, 4), odd=layer)
    with pytest.raises(ValueError, match=rf"odd \({type(layer).__name__} has its activation inside\)"):
        linl.linearize(net, "partial")


def test_a_shared_unit_is_hardened_at_each_of_its_places():
    fc, unit = nn.Linear(4, 4), linl.LiNLU(0.7)
    hard = linl.harden(nn.Sequential(fc, unit, fc, unit))
    assert not units_of(hard) and hard[1] is hard[3]
    assert type(linl.harden(linl.LiNLU(1.0))) is nn.Identity


def test_units_come_in_the_order_of_the_forward_pass():
    """Functional activations become modules of the traced network, added last; they are listed where they act."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.a, self.b = nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.late(self.b(F.relu(self.a(torch.tanh(x)))))

    units = linl.nonlinearity(linl.linearize(Net(), "partial"))["name"].tolist()
    assert units == ["tanh", "relu", "late"]


def _second(s, x):
    y = s.fc(x)
    old = y
    y += 1
    return F.relu(y) + old


def _views(s, x):
    y = s.fc(x)
    row = y.view(-1)
    y *= 2
    return F.relu(y) + row.view(y.shape)


def _through_an_identity(s, x):
    y = s.fc(x)
    z = s.none(y)
    z -= 1
    return F.relu(y) + s.other(z)


def _through_an_activation(s, x):
    y = s.fc(x)
    z = s.act(y)
    z += 1
    return s.other(z) + y


def _in_eval_mode(s, x):
    y = s.fc(x)
    z = F.dropout(y, training=s.training)
    z **= 2
    return F.relu(z) + y


def _transposed(s, x):
    y = s.fc(x)
    z = y.mT
    z += 1
    return F.relu(z).mT + y


@pytest.mark.parametrize(
    "forward", [_second, _views, _through_an_identity, _through_an_activation, _in_eval_mode, _transposed]
)
def test_plus_equals_under_a_second_name_is_refused_where_there_is_no_example(forward):
    """torch.fx reads it as a new value: the twin would compute something else."""
    net = made(forward, fc=nn.Linear(4, 4), none=nn.Identity(), other=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    for attempt in (linl.linearize, linl.fold_norms, lambda net: linl.fold(net, x)):
        with pytest.raises(ValueError, match=r"changed in place \(\+=.*y = y \+ z"):
            attempt(net)


def test_plus_equals_is_welcome_where_nothing_else_holds_on_to_the_value():
    def forward(s, x):
        y = s.fc(x)
        y += s.none(x)
        y = F.relu(y)
        y *= 2
        y += 1
        return s.other(y)

    net, x = made(forward, fc=nn.Linear(4, 4), none=nn.Identity(), other=nn.Linear(4, 4)), torch.randn(3, 4)
    assert torch.equal(linl.linearize(net, "partial")(x), net(x))


def _sizes(s, x):
    h, w = x.shape[0], x.shape[-1]
    h *= 1
    w *= 2
    y = F.relu(s.fc(x))
    old = y
    y = torch.cat([y, y], 1)
    return y.reshape(old.size(0), w)


def _halves(s, x):
    a, b = F.relu(s.fc(x)).chunk(2, 1)
    a += b.tanh()
    b += a.tanh()
    return torch.cat([a, b], 1)


def _only_its_size(s, x):
    y = s.fc(x)
    old = y
    y += 1
    return F.relu(y).reshape(old.size(0), -1)


@pytest.mark.parametrize("forward", [_sizes, _halves, _only_its_size])
@torch.no_grad()
def test_plus_equals_of_sizes_and_of_parts_that_do_not_overlap(forward):
    net, x = made(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4)
    assert torch.equal(linl.linearize(net, "partial")(x), net(x))


@pytest.mark.parametrize("pre", [False, True])
def test_hooks_on_the_network_itself_stay(pre):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval(), torch.randn(3, 4)
    plain = net(x)
    if pre:
        net.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    else:
        net.register_forward_hook(lambda module, given, output: output + 1)
    assert not torch.equal(net(x), plain)
    assert torch.equal(linl.linearize(net, "partial")(x), net(x))
    torch.testing.assert_close(linl.fold_norms(net)(x), net(x))
    torch.testing.assert_close(linl.fold(net, x)(x), net(x))
    assert linl.verify(net, linl.fold_norms(net), x).equal


def test_hooks_that_compute_the_networks_own_weight_are_not_carried_over():
    net, x = nn.utils.weight_norm(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    assert torch.equal(linl.graph.trace(net)(x), net(x)) and torch.allclose(linl.fold(net, x)(x), net(x))
