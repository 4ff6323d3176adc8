"""The networks, as plain `nn.Module`s of standard layers with ordinary activations.

torchvision's MobileNetV2 and timm's EfficientNet-Lite are used as they are. The others are written here
because the published variants differ from the libraries' (METHODS in the README: a BatchNorm after every
layer of LiNLNet's AlexNet and VGG16, 32-pixel stems, option-A shortcuts); `resnet18(stem="imagenet")`
has torchvision's layout and parameter names, so its weights load.

Geometry for 32 pixels: resnet18 has a 3×3 stem and the published max-pool (`stem="linlnet"`) or none
(`stem="cifar"`); MobileNetV2 and EfficientNet-Lite keep full resolution in the stem and second stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.weights import archived, is_archive, load_weights_

Size = tuple[int, int, int]


class InputSizeError(ValueError):
    """The network can't take images of this size."""


# --- building blocks -------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, norm: bool = True) -> list[nn.Module]:
    """Linear, BatchNorm, ReLU; the bias only where there is no norm to hold it."""
    layers: list[nn.Module] = [nn.Linear(inputs, outputs, bias=not norm)]
    return layers + ([nn.BatchNorm1d(outputs)] if norm else []) + [nn.ReLU()]


class MLP(nn.Module):
    """LiNLNet's MLP: (Linear, BatchNorm, ReLU) for each hidden layer, dropout before all but the first."""

    def __init__(self, input_size: Size, num_classes: int, hidden: Sequence[int], norm: bool, dropout: float) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        widths = [math.prod(input_size), *hidden]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            if dropout and i:
                layers.append(nn.Dropout(dropout))
            layers += _linear(a, b, norm)
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.flatten(x)))


class Autoencoder(nn.Module):
    """Dense layers, a ReLU after every one, the last giving the image back (Serra et al., NeurIPS 2021)."""

    def __init__(self, input_size: Size, hidden: Sequence[int]) -> None:
        super().__init__()
        pixels = math.prod(input_size)
        layers = [part for a, b in itertools.pairwise([pixels, *hidden, pixels]) for part in _linear(a, b, norm=False)]
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*layers)
        self.image = nn.Unflatten(1, input_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(self.layers(self.flatten(x)))


class AlexNet(nn.Module):
    """LiNLNet's AlexNet: five convolutions, each conv, BatchNorm, [max-pool], ReLU; two hidden dense layers.

    At 224 pixels 62,387,912 parameters for 1,000 classes.
    """

    def __init__(self, input_size: Size, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        small = input_size[-1] < 64
        c = [_scaled(n, width) for n in (96, 256, 384, 384, 256)]
        dense = _scaled(4096, width)
        pool = (lambda: nn.MaxPool2d(2)) if small else (lambda: nn.MaxPool2d(3, 2))
        first = (3, 2, 1) if small else (11, 4, 2)
        second = (3, 1, 1) if small else (5, 1, 2)
        geometry = [first, second, (3, 1, 1), (3, 1, 1), (3, 1, 1)]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([input_size[0], *c], c, strict=False)):
            k, s, p = geometry[i]
            layers += [nn.Conv2d(a, b, k, s, p, bias=False), nn.BatchNorm2d(b)]
            layers += [pool()] if i in (0, 1, 4) else []
            layers += [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        side = _side_after(self.features, input_size)
        self.flatten = nn.Flatten()
        drop = [nn.Dropout(dropout)] if dropout else []
        self.classifier = nn.Sequential(
            *drop, *_linear(c[-1] * side * side, dense), *drop, *_linear(dense, dense), nn.Linear(dense, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


_VGG = {  # convolutions in each of the five stages
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """VGG16/19 with a BatchNorm after every layer; dense layers 512-512 at 32 pixels, 4096-4096 at 224."""

    def __init__(self, name: str, input_size: Size, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_size[0]
        for count, stage in zip(_VGG[name], (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                out = _scaled(stage, width)
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = _side_after(self.features, input_size)
        dense = _scaled(512 if input_size[-1] < 64 else 4096, width)
        drop = [nn.Dropout(dropout)] if dropout else []
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            *_linear(channels * side * side, dense), *drop, *_linear(dense, dense), *drop, nn.Linear(dense, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


class OptionA(nn.Module):
    """He et al.'s parameter-free shortcut: every second pixel, new channels zero on both sides."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm, + shortcut, ReLU; an activation of its own for each place."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if stride == 1 and inputs == outputs:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = OptionA(stride, outputs - inputs)
        else:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNets of basic blocks: resnet18 (four stages from 64) and resnet20-56 (three stages from 16)."""

    def __init__(
        self, blocks: Sequence[int], base: int, stem: str, shortcut: str, channels: int, num_classes: int, width: float
    ) -> None:
        super().__init__()
        widths = [_scaled(base * 2**i, width) for i in range(len(blocks))]
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.conv1 = nn.Conv2d(channels, widths[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act = nn.ReLU()
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        inputs = widths[0]
        for i, (count, out) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(count):
                stage.append(BasicBlock(inputs, out, 2 if i and not j else 1, shortcut))
                inputs = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.flatten(self.avgpool(x)))


def _scaled(channels: int, width: float) -> int:
    """channels · width, to a multiple of 8 and at least 8; unchanged at width 1."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def _side_after(features: nn.Module, size: Size) -> int:
    """Height and width that a stack of convolutions leaves of square images."""
    side = size[-1]
    for layer in features:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            k, s, p = (v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.stride, layer.padding))
            side = (side + 2 * p - k) // s + 1
    if side < 1:
        raise InputSizeError(f"images of {size} are too small: nothing is left of them after the convolutions")
    return side


# --- makers: (input_size, num_classes, width, **options) -> nn.Module ------------------------------


def _mlp(size, classes, width, hidden=(2048, 1024, 512, 512), norm=True, dropout=0.2):
    return MLP(size, classes, [_scaled(h, width) for h in hidden], norm, dropout)


def _autoencoder(size, classes, width, hidden=(100, 25, 100)):
    return Autoencoder(size, [_scaled(h, width) for h in hidden])


def _alexnet(size, classes, width, dropout=0.5):
    return AlexNet(size, classes, width, dropout)


def _vgg(name):
    return lambda size, classes, width, dropout=0.0: VGG(name, size, classes, width, dropout)


def _resnet18(size, classes, width, stem=None, shortcut="B"):
    stem = stem or ("imagenet" if size[-1] >= 64 else "linlnet")
    if stem not in ("linlnet", "cifar", "imagenet"):
        raise ValueError(f'stem={stem!r}: choose "linlnet", "cifar" or "imagenet"')
    return ResNet((2, 2, 2, 2), 64, stem, _shortcut(shortcut), size[0], classes, width)


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
        img_size=size[-1], patch_size=patch, in_chans=size[0], num_classes=classes, embed_dim=3 * _scaled(64, width),
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
    "resnet20": _resnet_cifar(20),
    "resnet32": _resnet_cifar(32),
    "resnet44": _resnet_cifar(44),
    "resnet56": _resnet_cifar(56),
    "mobilenetv2": _mobilenetv2,
    **{name: _efficientnet_lite(name) for name in _LITE},
    "autoencoder": _autoencoder,
    "vit_tiny": _vit_tiny,
}


# --- weights ---------------------------------------------------------------------------------------


def init_default_(net: nn.Module) -> None:
    """The layers' own initialization (torch, torchvision, timm), already done by their constructors."""


def init_linlnet_(net: nn.Module) -> None:
    """LiNLNet on CIFAR-10: every convolution and dense weight from N(0, 0.01), BatchNorm 1 and 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linlnet_imagenet_(net: nn.Module) -> None:
    """LiNLNet on ImageNet: Kaiming normal by fan-out for convolutions, N(0, 0.01) for dense layers."""
    init_linlnet_(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_kaiming_(net: nn.Module) -> None:
    """Kaiming's normal weights for ReLUs, biases 0, as in the ReLU-stability experiments of Serra et al."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


INITS = {
    "default": init_default_,
    "linlnet": init_linlnet_,
    "linlnet-imagenet": init_linlnet_imagenet_,
    "kaiming": init_kaiming_,
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
            (dropout), resnet18(stem="linlnet" | "cifar" | "imagenet", shortcut), resnet20-56(shortcut),
            vit_tiny(patch).

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
        raise InputSizeError(f"{name} can't take images of {size}: {str(error).splitlines()[0]}") from None


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
