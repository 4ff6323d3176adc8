"""Where a network uses its activations: a site for each call, and a unit put at each."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from linl.aliases import VIEWS
from linl.calls import works_in_place
from linl.graph import input_of, is_activation, is_norm_act

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, torch.relu_: nn.ReLU, F.relu: nn.ReLU, F.relu_: nn.ReLU, F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU, F.leaky_relu_: nn.LeakyReLU, F.elu: nn.ELU, F.elu_: nn.ELU,
    torch.selu: nn.SELU, torch.celu: nn.CELU, torch.special.expit: nn.Sigmoid,
    F.selu: nn.SELU, F.celu: nn.CELU, F.gelu: nn.GELU, F.silu: nn.SiLU, F.mish: nn.Mish,
    F.hardswish: nn.Hardswish, F.hardsigmoid: nn.Hardsigmoid, F.hardtanh: nn.Hardtanh,
    F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, torch.sigmoid_: nn.Sigmoid,
    F.logsigmoid: nn.LogSigmoid, F.tanh: nn.Tanh, torch.tanh: nn.Tanh, torch.tanh_: nn.Tanh,
    F.softplus: nn.Softplus, F.softsign: nn.Softsign, F.tanhshrink: nn.Tanhshrink,
    F.hardshrink: nn.Hardshrink, F.softshrink: nn.Softshrink,
}  # fmt: skip
"""Functional activations and the module each is the same as, given the same arguments."""

_METHODS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "sigmoid": nn.Sigmoid, "sigmoid_": nn.Sigmoid,
    "tanh": nn.Tanh, "tanh_": nn.Tanh,
}  # fmt: skip

_UNNAMED = {
    torch.clamp, torch.clamp_, torch.clip, torch.clamp_min, torch.clamp_max, torch.maximum, torch.minimum,
    torch.where, torch.abs, F.threshold, F.threshold_, F.rrelu, F.rrelu_, F.prelu, F.glu, F.hardtanh_,
    torch.rrelu, torch.threshold, torch.abs_, operator.abs, abs, "clamp_min_", "clamp_max_", "abs_",
    "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_max", "maximum", "minimum", "where", "abs",
}  # fmt: skip
"""Operations that bend a signal but are not an activation we can stand in for: named, never skipped."""


@dataclass(frozen=True)
class Site:
    """One place where an activation is used.

    Attributes:
        node: the graph's node (a call of a module or of a function).
        name: dotted path, the unit's name in a linearized network.
        module: the activation, a module of its own for each site.
        inner: path inside the called module where the activation sits ("act" in timm's
            BatchNormAct2d), or "" when the call is the activation itself.
    """

    node: fx.Node
    name: str
    module: nn.Module
    inner: str = ""


def activation_sites(traced: fx.GraphModule) -> list[Site]:
    """Every place where an activation is used, in the order of the forward pass.

    A module called at n places gives n sites: torchvision's ResNet block calls one nn.ReLU twice, so
    resnet18 has 17 sites in 9 modules.

    Raises:
        ValueError: an activation that no unit could stand in for (a clamp, an in-place activation
            whose result is unused, a shared norm with an activation inside), by name.
    """
    found, refused, taken, calls = [], [], set(), {}
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        site, trouble = None, ""
        if node.op == "call_module":
            module = modules[node.target]
            if isinstance(module, _HIDING) or (getattr(module, "apply_act", False) and not is_norm_act(module)):
                trouble = f"{type(module).__name__} has its activation inside"
            calls[node.target] = calls.get(node.target, 0) + 1
            if is_activation(module):
                site = Site(node, node.target, module)
            elif is_norm_act(module) and not isinstance(module.act, nn.Identity):
                site = Site(node, f"{node.target}.act", module.act, "act")
                if calls[node.target] > 1:
                    trouble = "a norm with an activation inside, used twice"
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            site = _functional(node, _FUNCTIONS[node.target])
            trouble = "" if site else "arguments computed in the forward pass"
        elif node.op == "call_method" and node.target in _METHODS:
            site = _functional(node, _METHODS[node.target])
        elif node.op.startswith("call") and node.target in _UNNAMED and not _is_relu_clamp(node):
            trouble = f"{_where(node)} is no activation that a unit can stand in for"
        elif node.op.startswith("call") and _is_relu_clamp(node):
            site = Site(node, _where(node), nn.ReLU())
        if site and not trouble and works_in_place(site.module, node):
            trouble = _in_place_trouble(node)
        if trouble:
            name = site.name if site else node.target if node.op == "call_module" else node.name
            refused.append(f"{name} ({trouble})")
        elif site:
            name, n = site.name, 0
            own = node.op == "call_module"  # the first call of a module keeps its name
            while name in taken or ((n or not own) and name in modules):
                n += 1
                name = f"{site.name}_{n}"
            taken.add(name)
            found.append(Site(node, name, copy.deepcopy(site.module), site.inner))
    if refused:
        raise ValueError(f"activations that can't be replaced: {'; '.join(refused)}")
    return found


_HIDING = (nn.GLU, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers of torch with activations inside that no unit can replace."""


def _in_place_trouble(node: fx.Node) -> str:
    """Why an in-place activation can't be replaced by a unit, which works out of place; "" if it can."""
    if not node.users:
        return "works in place and its result is not used"
    source, order = input_of(node), {n: i for i, n in enumerate(node.graph.nodes)}
    while isinstance(source, fx.Node) and source.target in VIEWS:
        source = input_of(source)
        if any(order[user] > order[node] for user in source.users):
            return "works in place on a view of something that is used later"
    return ""


def _functional(node: fx.Node, cls: type[nn.Module]) -> Site | None:
    extra = [*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input")]
    if any(isinstance(value, fx.Node) for value in extra):
        return None
    options = {k: v for k, v in node.kwargs.items() if k != "input"}
    return Site(node, _where(node), cls(*node.args[1:], **options))


def _where(node: fx.Node) -> str:
    """The path of the module whose forward holds this call, and the call's name."""
    stack = node.meta.get("nn_module_stack") or {}
    owner = next(reversed(stack.values()), ("",))[0] if stack else ""
    call = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{owner}.{call}" if owner else call


def _is_relu_clamp(node: fx.Node) -> bool:
    clamps = {torch.clamp, torch.clip, torch.clamp_min, "clamp", "clip", "clamp_min"}
    if node.target not in clamps:
        return False
    low = node.kwargs.get("min", node.args[1] if len(node.args) > 1 else None)
    high = node.kwargs.get("max", node.args[2] if len(node.args) > 2 else None)
    return isinstance(low, int | float) and low == 0 and high is None


def replace_activations(traced: fx.GraphModule, sites: list[Site], units: list[nn.Module]) -> fx.GraphModule:
    """Put one unit at each site, in place; the old activations are dropped. Returns `traced`."""
    graph, order = traced.graph, {node: i for i, node in enumerate(traced.graph.nodes)}
    for site, unit in zip(sites, units, strict=True):
        if site.inner:
            setattr(traced.get_submodule(site.node.target), site.inner, unit)
            continue
        source = alias = input_of(site.node)
        while works_in_place(site.module, site.node):  # whoever reads the input later sees it changed: keep that
            for user in list(alias.users):
                if user is not site.node and order.get(user, -1) > order[site.node]:
                    user.replace_input_with(alias, site.node)
            if alias.op != "call_module" or not isinstance(traced.get_submodule(alias.target), nn.Identity):
                break
            alias = input_of(alias)
        traced.add_submodule(site.name, unit)
        with graph.inserting_before(site.node):
            new = graph.call_module(site.name, (source,))
        order[new] = order[site.node]
        site.node.replace_all_uses_with(new)
        graph.erase_node(site.node)
    graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
