"""Tensors of a network's own that meet its values in a sum or a product: a mean subtracted, a scale by channel."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from linl.calls import changes_its_input
from linl.graph import attribute, holder_of, input_of

_VIEWS = frozenset(
    {"view", "reshape", "unsqueeze", "flatten", torch.reshape, torch.unsqueeze, torch.flatten, operator.getitem}
)
"""What gives the same numbers another shape; of an index, where it takes everything."""


def reads_nothing(node: object) -> bool:
    """Whether a node gives a tensor of the network's own, viewed at most: it reads nothing that is computed."""
    while isinstance(node, fx.Node) and node.op.startswith("call") and node.target in _VIEWS:
        if len(node.all_input_nodes) != 1 or (node.target is operator.getitem and not _takes_all(node.args[1])):
            return False
        node = input_of(node)
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _takes_all(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None, None, None) for part in parts)


def read_by(node: object) -> Iterator[fx.Node]:
    """A node that `reads_nothing` and those before it, the attribute last."""
    while isinstance(node, fx.Node):
        yield node
        node = input_of(node) if node.op != "get_attr" else None


def value_of(traced: nn.Module, node: fx.Node) -> Tensor:
    """What a node that `reads_nothing` gives."""
    *views, held = read_by(node)
    value = attribute(traced, held.target)
    for view in reversed(views):
        if view.op == "call_method":
            value = getattr(value, view.target)(*view.args[1:], **view.kwargs)
        else:
            value = view.target(value, *view.args[1:], **{k: v for k, v in view.kwargs.items() if k != "input"})
    return value


def written(graph: fx.Graph) -> set[str]:
    """Attributes that a call changes in place: what they hold depends on when they are read."""
    found = set()
    for node in graph.nodes:
        if node.op.startswith("call") and changes_its_input(node) and reads_nothing(input_of(node)):
            found.add([*read_by(input_of(node))][-1].target)
    return found


def by_channel(value: Tensor, shape: Sequence[int]) -> tuple[Tensor, bool] | None:
    """A constant as a number for each channel.

    Args:
        value: of any shape.
        shape: (N, C, *size), of what it is added to or multiplied with; or (N, …, C), as of tokens.

    Returns: (C,), and whether the channels are the last axis of three or more; None where it differs otherwise.
    """
    if value.numel() == 1 and value.ndim <= len(shape):
        return value.detach().reshape(1).expand(shape[1]), False
    for axis in (1, len(shape) - 1):
        place = axis - len(shape) + value.ndim  # broadcasting begins with the last axis
        if place >= 0 and value.ndim <= len(shape) and value.numel() == value.shape[place] == shape[axis]:
            return value.detach().flatten(), axis > 1
    return None


def forget_(traced: fx.GraphModule) -> None:
    """Removes what `reads_nothing` and isn't read either, and the tensors that only such nodes named."""
    unread = []
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and reads_nothing(node):
            unread += [node.target] if node.op == "get_attr" else []
            traced.graph.erase_node(node)
    read = {node.target for node in traced.graph.nodes if node.op == "get_attr"}
    for target in set(unread) - read:
        holder, leaf = holder_of(traced, target)
        if type(holder) is nn.Module or holder is traced:  # a layer keeps what is its own
            delattr(holder, leaf)
