"""Convolutions of few pixels trained as products: the same sums, where it pays, and everything as before afterwards."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl import small_images
from linl.small_images import products_where_images_are_small

CPU = torch.device("cpu")


@pytest.fixture
def however_few(monkeypatch):
    """Networks of a test are too small for it to pay."""
    monkeypatch.setattr(small_images, "CHANNELS", 0)
    monkeypatch.setattr(small_images, "LEAST", 0)
    monkeypatch.setattr(small_images, "LEAST_OF_KERNELS", 0)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def gradients(net, x, quick):
    with (
        products_where_images_are_small(net, CPU, "bf16" if quick else "fp32"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = F.cross_entropy(net(x).float(), torch.arange(len(x)) % 4)
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.usefixtures("however_few")
def test_a_networks_gradients_are_those_of_torch_but_for_rounding():
    net, x = network(), torch.randn(16, 3, 8, 8)  # outputs of 8×8, three times 4×4, and twice 2×2 pixels
    exact = copy.deepcopy(net).double()
    F.cross_entropy(exact(x.double()), torch.arange(16) % 4).backward()
    torchs, ours = gradients(copy.deepcopy(net), x, False), gradients(copy.deepcopy(net), x, True)
    assert any(not torch.equal(torchs[name], ours[name]) for name in torchs), "ours was asked"
    for name, p in exact.named_parameters():
        right = p.grad
        apart = {
            who: ((g[name] - right).norm() / right.norm()).item() for who, g in (("torch", torchs), ("linl", ours))
        }
        assert ours[name].dtype == torch.float32 and apart["linl"] <= 1.5 * apart["torch"] + 1e-3, (name, apart)


@pytest.mark.usefixtures("however_few")
def test_evaluation_and_float32_are_torchs_own_and_nothing_stays():
    net, x = network(), torch.randn(4, 3, 8, 8)
    before, names = net(x), set(net.state_dict())
    with products_where_images_are_small(net, CPU, "bf16"):
        assert torch.equal(net(x), before), "float32, outside of autocast"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inside = net(x)
        assert set(net.state_dict()) == names
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), inside)
    assert not any("_conv_forward" in vars(module) for module in net.modules())


def test_it_is_undone_after_an_error():
    net = network()
    with pytest.raises(ZeroDivisionError), products_where_images_are_small(net, CPU, "bf16"):
        1 / 0
    assert not any("_conv_forward" in vars(module) for module in net.modules())


@pytest.mark.parametrize("device, precision", [("cpu", "fp32"), ("meta", "bf16")])
def test_elsewhere_nothing_is_changed(device, precision):
    net = network()
    with products_where_images_are_small(net, torch.device(device), precision):
        assert not any("_conv_forward" in vars(module) for module in net.modules())


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("side", [2, 4])
def test_a_gradient_of_a_gradient(side):
    conv, x, found = nn.Conv2d(4, 4, 3, padding=1), torch.randn(3, 4, side, side, requires_grad=True), []
    for precision in ("fp32", "bf16"):
        with products_where_images_are_small(conv, CPU, precision), torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        (first,) = torch.autograd.grad(y.float().pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), conv.weight)[0])
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


def marked(net):
    return [module for module in net.modules() if "_conv_forward" in vars(module)]


def test_one_within_another_and_a_forward_pass_of_somebodys_own():
    net = network()
    own = net[2]._conv_forward = lambda x, weight, bias: x
    with products_where_images_are_small(net, CPU, "bf16"):
        assert marked(net) == [net[0], net[2], net[4], net[8], net[9]]
        with products_where_images_are_small(net, CPU, "bf16"):
            pass
        assert marked(net) == [net[0], net[2], net[4], net[8], net[9]]
    assert marked(net) == [net[2]] and net[2]._conv_forward is own


@pytest.mark.usefixtures("however_few")
def test_a_copy_made_inside_is_torchs_own(tmp_path):
    net, x = network(), torch.randn(4, 3, 8, 8)
    with products_where_images_are_small(net, CPU, "bf16"):
        copied = copy.deepcopy(net)
        torch.save(net, tmp_path / "net.pt")
    saved = torch.load(tmp_path / "net.pt", weights_only=False)  # this test's own file
    assert b"small_images" not in (tmp_path / "net.pt").read_bytes()
    for other in (copied, saved):
        for module in other.modules():
            module.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            y = other(x)
        assert "ByProducts" not in seen(y.grad_fn) and torch.equal(other(x), net(x))


def seen(node, found=None):
    """Names of the backward pass."""
    found = set() if found is None else found
    if node is not None and node not in found:
        found.add(node)
        for before, _ in node.next_functions:
            seen(before, found)
    return " ".join(str(type(one).__name__) for one in found)


def ways(conv, images, sides):
    """What of a convolution is by products, for square images of several sizes."""
    found = {}
    with products_where_images_are_small(conv, CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        for n, side in itertools.product(images, sides):
            names = seen(conv(torch.randn(n, conv.in_channels, side, side, requires_grad=True)).grad_fn)
            found[n, side] = next((way for way in ("AllByProducts", "KernelByProducts") if way in names), "")
    return found


def test_where_it_would_not_pay_nothing_is_changed():
    every, kernel = "AllByProducts", "KernelByProducts"
    assert ways(nn.Conv2d(128, 128, 3, padding=1), (8, 64, 512), (2, 4, 5)) == {
        (8, 2): "", (8, 4): "", (8, 5): "", (64, 2): every, (64, 4): "", (64, 5): "",
        (512, 2): every, (512, 4): kernel, (512, 5): "",
    }  # fmt: skip
    of_one_pixel = {(512, 1): every, (512, 2): kernel, (512, 4): ""}
    assert ways(nn.Conv2d(128, 128, 1), (512,), (1, 2, 4)) == of_one_pixel
    assert set(ways(nn.Conv2d(64, 256, 3, padding=1), (1024,), (2, 4)).values()) == {""}, "few channels"


@pytest.mark.usefixtures("however_few")
def test_what_isnt_for_products_is_torchs_error_or_answer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    with products_where_images_are_small(conv, CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(4, 2, 2)).shape == (4, 2, 2), "no batch"
        with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
            conv(torch.randn(2, 3, 2, 2))
        conv.padding = (0, 0)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            conv(torch.randn(2, 4, 2, 2))
        double = conv.double()
        assert double(torch.randn(2, 4, 4, 4).double()).dtype == torch.float64


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x)
        y += x
        return y


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True)), Sum()]
)
@pytest.mark.parametrize("side", [2, 4])
def test_what_follows_may_change_the_output_in_place(net, side):
    x = torch.randn(3, 4, side, side, requires_grad=True)
    gradients = []
    for precision in ("fp32", "bf16"):
        with products_where_images_are_small(net, CPU, precision), torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert ("ByProducts" in seen(y.grad_fn)) == (precision == "bf16")
        gradients.append(torch.autograd.grad(y.float().pow(2).sum(), [x, *net.parameters()]))
    for torchs, ours in zip(*gradients, strict=True):
        assert (torchs - ours).norm() < 0.02 * torchs.norm()


@pytest.mark.usefixtures("however_few")
def test_only_bf16_is_ours_and_only_what_is_trained():
    net, x = network(), torch.randn(4, 3, 8, 8)
    with products_where_images_are_small(net, CPU, "bf16"):
        with torch.autocast("cpu", torch.bfloat16):
            assert "ByProducts" in seen(net(x).grad_fn)
        with torch.autocast("cpu", torch.float16):
            assert "ByProducts" not in seen(net(x).grad_fn)
        for module in (net[2], net[4], net[8], net[9]):
            module.weight.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert "ByProducts" not in seen(net(x).grad_fn)


@pytest.mark.usefixtures("however_few")
def test_training_uses_it(monkeypatch):
    """And ends with the network as it was."""
    called = []
    real = small_images.kernel_gradient
    monkeypatch.setattr(small_images, "kernel_gradient", lambda *given: called.append(1) or real(*given))
    digits = linl.data.load("digits", limit=64)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.Flatten(), nn.Linear(16, 10))
    how = {"device": "cpu", "verbose": False}
    linl.train.fit(net, digits, linl.train.recipe("linlnet-digits", epochs=1), precision="fp32", **how)
    assert not called
    linl.train.fit(net, digits, linl.train.recipe("linlnet-digits", epochs=1), precision="bf16", **how)
    assert called and not marked(net)
