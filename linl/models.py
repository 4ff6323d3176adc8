"""The networks, as plain `nn.Module`s of standard layers with ordinary activations.

torchvision's MobileNetV2 and timm's EfficientNet-Lite are used as they are. The others are written here
because the published variants differ from the libraries' (METHODS in the README: a BatchNorm after every
layer of LiNLNet's AlexNet and VGG16, 32-pixel stems, option-A shortcuts); `resnet18(stem="imagenet")`
has torchvision's layout and parameter names, so its weights load.

Geometry for 32 pixels: resnet18 has a 3×3 stem and the published max-pool (`stem="linlnet"`) or none
(`stem="cifar"`; by name `resnet18_cifar`, the usual one for CIFAR); MobileNetV2 and EfficientNet-Lite keep full
resolution in the stem and second stage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from linl.files import first_line
from linl.inits import INITS
from linl.networks import MLP, VGG, AlexNet, Autoencoder, BasicBlock, InputSizeError, OptionA, ResNet, Size, scaled  # noqa: F401 - found here too
from linl.weights import archived, is_archive, load_weights_

# --- makers: (input_size, num_classes, width, **options) -> nn.Module ------------------------------


def _mlp(size, classes, width, hidden=(2048, 1024, 512, 512), norm=True, dropout=0.2):
    return MLP(size, classes, [scaled(h, width) for h in hidden], norm, dropout)


def _autoencoder(size, classes, width, hidden=(100, 25, 100)):
    return Autoencoder(size, [scaled(h, width) for h in hidden])


def _alexnet(size, classes, width, dropout=0.5):
    return AlexNet(size, classes, width, dropout)


def _vgg(name):
    return lambda size, classes, width, dropout=0.0: VGG(name, size, classes, width, dropout)


def _resnet18(size, classes, width, stem=None, shortcut="B"):
    stem = stem or ("imagenet" if size[-1] >= 64 else "linlnet")
    if stem not in ("linlnet", "cifar", "imagenet"):
        raise ValueError(f'stem={stem!r}: choose "linlnet", "cifar" or "imagenet"')
    return ResNet((2, 2, 2, 2), 64, stem, _shortcut(shortcut), size[0], classes, width)


def _resnet18_cifar(size, classes, width, shortcut="B"):
    return _resnet18(size, classes, width, "cifar", shortcut)


def _resnet_cifar(depth):
    n = (depth - 2) // 6
    return lambda size, classes, width, shortcut="A": ResNet(
        (n, n, n), 16, "cifar", _shortcut(shortcut), size[0], classes, width
    )


def _shortcut(option: str) -> str:
    if option not in ("A", "B"):
        raise ValueError(f'shortcut={option!r}: choose "A" (subsample and pad) or "B" (1×1 convolution)')
    return option


def _mobilenetv2(size, classes, width, dropout=0.2):
    from torchvision.models import MobileNetV2

    small = size[-1] < 64
    stages = [  # expansion, channels, blocks, stride
        [1, 16, 1, 1], [6, 24, 2, 1 if small else 2], [6, 32, 3, 2], [6, 64, 4, 2],
        [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1],
    ]  # fmt: skip
    net = MobileNetV2(classes, width_mult=width, inverted_residual_setting=stages, dropout=dropout)
    if small:
        net.features[0][0].stride = (1, 1)
    return _first_channels(net, "features.0.0", size[0])


_LITE = {"efficientnet_lite0": (1.0, 1.0, 0.2), "efficientnet_lite1": (1.0, 1.1, 0.2),
         "efficientnet_lite2": (1.1, 1.2, 0.3), "efficientnet_lite3": (1.2, 1.4, 0.3),
         "efficientnet_lite4": (1.4, 1.8, 0.3)}  # fmt: skip
"""Channel multiplier, depth multiplier and dropout, as timm has them."""


def _efficientnet_lite(name):
    def make(size, classes, width, dropout=None):
        import timm
        from timm.models.efficientnet import _gen_efficientnet_lite

        channels, depth, drop = _LITE[name]
        options = {"num_classes": classes, "in_chans": size[0], "drop_rate": drop if dropout is None else dropout}
        if width == 1:
            net = timm.create_model(name, **options)
        else:  # timm has no public way to another width
            net = _gen_efficientnet_lite(name, channels * width, depth, **options)
        if size[-1] < 64:
            net.conv_stem.stride = (1, 1)
            net.blocks[1][0].conv_dw.stride = (1, 1)
        return net

    return make


def _vit_tiny(size, classes, width, patch=None):
    """timm's ViT-Tiny (Touvron et al., 2021) with ReLU for GELU, so that units can be dead; 3 heads.

    Patches of 16 pixels as published; on images below 128 pixels 8 × 8 of them.
    """
    from timm.models.vision_transformer import VisionTransformer

    patch = patch or (16 if size[-1] >= 128 else max(1, size[-1] // 8))
    if size[-1] != size[-2] or size[-1] % patch:
        raise InputSizeError(f"vit_tiny: images of {size[-2]}×{size[-1]} pixels don't divide into patches of {patch}")
    return VisionTransformer(
        img_size=size[-1], patch_size=patch, in_chans=size[0], num_classes=classes, embed_dim=3 * scaled(64, width),
        depth=12, num_heads=3, act_layer=nn.ReLU,
    )  # fmt: skip


def _first_channels(net: nn.Module, path: str, channels: int) -> nn.Module:
    first = net.get_submodule(path)
    if first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(torch.empty(first.out_channels, channels, *first.kernel_size))
        nn.init.kaiming_normal_(first.weight, mode="fan_out")
    return net


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": _mlp,
    "alexnet": _alexnet,
    "vgg16": _vgg("vgg16"),
    "vgg19": _vgg("vgg19"),
    "resnet18": _resnet18,
    "resnet18_cifar": _resnet18_cifar,
    "resnet20": _resnet_cifar(20),
    "resnet32": _resnet_cifar(32),
    "resnet44": _resnet_cifar(44),
    "resnet56": _resnet_cifar(56),
    "mobilenetv2": _mobilenetv2,
    **{name: _efficientnet_lite(name) for name in _LITE},
    "autoencoder": _autoencoder,
    "vit_tiny": _vit_tiny,
}


def create(
    name: str,
    num_classes: int = 10,
    input_size: Size = (3, 32, 32),
    *,
    width: float = 1.0,
    init: str = "default",
    pretrained: str | Path | None = None,
    **options,
) -> nn.Module:
    """A network by name.

    Args:
        name: one of `linl.models.NETWORKS`.
        num_classes: length of the output.
        input_size: (channels, height, width) of an image.
        width: multiplies every hidden width, rounded to multiples of 8; for trial runs.
        init: "default" (the layers' own), "linlnet" or "linlnet-imagenet" (the paper's code), "kaiming".
        pretrained: None; "imagenet" for the weights of torchvision (alexnet, vgg16, vgg19, resnet18, mobilenetv2)
            or timm (efficientnet_lite0-4: Google's, for inputs from -1 to 1), whose own layout is then built; a file
            of weights (.safetensors, .pt, .pth, .th) for this layout; or, for mobilenetv2, an archive of TensorFlow's
            weights (.npz, see `linl.weights`), in whose layout it is built, with a head of its classes.
        options: of the network: mlp(hidden, norm, dropout), alexnet/vgg/mobilenetv2/efficientnet_lite
            (dropout), resnet18(stem="linlnet" | "cifar" | "imagenet", shortcut), resnet18_cifar(shortcut),
            resnet20-56(shortcut), vit_tiny(patch).

    Returns: an `nn.Module` in train mode, with `.input_size`, `.num_classes` and, for this layout, `.made_by`: what
        builds it again elsewhere, without its weights.

    Raises:
        ValueError: an unknown name, init or option, or weights of another network.
        InputSizeError: images that the network can't take.
        FileNotFoundError: no such file of weights.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(NETWORKS)}")
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: choose from {', '.join(INITS)}")
    if not width > 0:
        raise ValueError(f"width = {width}: must be above 0")
    size = tuple(int(n) for n in input_size)
    if len(size) != 3 or min(size) < 1:
        raise InputSizeError(f"input_size = {input_size}: must be (channels, height, width)")
    if num_classes < 1:
        raise ValueError(f"num_classes = {num_classes}: must be at least 1")
    if pretrained == "imagenet":
        try:
            net = _published(name, num_classes)
        except OSError as error:  # URLError among them
            raise FileNotFoundError(
                f"the published weights of {name} can't be had ({error}): create it once where there is a "
                "network, they stay in the caches of torch and timm; or name a file of weights"
            ) from error
    elif is_archive(pretrained):
        net = archived(name, num_classes, pretrained)
    else:
        _check_size(name, size, num_classes, width, options)
        net = NETWORKS[name](size, num_classes, width, **options)
        INITS[init](net)
        if pretrained is not None:
            load_weights_(net, pretrained)
    net.input_size, net.num_classes = size, num_classes
    if pretrained != "imagenet" and not is_archive(pretrained):  # those have layouts of their own
        net.made_by = {"name": name, "num_classes": num_classes, "input_size": list(size), "width": width, **options}
    return net


def _check_size(name: str, size: Size, classes: int, width: float, options: dict) -> None:
    """Builds and runs the network without memory or arithmetic, so that a wrong size costs nothing."""
    try:
        with torch.device("meta"):
            net = NETWORKS[name](size, classes, width, **options).eval()
            net(torch.empty(1, *size))
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"{name}: {str(error).split('()')[-1].strip()}") from None
        raise
    except InputSizeError as error:
        raise InputSizeError(f"{name}: {error}") from None
    except RuntimeError as error:
        raise InputSizeError(f"{name} can't take images of {size}: {first_line(error)}") from None


def _published(name: str, num_classes: int) -> nn.Module:
    """torchvision's or timm's own network with its ImageNet weights; a new head for other class counts."""
    if name.startswith("efficientnet_lite"):
        import timm

        return timm.create_model(f"tf_{name}", pretrained=True, num_classes=num_classes)  # of all five sizes
    import torchvision.models as tv

    makers = {
        "alexnet": tv.alexnet,
        "vgg16": tv.vgg16_bn,
        "vgg19": tv.vgg19_bn,
        "resnet18": tv.resnet18,
        "mobilenetv2": tv.mobilenet_v2,
    }
    if name not in makers:
        raise ValueError(f"no published ImageNet weights for {name}; there are for {', '.join(makers)}")
    net = makers[name](weights="DEFAULT")
    head_owner = net if hasattr(net, "fc") else net.classifier
    key = "fc" if hasattr(net, "fc") else str(len(net.classifier) - 1)
    head = head_owner.get_submodule(key)
    if head.out_features != num_classes:
        setattr(head_owner, key, nn.Linear(head.in_features, num_classes))
    return net
