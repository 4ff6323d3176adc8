"""What an erratum is, and what errata are shown on.

An erratum is a function that does in a few lines of ours what published code does, does the same with linl, and returns
three figures: theirs, ours, and the right one. Where something that is installed is at fault (torch, HiGHS), it is
called itself. None of their code is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linl.images import Images

Figures = tuple[float, float, float]
"""Theirs, ours, the right one."""

KINDS = {
    "fault": "the code does something else than it says",
    "gap": "what is claimed is done by no code that is published",
    "trap": "right as it is written, wrong as it is easily used",
}

EQUAL = 1e-10
"""Relative to what is right, or to 1 where that is less: how far our figure may be from it."""


@dataclass(frozen=True)
class Erratum:
    """One fault.

    Attributes:
        name: of the function that shows it.
        system: whose code it is.
        kind: a key of `KINDS`.
        wrong: what is wrong, and what follows.
        figure: what is measured.
        source: where it can be read, or what was called.
        show: does it anew; returns theirs, ours, right.
        within: how far ours may be from right where chance or steps are in it; `EQUAL` elsewhere.
    """

    name: str
    system: str
    kind: str
    wrong: str
    figure: str
    source: str
    show: Callable[[], Figures]
    within: float = EQUAL

    def row(self) -> dict[str, str]:
        """Its line of the page; the figures are computed here and now, from the same seed each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs, ours, right = map(digits, self.show())
        told = {"system": self.system, "kind": self.kind, "what is wrong": self.wrong, "figure": self.figure}
        return {**told, "theirs": theirs, "ours": ours, "right": right, "source": self.source, "shown by": self.name}


def erratum(system: str, kind: str, figure: str, source: str, within: float = EQUAL) -> Callable[[Callable], Erratum]:
    """Makes an `Erratum` of a function; its docstring says what is wrong."""

    def make(show: Callable[[], Figures]) -> Erratum:
        return Erratum(show.__name__, system, kind, " ".join(show.__doc__.split()), figure, source, show, within)

    return make


def digits(figure: float) -> str:
    """A few digits, the same on every machine: what is only rounding is 0."""
    if abs(figure) < EQUAL or figure == round(figure):
        return f"{figure:,.0f}".replace("-0", "0")
    return f"{figure:.4g}" if abs(figure) >= 10 else f"{figure:.2g}"


# --- what they are shown on ------------------------------------------------------------------------


def batchnorm(channels: int, eps: float = 1e-5) -> nn.BatchNorm2d:
    """A BatchNorm with statistics by chance, as after a training."""
    made = nn.BatchNorm2d(channels, eps)
    nn.init.normal_(made.running_mean)
    nn.init.uniform_(made.running_var, 0.5, 2)
    nn.init.uniform_(made.weight, 0.5, 2)
    nn.init.normal_(made.bias)
    return made


def two(first: nn.Conv2d, second: nn.Conv2d) -> nn.Sequential:
    """Two convolutions whose activation became linear, a BatchNorm between them; float64, eval mode."""
    return nn.Sequential(first, batchnorm(first.out_channels), second).double().eval()


def mlp(*sizes: int) -> nn.Sequential:
    """Dense layers with ReLUs between them; float64, eval mode."""
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().eval()


def pictures(side: int = 12) -> Tensor:
    """(2, 3, side, side), float64, by chance."""
    return torch.randn(2, 3, side, side, dtype=torch.float64)


def tested(images: Tensor, labels: Tensor, classes: int) -> Images:
    """Test images (N, C, H, W) uint8 as a data set, pixels from 0 to 1; there are no others."""
    none, channels = (images[:0], labels[:0]), images.shape[1]
    return Images("test", none, none, (images, labels), classes, (0.0,) * channels, (1.0,) * channels)


def off(right: Tensor, found: Tensor, ring: int = 0) -> float:
    """The largest difference, relative to the largest value; without so many rings of positions at the border."""
    inside = (..., slice(ring, -ring), slice(ring, -ring)) if ring else ...
    return ((right - found).abs()[inside].max() / right.abs().max()).item()


def convolutions(net: nn.Module) -> int:
    """How many there are."""
    return sum(isinstance(module, nn.Conv2d) for module in net.modules())


def numbers(net: nn.Module) -> int:
    """How many parameters there are."""
    return sum(p.numel() for p in net.parameters())
