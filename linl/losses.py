"""What is minimized besides cross-entropy: reconstruction, sparse weights, attacked images, stable ReLUs.

Sparse weights and attacked images make more ReLUs stable (Kumar et al., arXiv 1905.11428); the ReLU-stability loss
asks for it outright (Xiao et al., ICLR 2019).
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.graph import Tracer, evaluating

Limits = tuple[Tensor, Tensor, Tensor]
"""The least and the greatest value of a pixel after normalization, and what a step of one pixel unit is; by channel."""


def _reconstruction(output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(output.flatten(1), images.flatten(1))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda output, images, labels: F.cross_entropy(output, labels),
    "reconstruction": _reconstruction,
}
"""Mean over a batch of (output, images, labels)."""


def distillation(output: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """How far outputs are from a teacher's: KL divergence of both softened, times T² (Hinton et al., 2015, section 2).

    Args:
        output, wanted: (N, classes), before the softmax.
        temperature: T, above 0.
    """
    mine, its = (F.log_softmax(logits / temperature, 1) for logits in (output, wanted))
    return temperature**2 * F.kl_div(mine, its, log_target=True, reduction="batchmean")


def pixel_range(data) -> Limits:
    """The values that pixels from 0 to 1 have after a data set's normalization, each (C, 1, 1)."""
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (data.mean, data.std))
    return (0 - mean) / std, (1 - mean) / std, 1 / std


def l1(net: nn.Module) -> Tensor:
    """Σ|weight| over all dense layers, the classifier's included; biases aren't."""
    return sum(module.weight.abs().sum() for module in net.modules() if isinstance(module, nn.Linear))


# --- attacked images -------------------------------------------------------------------------------


def _loss_gradient(net: nn.Module, images: Tensor, labels: Tensor, settings, at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        loss = LOSSES[settings.loss](net(at).float(), images, labels)
        return torch.autograd.grad(loss, at)[0]


def pgd(net: nn.Module, images: Tensor, labels: Tensor, settings, limits: Limits) -> list[Tensor]:
    """Projected gradient descent from a random start; the gradient anew at each step. [attacked images]"""
    low, high, unit = (t.to(images) for t in limits)
    eps, step = settings.eps * unit, settings.attack_step * unit
    at = images + (2 * torch.rand_like(images) - 1) * eps
    with evaluating(net):
        for _ in range(settings.attack_steps):
            at = at + step * _loss_gradient(net, images, labels, settings, at).sign()
            at = torch.minimum(torch.maximum(at, images - eps), images + eps)
            at = torch.minimum(torch.maximum(at, low), high).detach()
    return [at]


def single_gradient(net: nn.Module, images: Tensor, labels: Tensor, settings, limits: Limits) -> list[Tensor]:
    """One gradient's sign, eps away: what a loop that never computes its gradient anew does. [clean, attacked]"""
    low, high, unit = (t.to(images) for t in limits)
    with evaluating(net):
        at = images + settings.eps * unit * _loss_gradient(net, images, labels, settings, images).sign()
    return [images, torch.minimum(torch.maximum(at, low), high).detach()]


ADVERSARIES: dict[str, Callable[..., list[Tensor]]] = {"pgd": pgd, "single": single_gradient}
"""From (net, images, labels, settings, limits) to the batches that a step is taken on, in turn."""


# --- stable ReLUs ----------------------------------------------------------------------------------


def stability(net: nn.Module, images: Tensor, eps: float, limits: Limits) -> Tensor:
    """−Σ tanh(1 + lower·upper) over all ReLUs, mean over images; the bounds are intervals for pixels within eps.

    Differentiable in the weights. lower·upper > 0 means that the unit can't change its state (Xiao et al., eq. 2).

    Raises:
        ValueError: a layer that intervals are not carried through here, by name.
    """
    low, high, unit = (t.to(images) for t in limits)
    lower = torch.maximum(images - eps * unit, low)
    upper = torch.minimum(images + eps * unit, high)
    walk = _IntervalWalk(_traced(net))
    walk.run(((lower + upper) / 2, (upper - lower) / 2))
    return -sum(torch.tanh(1 + (c - r) * (c + r)).flatten(1).sum(1).mean() for c, r in walk.seen)


_TRACED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _traced(net: nn.Module) -> fx.GraphModule:
    """The network's graph over its own layers (no copies), found once."""
    if net not in _TRACED:
        _TRACED[net] = fx.GraphModule({name: m for name, m in net.named_modules() if name}, Tracer().trace(net))
    return _TRACED[net]


class _IntervalWalk(fx.Interpreter):
    """Centre and radius of every value; `seen` holds those that ReLUs read."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def call_module(self, target, args, kwargs):
        module, (center, radius) = self.fetch_attr(target), args[0]
        if isinstance(module, nn.Linear):
            return module(center), F.linear(radius, module.weight.abs())
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            options = (module.stride, module.padding, module.dilation, module.groups)
            return module(center), F.conv2d(radius, module.weight.abs(), None, *options)
        if isinstance(module, nn.Flatten | nn.Unflatten | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Identity):
            return module(center), module(radius)
        if isinstance(module, nn.Dropout):
            return center, radius
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            self.seen.append((center, radius))
            return self._bent(module, center, radius)
        raise ValueError(f"the ReLU-stability loss can't carry intervals through {target} ({type(module).__name__})")

    @staticmethod
    def _bent(module, center, radius):
        lower, upper = F.leaky_relu(center - radius, _slope(module)), F.leaky_relu(center + radius, _slope(module))
        return (lower + upper) / 2, (upper - lower) / 2

    def call_function(self, target, args, kwargs):
        if target in (operator.add, torch.add) and all(isinstance(a, tuple) for a in args):
            (c1, r1), (c2, r2) = args
            return c1 + c2, r1 + r2
        if target in (torch.flatten, torch.reshape):
            return tuple(target(part, *args[1:], **kwargs) for part in args[0])
        raise ValueError(f"the ReLU-stability loss can't carry intervals through {getattr(target, '__name__', target)}")

    def call_method(self, target, args, kwargs):
        if target in ("flatten", "view", "reshape"):
            return tuple(getattr(part, target)(*args[1:], **kwargs) for part in args[0])
        raise ValueError(f"the ReLU-stability loss can't carry intervals through {target}")


def _slope(module: nn.Module) -> float:
    return module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
