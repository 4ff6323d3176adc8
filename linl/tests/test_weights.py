"""Archived weights: the layout they bring, their norms put back, some of their classes."""

import numpy as np
import pytest
import torch
from torch import nn

import linl
from linl.weights import only_classes_, restore_norms_


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A made-up archive of MobileNetV2, as published ones are: int8 weights, scales, biases, 11 classes."""
    from torchvision.models import MobileNetV2

    torch.manual_seed(0)
    net, arrays = MobileNetV2(num_classes=11), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scale = module.weight.detach().flatten(1).abs().amax(1) / 127
            quantized = (module.weight.detach() / scale.view(-1, *[1] * (module.weight.ndim - 1))).round()
            arrays[f"{name}.weight_q"] = quantized.to(torch.int8).numpy()
            arrays[f"{name}.weight_scale"] = scale.numpy()
            arrays[f"{name}.bias"] = np.random.default_rng(0).normal(size=len(scale)).astype("float32") * 0.1
    path = tmp_path_factory.mktemp("weights") / "net.npz"
    np.savez(path, **arrays)
    return path


def test_an_archive_brings_its_own_layout(archive):
    net = linl.models.create("mobilenetv2", 11, (3, 64, 64), pretrained=archive).eval()
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5 and all(m.padding == (0, 0) for m in strided)
    with np.load(archive) as arrays:
        want = arrays["features.1.conv.1.weight_q"] * arrays["features.1.conv.1.weight_scale"][:, None, None, None]
        assert torch.equal(net.features[1].conv[1].weight, torch.from_numpy(want).float())
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 11)


def test_asymmetric_padding_folds_exactly(archive):
    """TensorFlow pads a stride-2 convolution behind the image only."""
    net = linl.models.create("mobilenetv2", 11, (3, 64, 64), pretrained=archive).double().eval()
    bare = linl.harden(linl.linearize(net, "partial", start=1.0)).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    head = linl.harden(linl.linearize(net.features[:3], "partial", start=1.0)).eval()
    small = linl.fold(bare, x, objective="macs")
    assert linl.verify(bare, small, x).equal
    padded = linl.pad_first(head, x)
    one = linl.fold(padded, x, objective="depth")
    assert linl.verify(padded, one, x).equal and (linl.cost.depth(head), linl.cost.depth(one)) == (6, 1)


def test_restored_norms_change_nothing_in_evaluation(archive):
    net = linl.models.create("mobilenetv2", 11, (3, 64, 64), pretrained=archive).eval()
    x = torch.randn(8, 3, 64, 64)
    before = net(x)
    restore_norms_(net, x)
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 52 and not any(m.training for m in norms)
    assert not [m for m in linl.fold(net, x, objective="macs").modules() if isinstance(m, nn.BatchNorm2d)]
    net.train()(x)
    assert any(not torch.equal(m.running_mean, m.bias) for m in norms), "they work in training"


def test_some_classes_of_a_head():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))
    x = torch.randn(3, 2, 2)
    before = net(x)
    only_classes_(net, [5, 1])
    torch.testing.assert_close(net(x), before[:, [5, 1]])
    assert net.num_classes == 2
    with pytest.raises(ValueError, match="outputs 0 to 1"):
        only_classes_(net, [2])


def test_wrong_archives_are_refused(archive, tmp_path):
    with pytest.raises(ValueError, match="not of resnet18's"):
        linl.models.create("resnet18", 11, pretrained=archive)
    with pytest.raises(ValueError, match="has 11 classes, not 10"):
        linl.models.create("mobilenetv2", 10, pretrained=archive)
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match="holds no weights of mobilenetv2"):
        linl.models.create("mobilenetv2", 10, pretrained=tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        linl.models.create("mobilenetv2", 10, pretrained=tmp_path / "none.npz")
