"""Blocks of a changed network whose last layers are fitted anew to what the network gave before, in fewer channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from linl.checking import shown, verify
from linl.folding import refuse_training
from linl.graph import clone
from linl.masks import refuse_masks
from linl.regression import (
    Sample,
    Sums,
    called_once,
    hooked,
    numbers_of,
    outputs,
    refuse_blocks,
    refuse_few,
    set_,
    stopped_at,
)  # fmt: skip
from linl.shrinking import shrink


@dataclass(frozen=True)
class ReconstructionReport:
    """How near blocks come to what they gave before.

    `.table` has a row a block: its name, its last layer, channels (that this layer reads) and channels_left, rows
    (outputs that it was fitted to), and the share of the variance of the teacher's block that is missed:
    missed_before with the weights it had, missed with those it got.
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        return shown(self.table)


@torch.no_grad()
def reconstruct(
    net: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[str],
    images: Tensor,
    *,
    channels: Mapping[str, int] | None = None,
    ridge: float = 1e-3,
    batch: int = 64,
) -> nn.Module:
    """A network nearer to the one that it was made from, by the last layers of its blocks; on request narrower.

    Where blocks were replaced (`refit`) or pruned, those behind them read something else than before. Block by block in
    the order of the forward pass, the last layer gets the weights of a linear regression, so that the block, with what
    is added to it, gives what the *teacher's* block gives: errors are mended as they come, and don't add up. A layer
    that may read fewer channels reads those that it needs most, found by backward elimination, and the layers before it
    no longer compute the others (He et al., ICCV 2017, choose by a lasso). It takes no labels, and a pass a block.

    Args:
        net: in eval mode; left alone.
        teacher: in eval mode, the network that `net` was made from, or `net` itself.
        blocks: names of modules that both have, each called once. A block ends in a convolution or a dense layer, which
            may have a BatchNorm behind it and be added to something: an inverted bottleneck, a layer alone.
        images: (N, ...) network inputs, on the network's device. Four outputs at least for each number fitted; of more
            than 200 a sample from every image.
        channels: by block, how many channels its last layer still reads; empty leaves them all.
        ridge: holds weights to those that they were, relative to the mean of the regression's diagonal.
        batch: images at once.

    Returns: a copy, `.reconstruction_report` attached. Where channels that should go are tied to others, they stay:
        `channels_left` tells.

    Raises:
        ValueError: train mode, masks or trainable units, an unknown block, one within another, one that isn't called
            once or doesn't end in a layer, outputs of another shape than the teacher's, channels for what isn't among
            the blocks or of a number that isn't there, or too few images.
    """
    for one in (net, teacher):
        refuse_training(one)
        refuse_masks(one)
        refuse_blocks(one, blocks)
    if not ridge > 0:
        raise ValueError(f"ridge = {ridge}: above 0, or weights that the images tell nothing of are lost")
    made, rows, parts = clone(net), [], images.split(batch)
    read, seen = (called_once(one, blocks, images[:1]) for one in (made, teacher))
    ends = {name: _end_of(made, name, x) for name, x in read.items()}
    for name in ends:
        mine, its = (one.get_submodule(name)(x[name].clone()) for one, x in ((made, read), (teacher, seen)))
        if mine.shape != its.shape:
            raise ValueError(f"{name} gives {tuple(mine.shape[1:])} where the teacher's gives {tuple(its.shape[1:])}")
    left = dict(channels or {})
    _refuse_channels(left, ends)
    samples = {name: Sample(number, end.layer, len(images)) for number, (name, end) in enumerate(ends.items())}
    targets = outputs(teacher, samples, parts)
    for name, end in ends.items():
        sums, variance = _seen(made, end, samples[name], parts, targets.pop(name))
        refuse_few(name, sums, len(images))
        had = end.numbers
        told = {"block": name, "layer": end.name, "channels": end.channels, "rows": sums.rows}
        stays = sums.needed(left[name], end.positions, ridge) if name in left else None
        columns = None if stays is None else stays.repeat_interleave(end.positions)
        end.take_(*sums.solution(ridge, had, columns))
        told |= {"missed_before": sums.missed(*had, variance), "missed": sums.missed(*end.numbers, variance)}
        if name in left:
            _narrow_(made, name, read[name])
        rows.append({**told, "channels_left": _end_of(made, name, read[name]).channels})
    made.reconstruction_report = ReconstructionReport(pd.DataFrame(rows))
    return made


def _refuse_channels(left: dict[str, int], ends: dict[str, _End]) -> None:
    if others := sorted(set(left) - set(ends)):
        raise ValueError(f"channels of {others[0]}: not among the blocks, {', '.join(ends)}")
    for name, number in left.items():
        if not 1 <= number <= ends[name].channels:
            raise ValueError(f"channels of {name}: {number} of the {ends[name].channels} that {ends[name].name} reads")


def _seen(
    net: nn.Module, end: _End, sample: Sample, parts: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[Sums, Tensor]:
    """What a block's last layer reads, and what it should give; the variance of what the block should give."""
    sums, wholes, (weight, bias) = Sums(), Sums(), end.numbers
    for number, (part, its) in enumerate(zip(parts, wanted, strict=True)):
        rows: list[Tensor] = []
        listen = {end.name: lambda module, inputs, y, n=number, to=rows: to.append(sample.of_inputs(inputs[0], n))}
        mine = sample.of_outputs(stopped_at(net, end.block, part, listen)[1], number)
        added = mine - rows[0] @ weight.T - bias
        sums.add(rows[0], its - added)
        wholes.add(its[:, :0], its)
    return sums, wholes.variance


def _narrow_(net: nn.Module, block: str, x: Tensor) -> None:
    """Cuts the channels within a block that nothing reads, module by module: all keep their names."""
    whole = nn.Sequential(clone(net.get_submodule(block))).eval()
    small = shrink(whole, x)
    known = dict(whole.named_modules())
    for name, module in small.named_modules():
        if name in known and _own_sizes(module) != _own_sizes(known[name]):
            whole.set_submodule(name, module)
    if verify(net.get_submodule(block), whole, x).equal:
        net.set_submodule(block, whole[0])


def _own_sizes(module: nn.Module) -> list[torch.Size]:
    return [t.shape for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]


# --- where a block ends ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    """The layer that a block ends in: the block gives factor · layer(·) + what doesn't depend on it.

    Attributes:
        block, name: in the network.
        layer: a convolution or dense layer.
        factor: of norms and signs behind it, (outputs,) in float64.
    """

    block: str
    name: str
    layer: nn.Module
    factor: Tensor

    @property
    def channels(self) -> int:
        """That it reads."""
        return self.layer.weight.shape[1]

    @property
    def positions(self) -> int:
        """Of its kernel."""
        return self.layer.weight[0, 0].numel()

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """Weights (outputs, numbers) and biases, times the factor."""
        weight, bias = numbers_of(self.layer)
        return self.factor[:, None] * weight.double(), self.factor * bias.double()

    def take_(self, weight: Tensor, bias: Tensor) -> None:
        """Weights and biases, times the factor; where that is 0 they stay."""
        old, on = numbers_of(self.layer), self.factor != 0
        weight = torch.where(on[:, None], weight / self.factor[:, None], old[0].double())
        set_(self.layer, weight, torch.where(on, bias / self.factor, old[1].double()))


def _end_of(net: nn.Module, block: str, x: Tensor) -> _End:
    """Where a block ends, and what is behind it, seen from what other values there lead to.

    Args:
        x: what the block reads, of one image.

    Raises:
        ValueError: not in a layer that nothing but norms and sums are behind.
    """
    whole, called = net.get_submodule(block), []
    inner = {name: module for name, module in whole.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    with hooked(whole, {name: lambda m, i, y, name=name: called.append((name, y)) for name in inner}):
        whole(x.clone())
    if not called or [name for name, _ in called].count(called[-1][0]) > 1:
        raise ValueError(f"{block} has no convolution or dense layer that is called once, as its last")
    inside, value = called[-1]
    layer, name = inner[inside], f"{block}.{inside}".rstrip(".")
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"{name} is a convolution in groups, or one that doesn't pad with zeros: {layer}")
    if isinstance(getattr(layer, "padding", 0), str):
        raise ValueError(f"{name} is a convolution that says {layer.padding!r} for its padding: give it in numbers")
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))

    def given(v: Tensor) -> Tensor:
        with hooked(whole, {inside: lambda module, inputs, y: v.clone()}):
            return whole(x.clone())

    axis = value.ndim - 1 if isinstance(layer, nn.Linear) else 1
    tried = 10 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    none, one, several = given(torch.zeros_like(value)), given(torch.ones_like(value)), given(tried)
    trouble = f"{block} doesn't end in {name}, its last layer: something bends or mixes what that gives"
    if one.shape != value.shape:
        raise ValueError(trouble)
    apart = (one - none).movedim(axis, 0).flatten(1).double()
    factor = apart.mean(1)
    expected = none + factor.to(value).view(-1, *[1] * (value.ndim - 1 - axis)) * tried
    if not (several - expected).abs().max() <= 1e-3 * several.abs().max():
        raise ValueError(trouble)
    return _End(block, name, layer, factor)
