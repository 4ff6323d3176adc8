"""Layers as linear regressions: what they read at some places, and the weights that come nearest to what is wanted."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.graph import evaluating

LEAST, ENOUGH = 4, 200
"""Outputs on the images for each number that is fitted to them: fewer are refused, of more a sample is taken."""


@contextlib.contextmanager
def hooked(net: nn.Module, calls: Mapping[str, Callable]) -> Iterator[None]:
    """In evaluation, with forward hooks on modules by name; afterwards both are as they were."""
    hooks = [net.get_submodule(name).register_forward_hook(call) for name, call in calls.items()]
    try:
        with evaluating(net):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Reached(Exception):  # noqa: N818 - no error: a forward pass ends early
    pass


def stopped_at(
    net: nn.Module, name: str, images: Tensor, calls: Mapping[str, Callable] | None = None
) -> tuple[Tensor, Tensor]:
    """What a module reads and gives; nothing behind it is run. `calls`: hooks on others meanwhile."""

    def reached(module, inputs, y):
        raise _Reached(inputs[0], y)

    with hooked(net, calls or {}), hooked(net, {name: reached}):
        try:
            net(images)
        except _Reached as stop:
            return stop.args
    raise AssertionError(f"{name} wasn't called")


def refuse_blocks(net: nn.Module, blocks: Sequence[str]) -> None:
    """
    Raises:
        ValueError: no blocks, one that the network lacks, one twice, or one within another.
    """
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


def called_once(net: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What each module reads, in the order of the forward pass.

    Raises:
        ValueError: a module that isn't called once, or not with one tensor for one tensor.
    """
    seen: list[tuple[str, tuple, object]] = []
    with hooked(net, {name: lambda m, inputs, y, name=name: seen.append((name, inputs, y)) for name in names}):
        net(images)
    called = [name for name, *_ in seen]
    for name in names:
        if called.count(name) != 1:
            hint = "; of a traced network only layers are called" if not called.count(name) else ""
            raise ValueError(f"{name} is called {called.count(name)} times, and only what is called once will do{hint}")
    for name, inputs, y in seen:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(y, Tensor):
            raise ValueError(f"{name} isn't called with one tensor, by position, or doesn't give one")
    return {name: inputs[0] for name, inputs, _ in seen}


class Sample:
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


def outputs(net: nn.Module, samples: dict[str, Sample], parts: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What modules give, at the sampled places: one pass for all."""
    found: dict[str, list[Tensor]] = {name: [] for name in samples}

    def keep(name):
        return lambda module, inputs, y: found[name].append(samples[name].of_outputs(y, len(found[name])))

    with hooked(net, {name: keep(name) for name in samples}):
        for part in parts:
            net(part)
    return found


class Sums:
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
        x, y = torch.cat([x - self._x, x.new_ones(len(x), 1)], 1), y - self._y
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._yy += (y**2).sum(0)
        self._sum += y.sum(0)
        self.rows += len(x)

    @property
    def numbers(self) -> int:
        """Of an output."""
        return len(self._xx)

    def solution(
        self, ridge: float, about: tuple[Tensor, Tensor] | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Least squares: (outputs, numbers) and the biases, which aren't held back. Of many, the smallest.

        Args:
            ridge: holds the weights back, relative to the mean of Σ x².
            about: weights and biases that they are held to; None for 0.
            columns: bool (numbers,), which may be read: the others' weights are 0.
        """
        at = torch.arange(self.numbers, device=self._xx.device)
        if columns is not None:
            at = at[torch.cat([columns, columns.new_ones(1)])]
        whole, matrix, wanted = self._xx[at][:, at], self._held(ridge)[at][:, at], self._xy[at]
        start = torch.zeros_like(wanted) if about is None else self._about_the_middle(*about)[at]
        wanted = wanted - whole @ start
        more = torch.linalg.solve(matrix, wanted) if ridge else torch.linalg.pinv(matrix, hermitian=True) @ wanted
        found = torch.zeros_like(self._xy)
        found[at] = start + more
        weight = found[:-1].T
        return weight, found[-1] + self._y - weight @ self._x

    def needed(self, left: int, size: int, ridge: float, outputs: Tensor | None = None) -> Tensor:
        """Which inputs a layer needs most, if it may read so many; bool (inputs,).

        Backward elimination: the one whose loss raises the error least goes, the other weights are those of the least
        squares without it, and so on (of one weight: Hassibi & Stork, NIPS 1992; here of all weights of an input).

        Args:
            left: inputs that stay.
            size: numbers of an input: the positions of a kernel.
            ridge: as for `solution`, above 0.
            outputs: bool (outputs,), those that count; None for all.
        """
        inverse, wanted = torch.linalg.inv(self._held(ridge)), self._xy if outputs is None else self._xy[:, outputs]
        weight, inputs = inverse @ wanted, (self.numbers - 1) // size
        groups = torch.arange(inputs * size, device=weight.device).view(inputs, size)
        stays = torch.ones(inputs, dtype=torch.bool, device=weight.device)
        for _ in range(inputs - left):
            at = groups[stays]
            inner = torch.linalg.inv(inverse[at[:, :, None], at[:, None, :]])
            rise = torch.einsum("gio,gij,gjo->g", weight[at], inner, weight[at])
            least = int(rise.argmin())
            gone, back = at[least], inverse[:, at[least]] @ inner[least]
            weight = weight - back @ weight[gone]
            inverse = inverse - back @ inverse[gone]
            stays[stays.nonzero()[least, 0]] = False
        return stays

    def _held(self, ridge: float) -> Tensor:
        """Σ xxᵀ with what holds weights back on its diagonal, relative to its mean."""
        scale = self._xx.diagonal()[:-1].mean().item() or 1.0  # 1 where nothing that is read varies
        held = torch.full((self.numbers,), ridge * scale).to(self._xx)
        held[-1] = 0
        return self._xx + held.diag()

    def missed(self, weight: Tensor, bias: Tensor, variance: Tensor | None = None) -> float:
        """Squared error of a layer, in the outputs' `variance` (the sum over channels), or in another; nan in none."""
        w = self._about_the_middle(weight, bias)
        error = self._yy - 2 * (w * self._xy).sum(0) + (w * (self._xx @ w)).sum(0)
        variance = self.variance if variance is None else variance
        return (error.sum() / variance).item() if variance > 0 else math.nan

    @property
    def variance(self) -> Tensor:
        """Of the outputs that were wanted, summed over rows and channels."""
        return (self._yy - self._sum**2 / self.rows).sum()

    def of_outputs(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer's outputs, a number a channel."""
        w = self._about_the_middle(weight, bias)
        mean = self._xx[-1] @ w / self.rows
        return mean + self._y, ((w * (self._xx @ w)).sum(0) / self.rows - mean**2).clamp_min(0)

    def _about_the_middle(self, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.double(), bias.double()
        return torch.cat([weight, (bias + weight @ self._x - self._y)[:, None]], 1).T


def refuse_few(name: str, layer: nn.Module, rows: int, images: int) -> None:
    """
    Raises:
        ValueError: too few outputs, of so many images, for the weights of an output of a layer.
    """
    numbers = layer.weight[0].numel() + 1
    if rows < LEAST * numbers:
        more = -(-images * LEAST * numbers // rows)
        raise ValueError(
            f"{images} images are {rows} outputs of {name}, too few for {numbers} weights each: give {more}"
        )


def numbers_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Its weights, (outputs, numbers), and biases."""
    return layer.weight.flatten(1), layer.bias


def set_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """A convolution's inputs are in the order of `unfold`: by channel, then position."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    layer.bias.copy_(bias)
