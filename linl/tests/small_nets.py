"""Small networks of every kind that bounds are known for."""

import copy

import torch
from torch import nn

import linl

ACTIVATIONS = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky": nn.LeakyReLU(0.1), "hardtanh": nn.Hardtanh(), "prelu": nn.PReLU(),
    "linlu": linl.LiNLU(0.8), "partial relu6": linl.PartialLinear(nn.ReLU6(), 0.3),
    "partial above 1": linl.PartialLinear(nn.ReLU(), 1.5),
}  # fmt: skip


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.second, self.act = nn.Conv2d(channels, channels, 3, padding=1, bias=False), act

    def forward(self, x):
        return self.act(self.second(self.act(self.norm(self.first(x)))) + x)


def dense(act: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Dense layers with a BatchNorm."""
    layers = [nn.Linear(4, 9), nn.BatchNorm1d(9), act, nn.Linear(9, 6), act, nn.Linear(6, 6, bias=False), act]
    return nn.Sequential(*layers, nn.Linear(6, 3)), (4,)


def residual(act: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions of odd sizes and strides, a residual block, an average pool, groups, dense layers."""
    layers = [nn.Conv2d(2, 4, 3, 2, padding=1), act, Block(4, act), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(4, 6, (2, 3), padding=(1, 0), groups=2, dilation=(1, 1)), act, nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(18, 7), act, nn.Linear(7, 2)), (2, 7, 11)


def plain_convolutions(act: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolution, BatchNorm, convolution, average pool, dense layers: channels can be taken out everywhere."""
    layers = [nn.Conv2d(1, 6, 3, 2, padding=1), nn.BatchNorm2d(6), act, nn.Conv2d(6, 5, 3, padding=1), act]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(10, 7), act, nn.Linear(7, 2)), (1, 7, 5)


def pooled(act: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Max-pools, overlapping and padded, before and after activations."""
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(3, 2, padding=1), act, nn.Conv2d(4, 5, 3, padding=1), act]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(10, 6), act, nn.Linear(6, 2)), (1, 8, 5)


NETS = {"dense": dense, "residual": residual, "convolutions": plain_convolutions, "max-pools": pooled}


def make(kind: str, activation: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in float64 and eval mode with random statistics and large biases, and its input's shape."""
    torch.manual_seed(seed)
    net, shape = NETS[kind](copy.deepcopy(ACTIVATIONS[activation]))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= 2
            if module.bias is not None:
                module.bias.data *= 6
    return net.double(), shape


def made(forward, **layers: nn.Module) -> nn.Module:
    """A network from a forward function and its layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Net.forward = forward
    return Net().eval()
