"""A watch on a network that is only right inside a box."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linl.boxes import Box


class Guard(nn.Module):
    """A network, and what happens when an input lies outside the box that it was made for.

    Attributes:
        net: the network.
        fallback: what computes inputs outside; None: `net` does, with a warning.
        outside: inputs outside so far.
    """

    def __init__(self, net: nn.Module, box: Box, fallback: nn.Module | None, slack: float) -> None:
        super().__init__()
        self.net, self.fallback, self.slack = net, fallback, slack
        self.register_buffer("lower", box.lower.clone(), persistent=True)
        self.register_buffer("upper", box.upper.clone(), persistent=True)
        self.outside = 0

    def _apply(self, fn: Callable, recurse: bool = True) -> Guard:
        """`.half()` and its like: the box keeps its corners, which rounding would move."""
        corners = {"lower": self.lower, "upper": self.upper}
        super()._apply(fn, recurse)
        for name, corner in corners.items():
            if (moved := getattr(self, name)).dtype != corner.dtype:
                setattr(self, name, corner.to(moved.device))
        return self

    def excess(self, x: Tensor) -> Tensor:
        """By how much each input (N, *shape) lies outside the nearest box, at its worst position; (N,), 0 inside."""
        wide = x.detach().to(self.lower.dtype).unsqueeze(1)  # (N, 1, *shape) against (boxes, *shape)
        beyond = torch.maximum(self.lower - wide, wide - self.upper).flatten(2).amax(2).amin(1)
        return beyond.clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        beyond = self.excess(x)
        out = ~(beyond <= self.slack)  # a value that is no number is outside
        count = int(out.sum())
        if not count:
            return self.net(x)
        self.outside += count
        if self.fallback is None:
            warnings.warn(
                f"{count} of {len(x)} inputs lie outside the certified box (by up to {beyond.max():.3g}): "
                "the network may compute something else there; pass fallback=the original network",
                stacklevel=2,
            )
            return self.net(x)
        if count == len(x):
            return self.fallback(x)
        inside = self.net(x[~out])
        y = inside.new_empty(len(x), *inside.shape[1:])
        y[~out], y[out] = inside, self.fallback(x[out]).to(y.dtype)
        return y


def guard(net: nn.Module, box: Box, fallback: nn.Module | None = None, slack: float = 1e-6) -> Guard:
    """Watches a network's inputs: warns, or falls back, when one leaves the box.

    Args:
        net: as from `compress`; used as it is, not copied.
        box: the domain it was made for; with several boxes an input must lie in one of them.
        fallback: the original network, for inputs outside; None warns instead.
        slack: how far outside still counts as inside, at each position: room for the rounding of inputs.

    Raises:
        ValueError: slack below 0.
    """
    if not slack >= 0:
        raise ValueError(f"slack = {slack}: must be at least 0")
    return Guard(net, box, fallback, slack).train(net.training)
