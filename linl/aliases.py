"""One value under several names: where it is changed in place, all of them see the change.

torch.fx reads `y += z` as `y = y + z`, which is the same only as long as nothing else holds on to y's old value.
"""

from __future__ import annotations

import itertools
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from linl.calls import works_in_place

CHANGED = "changed in place"  # in a node's meta: its first argument
VIEWS = frozenset(
    {
        "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "detach", "contiguous",
        "chunk", "split", "narrow", "select", "unflatten", "t", operator.getitem, torch.flatten, torch.reshape,
        torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.chunk, torch.split,
    }
)  # fmt: skip
"""Methods and functions whose result may lie in the memory of their first argument."""

_MAY_BE_THE_SAME = frozenset(
    {"float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "cuda", F.dropout, F.dropout1d, F.dropout2d,
     F.dropout3d}
) | VIEWS  # fmt: skip
_KEEPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
_SIZES = ("size", "dim", "numel", "ndimension", "stride")


class _Changing:
    """Notes where `+=` and its like were written."""

    def _changed(self, name: str, other: object) -> fx.Proxy:
        made = getattr(operator, name)(self, other)
        made.node.meta[CHANGED] = True
        return made

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._changed("add", other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._changed("sub", other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._changed("mul", other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._changed("truediv", other)

    def __ipow__(self, other: object) -> fx.Proxy:
        return self._changed("pow", other)


class ChangingProxy(_Changing, fx.Proxy):
    """A traced value that notes where it is changed in place."""

    def __getattr__(self, name: str) -> fx.Proxy:
        return _ChangingAttribute(self, name)


class _ChangingAttribute(_Changing, fx.proxy.Attribute):
    """The same of an attribute, `x.mT`."""


def second_name(graph: fx.Graph, modules: dict[str, nn.Module]) -> str:
    """Where a value is changed by `+=` that is read later under another name; "" where that is nowhere.

    Args:
        modules: by the names that the graph calls them.
    """
    order, sizes = {node: i for i, node in enumerate(graph.nodes)}, _sizes(graph)
    for node in graph.nodes:
        if not node.meta.get(CHANGED) or not isinstance(node.args[0], fx.Node) or node.args[0] in sizes:
            continue
        for same in _in_one_memory(node.args[0], modules):
            if any(order[user] > order[node] and user not in sizes for user in same.users):
                return f"{node.args[0].name} is changed in place (+= or the like) and read later under another name"
    return ""


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Sizes of values, and what is computed from these alone: numbers, which have no memory in common."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        named = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
        read = named or (node.op == "call_method" and node.target in _SIZES)
        if read or (node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= found):
            found.add(node)
    return found


def _in_one_memory(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """A value, what it is a view of, and the views of these that may overlap it."""
    path = [node]
    while _is_view(path[-1], modules):
        path.append(path[-1].args[0])
    found = [node]
    for part, whole in itertools.pairwise(path):
        found += [one for one in _views(whole, modules) if one is not part and not _disjoint(one, part)]
    for one in found:
        found += [view for view in _views(one, modules) if view not in found]
    return found + path[1:]


def _views(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    return [user for user in node.users if _is_view(user, modules) and user.args[0] is node]


def _disjoint(one: fx.Node, other: fx.Node) -> bool:
    """Whether two pieces of a value are two of its parts: x[0] and x[1], two of chunk's pieces."""
    indices = [n.args[1] for n in (one, other) if n.target is operator.getitem]
    return len(indices) == 2 and all(isinstance(i, int) for i in indices) and indices[0] != indices[1]


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    module = modules.get(node.target) if node.op == "call_module" else None
    if works_in_place(module, node) or node.kwargs.get("inplace"):
        return True
    if module is not None:
        return isinstance(module, _KEEPING)
    transposed = node.target is getattr and node.args[1] in ("T", "mT", "H", "mH", "data", "real")
    return transposed or node.target in _MAY_BE_THE_SAME
