"""Weights before training, by name."""

from __future__ import annotations

from torch import nn


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
