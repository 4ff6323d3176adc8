"""Blocks of a trained network, each replaced by the one layer that comes nearest to it on real inputs."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.checking import shown
from linl.folding import fold, refuse_unfinished
from linl.graph import clone, evaluating, trace
from linl.padding import pad_first
from linl.rewriting import neutral_norm
from linl.sites import activation_sites
from linl.units import PartialLinear, harden, linearize

LEAST, ENOUGH = 4, 200
"""Outputs on the images for each number that is fitted to them: fewer are refused, of more a sample is taken."""


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
        ValueError: train mode or trainable units, an unknown block, one within another, one that isn't called once,
            one that doesn't fold to one layer, units or pointwise layers for what isn't replaced, a pointwise layer for
            what isn't a convolution that pads half of its kernel on every side, or too few images.
    """
    refuse_unfinished(net)
    _refuse_blocks(net, blocks)
    for asked, those in (("units", units), ("pointwise", pointwise)):
        if others := sorted(set(those) - set(blocks)):
            raise ValueError(f"{asked} = {others}: not among the blocks that are replaced, {', '.join(blocks)}")
    made, rows, parts = clone(net), [], images.split(batch)
    read = _read_by(net, blocks, images[:1])
    ones = {name: _as_one(net.get_submodule(name), name, x) for name, x in read.items()}
    ones |= {name: _pointwise(ones[name], name) for name in pointwise}
    samples = {name: _Sample(n, _only_layer(one), len(images)) for n, (name, one) in enumerate(ones.items())}
    targets = _targets(net, samples, parts)
    for name, block in ones.items():
        layer, sample = _only_layer(block), samples[name]
        made.set_submodule(name, block)
        sums = _Sums()
        for number, (part, y) in enumerate(zip(parts, targets.pop(name), strict=True)):
            sums.add(sample.of_inputs(_stopped_at(made, layer, part), number), y)
        _refuse_few(name, sums, len(images))
        told = {"block": name, "layer": _described(layer), "numbers": sums.numbers, "rows": sums.rows}
        bare = sums.missed(*_numbers(layer))
        _set(layer, *sums.solution(ridge))
        rows.append(told | {"missed_bare": bare, "missed": sums.missed(*_numbers(layer))})
        behind = []
        if norms and isinstance(layer, nn.Conv2d):
            behind.append(neutral_norm(*sums.of_outputs(*_numbers(layer))))
        if name in units:
            behind.append(PartialLinear(alpha=1.0))
        if behind:
            made.set_submodule(name, nn.Sequential(block, *behind).to(layer.weight).eval())
    made.refit_report = RefitReport(pd.DataFrame(rows))
    return made


def _refuse_blocks(net: nn.Module, blocks: Sequence[str]) -> None:
    known = dict(net.named_modules())
    if not blocks:
        raise ValueError("no blocks: name at least one module of the network")
    for name in blocks:
        if name not in known or not name:
            raise ValueError(f"no module {name!r} in {type(net).__name__}: named_modules() lists them")
    for one, other in itertools.permutations(blocks, 2):
        if one == other or other.startswith(f"{one}."):
            raise ValueError(
                f"{other} is named twice" if one == other else f"{other} is part of {one}: name one of them"
            )


# --- what is read and given where -----------------------------------------------------------------


def _read_by(net: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What each block reads, in the order of the forward pass."""
    seen: list[tuple[str, Tensor]] = []
    with _hooked(net, {name: lambda m, inputs, y, name=name: seen.append((name, inputs[0])) for name in blocks}):
        net(images)
    called = [name for name, _ in seen]
    for name in blocks:
        if called.count(name) != 1:
            raise ValueError(f"{name} is called {called.count(name)} times: only a block called once can be replaced")
    return dict(seen)


def _targets(net: nn.Module, samples: dict[str, _Sample], parts: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What the original blocks give, at the sampled places: one pass for all."""
    found: dict[str, list[Tensor]] = {name: [] for name in samples}

    def keep(name):
        return lambda module, inputs, y: found[name].append(samples[name].of_outputs(y, len(found[name])))

    with _hooked(net, {name: keep(name) for name in samples}):
        for part in parts:
            net(part)
    return found


class _Reached(Exception):  # noqa: N818 - no error: a forward pass ends early
    pass


def _stopped_at(net: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer reads; nothing behind it is run."""

    def reached(module, inputs, y):
        raise _Reached(inputs[0])

    name = next(name for name, module in net.named_modules() if module is layer)
    with _hooked(net, {name: reached}):
        try:
            net(images)
        except _Reached as stop:
            return stop.args[0]
    raise AssertionError(f"{name} wasn't called")


@contextlib.contextmanager
def _hooked(net: nn.Module, calls: dict[str, Callable]) -> Iterator[None]:
    hooks = [net.get_submodule(name).register_forward_hook(call) for name, call in calls.items()]
    try:
        with evaluating(net):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Sample:
    """Which of a layer's outputs are looked at: so many places of each image, by chance, the same on every call."""

    def __init__(self, number: int, layer: nn.Module, images: int) -> None:
        self.number, self.layer = number, layer
        self.each = math.ceil(ENOUGH * (layer.weight[0].numel() + 1) / images)

    def of_inputs(self, x: Tensor, part: int) -> Tensor:
        """(rows, numbers): all that the outputs at these places read."""
        if isinstance(self.layer, nn.Linear):
            return self._rows(x.reshape(len(x), -1, x.shape[-1]), part)
        geometry = {name: getattr(self.layer, name) for name in ("dilation", "padding", "stride")}
        columns = [F.unfold(some, self.layer.kernel_size, **geometry).transpose(1, 2) for some in x.split(8)]
        return self._rows(columns, part)

    def of_outputs(self, y: Tensor, part: int) -> Tensor:
        """(rows, outputs)."""
        linear = isinstance(self.layer, nn.Linear)
        return self._rows(y.reshape(len(y), -1, y.shape[-1]) if linear else y.flatten(2).transpose(1, 2), part)

    def _rows(self, values: Tensor | list[Tensor], part: int) -> Tensor:
        """Of (images, places, numbers)."""
        chunks = values if isinstance(values, list) else values.split(8)
        images, places = sum(map(len, chunks)), chunks[0].shape[1]
        draw = torch.Generator().manual_seed(1_000_003 * self.number + part)
        order = torch.rand(images, places, generator=draw).argsort(1)[:, : self.each].to(chunks[0].device)
        taken = [
            c.gather(1, at[..., None].expand(-1, -1, c.shape[2])) for c, at in zip(chunks, order.split(8), strict=True)
        ]
        return torch.cat([t.flatten(0, 1) for t in taken]).double()


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
    _set(one, layer.weight[:, :, height // 2, width // 2], layer.bias)
    return one


def _only_layer(block: nn.Module) -> nn.Module:
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def _described(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} → {layer.out_features}"
    size, stride = "×".join(map(str, layer.kernel_size)), max(layer.stride)
    return f"{size}, {layer.in_channels} → {layer.out_channels}" + (f", stride {stride}" if stride > 1 else "")


# --- the regression --------------------------------------------------------------------------------


class _Sums:
    """Σ xxᵀ, Σ xyᵀ, Σ y² and Σ y over all outputs, in float64, taken from about their middle; the last of x is 1.

    Attributes:
        rows: outputs seen so far.
    """

    rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (rows, numbers), y: (rows, outputs)."""
        if not self.rows:  # their middle: a variance that is small beside the values stays exact
            self._x, self._y = x.mean(0), y.mean(0)
            n, outputs = len(self._x) + 1, len(self._y)
            sizes = (n, n), (n, outputs), outputs, outputs
            self._xx, self._xy, self._yy, self._sum = (x.new_zeros(size) for size in sizes)
        x, y = torch.cat([x - self._x, torch.ones_like(x[:, :1])], 1), y - self._y
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._yy += (y**2).sum(0)
        self._sum += y.sum(0)
        self.rows += len(x)

    @property
    def numbers(self) -> int:
        """Of an output."""
        return len(self._xx)

    def solution(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Least squares: (outputs, numbers) and the biases, which aren't held back. Of many, the smallest."""
        held = torch.full((self.numbers,), ridge * self._xx.diagonal()[:-1].mean().item()).to(self._xx)
        held[-1] = 0
        matrix = self._xx + held.diag()
        found = torch.linalg.solve(matrix, self._xy) if ridge else torch.linalg.pinv(matrix, hermitian=True) @ self._xy
        weight = found[:-1].T
        return weight, found[-1] + self._y - weight @ self._x

    def missed(self, weight: Tensor, bias: Tensor) -> float:
        """Squared error of a layer, in the outputs' variance (the sum over channels)."""
        w = self._about_the_middle(weight, bias)
        error = self._yy - 2 * (w * self._xy).sum(0) + (w * (self._xx @ w)).sum(0)
        return (error.sum() / (self._yy - self._sum**2 / self.rows).sum()).item()

    def of_outputs(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer's outputs, a number a channel."""
        w = self._about_the_middle(weight, bias)
        mean = self._xx[-1] @ w / self.rows
        return mean + self._y, ((w * (self._xx @ w)).sum(0) / self.rows - mean**2).clamp_min(0)

    def _about_the_middle(self, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.double(), bias.double()
        return torch.cat([weight, (bias + weight @ self._x - self._y)[:, None]], 1).T


def _refuse_few(name: str, sums: _Sums, images: int) -> None:
    if sums.rows < LEAST * sums.numbers:
        more = -(-images * LEAST * sums.numbers // sums.rows)
        raise ValueError(
            f"{images} images are {sums.rows} outputs of {name}, too few for {sums.numbers} weights each: give {more}"
        )


def _numbers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.weight.flatten(1), layer.bias


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """A convolution's inputs are in the order of `unfold`: by channel, then position."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    layer.bias.copy_(bias)
