"""One value under several names: where it is changed in place, all of them see the change.

torch.fx reads `y += z` as `y = y + z`, which is the same only as long as nothing else holds on to y's old value.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

CHANGED = "changed in place"  # in a node's meta: its first argument
VIEWS = frozenset(
    {
        "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "detach", "contiguous",
        "chunk", "split", "narrow", "select", "unflatten", "t", operator.getitem, torch.flatten, torch.reshape,
        torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.chunk, torch.split,
    }
)  # fmt: skip
"""Methods and functions whose result may lie in the memory of their first argument."""

_KEEPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


class ChangingProxy(fx.Proxy):
    """A proxy that notes where `+=` and its like were written."""

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


def second_name(graph: fx.Graph, modules: dict[str, nn.Module]) -> str:
    """Where a value is changed by `+=` that is read later under another name; "" where that is nowhere.

    Args:
        modules: by the names that the graph calls them.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not node.meta.get(CHANGED) or not isinstance(node.args[0], fx.Node):
            continue
        for same in _in_one_memory(node.args[0], modules):
            if any(order[user] > order[node] for user in same.users):
                return f"{node.args[0].name} is changed in place (+= or the like) and read later under another name"
    return ""


def _in_one_memory(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """A value, what it may be a view of, and the views of these."""
    while _is_view(node, modules):
        node = node.args[0]
    found = [node]
    for one in found:
        found += [user for user in one.users if _is_view(user, modules) and user.args[0] is one]
    return found


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    return isinstance(modules.get(node.target), _KEEPING) if node.op == "call_module" else node.target in VIEWS
