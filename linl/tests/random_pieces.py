"""What random networks are made of: operations as modules, and pieces that know what folding leaves of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = torch.float64

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
ADAPTIVES = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}
MAXES = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
ZEROS = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d}
REFLECTS = {1: nn.ReflectionPad1d, 2: nn.ReflectionPad2d}


# --- modules -----------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function as a module that prints as what it does."""

    def __init__(self, text: str, function: Callable) -> None:
        super().__init__()
        self.text, self.function = text, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __repr__(self) -> str:
        return f"«{self.text}»"


CONSTANTS = {
    "x + c": lambda x, c: x + c, "x - c": lambda x, c: x - c, "x * c": lambda x, c: x * c, "x / c": lambda x, c: x / c,
    "c + x": lambda x, c: c + x, "c * x": lambda x, c: c * x, "torch.add(x, c)": torch.add,
    "x.mul(c)": lambda x, c: x.mul(c), "(x - c) / c": lambda x, c: (x - c) / c,
}  # fmt: skip


class Constant(nn.Module):
    """A number or a tensor of its own (`held`: "buffer", "parameter") meets what goes through, as in CONSTANTS."""

    def __init__(self, how: str, held: str, shape: tuple[int, ...]):
        super().__init__()
        self.how, value = how, torch.rand(shape, dtype=D) + 0.5
        if held == "number":
            self.c = value.mean().item()
        elif held == "buffer":
            self.register_buffer("c", value)
        else:
            self.c = nn.Parameter(value)

    def forward(self, x):
        return CONSTANTS[self.how](x, self.c)

    def extra_repr(self):
        return f"{self.how}, c {getattr(self.c, 'shape', self.c)}"


class Pad(nn.Module):
    """`F.pad` with zeros."""

    def __init__(self, padding: Sequence[int]) -> None:
        super().__init__()
        self.padding, self.value = tuple(padding), 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, value=self.value)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class Pool(nn.Module):
    """`F.avg_pool2d`."""

    def __init__(self, *arguments: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"{self.kernel}, {self.stride}, {self.padding}"


class Twice(nn.Module):
    """One layer called two times in a row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Sum(nn.Module):
    """Branches that read one value, put together by `how`."""

    def __init__(self, how: str, *branches: nn.Module) -> None:
        super().__init__()
        self.how, self.branches = how, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total, *others = [branch(x) for branch in self.branches]
        for other in others:
            total = SUMS[self.how](total, other)
        return total

    def extra_repr(self) -> str:
        return self.how


class Between(nn.Module):
    """Something done in place to a run's source before the run's last layer."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        x = 1.5 * x
        h = self.a(x)
        x = x.relu_()
        return self.b(h).mean() + x


class Scale(nn.Module):
    """A trained factor for each channel."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


FRESH = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
"""Modules that give a tensor of their own."""

SUMS = {
    "+": operator.add, "torch.add": torch.add, "+=": operator.iadd, "-": operator.sub, "torch.sub": torch.sub,
    "method add": lambda a, b: a.add(b), "method add_": lambda a, b: a.add_(b), "*": operator.mul,
    "add, alpha=2": lambda a, b: torch.add(a, b, alpha=2), "cat": lambda a, b: torch.cat([a, b], 1),
}  # fmt: skip
LINEAR_SUMS = ("+", "+", "torch.add", "+=", "-", "torch.sub", "method add", "method add_")

FACTORS = {
    "x * 0.5": lambda x: x * 0.5, "2 * x": lambda x: 2 * x, "x / 3": lambda x: x / 3, "-x": lambda x: -x,
    "torch.mul(x, 0.7)": lambda x: torch.mul(x, 0.7), "x.mul(-2)": lambda x: x.mul(-2),
    "x.div(2)": lambda x: x.div(2), "torch.neg(x)": torch.neg,
}  # fmt: skip

FLATTENINGS = {
    "x.view(x.size(0), -1)": lambda x: x.view(x.size(0), -1), "torch.flatten(x, 1)": lambda x: torch.flatten(x, 1),
    "x.flatten(1)": lambda x: x.flatten(1), "x.reshape(x.shape[0], -1)": lambda x: x.reshape(x.shape[0], -1),
    "nn.Flatten()": nn.Flatten(),
}  # fmt: skip

TRAPS = {
    "x + 1": lambda x: x + 1, "1 - x": lambda x: 1 - x, "x * x": lambda x: x * x, "x + x": lambda x: x + x,
    "x - x.mean()": lambda x: x - x.mean(), "x - x / 2": lambda x: x - x / 2, "x.relu() + x": lambda x: x.relu() + x,
    "torch.div(x, 2, rounding_mode='trunc')": lambda x: torch.div(x, 2, rounding_mode="trunc"),
    "torch.mul(x, other=0.5)": lambda x: torch.mul(x, other=0.5),
    "torch.mul(input=x, other=2)": lambda x: torch.mul(input=x, other=2),
    "y = 3 * x; y.mul_(2)": lambda x: (3 * x).mul_(2), "y = -x; 2 * y + y": lambda x: (lambda y: 2 * y + y)(-x),
    "y = 2 * x; y.mul_(3) + y": lambda x: (lambda y: y.mul_(3) + y)(2 * x),
    "x[:, :1] + x": lambda x: x[:, :1] + x, "x[:, :2]": lambda x: x[:, :2],
    "x * x.mean(1, True)": lambda x: x * x.mean(1, True), "x.flip(-1)": lambda x: x.flip(-1),
    "torch.add(x, x, alpha=3)": lambda x: torch.add(x, x, alpha=3), "x * True": lambda x: x * True,
    "x.sigmoid()": lambda x: x.sigmoid(), "x.clamp(-1, 1)": lambda x: x.clamp(-1, 1),
}  # fmt: skip
"""What looks linear, or nearly: it must come out the same whatever is made of it."""

IMAGE_TRAPS = {
    "F.pad(x, (1, 1), value=1)": lambda x: F.pad(x, (1, 1), value=1.0), "x[:, :, 1::2]": lambda x: x[:, :, 1::2],
    "x[..., :-1]": lambda x: x[..., :-1], "x.transpose(-1, -2)": lambda x: x.transpose(-1, -2),
    "x.mean(-1, True)": lambda x: x.mean(-1, True), "x.mean((1, 2), True)": lambda x: x.mean((1, 2), True),
    "x + x.mean(-1, True)": lambda x: x + x.mean(-1, True),
    "F.pad(x, …, 'circular')": lambda x: F.pad(x, (1, 1) * (x.dim() - 2), "circular"),
    "x.flatten(2).view_as(x)": lambda x: x.flatten(2).view_as(x),
    "2 * x[:, :, ::1] + x": lambda x: 2 * x[:, :, ::1] + x,
}  # fmt: skip

SKIPPED: set[str] = set()
"""Traps left out as long as folding is known to fall into them."""


# --- pieces and what is left of them -----------------------------------------------------------------


@dataclass
class Piece:
    """A part of a network.

    Attributes:
        module: what it computes.
        layers: convolutions and dense layers in it, where a linear run goes through; None where runs end.
        stays: layers that the best fold leaves in a piece where runs end.
        begins: a run begins here whatever is before it,
        single: unless all of it is read at one position, as this piece's value is: then it is one matrix.
    """

    module: nn.Module
    layers: int | None = 0
    stays: int = 0
    begins: bool = False
    single: bool = False


def left(pieces: Sequence[Piece]) -> int:
    """Layers that the best fold leaves: one for each maximal linear run with a layer in it, and all that stays."""
    total = run = 0
    for i, piece in enumerate(pieces):
        behind = itertools.takewhile(lambda other: other.layers is not None, pieces[i:])
        if piece.layers is None or (piece.begins and not any(other.single for other in behind)):
            total, run = total + min(run, 1) + piece.stays, 0
        run += piece.layers or 0
    return total + min(run, 1)


def odd_layers(shape: Sequence[int], square: Callable[[], nn.Module]) -> list[nn.Module]:
    """Layers that are nearly what folding merges, for values of a shape; `square` makes a layer from C to C."""
    dims, channels = len(shape) - 2, shape[1]
    made = [nn.ReLU6(), nn.Softplus(), nn.PReLU(channels), Scale(channels, dims), Between(square(), square())]
    made += [NORMS[dims](channels, track_running_stats=False), Twice(NORMS[dims](channels)), nn.Linear(shape[-1], 4)]
    made += [nn.Sequential(square(), nn.ReLU(inplace=True))]
    made += [nn.Sequential(square(), nn.Identity(), Call("x *= 2", lambda x: operator.imul(x, 2)))]
    if dims:
        one = {1: (nn.InstanceNorm1d, nn.ConvTranspose1d, nn.ConstantPad1d, nn.ReflectionPad1d)}
        two = {2: (nn.InstanceNorm2d, nn.ConvTranspose2d, nn.ConstantPad2d, nn.ReflectionPad2d)}
        instance, transposed, constant, mirror = (one | two)[dims]
        made += [instance(channels), transposed(channels, 3, 2, 2), constant(1, 0.5), mirror(1)]
        made += [nn.Upsample(scale_factor=2), *([nn.AvgPool2d(2, divisor_override=3)] if dims == 2 else [])]
    return made


def run(made: nn.Module | Sequence[Piece], x: Tensor) -> Tensor:
    """A module's, or a row of pieces', value in float64."""
    made = made if isinstance(made, nn.Module) else nn.Sequential(*(piece.module for piece in made))
    with torch.no_grad():
        return made.double().eval()(x)


def shaken_(net: nn.Module) -> None:
    """Weights that keep a signal's size, BatchNorm statistics of a network trained somewhere; float64, eval mode."""
    net.double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.normal_(1, 0.2), module.bias.normal_(0, 0.2)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)


# --- the whole ---


@dataclass
class Network:
    """A random network, in float64 and eval mode.

    Attributes:
        net, example: the network and one input batch.
        left: how many layers the best fold leaves; None for the wild.
        inner: whether any padding lies inside a linear run.
        single: the network is one linear run from image to image.
    """

    seed: int
    family: str
    net: nn.Sequential
    example: Tensor
    left: int | None
    inner: bool
    single: bool

    def __str__(self) -> str:
        told = [f"seed {self.seed}, {self.family}, input {tuple(self.example.shape)}, left {self.left}", repr(self.net)]
        for name, module in self.net.named_modules():  # which torch doesn't print
            if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
                told.append(f"{name}: ceil_mode={module.ceil_mode}, count_include_pad={module.count_include_pad}")
        return "\n".join(told)

    def batch(self, n: int) -> Tensor:
        """Another input batch of n items."""
        return torch.randn(n, *self.example.shape[1:], dtype=D)
