"""Folding other people's networks: torchvision's and timm's, with units linear at random places."""

import copy
import random

import pytest
import torch
from torch import nn

import linl
from linl.tests.test_folding import shaken
from linl.tests.test_linearize import network
from linl.units import units_of

SIDES = {"torchvision alexnet": 96, "torchvision vgg16_bn": 32}
LABELS = ["torchvision alexnet", "torchvision vgg16", "torchvision resnet18", "torchvision mobilenet_v2",
          "timm mobilenetv2_100", "timm efficientnet_lite0"]  # fmt: skip


def narrow(label):
    """A network whose 4096-wide dense layers are 64 wide: the same wiring, seconds instead of a minute."""
    net = copy.deepcopy(network(label))
    dense = [m for m in getattr(net, "classifier", nn.Module()).children() if isinstance(m, nn.Linear)]
    for i, layer in enumerate(dense if len(dense) == 3 else []):
        inputs, outputs = (layer.in_features if i == 0 else 64), (10 if i == 2 else 64)
        layer.__init__(inputs, outputs)
    return net


def partly_linear(label, seed, share=0.5):
    """A network with random statistics and a share of its activations linear, hardened, in eval mode."""
    random.seed(seed), torch.manual_seed(seed)
    net = linl.linearize(shaken(narrow(label)), "partial").eval()
    with torch.no_grad():
        for unit in units_of(net).values():
            unit.alpha.fill_(1.0 if random.random() < share else random.choice((0.0, 0.3)))
    return linl.harden(net)


@pytest.mark.parametrize("label", LABELS)
def test_units_linear_at_random_places(label):
    hard = partly_linear(label, seed=len(label)).double()
    side = SIDES.get(label, 64 if "resnet" in label else 32)
    x, other = torch.randn(1, 3, side, side, dtype=torch.float64), torch.randn(2, 3, side, side, dtype=torch.float64)
    small = linl.fold(hard, x, objective="macs")
    for images in (x, other):
        want = hard(images)
        assert (small(images) - want).abs().max() <= 1e-10 * max(1, want.abs().max())
    assert not [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before, after = (linl.measure(n, x, batches=()).table.iloc[0] for n in (hard, small))
    assert after["gmacs"] <= before["gmacs"] and after["depth"] <= before["depth"]
    assert small.fold_report.table["error_interior"].max() < 1e-10


@pytest.mark.parametrize("label", ["timm mobilenetv2_100", "timm efficientnet_lite0"])
def test_logits_of_folded_timm_networks_agree_in_float32(label):
    net = copy.deepcopy(network(label)).eval()
    x = torch.randn(2, 3, 64, 64)
    small = linl.fold(net, x, objective="macs")
    torch.testing.assert_close(small(x), net(x), atol=1e-4, rtol=1e-4)
    assert not [m for m in small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_an_inverted_bottleneck_becomes_one_exact_convolution():
    """1×1, 3×3 depthwise, 1×1 with the skip: exact at the border too, by a bias map."""
    from torchvision.models.mobilenetv2 import InvertedResidual

    torch.manual_seed(0)
    block = shaken(InvertedResidual(8, 8, 1, 6))
    for i in (0, 1):
        block.conv[i][2] = nn.Identity()
    block = block.double().eval()
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    small = linl.fold(block, x, objective="depth")
    assert (small(x) - block(x)).abs().max() < 1e-12
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in convs] == [(8, 8, 3, 3)]
    assert "bias map" in small.fold_report.table["reason"].iloc[0]
    assert [tuple(p.shape) for p in small.parameters()].count((8, 9, 11)) == 1
    with pytest.raises(RuntimeError):
        small(torch.randn(2, 8, 5, 5, dtype=torch.float64))
    padded = linl.pad_first(block, x)
    plain = linl.fold(padded, x, objective="depth")
    assert (plain(x) - padded(x)).abs().max() < 1e-12
    assert len(list(plain.parameters())) == 2
    plain(torch.randn(2, 8, 5, 5, dtype=torch.float64))


def test_folded_networks_do_without_linl(tmp_path):
    """A folded network is torch's own layers: it loads in a process that has never heard of linl."""
    import subprocess
    import sys

    hard = partly_linear("timm mobilenetv2_100", 3)
    x = torch.randn(1, 3, 32, 32)
    small = linl.fold(hard, x, objective="depth")
    torch.save(small, tmp_path / "small.pt")
    torch.save((x, small(x)), tmp_path / "pair.pt")
    code = (
        "import sys, torch; sys.modules['linl'] = None\n"
        "net = torch.load('small.pt', weights_only=False); x, y = torch.load('pair.pt')\n"
        "assert torch.equal(net(x), y)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def on_digits():
    """A folded ResNet and its original, and real pictures for them."""
    torch.manual_seed(0)
    net = linl.models.create("resnet20", 10, width=0.5)
    lin = linl.linearize(shaken(net), "partial")
    with torch.no_grad():
        for i, unit in enumerate(units_of(lin).values()):
            unit.alpha.fill_(float(i % 3 != 0))
    hard = linl.harden(lin).eval()
    images, _ = next(linl.data.load("digits", size=32, channels=3).batches("test", 16))
    return hard, linl.fold(linl.pad_first(hard, images).eval(), images, objective="depth"), images


def test_torch_export_of_a_folded_network(on_digits):
    _, small, images = on_digits
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, (images,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images[:5]), small(images[:5]))


def test_onnx_export_agrees_on_real_pictures(on_digits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, small, images = on_digits
    torch.onnx.export(small, (images,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small(images).detach(), atol=1e-4, rtol=1e-4)


def test_a_bias_map_is_exported_too(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 7, 9)
    small = linl.fold(net, x, objective="depth")
    assert linl.cost.depth(small) == 1 and "bias map" in small.fold_report.table["reason"].iloc[0]
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), atol=1e-5, rtol=1e-5)
