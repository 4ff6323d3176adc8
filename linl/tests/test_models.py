"""The networks: parameter counts, activations, sizes they take and refuse, weights."""

import pytest
import torch
from torch import nn

import linl
from linl.graph import trace
from linl.models import InputSizeError, create
from linl.networks import OptionA
from linl.sites import activation_sites

SHARED_WEIGHTS = "weights/cifar10/akamaster_resnet20-12fca82f.th"


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "size", "classes", "count"),
    [
        # METHODS 1.6: 62,387,912 with BatchNorm everywhere and one bias; the rest follows from 1.3
        ("alexnet", 224, 1000, 62_387_912),
        ("alexnet", 32, 10, 24_351_978),
        ("mlp", 32, 10, 9_188_362),
        ("vgg16", 32, 10, 15_250_378),
        ("resnet18", 224, 1000, 11_689_512),  # torchvision's
        ("resnet18", 32, 10, 11_173_962),
        ("resnet18_cifar", 32, 10, 11_173_962),  # a max-pool has no parameters
        ("resnet20", 32, 10, 269_722),  # He et al.: 0.27 M
        ("resnet56", 32, 10, 853_018),  # 0.85 M
        ("mobilenetv2", 224, 1000, 3_504_872),  # torchvision's
        ("efficientnet_lite0", 224, 1000, 4_652_008),  # timm's
        ("vit_tiny", 224, 1000, 5_717_416),  # timm's vit_tiny_patch16_224
    ],
)
def test_parameter_counts(name, size, classes, count):
    with torch.device("meta"):
        net = linl.models.NETWORKS[name]((3, size, size), classes, 1.0)
    assert parameters(net) == count


def test_what_merging_the_last_hidden_layer_saves_is_the_papers_27_percent():
    before, fc7, its_norm = 62_387_912, 4096 * 4096, 2 * 4096
    assert (before - fc7 - its_norm) / before - 1 == pytest.approx(-0.269, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [("mlp", 4), ("alexnet", 7), ("vgg16", 15), ("vgg19", 18), ("resnet18", 17), ("resnet18_cifar", 17),
     ("resnet20", 19), ("resnet32", 31), ("resnet44", 43), ("resnet56", 55), ("mobilenetv2", 35),
     ("efficientnet_lite0", 33), ("efficientnet_lite4", 61), ("vit_tiny", 12)],
)  # fmt: skip
def test_activations_and_a_forward_pass(name, count):
    net = create(name, num_classes=7, width=0.25)
    assert len(activation_sites(trace(net))) == count
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert net.input_size == (3, 32, 32) and net.num_classes == 7


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "mobilenetv2", "efficientnet_lite0"])
def test_large_images(name):
    assert create(name, 5, (3, 224, 224), width=0.25).eval()(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def resolution(net, x, kind=nn.AdaptiveAvgPool2d):
    """Side of the map that the last pooling sees."""
    seen = []
    for module in net.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].shape[-1]))
    net.eval()(x)
    return seen[-1]


def test_small_image_geometry():
    x = torch.randn(1, 3, 32, 32)
    assert resolution(create("resnet18", width=0.25), x) == 2  # 3×3 stem, then the published max-pool
    assert resolution(create("resnet18", width=0.25, stem="cifar"), x) == 4
    assert resolution(create("resnet18_cifar", width=0.25), x) == 4
    assert resolution(create("resnet20", width=0.5), x) == 8
    mobile = create("mobilenetv2", width=0.25).eval()
    lite = create("efficientnet_lite0", width=0.25).eval()
    assert mobile.features(x).shape[-1] == 4, "stem and second stage at stride 1"
    assert lite.forward_features(x).shape[-1] == 4


def test_mlp_for_stability_has_neither_norm_nor_dropout():
    net = create("mlp", 10, (1, 28, 28), hidden=(100, 100), norm=False, dropout=0)
    assert [type(m) for m in net.hidden] == [nn.Linear, nn.ReLU] * 2
    assert parameters(net) == 784 * 100 + 100 + 100 * 100 + 100 + 1000 + 10


def test_grey_images_and_widths():
    assert create("mobilenetv2", 10, (1, 32, 32), width=0.5)(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert create("mlp", 10, (1, 8, 8), width=0.125)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_option_a_shortcut():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = OptionA(2, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2]) and not y[:, [0, 3]].any()


def test_linlnet_initialization():
    torch.manual_seed(0)
    net = create("vgg16", init="linlnet", width=0.5)
    weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    assert weights.std().item() == pytest.approx(0.01, rel=0.01) and abs(weights.mean().item()) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alexnit"}, r"unknown network 'alexnit': choose from mlp, alexnet"),
        ({"name": "mlp", "init": "xavier"}, "unknown init 'xavier'"),
        ({"name": "mlp", "width": 0}, "width = 0: must be above 0"),
        ({"name": "mlp", "num_classes": 0}, "num_classes = 0"),
        ({"name": "mlp", "depth": 3}, "mlp: .*unexpected keyword argument 'depth'"),
        ({"name": "resnet20", "shortcut": "C"}, "shortcut='C'"),
        ({"name": "resnet20", "pretrained": "imagenet"}, "no published ImageNet weights for resnet20"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**arguments)


@pytest.mark.parametrize(("name", "side"), [("alexnet", 8), ("vgg16", 16), ("vgg19", 31), ("vgg16", 1)])
def test_images_that_do_not_fit_are_refused(name, side):
    with pytest.raises(InputSizeError, match=rf"{name}.*\(3, {side}, {side}\)"):
        create(name, 10, (3, side, side), width=0.125)
    with pytest.raises(InputSizeError, match="must be \\(channels, height, width\\)"):
        create(name, 10, (side, side))


def test_the_smallest_image_of_the_large_layout_fits():
    assert create("alexnet", 10, (3, 64, 64), width=0.125).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_weights_travel_through_files(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = create("resnet20", width=0.5)
    x = torch.randn(2, 3, 32, 32)
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "b.th")
    for file in ("a.safetensors", "b.th"):
        other = create("resnet20", width=0.5, pretrained=tmp_path / file)
        assert torch.equal(other.eval()(x), net.eval()(x))
    with pytest.raises(ValueError, match=r"another network: .*of another shape"):
        create("resnet20", pretrained=tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="missing: .*unknown"):
        create("mlp", pretrained=tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*c\.th"):
        create("resnet20", pretrained=tmp_path / "c.th")


def test_published_resnet20_where_it_lies_beside(data_folder):
    """91.73 % on the 10,000 test images with its own normalization; 1,000 of them here."""
    net = create("resnet20", pretrained=data_folder / SHARED_WEIGHTS).eval()
    data = linl.data.load("cifar10", data_folder)
    data.mean, data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data.test = tuple(t[:1000] for t in data.test)
    assert linl.train.evaluate(net, data).accuracy == pytest.approx(0.9173, abs=0.02)
