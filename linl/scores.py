"""Pruning scores: a number for every weight, the lowest go first.

| score | of a weight w | among | source |
|---|---|---|---|
| magnitude | \\|w\\| | all | Han et al., NeurIPS 2015; global as in Blalock et al., MLSys 2020 |
| layer-magnitude | \\|w\\| | its layer | the same share of every layer |
| gradient | \\|w·∂L/∂w\\|, BatchNorm in eval | all | Blalock et al., section 7.2, "global gradient" |
| lamp | w² / Σ v² over its layer's weights from w upwards | all | Lee et al., ICLR 2021, arXiv 2010.07611, eq. 4 |
| lap | \\|w\\|·‖before‖·‖after‖, see `linl.lookahead` | its layer | Park et al., ICLR 2020, arXiv 2002.04809, eq. 4 |
| snip | \\|w·∂L/∂w\\|, BatchNorm by the batch | all | Lee et al., ICLR 2019, arXiv 1810.02340, eqs. 4 and 5 |
| synflow | \\|w·∂R/∂w\\|, R as in `synflow` | all | Tanaka et al., NeurIPS 2020, arXiv 2006.05467 |
| random | a random number | all | control |

`gradient` and `snip` are one formula. What differs is the network that they are meant for: snip is for the start of
training, where running statistics mean nothing yet, gradient for a trained network as it is used. SynFlow is taken in
100 rounds, each of which scores anew (its Algorithm 1), in float64, everything positive, BatchNorm in eval. Weights
that are pruned already don't count: not in LAMP's sums, nor in any gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linl.checking import one_tensor
from linl.graph import clone, evaluating, example_for, trace
from linl.lookahead import Lookahead
from linl.losses import LOSSES
from linl.masks import LAYERS, harden_masks, masks_of, prunable, raw_weight

Weights = dict[str, Tensor]
"""A number for each weight, by the name of its layer."""


@dataclass(frozen=True)
class Given:
    """What a score may ask for.

    Attributes:
        batch: (images, labels) or None.
        loss: a key of `linl.losses.LOSSES`.
        generator: of random numbers, on the CPU.
    """

    batch: tuple[Tensor, Tensor] | None
    loss: str
    generator: torch.Generator


@dataclass(frozen=True)
class Score:
    """A row of the table above.

    Attributes:
        of: from a masked network, which it leaves alone, and what is given.
        by_layer: whether the same share of every layer goes.
        rounds: in how many steps, each scored anew; what is kept falls by the same factor in each.
        wants_batch: whether it asks for images with labels.
    """

    of: Callable[[nn.Module, Given], Weights]
    by_layer: bool = False
    rounds: int = 1
    wants_batch: bool = False


def magnitude(net: nn.Module, given: Given) -> Weights:
    """|w|."""
    return {name: raw_weight(layer).detach().abs() for name, layer in prunable(net).items()}


def lamp(net: nn.Module, given: Given) -> Weights:
    """w² over the sum of squares of all live weights of the layer that don't come before it, sorted by magnitude."""
    masks = masks_of(net)
    return {n: _lamp(raw_weight(layer).detach().double() ** 2, masks[n]) for n, layer in prunable(net).items()}


def _lamp(squares: Tensor, live: Tensor) -> Tensor:
    ranked, order = squares[live].sort(stable=True)
    from_here = ranked.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(ranked)
    scores[order] = ranked / from_here.clamp(min=torch.finfo(ranked.dtype).tiny)
    return torch.zeros_like(squares).masked_scatter_(live, scores)


def lookahead(net: nn.Module, given: Given) -> Weights:
    """As `linl.lookahead`."""
    with torch.no_grad():
        around = Lookahead(trace(harden_masks(net)).eval())
        return {name: around.score(name) for name in prunable(net)}


def random(net: nn.Module, given: Given) -> Weights:
    """Uniform."""
    return {n: torch.rand(m.shape, generator=given.generator, dtype=torch.float64) for n, m in masks_of(net).items()}


def gradient(net: nn.Module, given: Given) -> Weights:
    """|w·g|, g the gradient of the loss on the batch, in eval mode."""
    with evaluating(net):
        return _sensitivity(net, given)


def snip(net: nn.Module, given: Given) -> Weights:
    """The same, BatchNorm in train mode (the running statistics stay), dropout off."""
    net = clone(net).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return _sensitivity(net, given)


def synflow(net: nn.Module, given: Given) -> Weights:
    """|w·∂R/∂w|, R = 1ᵀ·f(1) of the network f with |parameters|, |buffers| and without biases or shifts of norms.

    The paper's R is a product of weights, from which it follows that no layer is lost while another has weights to
    spare (its Theorem 3). Its code leaves shifts in, which are next to 0 at the start of training, for which it is
    meant; in a trained network they would break that.
    """
    images = given.batch[0] if given.batch else None
    trouble = "SynFlow must know how large an input is: pass batch=(images, labels), whose values don't matter"
    shape = example_for(net, images, trouble).shape[1:]
    net = clone(net).double().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.abs_()
        for module in net.modules():
            if isinstance(module, (*LAYERS, nn.modules.batchnorm._BatchNorm)):
                for shift in (module.bias, getattr(module, "running_mean", None)):
                    if shift is not None:
                        shift.zero_()
    x = torch.ones(1, *shape, dtype=torch.float64, device=next(net.parameters()).device)
    return _saliency(net, lambda: one_tensor(net(x)).sum())


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude),
    "layer-magnitude": Score(magnitude, by_layer=True),
    "gradient": Score(gradient, wants_batch=True),
    "lamp": Score(lamp),
    "lap": Score(lookahead, by_layer=True),
    "snip": Score(snip, wants_batch=True),
    "synflow": Score(synflow, rounds=100),
    "random": Score(random),
}


def _sensitivity(net: nn.Module, given: Given) -> Weights:
    like = raw_weight(next(iter(prunable(net).values())))
    images, labels = (t.to(like.device) for t in given.batch)
    images = images.to(like.dtype) if images.is_floating_point() else images
    return _saliency(net, lambda: LOSSES[given.loss](net(images), images, labels))


def _saliency(net: nn.Module, value: Callable[[], Tensor]) -> Weights:
    """|w·∂value/∂w|. The derivative is the masked parameter's: 0 for pruned weights."""
    layers = prunable(net)
    raw = [raw_weight(layer) for layer in layers.values()]
    wanted = [p.requires_grad for p in raw]
    try:
        for p in raw:
            p.requires_grad_(True)
        with torch.enable_grad():
            slopes = torch.autograd.grad(value(), raw, allow_unused=True)
    finally:
        for p, before in zip(raw, wanted, strict=True):
            p.requires_grad_(before)
    slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(raw, slopes, strict=True)]
    return {n: (p.detach() * g).abs() for n, p, g in zip(layers, raw, slopes, strict=True)}
