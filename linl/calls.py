"""Calls in a traced network's graph: what is a sum, what changes its argument; and arguments in their places."""

from __future__ import annotations

import operator

import torch
from torch import fx

DIFFERENCES = frozenset({operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"})
SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"}) | DIFFERENCES
"""Additions and subtractions of two values."""

IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})
"""Functions that change their first argument; methods that do end in "_"."""

_PAIR = ("input", "other")
_ARGUMENTS = {
    torch.add: _PAIR, torch.sub: _PAIR, torch.subtract: _PAIR, torch.mul: _PAIR, torch.multiply: _PAIR,
    torch.div: _PAIR, torch.divide: _PAIR, torch.true_divide: _PAIR, torch.maximum: _PAIR, torch.minimum: _PAIR,
    torch.matmul: _PAIR, torch.cat: ("tensors",), torch.concat: ("tensors",), torch.stack: ("tensors",),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "subtract", "mul", "mul_", "div", "div_"), ("self", "other")),
}  # fmt: skip


def positional_(graph: fx.Graph) -> bool:
    """Gives operands that were named, as in `torch.add(x, other=y)`, their places; whether there were any."""
    changed = False
    for node in graph.nodes:
        names, kwargs = _ARGUMENTS.get(node.target, ()), dict(node.kwargs)
        args = list(node.args)
        while len(args) < len(names) and names[len(args)] in kwargs:
            args.append(kwargs.pop(names[len(args)]))
            changed = True
        node.args, node.kwargs = tuple(args), kwargs
    return changed


def doubled_(graph: fx.Graph) -> bool:
    """Turns every cast to another floating precision into one to float64; whether there were any."""
    before = str(graph)
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
        elif node.op == "call_method" and node.target in ("to", "type"):
            node.args = tuple(torch.float64 if a in _FLOATS else a for a in node.args)
            node.kwargs = {k: torch.float64 if v in _FLOATS else v for k, v in node.kwargs.items()}
    return str(graph) != before


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
