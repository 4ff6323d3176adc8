"""A network as a list of operations that bounds can be pushed through: affine layers, sums, bends, reshapings.

All numbers are float64, whatever the network has. linl.reading makes a program of a network.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.affine import Affine
from linl.pieces import Pieces
from linl.whole import adjoint

KEPT = 1 << 22  # numbers of a layer whose magnitudes are kept: 32 MiB in float64


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        sources: numbers of the values it reads; value 0 is the input.
        target: number of the value it gives.
        name: of the layer or call.
    """

    sources: tuple[int, ...]
    target: int
    name: str

    def magnitude(self, weight: Tensor) -> Tensor:
        """|weight|, kept with the operation if it isn't large; an operation's numbers never change."""
        if weight.numel() > KEPT:
            return weight.abs()
        if not hasattr(self, "_magnitude"):
            self._magnitude = weight.abs()
        return self._magnitude

    def sums(self, weight: Tensor) -> Tensor:
        """Σ|weight| of each row, kept likewise."""
        if not hasattr(self, "_sums"):
            self._sums = self.magnitude(weight).flatten(1).sum(1)
        return self._sums


@dataclass(eq=False)
class Dense(Op):
    """weight·x + bias on the flattened input; weight (out, in), bias (out,)."""

    weight: Tensor = None
    bias: Tensor | None = None
    inputs: torch.Size = ()

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """weight (out, in) and bias (out,), zeros where there is none; float64."""
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return self.weight.detach().double().numpy(), bias.detach().double().numpy()

    @property
    def fans(self) -> tuple[int, int]:
        """Products in one number of the output, and in one of the way back."""
        outputs, inputs = self.weight.shape
        return inputs, outputs

    @property
    def fan(self) -> int:
        """The larger of both."""
        return max(self.fans)

    @property
    def norms(self) -> Tensor:
        """The sum of the magnitudes of each output's weights, (out,)."""
        return self.sums(self.weight)

    @property
    def scales(self) -> bool:
        """Whether each number of the output is one of the input times a factor, shifted."""
        return (
            torch.equal(self.weight, torch.diag(self.weight.diagonal())) if len(set(self.weight.shape)) == 1 else False
        )

    def forward(self, x: Tensor, absolute: bool = False) -> Tensor:
        """Applied to (N, *inputs); `absolute`: |weight|·x, without the bias."""
        x = x.flatten(1)
        return F.linear(x, self.magnitude(self.weight)) if absolute else F.linear(x, self.weight, self.bias)

    def backward(self, rows: Tensor) -> Tensor:
        """rows·weight: (N, out) to (N, *inputs)."""
        return (rows @ self.weight).view(len(rows), *self.inputs)

    def first(self, units: Tensor) -> Tensor:
        """`backward` of the rows that pick some outputs."""
        return self.weight[units].view(len(units), *self.inputs)

    def terms(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """What some outputs (flat positions) are sums of: positions of what each reads, and weights; (N, fan) both."""
        return torch.arange(self.weight.shape[1]).expand(len(units), -1), self.weight[units]


@dataclass(eq=False)
class Conv(Op):
    """A convolution, average pool, BatchNorm, zero padding or subsampling over one to three dimensions."""

    layer: Affine = None
    inputs: torch.Size = ()
    outputs: torch.Size = ()

    @property
    def bias(self) -> Tensor | None:
        """(C, 1, …) or (C, *size)."""
        bias = self.layer.bias
        return bias if bias is None or bias.ndim > 1 else bias.view(-1, *[1] * self.layer.geometry.dims)

    @property
    def fans(self) -> tuple[int, int]:
        """As in `Dense`."""
        g = self.layer.geometry
        each = math.prod(g.kernel)
        return each * g.inputs // g.groups, each * g.outputs // g.groups

    @property
    def fan(self) -> int:
        """As in `Dense`."""
        return max(self.fans)

    @property
    def norms(self) -> Tensor:
        """As in `Dense`, (C, 1, …)."""
        return self.sums(self.layer.weight).view(-1, *[1] * self.layer.geometry.dims)

    @property
    def pointwise(self) -> bool:
        """Whether each number of the output reads one number of the input alone: a BatchNorm, a padding."""
        g = self.layer.geometry
        return math.prod(g.kernel) == 1 and g.groups == g.inputs == g.outputs

    @property
    def scales(self) -> bool:
        """As in `Dense`: a BatchNorm."""
        g = self.layer.geometry
        return self.pointwise and set(g.stride) == {1} and not any(side for pair in g.padding for side in pair)

    def forward(self, x: Tensor, absolute: bool = False) -> Tensor:
        """As in `Dense`."""
        if not absolute:
            return self.layer(x)
        return Affine(self.layer.geometry, self.magnitude(self.layer.weight), None)(x)

    def backward(self, rows: Tensor) -> Tensor:
        """As in `Dense`: (N, *outputs) to (N, *inputs)."""
        return adjoint(self.layer.geometry, self.layer.weight, rows, tuple(self.inputs[1:]))

    def first(self, units: Tensor) -> Tensor:
        """As in `Dense`."""
        at, weights = self.terms(units)
        made = weights.new_zeros(len(units), math.prod(self.inputs)).scatter_add_(1, at, weights)
        return made.view(len(units), *self.inputs)

    def terms(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Dense`; where padding makes up a zero, its weight is 0. (No other padding is read: `linl.reading`.)"""
        g, area = self.layer.geometry, math.prod(self.outputs[1:])
        channel, place = units // area, torch.unravel_index(units % area, self.outputs[1:])
        group = channel // (g.outputs // g.groups) * (g.inputs // g.groups)  # its first channel
        at = group[:, None] + torch.arange(g.inputs // g.groups)
        real = torch.ones_like(at, dtype=torch.bool)
        for axis, (side, here, (low, _)) in enumerate(zip(self.inputs[1:], place, g.padding, strict=True)):
            taps = here[:, None] * g.stride[axis] + torch.arange(g.kernel[axis]) * g.dilation[axis] - low
            taps = taps.view(len(units), *[1] * (at.ndim - 1), g.kernel[axis])
            at, real = at[..., None] * side + taps, real[..., None] & (taps >= 0) & (taps < side)
        at, real = at.flatten(1), real.flatten(1)
        return torch.where(real, at, 0), torch.where(real, self.layer.weight.flatten(1)[channel], 0)


@dataclass(eq=False)
class MaxPool(Op):
    """The largest number of each window; `module` is torch's own, 1-D or 2-D, without ceil_mode."""

    module: nn.Module = None

    def forward(self, x: Tensor) -> Tensor:
        """Applied to (N, *inputs)."""
        return self.module(x)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima of (N, *inputs), and for each where it stands among its channel's numbers."""
        m = self.module
        pool = F.max_pool1d if isinstance(m, nn.MaxPool1d) else F.max_pool2d
        return pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, return_indices=True)

    def windows(self, x: Tensor, fill: float = -math.inf) -> Tensor:
        """The numbers of each window of (N, *inputs), `fill` for padding; (N, *outputs, window)."""
        m, two = self.module, x.ndim - 2
        kernel, stride, padding, dilation = (
            (v,) * two if isinstance(v, int) else tuple(v) for v in (m.kernel_size, m.stride, m.padding, m.dilation)
        )
        x = F.pad(x, [side for p in reversed(padding) for side in (p, p)], value=fill)
        for i in range(two):
            x = x.unfold(2 + i, (kernel[i] - 1) * dilation[i] + 1, stride[i])[..., :: dilation[i]]
        return x.flatten(2 + two)


@dataclass(eq=False)
class Sum(Op):
    """sign·a + sign·b, or with one source a constant added."""

    signs: tuple[int, ...] = (1, 1)
    constant: Tensor | None = None


@dataclass(eq=False)
class Reshape(Op):
    """The same numbers in another shape."""


@dataclass(eq=False)
class Bend(Op):
    """An activation: `site` is its number among the network's activations, `module` what computes it."""

    pieces: Pieces = None
    site: int = 0
    module: nn.Module = None


def picks(units: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """Rows (N, *shape) with a single one each, at the given flat positions."""
    rows = torch.zeros(len(units), math.prod(shape), dtype=like.dtype, device=like.device)
    rows[torch.arange(len(units)), units] = 1
    return rows.view(len(units), *shape)


@dataclass
class Program:
    """The operations of a network, in order.

    Attributes:
        ops: each after those it reads.
        shapes: of every value, for one example.
        output: number of the value that the network gives.
        names: of the activations, in the order of the forward pass.
    """

    ops: list[Op]
    shapes: list[torch.Size]
    output: int
    names: list[str] = field(default_factory=list)
    _casts: dict[torch.dtype, tuple[list[Op], list[Op]]] = field(default_factory=dict, repr=False)

    @property
    def bends(self) -> list[Bend]:
        """The activations, by site."""
        return sorted((op for op in self.ops if isinstance(op, Bend)), key=lambda op: op.site)

    def fingerprint(self) -> str:
        """Of wiring and numbers: the same for two networks only if they compute the same."""
        digest = hashlib.sha256()
        for op in self.ops:
            digest.update(f"{type(op).__name__} {op.sources} {op.target} {op.name}".encode())
            tensors: list[Tensor | None] = []
            if isinstance(op, Dense):
                tensors = [op.weight, op.bias]
            elif isinstance(op, Conv):
                digest.update(repr(op.layer.geometry).encode())
                tensors = [op.layer.weight, op.layer.bias]
            elif isinstance(op, Sum):
                digest.update(repr(op.signs).encode())
                tensors = [op.constant]
            elif isinstance(op, MaxPool):
                digest.update(repr(op.module).encode())
            elif isinstance(op, Bend):
                digest.update(repr((op.pieces.bends, op.pieces.values)).encode())
                tensors = list(op.pieces.slopes)
            for tensor in tensors:
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def readers(self, value: int) -> list[Op]:
        """The operations that read a value."""
        return [op for op in self.ops if value in op.sources]

    def giver(self, value: int) -> Op | None:
        """The operation that gives a value; None for the input."""
        return next((op for op in self.ops if op.target == value), None)

    def upto(self, value: int) -> list[Op]:
        """The operations that a value depends on, in order."""
        wanted, found = {value}, []
        for op in reversed(self.ops):
            if op.target in wanted:
                found.append(op)
                wanted.update(op.sources)
        return found[::-1]

    def to(self, dtype: torch.dtype) -> Program:
        """The same with its numbers in another dtype; kept, since bounds ask for it time and again."""
        if dtype == torch.float64:
            return self
        of, made = self._casts.get(dtype, ([], []))
        if len(of) != len(self.ops) or any(a is not b for a, b in zip(of, self.ops, strict=True)):
            made = [_cast(op, dtype) for op in self.ops]
            self._casts[dtype] = list(self.ops), made
        return Program(made, self.shapes, self.output, self.names)

    def run(self, x: Tensor) -> dict[int, Tensor]:
        """Every value, for inputs (N, *shape), in x's dtype."""
        found = {0: x}
        for op in self.ops:
            found[op.target] = apply(op, [found[s] for s in op.sources], self.shapes[op.target])
        return found


def _cast(op: Op, dtype: torch.dtype) -> Op:
    if isinstance(op, Dense):
        return replace(op, weight=op.weight.to(dtype), bias=None if op.bias is None else op.bias.to(dtype))
    if isinstance(op, Conv):
        bias = None if op.layer.bias is None else op.layer.bias.to(dtype)
        return replace(op, layer=replace(op.layer, weight=op.layer.weight.to(dtype), bias=bias))
    if isinstance(op, Sum) and op.constant is not None:
        return replace(op, constant=op.constant.to(dtype))
    return op


def apply(op: Op, sources: list[Tensor], shape: torch.Size) -> Tensor:
    """One operation on values (N, …)."""
    if isinstance(op, Dense):
        return F.linear(sources[0].flatten(1), op.weight.to(sources[0]), _to(op.bias, sources[0]))
    if isinstance(op, Conv | MaxPool):
        return op.forward(sources[0])
    if isinstance(op, Sum):
        total = sum(sign * value for sign, value in zip(op.signs, sources, strict=True))
        return total if op.constant is None else total + op.constant.to(total)
    if isinstance(op, Reshape):
        return sources[0].reshape(-1, *shape)
    return op.pieces(sources[0])


def _to(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like)
