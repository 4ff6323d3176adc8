"""A program as a plain network again: torch's own layers in a graph, ready to save, fold and measure."""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, fx, nn

from linl import rewriting
from linl.folding import finish_
from linl.graph import free_name
from linl.program import Bend, Conv, Dense, MaxPool, Op, Program, Reshape, Sum
from linl.reading import NoBoundRule

PLAIN = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh)
"""Activations that are written as they are; ReLU6 is a Hardtanh."""


def _plain(activation: nn.Module) -> bool:
    """Whether an activation is written as it is: one of those, or one that has nothing of single channels."""
    return isinstance(activation, PLAIN) or not activation.state_dict()


def emit(program: Program, like: Tensor, name: str = "Network") -> fx.GraphModule:
    """A network of torch's own layers that computes what a program computes.

    Args:
        program: its activations must be torch's own (`PLAIN`), or have neither parameters nor buffers.
        like: whose dtype and device the weights get.
        name: of its class.

    Raises:
        NoBoundRule: an activation that can't be written plainly, by name.
    """
    root, graph = nn.Module(), fx.Graph()
    values: dict[int, fx.Node] = {0: graph.placeholder("x")}
    for op in program.ops:
        values[op.target] = _write(op, program, root, graph, [values[s] for s in op.sources])
    graph.output(values[program.output])
    root.to(device=like.device, dtype=like.dtype).eval()
    made = fx.GraphModule(root, graph, name).eval()
    finish_(made)
    return made


def emit_constant(value: Tensor, like: Tensor, name: str = "Network") -> fx.GraphModule:
    """A network that gives the same value (*shape) whatever it is given: a dense layer that reads no number."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    nothing = graph.call_function(operator.getitem, (graph.call_function(torch.flatten, (x, 1)), _NO_COLUMN))
    root.constant = _linear(torch.zeros(value.numel(), 0), value.flatten())
    out = graph.call_module("constant", (nothing,))
    if value.ndim != 1:
        out = graph.call_function(torch.reshape, (out, (-1, *value.shape)))
    graph.output(out)
    root.to(device=like.device, dtype=like.dtype).eval()
    made = fx.GraphModule(root, graph, name).eval()
    finish_(made)
    return made


_NO_COLUMN = (slice(None), slice(None, 0))


def _write(op: Op, program: Program, root: nn.Module, graph: fx.Graph, sources: list[fx.Node]) -> fx.Node:
    value, label = sources[0], op.name.replace(".", "_")
    if isinstance(op, Dense):
        if len(program.shapes[op.sources[0]]) > 1:
            value = graph.call_function(torch.flatten, (value, 1))
        return graph.call_module(_add(root, label, _linear(op.weight, op.bias)), (value,))
    if isinstance(op, Conv):
        modules, bias_map = rewriting.modules_of(op.layer, tuple(op.inputs[1:]), flat=False)
        for suffix, module in modules:
            value = graph.call_module(_add(root, f"{label}{suffix}", module), (value,))
        return value if bias_map is None else _plus(root, graph, value, bias_map, label)
    if isinstance(op, Sum):
        if len(op.sources) == 1:
            value = value if op.signs[0] > 0 else graph.call_function(operator.neg, (value,))
            return _plus(root, graph, value, op.constant, label)
        call = operator.add if op.signs[1] > 0 else operator.sub
        if op.signs[0] < 0:
            raise NoBoundRule(f"{op.name}: a difference the other way round can't be written")
        return graph.call_function(call, tuple(sources))
    if isinstance(op, MaxPool):
        return graph.call_module(_add(root, label, copy.deepcopy(op.module)), (value,))
    if isinstance(op, Reshape):
        return graph.call_function(torch.reshape, (value, (-1, *program.shapes[op.target])))
    assert isinstance(op, Bend)
    if _plain(op.module):
        module = copy.deepcopy(op.module)
        if getattr(module, "inplace", False):
            module.inplace = False  # where an activation before it went, its input may have other readers now
        return graph.call_module(_add(root, label, module), (value,))
    return _spelled(op, root, graph, value, label)


def _spelled(op: Bend, root: nn.Module, graph: fx.Graph, value: fx.Node, label: str) -> fx.Node:
    """A unit of linl's in torch's own operations: positive·leaky(x), or α·x + (1 − α)·σ(x)."""

    def number(of: Tensor, word: str) -> float | fx.Node:
        if of.numel() == 1:
            return of.item()
        held = free_name(root, f"{label}_{word}")
        root.register_buffer(held, of.clone())
        return graph.get_attr(held)

    if len(op.pieces.slopes) == 2:
        negative, positive = op.pieces.slopes
        if not (positive > 0).all():
            raise NoBoundRule(f"{op.name}: a slope of {positive.min():g} above 0 can't be written plainly")
        module = leaky(negative / positive)
        bent = graph.call_module(_add(root, label, module), (value,))
        return graph.call_function(operator.mul, (bent, number(positive, "positive")))
    inner, alpha = op.module.activation, op.pieces.slopes[0]
    if not _plain(inner) or (op.pieces.slopes[0] != op.pieces.slopes[-1]).any():
        raise NoBoundRule(f"{op.name} ({type(op.module).__name__}) can't be written as one of torch's own activations")
    bent = graph.call_module(_add(root, label, copy.deepcopy(inner)), (value,))
    part = graph.call_function(operator.mul, (bent, number(1 - alpha, "rest")))
    rest = graph.call_function(operator.mul, (value, number(alpha, "alpha")))
    return graph.call_function(operator.add, (part, rest))


def leaky(slope: Tensor) -> nn.Module:
    """x above 0, slope·x below; the slope () or one a channel."""
    if slope.numel() == 1:
        return nn.LeakyReLU(slope.item()) if slope.item() else nn.ReLU()
    made = nn.PReLU(slope.numel(), dtype=torch.float64)
    made.weight.data = slope.reshape(-1).clone()
    return made


def _plus(root: nn.Module, graph: fx.Graph, value: fx.Node, constant: Tensor, label: str) -> fx.Node:
    held = free_name(root, f"{label}_border")
    root.register_parameter(held, nn.Parameter(constant.clone()))
    return graph.call_function(operator.add, (value, graph.get_attr(held)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(
        1, 1, bias=bias is not None, device="meta"
    )  # torch warns of layers without inputs when it makes one
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _add(root: nn.Module, name: str, module: nn.Module) -> str:
    name = free_name(root, name)
    root.add_module(name, module)
    return name
