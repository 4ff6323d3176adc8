"""What keeps a call out of a merge, though it is linear: a kind of its own, hooks, other users, other names."""

from __future__ import annotations

from torch import fx, nn

from linl.affine import CannotMerge
from linl.calls import changes_its_input
from linl.graph import attribute, input_of, is_norm_act

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d", "BatchNormAct1d",
          "FrozenBatchNorm2d")  # fmt: skip


def is_plain_conv(module: nn.Module | None) -> bool:
    """Whether a module is one of torch's own convolutions, or timm's with TensorFlow's padding."""
    return type(module) in _CONVS or type(module).__name__ == "Conv2dSame"


def is_hooked(module: nn.Module) -> bool:
    """Whether something else happens when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def norm_trouble(norm: nn.Module) -> str:
    """Why a BatchNorm (of one with an activation inside, the norm) is no factor and shift; "" if it is."""
    if norm.running_mean is None:
        return "BatchNorm without running statistics"
    if type(norm).__name__ not in _NORMS:
        return f"{type(norm).__name__} is not a BatchNorm that can be merged"
    plain = isinstance(getattr(norm, "drop", None), nn.Identity | nn.Dropout | None)
    return "" if plain or not is_norm_act(norm) else "a norm that drops blocks"


def refuse_aliases(node: fx.Node, module: nn.Module | None = None) -> None:
    """An operation in place on a value that others read too changes it for them: it must stay."""
    if changes_its_input(node, module) and len(getattr(input_of(node), "users", ())) > 1:
        raise CannotMerge("an operation in place on a value that is used elsewhere too")


def shared_names(traced: nn.Module, graph: fx.Graph | None = None) -> dict[str, str]:
    """Modules that must stay as they are because something else uses them or their parameters: name to reason.

    Args:
        traced: a traced network, or with `graph` the one that this was made of.
    """
    calls: dict[str, int] = {}
    owners: dict[int, set[str]] = {}
    for node in (graph or traced.graph).nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
            for tensor in traced.get_submodule(node.target).parameters():
                owners.setdefault(id(tensor), set()).add(node.target)
        elif node.op == "get_attr":
            owners.setdefault(id(attribute(traced, node.target)), set()).add(f"the attribute {node.target}")
    reasons = {name: "a layer that is used more than once" for name, n in calls.items() if n > 1}
    for names in owners.values():
        if len(names) > 1:
            for name in names:
                others = ", ".join(sorted(names - {name}))
                reasons.setdefault(name, f"shared parameters: with {others}")
    return reasons
