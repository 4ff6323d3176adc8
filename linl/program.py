"""A network as a list of operations that bounds can be pushed through: affine layers, sums, bends, reshapings.

Everything is read off the traced graph with the same reader that folding uses; what it can't read is refused by
name. All numbers are float64, whatever the network has.
"""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl import affine
from linl.affine import Affine, CannotMerge
from linl.graph import UntraceableError, activation_sites, clone, input_of, shapes, trace, works_in_place
from linl.operations import Reader, attribute
from linl.pieces import Pieces, pieces_of
from linl.rewriting import called, open_
from linl.whole import adjoint


class NoBoundRule(ValueError):  # noqa: N818 - an answer, not a fault
    """The network has an operation that no bound is known for; the message names it."""


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


@dataclass(eq=False)
class Dense(Op):
    """weight·x + bias on the flattened input; weight (out, in), bias (out,)."""

    weight: Tensor = None
    bias: Tensor | None = None
    inputs: torch.Size = ()

    @property
    def fan(self) -> int:
        """Products in one number of the output, or of the way back, whichever are more."""
        return max(self.weight.shape)

    def forward(self, x: Tensor, absolute: bool = False) -> Tensor:
        """Applied to (N, *inputs); `absolute`: |weight|·x, without the bias."""
        weight = self.weight.abs() if absolute else self.weight
        return F.linear(x.flatten(1), weight, None if absolute else self.bias)

    def backward(self, rows: Tensor) -> Tensor:
        """rows·weight: (N, out) to (N, *inputs)."""
        return (rows @ self.weight).view(len(rows), *self.inputs)

    def first(self, units: Tensor, like: Tensor) -> Tensor:
        """`backward` of the rows that pick some outputs."""
        return self.weight[units].view(len(units), *self.inputs)


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
    def fan(self) -> int:
        """As in `Dense`."""
        g = self.layer.geometry
        return math.prod(g.kernel) * max(g.inputs, g.outputs) // g.groups

    @property
    def pointwise(self) -> bool:
        """Whether each number of the output reads one number of the input alone: a BatchNorm, a padding."""
        g = self.layer.geometry
        return math.prod(g.kernel) == 1 and g.groups == g.inputs == g.outputs

    def forward(self, x: Tensor, absolute: bool = False) -> Tensor:
        """As in `Dense`."""
        if not absolute:
            return self.layer(x)
        return Affine(self.layer.geometry, self.layer.weight.abs(), None)(x)

    def backward(self, rows: Tensor) -> Tensor:
        """As in `Dense`: (N, *outputs) to (N, *inputs)."""
        return adjoint(self.layer.geometry, self.layer.weight, rows, tuple(self.inputs[1:]))

    def first(self, units: Tensor, like: Tensor) -> Tensor:
        """As in `Dense`."""
        return self.backward(picks(units, self.outputs, like))


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
        """The same with its numbers in another dtype."""
        ops = self.ops if dtype == torch.float64 else [_cast(op, dtype) for op in self.ops]
        return Program(ops, self.shapes, self.output, self.names)

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


# --- reading a network -----------------------------------------------------------------------------


def program(net: nn.Module, shape: torch.Size) -> Program:
    """Reads a network in eval mode.

    Args:
        net: any depth and wiring of the operations above; left alone. Trainable units are read as they stand.
        shape: of one input.

    Raises:
        ValueError: train mode, weights or values that aren't finite, an input shape that the network can't take.
        NoBoundRule: an operation or activation that no bound is known for, by name; or a forward that does more than
            its traced graph shows.
        UntraceableError: as `linl.graph.trace`.
    """
    training = [name or "the network" for name, module in net.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode: call .eval() first, BatchNorm and dropout behave otherwise")
    bad = [name for name, t in net.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds values that are no finite numbers: no bound can follow from them")
    first = next(net.parameters(), torch.zeros(()))
    example = torch.zeros(2, *shape, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        try:
            net(example)
        except Exception as error:
            why = (str(error).splitlines() or [repr(error)])[0]
            raise ValueError(f"{type(net).__name__} can't take inputs of shape {tuple(shape)}: {why}") from error
        traced = trace(net)
        names = [site.name for site in _sites(traced)]
        known = shapes(traced, example)
        open_(traced, known)
        read = _Reading(traced, known, names).program
        _refuse_other_function(net, read)
        return read


def _refuse_other_function(net: nn.Module, read: Program) -> None:
    """Compares what was read with the network itself, in float64: a misread graph must never be analysed."""
    wide, generator = clone(net).to("cpu", torch.float64), torch.Generator().manual_seed(0)
    x = torch.randn(3, *read.shapes[0], dtype=torch.float64, generator=generator)
    x = x * torch.tensor([0.3, 1.0, 10.0], dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    values = read.run(x)
    mine, largest = values[read.output], max(value.abs().amax() for value in values.values() if value.numel())
    try:
        y = wide(x.clone())  # it may work in place
    except Exception as error:
        why = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{type(net).__name__} can't be run in float64, which is how it is read: {why}") from error
    if not (mine.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"{type(net).__name__} gives no finite numbers for ordinary inputs: its weights are too large")
    if y.shape != mine.shape or (y - mine).abs().amax() > 1e-6 * y.abs().amax() + 1e-12 * largest:
        raise NoBoundRule(
            f"no bound is known: {type(net).__name__} gives something else than what its graph shows. A hook, a "
            "forward of an activation's own, or a change in place of a value that is read elsewhere? Write it anew."
        )


def _sites(traced: fx.GraphModule) -> list:
    try:
        return activation_sites(traced)
    except ValueError as error:
        raise NoBoundRule(f"no bound is known: {error}") from error


class _Reading:
    """The walk over a graph."""

    def __init__(self, traced: fx.GraphModule, known: dict[fx.Node, torch.Size], names: list[str]) -> None:
        self.traced, self.known, self.reader = traced, known, Reader(traced, known)
        self.sites = {site.node: (i, site) for i, site in enumerate(_sites(traced))}
        self.values: dict[fx.Node, int] = {}
        self.ops: list[Op] = []
        self.shapes: list[torch.Size] = []
        for node in traced.graph.nodes:
            if node.op == "output":
                output = node.args[0]
            elif node.op != "get_attr":
                self._take(node)
        if not isinstance(output, fx.Node):
            raise NoBoundRule(f"the network gives {type(output).__name__}, not one tensor")
        whole = Program(self.ops, self.shapes, self._source(output))
        whole.ops = whole.upto(whole.output)
        whole.names = [names[op.site] for op in whole.bends]
        for number, op in enumerate(whole.bends):  # those whose values nobody reads are gone
            op.site = number
        self.program = whole

    def _take(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.values:
                return  # an optional argument, at its default
            self._add(node)
            return
        if node not in self.known:
            return  # a size or a number; whoever reads it is refused
        bends = node in self.sites
        plain = (self._max_pool, self._sum, self._affine, self._reshape)
        op = self._bend(node) if bends else next(filter(None, (read(node) for read in plain)), None)
        if op is None:
            raise NoBoundRule(f"no bound is known for {self._told(node)}")
        op.target = self._add(node)
        self.ops.append(op)
        if works_in_place(self.sites[node][1].module if bends else None, node):
            self.values[input_of(node)] = op.target  # whoever reads it from here on sees it changed

    def _add(self, node: fx.Node) -> int:
        self.values[node] = len(self.shapes)
        self.shapes.append(self.known[node][1:])
        return self.values[node]

    def _told(self, node: fx.Node) -> str:
        module = called(self.traced, node)
        if module is not None:
            return f"{node.target} ({type(module).__name__})"
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def _source(self, node: fx.Node) -> int:
        if node not in self.values:
            raise NoBoundRule(f"no bound is known for {node.name}: it isn't computed from the input alone")
        return self.values[node]

    def _bend(self, node: fx.Node) -> Bend:
        number, site = self.sites[node]
        pieces = pieces_of(site.module, max(0, len(self.known[node]) - 2))
        if pieces is None:
            raise NoBoundRule(
                f"no bound is known for {site.name} ({type(site.module).__name__}): ReLU, ReLU6, LeakyReLU, PReLU, "
                "Hardtanh, LiNLU and PartialLinear around them have one"
            )
        return Bend((self._source(input_of(node)),), -1, site.name, pieces, number, site.module)

    def _affine(self, node: fx.Node) -> Op | None:
        try:
            link = self.reader.link(node)
        except CannotMerge as reason:
            shared = self.reader.shared.get(node.target) if node.op == "call_module" else None
            if shared is None:
                return self._reshape(node) or _refuse(f"no bound is known for {self._told(node)}: {reason}")
            link = self._shared(node)
        if link is None:
            return None
        if link.last_axis:
            raise NoBoundRule(f"no bound is known for {self._told(node)} on more than one position")
        if link.geometry.mode != "zeros":
            raise NoBoundRule(f"no bound is known for {self._told(node)}: {link.geometry.mode} padding")
        layer, source = link.layer(), self._source(link.source)
        layer = Affine(layer.geometry, affine.wide(layer.weight).detach(), _detached(layer.bias))
        inputs, name = self.shapes[source], str(node.target)
        if not layer.geometry.dims or link.flat:
            flat = affine.as_dense(layer, link.size) if layer.geometry.dims else affine.as_dense(layer, ())
            return Dense((source,), -1, name, flat.weight, flat.bias, inputs)
        return Conv((source,), -1, name, layer, inputs, self.known[node][1:])

    def _shared(self, node: fx.Node):
        """A layer that is used more than once: bounds don't mind."""
        kept, self.reader.shared = self.reader.shared, {}
        try:
            return self.reader.link(node)
        except CannotMerge as reason:
            raise NoBoundRule(f"no bound is known for {self._told(node)}: {reason}") from reason
        finally:
            self.reader.shared = kept

    def _max_pool(self, node: fx.Node) -> MaxPool | None:
        module = called(self.traced, node)
        if type(module) not in (nn.MaxPool1d, nn.MaxPool2d):
            return None
        if module.ceil_mode or module.return_indices:
            raise NoBoundRule(f"no bound is known for {self._told(node)} with ceil_mode or return_indices")
        return MaxPool((self._source(input_of(node)),), -1, str(node.target), module)

    def _sum(self, node: fx.Node) -> Sum | None:
        if node.target not in _SUMS or node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
            return None
        a, b = node.args[:2]
        sign = -1 if node.target in _DIFFERENCES else 1
        if not isinstance(a, fx.Node) or (isinstance(b, fx.Node) and b.op != "get_attr" and a.op == "get_attr"):
            a, b, sign = (b, a, sign) if sign == 1 else (None, None, sign)
        if not isinstance(a, fx.Node) or a not in self.values:
            raise NoBoundRule(
                f"no bound is known for {self._told(node)} of something that isn't computed from the input"
            )
        name = node.name
        if isinstance(b, fx.Node) and b.op != "get_attr":
            if self.known[a] != self.known[b]:
                raise NoBoundRule("no bound is known for an addition of different shapes")
            return Sum((self._source(a), self._source(b)), -1, name, (1, sign))
        value = attribute(self.traced, b.target) if isinstance(b, fx.Node) else torch.tensor(float(b))
        if self.known[a] != self.known[node]:
            raise NoBoundRule("no bound is known for an addition that spreads a value over more positions")
        constant = sign * affine.wide(value.detach()).cpu()
        constant = constant[0] if constant.ndim == len(self.known[node]) and constant.shape[0] == 1 else constant
        if constant.ndim > len(self.known[node]) - 1:
            raise NoBoundRule("no bound is known for an addition of a constant that differs by example")
        return Sum((self._source(a),), -1, name, (1,), constant.broadcast_to(self.known[node][1:]))

    def _reshape(self, node: fx.Node) -> Reshape | None:
        module, views = called(self.traced, node), (torch.flatten, torch.reshape, "view", "reshape", "flatten")
        if type(module) not in (nn.Flatten, nn.Unflatten) and node.target not in views:
            return None
        source = input_of(node)
        if source not in self.values or self.known[node][0] != self.known[source][0] or len(self.known[node]) < 2:
            return None
        return Reshape((self._source(source),), -1, node.name)


def _refuse(why: str) -> None:
    raise NoBoundRule(why)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else affine.wide(bias).detach().cpu()


_DIFFERENCES = {operator.sub, torch.sub, "sub", "sub_", operator.isub}
_SUMS = {operator.add, torch.add, operator.iadd, "add", "add_"} | _DIFFERENCES

__all__ = [
    "Bend",
    "Conv",
    "Dense",
    "MaxPool",
    "NoBoundRule",
    "Op",
    "Program",
    "Reshape",
    "Sum",
    "UntraceableError",
    "program",
]
