"""Calls in a traced network's graph: what is a sum, what changes its argument; and arguments in their places."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

DIFFERENCES = frozenset({operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"})
SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"}) | DIFFERENCES
"""Additions and subtractions of two values."""

IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})
"""Functions that change their first argument; methods that do end in "_"."""


def works_in_place(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether a call, of an activation's module or another, changes its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(getattr(module, "inplace", False)) or (node.op != "call_module" and name.endswith("_"))


def changes_its_input(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether a call, of a module or not, writes its value over what it reads, `+=` among them."""
    return node.target in IN_PLACE or works_in_place(module, node)


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
        names, args, kwargs = _ARGUMENTS.get(node.target, ()), list(node.args), dict(node.kwargs)
        while len(args) < len(names) and names[len(args)] in kwargs:
            args.append(kwargs.pop(names[len(args)]))
        if len(args) > len(node.args):
            node.args, node.kwargs, changed = tuple(args), kwargs, True
    return changed


def doubled_(graph: fx.Graph) -> bool:
    """Turns every cast to another floating precision into one to float64; whether there were any."""
    changed = False
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target, changed = "double", True
        elif node.op == "call_method" and node.target in ("to", "type") and _casts(node):
            node.args = tuple(torch.float64 if a in _FLOATS else a for a in node.args)
            node.kwargs = {k: torch.float64 if v in _FLOATS else v for k, v in node.kwargs.items()}
            changed = True
    return changed


def _casts(node: fx.Node) -> bool:
    return any(value in _FLOATS for value in (*node.args, *node.kwargs.values()))


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
