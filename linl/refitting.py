"""Blocks of a trained network, each replaced by the one layer that comes nearest to it on real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from linl.checking import shown
from linl.folding import fold, refuse_unfinished
from linl.graph import clone, trace
from linl.padding import pad_first
from linl.regression import Sample, Sums, called_once, numbers_of, outputs, refuse_blocks, refuse_few, set_, stopped_at
from linl.rewriting import neutral_norm
from linl.sites import activation_sites
from linl.units import PartialLinear, harden, linearize


@dataclass(frozen=True)
class RefitReport:
    """What one layer instead of a block loses.

    `.table` has a row a block: its name, the layer, numbers (weights of an output, bias included), rows (outputs that
    they were fitted to), and the share of the variance of the block's outputs that is missed: missed_bare by the block
    without its activations (of a pointwise one, by the middle of that), missed by the layer that came instead.
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        return shown(self.table)


@torch.no_grad()
def refit(
    net: nn.Module,
    blocks: Sequence[str],
    images: Tensor,
    *,
    norms: bool = True,
    units: Sequence[str] = (),
    pointwise: Sequence[str] = (),
    ridge: float = 1e-3,
    batch: int = 64,
) -> nn.Module:
    """A shallower network: blocks replaced by single layers, fitted to what the blocks compute.

    A block whose activations are gone is one layer (`fold`), but a poor one: its weights were trained for the
    activations. Here the layer has the geometry of that fold and the weights of a linear regression: of the *original*
    block's outputs on what the layer reads. Block by block in the order of the forward pass, each reading what the
    layers before it give, so that it mends their errors as far as it can (as He et al., ICCV 2017, do in channel
    pruning). It is not the same function: tune the network afterwards, now that it has fewer layers.

    Args:
        net: trained, in eval mode; left alone.
        blocks: names of modules, each of which is called once and is one convolution or dense layer without its
            activations: inverted bottlenecks, residual blocks whose skip is part of them, runs of dense layers.
        images: (N, ...) network inputs, on the network's device. Four outputs at least for each number fitted; of more
            than 200 a sample from every image.
        norms: behind each new convolution comes a BatchNorm that changes nothing in evaluation and normalizes in
            training; `fold_norms` takes it in later.
        units: those of the blocks behind whose layer a `PartialLinear` comes, at α = 1: the identity until it is
            trained, which may bend the network again there, for one activation instead of a block's.
        pointwise: those of the blocks whose layer looks at one position only, a 1×1 convolution: beside another one,
            without a unit between them, `fold` takes it in, and nothing is left of the block.
        ridge: added to the regression's diagonal, relative to its mean: keeps directions that the images hardly show
            from large weights, which cancel in float32 but not in bfloat16.
        batch: images at once.

    Returns: a copy, `.refit_report` attached.

    Raises:
        ValueError: train mode or trainable units, an unknown block, one within another, one that isn't called once
            with one tensor, one that doesn't fold to one layer, units or pointwise layers for what isn't replaced, a
            pointwise layer for what isn't a convolution that pads half of its kernel on every side, or too few images.
    """
    refuse_unfinished(net)
    refuse_blocks(net, blocks)
    for asked, those in (("units", units), ("pointwise", pointwise)):
        if others := sorted(set(those) - set(blocks)):
            raise ValueError(f"{asked} = {others}: not among the blocks that are replaced, {', '.join(blocks)}")
    made, rows, parts = clone(net), [], images.split(batch)
    read = called_once(net, blocks, images[:1])
    ones = {name: _as_one(net.get_submodule(name), name, x) for name, x in read.items()}
    ones |= {name: _pointwise(ones[name], name) for name in pointwise}
    samples = {name: Sample(n, _only_layer(one), len(images)) for n, (name, one) in enumerate(ones.items())}
    targets = outputs(net, samples, parts)
    for name, one in ones.items():
        refuse_few(name, _only_layer(one), sum(map(len, targets[name])), len(images))
    for name, block in ones.items():
        layer, sample = _only_layer(block), samples[name]
        made.set_submodule(name, block)
        sums = Sums()
        for number, (part, y) in enumerate(zip(parts, targets.pop(name), strict=True)):
            sums.add(sample.of_inputs(stopped_at(made, _name_in(made, layer), part)[0], number), y)
        told = {"block": name, "layer": _described(layer), "numbers": sums.numbers, "rows": sums.rows}
        bare = sums.missed(*numbers_of(layer))
        set_(layer, *sums.solution(ridge))
        rows.append(told | {"missed_bare": bare, "missed": sums.missed(*numbers_of(layer))})
        behind = []
        if norms and isinstance(layer, nn.Conv2d):
            behind.append(neutral_norm(*sums.of_outputs(*numbers_of(layer))))
        if name in units:
            behind.append(PartialLinear(alpha=1.0))
        if behind:
            made.set_submodule(name, nn.Sequential(block, *behind).to(layer.weight).eval())
    made.refit_report = RefitReport(pd.DataFrame(rows))
    return made


# --- a block as one layer --------------------------------------------------------------------------


def _as_one(block: nn.Module, name: str, x: Tensor) -> nn.Module:
    """The block without its activations, padded first, folded: at most a padding, and a layer."""
    block = nn.Sequential(block).eval()  # traced as one, a single layer would be opened
    sites = activation_sites(trace(block))
    bare = harden(linearize(block, "partial", start=1.0)).eval() if sites else clone(block)
    folded = fold(pad_first(bare.double(), x.double()), x.double(), objective="depth").to(x.dtype).eval()
    calls = [node for node in folded.graph.nodes if node.op not in ("placeholder", "output")]
    made = [folded.get_submodule(node.target) if node.op == "call_module" else None for node in calls]
    if not (
        made and isinstance(made[-1], nn.Conv2d | nn.Linear) and all(isinstance(m, nn.ZeroPad2d) for m in made[:-1])
    ):
        told = ", ".join(str(node.target) for node in calls) or "nothing"
        raise ValueError(f"{name} is not one layer without its activations: {told}")
    if getattr(made[-1], "groups", 1) > 1 or getattr(made[-1], "padding_mode", "zeros") != "zeros":
        raise ValueError(f"{name} is a convolution in groups, or one that doesn't pad with zeros: {made[-1]}")
    if isinstance(getattr(made[-1], "padding", 0), str):
        raise ValueError(f"{name} is a convolution that says {made[-1].padding!r} for its padding: give it in numbers")
    if made[-1].bias is None:
        made[-1].bias = nn.Parameter(made[-1].weight.new_zeros(len(made[-1].weight)))
    return folded


def _pointwise(folded: nn.Module, name: str) -> nn.Conv2d:
    """A convolution that looks only where the middle of this one's kernel lies."""
    layer, pads = _only_layer(folded), [module for module in folded.modules() if isinstance(module, nn.ZeroPad2d)]
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"pointwise = {name!r}: {_described(layer)} is no convolution")
    for axis, size in enumerate(layer.kernel_size):  # a ZeroPad2d has left, right, top, bottom
        around = {layer.padding[axis] + sum(pad.padding[2 * (1 - axis) + end] for pad in pads) for end in (0, 1)}
        if size % 2 == 0 or around != {layer.dilation[axis] * (size // 2)}:
            raise ValueError(f"pointwise = {name!r}: {_described(layer)} doesn't pad half of its kernel on every side")
    one = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride).to(layer.weight).eval()
    height, width = layer.kernel_size
    set_(one, layer.weight[:, :, height // 2, width // 2], layer.bias)
    return one


def _name_in(net: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in net.named_modules() if module is layer)


def _only_layer(block: nn.Module) -> nn.Module:
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def _described(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} → {layer.out_features}"
    size, stride = "×".join(map(str, layer.kernel_size)), max(layer.stride)
    return f"{size}, {layer.in_channels} → {layer.out_channels}" + (f", stride {stride}" if stride > 1 else "")
