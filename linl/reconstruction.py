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
        blocks: names of modules that both have, each called once. The layer that a block calls last is a convolution or
            a dense layer; a BatchNorm may be behind it (it stays as it is, its running statistics too), and it may be
            added to something: an inverted bottleneck, a layer alone.
        images: (N, ...) network inputs, on the network's device. Four outputs at least for each number fitted; of more
            than 200 a sample from every image.
        channels: by block, how many channels its last layer reads at most; empty leaves them all.
        ridge: holds weights to those that they were, relative to the mean of the regression's diagonal.
        batch: images at once.

    Returns: a copy, `.reconstruction_report` attached. Where channels can't be cut, being tied to others, all of them
        stay: `channels_left` tells.

    Raises:
        ValueError: train mode or masks, an unknown block, one within another, one that isn't called once with one
            tensor or doesn't end in a layer, a layer with weights that aren't its own, outputs of another shape than
            the teacher's, channels for what isn't among the blocks or of a number that isn't there, or too few images.
    """
    for one in (net, teacher):
        refuse_training(one)
        refuse_masks(one)
        refuse_blocks(one, blocks)
    if not ridge > 0:
        raise ValueError(f"ridge = {ridge}: above 0, or weights that the images tell nothing of are lost")
    made, left, rows, parts = clone(net), dict(channels or {}), [], images.split(batch)
    read = called_once(made, blocks, images[:2])
    ends = {name: _end_of(made, name, x) for name, x in read.items()}
    called_once(made, [end.name for end in ends.values()], images[:2])
    _refuse_other_shapes(made, teacher, read, images[:2])
    _refuse_channels(left, ends)
    samples = {name: Sample(number, end.layer, len(images)) for number, (name, end) in enumerate(ends.items())}
    targets = outputs(teacher, samples, parts)
    for name, end in ends.items():
        refuse_few(name, end.layer, sum(map(len, targets[name])), len(images))
    for name, end in ends.items():
        sums, variance = _seen(made, end, samples[name], parts, targets.pop(name))
        had, narrow = end.numbers, False
        told = {"block": name, "layer": end.name, "channels": end.channels, "channels_left": end.channels}
        told |= {"rows": sums.rows, "missed_before": sums.missed(*had, variance)}
        if left.get(name, end.channels) < end.channels:
            stays = sums.needed(left[name], end.positions, ridge, end.alive).repeat_interleave(end.positions)
            end.take_(*sums.solution(ridge, had, stays), stays)
            narrow = _narrow_(made, end, read[name], left[name])
        if narrow:
            told["channels_left"] = made.get_submodule(end.name).weight.shape[1]
        else:
            end.take_(*sums.solution(ridge, had))
        rows.append({**told, "missed": sums.missed(*end.numbers, variance)})
    made.reconstruction_report = ReconstructionReport(pd.DataFrame(rows))
    return made


def _refuse_other_shapes(net: nn.Module, teacher: nn.Module, read: dict[str, Tensor], images: Tensor) -> None:
    seen = called_once(teacher, list(read), images)
    for name, x in read.items():
        mine, its = net.get_submodule(name)(x.clone()), teacher.get_submodule(name)(seen[name].clone())
        if mine.shape != its.shape:
            raise ValueError(f"{name} gives {tuple(mine.shape[1:])} where the teacher's gives {tuple(its.shape[1:])}")


def _refuse_channels(left: dict[str, int], ends: dict[str, _End]) -> None:
    if others := sorted(set(left) - set(ends)):
        raise ValueError(f"channels of {others[0]}: not among the blocks, {', '.join(ends)}")
    for name, number in left.items():
        if not isinstance(number, int) or not 1 <= number <= ends[name].channels:
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


def _narrow_(net: nn.Module, end: _End, x: Tensor, left: int) -> bool:
    """Cuts the channels within a block that nothing reads, module by module: all keep their names. Where that doesn't
    go, or leaves more than so many, the block stays; whether it went."""
    whole = nn.Sequential(clone(net.get_submodule(end.block))).eval()
    known, last = dict(whole.named_modules()), f"0{end.name.removeprefix(end.block)}"
    try:
        small = shrink(whole, x)
        for name, module in small.named_modules():
            if type(module) is type(known.get(name)) and _own_sizes(module) != _own_sizes(known[name]):
                whole.set_submodule(name, module)
        narrow = whole.get_submodule(last).weight.shape[1] <= left
        narrow = narrow and verify(net.get_submodule(end.block), whole, x).equal
    except (ValueError, RuntimeError):  # it can't be traced, or its code counts on the channels it had
        return False
        return False
    if narrow:
        net.set_submodule(end.block, whole[0])
    return narrow


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
    def alive(self) -> Tensor:
        """Outputs that the block gives on, bool (outputs,): no weight mends what is behind a factor of next to 0."""
        size = self.factor.abs()
        return size > 1e-4 * size.max()

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """Weights (outputs, numbers) and biases, times the factor."""
        weight, bias = numbers_of(self.layer)
        return self.factor[:, None] * weight.double(), self.factor * bias.double()

    def take_(self, weight: Tensor, bias: Tensor, columns: Tensor | None = None) -> None:
        """Weights and biases, times the factor; of what isn't alive only columns that aren't read go."""
        (old, shift), factor = numbers_of(self.layer), self.factor.where(self.alive, torch.ones_like(self.factor))
        kept = old.double() if columns is None else old.double() * columns
        weight = torch.where(self.alive[:, None], weight / factor[:, None], kept)
        set_(self.layer, weight, torch.where(self.alive, bias / factor, shift.double()))


def _end_of(net: nn.Module, block: str, x: Tensor) -> _End:
    """Where a block ends, and what is behind it, seen in float64 from what other values there lead to.

    Args:
        x: what the block reads, of two images or one.

    Raises:
        ValueError: not in a layer of its own weights that nothing but norms and sums are behind.
    """
    whole, x = clone(net.get_submodule(block)).cpu().double().eval(), x.cpu().double()
    x = torch.cat([x, x / 2]) if len(x) == 1 else x  # of one image alone a gate is a factor like any other
    inner = {name: module for name, module in whole.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    called: list[tuple] = []
    with hooked(
        whole, {name: lambda m, i, y, name=name: called.append((name, i[0].clone(), y.clone())) for name in inner}
    ):
        whole(x.clone())
    if not called or [name for name, *_ in called].count(called[-1][0]) > 1:
        raise ValueError(f"{block} has no convolution or dense layer that is called once, as its last")
    inside, read, value = called[-1]
    name = f"{block}.{inside}".rstrip(".")
    _refuse_layer(net, block, name)
    layer = net.get_submodule(name)
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), layer.weight.requires_grad)
    _refuse_other_layer(name, inner[inside], read, value)

    def given(v: Tensor) -> Tensor:
        with hooked(whole, {inside: lambda module, inputs, y: v.clone()}):
            return whole(x.clone())

    axis = value.ndim - 1 if isinstance(layer, nn.Linear) else 1
    tried = 10 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
    none, one, several = given(torch.zeros_like(value)), given(torch.ones_like(value)), given(tried)
    trouble = f"{block} doesn't end in {name}, its last layer: something bends or mixes what that gives"
    if one.shape != value.shape:
        raise ValueError(trouble)
    factor = (one - none).movedim(axis, 0).flatten(1)[:, 0]
    over = factor.view(-1, *[1] * (value.ndim - 1 - axis))
    for got, v in ((one, 1.0), (several, tried)):
        if not ((got - none - over * v).abs() <= 1e-6 * over.abs() + 1e-12 * none.abs().max()).all():
            raise ValueError(trouble)
    return _End(block, name, layer, factor.to(layer.weight.device))


def _refuse_layer(net: nn.Module, block: str, name: str) -> None:
    layer = net.get_submodule(name)
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"{name} is a convolution in groups, or one that doesn't pad with zeros: {layer}")
    if isinstance(getattr(layer, "padding", 0), str):
        raise ValueError(f"{name} is a convolution that says {layer.padding!r} for its padding: give it in numbers")
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"{name} has no weight of its own (weight_norm, a parametrization): make it a plain parameter")
    numbers = [own for own in (layer.weight, layer.bias) if own is not None]
    paths = [path for path, m in net.named_modules(remove_duplicate=False) if m is net.get_submodule(block)]
    shared = [path for path, p in net.named_parameters(remove_duplicate=False) if any(p is own for own in numbers)]
    for what, names, count in ((block, paths, 1), (f"a weight of {name}", shared, len(numbers))):
        if len(names) > count:
            raise ValueError(f"{what} has several names ({', '.join(names)}): untie them first")


def _refuse_other_layer(name: str, layer: nn.Module, read: Tensor, value: Tensor) -> None:
    """One that computes something else than its weights say, such as timm's standardized or self-padding ones."""
    sample, bias = Sample(0, layer, 1), 0 if layer.bias is None else layer.bias
    rows, wanted = sample.of_inputs(read, 0), sample.of_outputs(value, 0)
    if len(rows) != len(wanted) or not torch.allclose(rows @ layer.weight.flatten(1).T + bias, wanted, 1e-6, 1e-9):
        raise ValueError(f"{name}, a {type(layer).__name__}, isn't an ordinary layer: it gives something else")
