"""Blocks of a trained network, each replaced by the one layer that comes nearest to it on real inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.checking import shown
from linl.folding import fold, refuse_unfinished
from linl.graph import activation_sites, clone, evaluating, trace
from linl.padding import pad_first
from linl.rewriting import neutral_norm
from linl.units import harden, linearize

ROWS_FOR_EACH = 4
"""Least outputs on the images for each number that is fitted to them."""


@dataclass(frozen=True)
class RefitReport:
    """What one layer instead of a block loses.

    `.table` has a row a block: its name, the layer, numbers (weights of an output, bias included), rows (outputs that
    they were fitted to), and the share of the variance of the block's outputs that is missed: missed_bare by the block
    without its activations, missed by the layer that came instead.
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
    ridge: float = 1e-6,
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
        images: (N, ...) network inputs, on the network's device. Four outputs at least for each number fitted.
        norms: behind each new convolution comes a BatchNorm that changes nothing in evaluation and normalizes in
            training; `fold_norms` takes it in later.
        ridge: added to the regression's diagonal, relative to its mean: keeps directions that the images hardly show
            from large weights.
        batch: images at once.

    Returns: a copy, `.refit_report` attached.

    Raises:
        ValueError: train mode or trainable units, an unknown block, one within another, one that isn't called once,
            one that doesn't fold to one layer, or too few images.
    """
    refuse_unfinished(net)
    _refuse_blocks(net, blocks)
    made, rows = clone(net), []
    for name in _in_order(net, blocks, images[:1]):
        (x,) = _seen(net, name, images[:1])[0]
        block = _as_one(net.get_submodule(name), name, x)
        layer = _only_layer(block)
        made.set_submodule(name, block)
        sums = _sums(net, made, name, layer, images.split(batch))
        _refuse_few(name, sums, len(images))
        rows.append({"block": name, "layer": _described(layer), "numbers": sums.numbers, "rows": sums.rows,
                     "missed_bare": sums.missed(*_numbers(layer))})  # fmt: skip
        _set(layer, *sums.solution(ridge))
        rows[-1]["missed"] = sums.missed(*_numbers(layer))
        if norms and isinstance(layer, nn.Conv2d):
            made.set_submodule(
                name, nn.Sequential(block, neutral_norm(*sums.of_outputs(*_numbers(layer))).to(layer.weight))
            )
            made.get_submodule(name).eval()
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


# --- running as far as a block ---------------------------------------------------------------------


class _Reached(Exception):  # noqa: N818 - no error: a forward pass ends early
    pass


def _seen(net: nn.Module, name: str, images: Tensor) -> tuple[tuple, Tensor]:
    """What a module reads and gives; nothing behind it is run."""
    found: list = []

    def reached(module, inputs, output):
        found.append((inputs, output))
        raise _Reached

    hook = net.get_submodule(name).register_forward_hook(reached)
    try:
        with evaluating(net):
            net(images)
    except _Reached:
        return found[0]
    finally:
        hook.remove()
    raise ValueError(f"{name} isn't called by {type(net).__name__} as a module")


def _in_order(net: nn.Module, blocks: Sequence[str], images: Tensor) -> list[str]:
    """Names as the forward pass comes to them."""
    calls: list[str] = []
    hooks = [net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name)) for name in blocks]
    try:
        with evaluating(net):
            net(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name in blocks:
        if calls.count(name) != 1:
            raise ValueError(f"{name} is called {calls.count(name)} times: only a block called once can be replaced")
    return calls


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
    if made[-1].bias is None:
        made[-1].bias = nn.Parameter(made[-1].weight.new_zeros(len(made[-1].weight)))
    return folded


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

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Some outputs, for their middle alone: a variance that is small beside the values stays exact."""
        self._x, self._y, self.rows = x.mean(0), y.mean(0), 0
        n, outputs = len(self._x) + 1, len(self._y)
        self._xx, self._xy, self._yy, self._sum = (
            x.new_zeros(shape) for shape in ((n, n), (n, outputs), outputs, outputs)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (rows, numbers), y: (rows, outputs)."""
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


def _sums(net: nn.Module, made: nn.Module, block: str, layer: nn.Module, parts: Sequence[Tensor]) -> _Sums:
    name = next(name for name, module in made.named_modules() if module is layer)
    sums = None
    for part in parts:
        for x, y in _pairs(layer, _seen(made, name, part)[0][0], _seen(net, block, part)[1]):
            sums = sums or _Sums(x, y)
            sums.add(x, y)
    return sums


def _pairs(layer: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a regression, some images at a time: all that an output of the layer reads, and what it should be."""
    if isinstance(layer, nn.Linear):
        yield x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
        return
    geometry = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    for some, out in zip(x.double().split(8), y.double().split(8), strict=True):
        columns = F.unfold(some, layer.kernel_size, **geometry).transpose(1, 2)
        yield columns.reshape(-1, columns.shape[-1]), out.flatten(2).transpose(1, 2).reshape(-1, out.shape[1])


def _refuse_few(name: str, sums: _Sums, images: int) -> None:
    if sums.rows < ROWS_FOR_EACH * sums.numbers:
        more = -(-images * ROWS_FOR_EACH * sums.numbers // sums.rows)
        raise ValueError(
            f"{images} images are {sums.rows} outputs of {name}, too few for {sums.numbers} weights each: give {more}"
        )


def _numbers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.weight.flatten(1), layer.bias


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """A convolution's inputs are in the order of `unfold`: by channel, then position."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    layer.bias.copy_(bias)
