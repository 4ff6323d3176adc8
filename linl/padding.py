"""Padding moved ahead inside linear runs, before fine-tuning, so that merging them later is exact everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from linl.affine import Padding
from linl.chains import Fork, find
from linl.constants import reads_nothing
from linl.folding import joined, prepared, refuse_units
from linl.graph import free_name, trace
from linl.operations import Link
from linl.planning import OBJECTIVES, layers_in, plan
from linl.rewriting import average_pool_module, called, pad_module
from linl.timing import layer_timer


def pad_first(net: nn.Module, example: Tensor, objective: str = "depth") -> nn.Module:
    """A copy whose linear runs pad once, at their head: p₁ + s₁·p₂ + s₁·s₂·p₃ …, and nowhere inside.

    Two convolutions that each pad are no single convolution near the border: the second pads with zeros,
    where one merged kernel would see the first's values. Padded first, they are one, exactly. The function
    changes near the border (not its shape), so fine-tune afterwards; then `fold` is exact. The step that
    Kim et al., ICML 2023, take before fine-tuning.

    Args:
        net: hardened, in any mode; left alone.
        example: one input batch.
        objective: which runs: those that `fold` would merge for it. "depth": all of them.

    Returns: a traced copy, trainable as before, dropout and all.

    Raises:
        ValueError: trainable units, an unknown objective, or a network that can't be traced.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    refuse_units(net)
    traced = trace(net)
    with torch.no_grad():
        plain, known = prepared(net, example)
        timer = layer_timer(len(example), next(net.parameters(), example)) if objective == "latency" else None
        edit = _Edit(traced)
        for chain in find(plain, known).chains:
            for step in joined(plan(chain.links, objective, "interior", timer, matrix=False)):
                if layers_in(step.links) > 1:
                    none = ((0, 0),) * len(step.size)
                    _move(edit, step.links, none)
        edit.finish()
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _move(edit: _Edit, links: Sequence[Link | Fork], need: Padding) -> None:
    """Takes all padding out of a run and puts it before its first call; `need` more is wanted behind it."""
    for link in reversed(links[1:]):
        need = _strip(edit, link, need)
    head = links[0]
    if isinstance(head, Link):
        edit.set(head, _before(head, need), wider=_any(need))
        return
    for place, branch in enumerate(head.branches):
        if branch:
            _move(edit, branch, need)
        else:
            edit.pad(head.end.name, place, need)


def _strip(edit: _Edit, link: Link | Fork, need: Padding) -> Padding:
    """Takes a link's padding away; returns what is wanted before it instead."""
    if isinstance(link, Link):
        if not link.geometry.dims:
            return need
        edit.set(link, ((0, 0),) * link.geometry.dims, wider=_any(need))
        return _before(link, need)
    needs = []
    for branch in link.branches:
        wanted = need
        for inner in reversed(branch):
            wanted = _strip(edit, inner, wanted)
        needs.append(wanted)
    most = tuple(
        (max(lows), max(highs)) for lows, highs in (zip(*pairs, strict=True) for pairs in zip(*needs, strict=True))
    )
    for place, wanted in enumerate(needs):
        cut = tuple((w[0] - m[0], w[1] - m[1]) for w, m in zip(wanted, most, strict=True))
        for name, at in _heads(link, place):
            edit.pad(name, at, cut)
    return most


def _heads(fork: Fork, place: int) -> list[tuple[str, int]]:
    """The calls that read a branch's source, with the place of that argument."""
    branch = fork.branches[place]
    if not branch:
        return [(fork.end.name, place)]
    if isinstance(branch[0], Link):
        return [(branch[0].nodes[0].name, 0)]
    return [head for inner in range(len(branch[0].branches)) for head in _heads(branch[0], inner)]


def _before(link: Link, need: Padding) -> Padding:
    g = link.geometry
    return tuple((p[0] + s * n[0], p[1] + s * n[1]) for p, n, s in zip(g.padding, need, g.stride, strict=True))


def _any(padding: Padding) -> bool:
    return any(side for pair in padding for side in pair)


class _Edit:
    """Changes of padding in a traced network, by the names of its calls."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.nodes = {node.name: node for node in traced.graph.nodes}
        self.emptied: list[fx.Node] = []

    def set(self, link: Link, padding: Padding, wider: bool) -> None:
        """Gives a link another padding; `wider`: its input has grown as well."""
        node = self.nodes.get(link.nodes[0].name)
        if node is None or (padding == link.geometry.padding and not wider):
            return
        module = called(self.traced, node)
        if isinstance(module, nn.modules.conv._ConvNd):
            self._set_conv(node, module, padding)
        elif link.kind == "pool":
            pool = average_pool_module(link.geometry)
            divisor = getattr(module, "divisor_override", None)
            if divisor:
                pool.divisor_override = divisor
            self._replace(node, pool, padding)
        elif link.kind == "copy" and _any(link.geometry.padding):
            self.pad(node.name, 0, padding)
            self.emptied.append(node)  # erased at the end: it may be the head of a branch that is cut
        else:
            self.pad(node.name, 0, padding)

    def _set_conv(self, node: fx.Node, module: nn.Module, padding: Padding) -> None:
        plain = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[module.weight.ndim]
        symmetric = all(low == high >= 0 for low, high in padding)
        conv = plain(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,
            tuple(low for low, _ in padding) if symmetric else 0, module.dilation, module.groups,
            module.bias is not None, module.padding_mode, device="meta",
        )  # fmt: skip
        conv.weight, conv.bias = module.weight, module.bias
        self.traced.add_submodule(node.target, conv.train(module.training))
        if not symmetric:
            self.pad(node.name, 0, padding)

    def _replace(self, node: fx.Node, module: nn.Module, padding: Padding) -> None:
        name = free_name(self.traced, f"{node.target if node.op == 'call_module' else node.name}_explicit")
        self.traced.add_submodule(name, module.train(self.traced.training))
        with self.traced.graph.inserting_before(node):
            new = self.traced.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(new)
        self.traced.graph.erase_node(node)
        self.nodes[node.name] = new
        self.pad(node.name, 0, padding)

    def finish(self) -> None:
        """Erases the paddings that have moved."""
        for node in self.emptied:
            node.replace_all_uses_with(node.args[0])
            self.traced.graph.erase_node(node)

    def pad(self, name: str, place: int, padding: Padding) -> None:
        """Zero padding (below 0: cutting off) before one argument of a call."""
        if not _any(padding):
            return
        node = self.nodes[name]
        if not isinstance(node.args[place], fx.Node) or reads_nothing(node.args[place]):
            place = 1  # 2 * x
        own = free_name(self.traced, f"{node.target if node.op == 'call_module' else name}_pad")
        self.traced.add_submodule(own, pad_module(padding).train(self.traced.training))
        with self.traced.graph.inserting_before(node):
            padded = self.traced.graph.call_module(own, (node.args[place],))
        node.update_arg(place, padded)
