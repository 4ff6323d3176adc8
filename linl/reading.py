"""A network read as a program: its traced graph as operations that bounds can be pushed through.

Everything is read with the same reader that folding uses; what it can't read is refused by name. A BatchNorm right
after a layer becomes part of it: one operation less, and tighter intervals.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from linl import affine
from linl.affine import Affine, CannotMerge
from linl.calls import DIFFERENCES, SUMS, works_in_place
from linl.constants import reads_nothing, value_of
from linl.files import first_line
from linl.graph import clone, input_of, shapes, trace_evaluation
from linl.masks import refuse_masks
from linl.merge import merge
from linl.operations import Reader
from linl.pieces import pieces_of
from linl.program import Bend, Conv, Dense, MaxPool, Op, Program, Reshape, Sum
from linl.rewriting import called, open_
from linl.sites import activation_sites


class NoBoundRule(ValueError):  # noqa: N818 - an answer, not a fault
    """The network has an operation that no bound is known for; the message names it."""


def program(net: nn.Module, shape: torch.Size) -> Program:
    """Reads a network in eval mode.

    Args:
        net: any depth and wiring of the operations above; left alone. Trainable units are read as they stand.
        shape: of one input.

    Raises:
        ValueError: train mode, masks, weights or values that aren't finite, an input shape that the network can't take.
        NoBoundRule: an operation or activation that no bound is known for, by name; or a forward that does more than
            its traced graph shows.
        UntraceableError: as `linl.graph.trace_evaluation`.
    """
    training = [name or "the network" for name, module in net.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode: call .eval() first, BatchNorm and dropout behave otherwise")
    refuse_masks(net)
    bad = [name for name, t in net.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds values that are no finite numbers: no bound can follow from them")
    first = next(net.parameters(), torch.zeros(()))
    example = torch.zeros(2, *shape, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        try:
            net(example)
        except Exception as error:
            why = first_line(error)
            raise ValueError(f"{type(net).__name__} can't take inputs of shape {tuple(shape)}: {why}") from error
        traced = trace_evaluation(net)
        names = [site.name for site in _sites(traced)]
        known = shapes(traced, example)
        open_(traced, known)
        read = _joined(_Reading(traced, known, names).program)
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
        why = first_line(error)
        raise ValueError(f"{type(net).__name__} can't be run in float64, which is how it is read: {why}") from error
    if not (mine.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"{type(net).__name__} gives no finite numbers for ordinary inputs: its weights are too large")
    if y.shape != mine.shape or (y - mine).abs().amax() > 1e-6 * y.abs().amax() + 1e-12 * largest:
        raise NoBoundRule(
            f"no bound is known: {type(net).__name__} gives something else than what its graph shows. A hook, a "
            "forward of an activation's own, or a change in place of a value that is read elsewhere? Write it anew."
        )


def _joined(read: Program) -> Program:
    """Each BatchNorm, or other factor a number has to itself, made part of the layer that alone it reads."""
    ops: list[Op] = []
    for op in read.ops:
        before = next((o for o in ops if o.target == op.sources[0]), None)
        alone = before is not None and len(read.readers(before.target)) == 1
        if alone and isinstance(before, Conv) and isinstance(op, Conv) and op.scales:
            layer = merge(before.layer, op.layer, tuple(before.inputs[1:]))
            ops[ops.index(before)] = replace(before, target=op.target, layer=layer)
        elif alone and isinstance(before, Dense) and isinstance(op, Dense) and op.scales:
            layer = merge(affine.dense(before.weight, before.bias), affine.dense(op.weight, op.bias))
            ops[ops.index(before)] = replace(before, target=op.target, weight=layer.weight, bias=layer.bias)
        else:
            ops.append(op)
    return Program(ops, read.shapes, read.output, read.names)


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
            elif not reads_nothing(node):
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
        if node.target not in SUMS | {torch.rsub} or len(node.args) < 2:
            return None
        (a, b), factor = node.args[:2], node.kwargs.get("alpha", 1) if len(node.args) == 2 else node.args[2]
        signs = [1, -factor if node.target in DIFFERENCES else factor]
        if node.target is torch.rsub:
            signs = [-factor, 1]
        moves = [isinstance(part, fx.Node) and not reads_nothing(part) for part in (a, b)]
        if not any(moves) or any(
            moving and part not in self.values for moving, part in zip(moves, (a, b), strict=True)
        ):
            raise NoBoundRule(
                f"no bound is known for {self._told(node)} of something that isn't computed from the input"
            )
        if any(moving and sign not in (1, -1) for moving, sign in zip(moves, signs, strict=True)):
            raise NoBoundRule(f"no bound is known for {self._told(node)} with alpha = {factor}: multiply before it")
        if all(moves):
            if self.known[a] != self.known[b]:
                raise NoBoundRule("no bound is known for an addition of different shapes")
            order = (a, b) if signs[0] == 1 else (b, a)
            return Sum(tuple(map(self._source, order)), -1, node.name, tuple(sorted(signs, reverse=True)))
        moving, fixed = (a, b) if moves[0] else (b, a)
        sign, times = signs if moves[0] else signs[::-1]
        return Sum((self._source(moving),), -1, node.name, (sign,), times * self._constant(node, moving, fixed))

    def _constant(self, node: fx.Node, moving: fx.Node, fixed: fx.Node | float) -> Tensor:
        """What is added to a value, in its shape."""
        value = value_of(self.traced, fixed) if isinstance(fixed, fx.Node) else torch.tensor(float(fixed))
        if self.known[moving] != self.known[node]:
            raise NoBoundRule("no bound is known for an addition that spreads a value over more positions")
        constant = affine.wide(value.detach()).cpu()
        constant = constant[0] if constant.ndim == len(self.known[node]) and constant.shape[0] == 1 else constant
        if constant.ndim > len(self.known[node]) - 1:
            raise NoBoundRule("no bound is known for an addition of a constant that differs by example")
        return constant.broadcast_to(self.known[node][1:])

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
