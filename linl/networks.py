"""The networks that are written here, as classes: plain `nn.Module`s of standard layers with ordinary activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int, int]


class InputSizeError(ValueError):
    """The network can't take images of this size."""


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
        c = [scaled(n, width) for n in (96, 256, 384, 384, 256)]
        dense = scaled(4096, width)
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
        side = side_after(self.features, input_size)
        self.flatten = nn.Flatten()
        drop = [nn.Dropout(dropout)] if dropout else []
        self.classifier = nn.Sequential(
            *drop, *_linear(c[-1] * side * side, dense), *drop, *_linear(dense, dense), nn.Linear(dense, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


STAGES = {  # convolutions in each of the five stages
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """VGG16/19 with a BatchNorm after every layer; dense layers 512-512 at 32 pixels, 4096-4096 at 224."""

    def __init__(self, name: str, input_size: Size, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_size[0]
        for count, stage in zip(STAGES[name], (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                out = scaled(stage, width)
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = side_after(self.features, input_size)
        dense = scaled(512 if input_size[-1] < 64 else 4096, width)
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
        widths = [scaled(base * 2**i, width) for i in range(len(blocks))]
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


def scaled(channels: int, width: float) -> int:
    """channels · width, to a multiple of 8 and at least 8; unchanged at width 1."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def side_after(features: nn.Module, size: Size) -> int:
    """Height and width that a stack of convolutions leaves of square images."""
    side = size[-1]
    for layer in features:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            k, s, p = (v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.stride, layer.padding))
            side = (side + 2 * p - k) // s + 1
    if side < 1:
        raise InputSizeError(f"images of {size} are too small: nothing is left of them after the convolutions")
    return side
