"""Folding: a network's linear runs rewritten as one layer each, with the rules of `merge`.

What is merged now: BatchNorm into the convolution or dense layer before it, dense layers in a row (with
dropout, identities and flat views between them), fixed factors. What stays is reported with its reason.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl import merge as algebra
from linl.graph import input_of, is_activation, is_norm_act, shapes, trace
from linl.units import FixedTwoSlope, units_of

OBJECTIVES = ("latency", "parameters", "macs", "depth")


@dataclass(frozen=True)
class FoldReport:
    """What folding did. `.table` has a row for each pair of neighbouring linear layers.

    Columns: first, second (names of the layers), verdict ("exact" or "refused"), reason,
    weights_before, weights_after.
    """

    table: pd.DataFrame

    @property
    def merged(self) -> int:
        """Pairs that became one layer."""
        return int((self.table["verdict"] == "exact").sum())

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)


@dataclass(frozen=True)
class Verification:
    """Two networks on the same inputs, in float64.

    Attributes:
        largest: max |a(x) − b(x)|.
        scale: max(1, max |a(x)|).
        tolerance: what counts as equal, relative to the scale.
    """

    largest: float
    scale: float
    tolerance: float = 1e-10

    @property
    def equal(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.largest <= self.tolerance * self.scale

    @property
    def table(self) -> pd.DataFrame:
        """One row: largest, scale, relative, equal."""
        row = {"largest": self.largest, "scale": self.scale, "relative": self.largest / self.scale, "equal": self.equal}
        return pd.DataFrame([row])

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)


def fold(net: nn.Module, example: Tensor, border: str = "exact", objective: str = "latency") -> nn.Module:
    """A network with fewer layers that computes the same.

    Args:
        net: in eval mode, without trainable units (`harden` first); left alone.
        example: one input batch (N, ...), to see that the network runs and to check the result.
        border: "exact": only what is exact everywhere. "interior" comes with convolution merging.
        objective: what a merge of two dense layers must not raise: "latency", "parameters" and "macs"
            go by the number of weights, "depth" merges whatever it can.

    Returns: a traced copy, `.fold_report` attached.

    Raises:
        ValueError: train mode, trainable units, an unknown option, or a network that can't be traced.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    if border != "exact":
        raise ValueError(f'border={border!r}: only "exact" until convolutions can be merged with each other')
    training = [name or "the network" for name, module in net.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode: call .eval() first, BatchNorm and dropout behave otherwise")
    if units_of(net):
        raise ValueError(f"{len(units_of(net))} trainable units are left: call linl.harden(net) first")
    traced = trace(net)
    with torch.no_grad():
        traced.known_shapes = shapes(traced, example)
        _drop_nothings(traced)
        rows = _merge_norms(traced)
        rows += _merge_dense(traced, objective)
    rows += _left_over(traced)
    del traced.known_shapes
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    columns = ["first", "second", "verdict", "reason", "weights_before", "weights_after"]
    traced.fold_report = FoldReport(pd.DataFrame(rows, columns=columns))
    return traced


@torch.no_grad()
def verify(net: nn.Module, other: nn.Module, example: Tensor, tolerance: float = 1e-10) -> Verification:
    """Compares two networks in float64 on an example, each in eval mode; both are left alone."""
    a, b = (copy.deepcopy(n).eval().double()(example.double()) for n in (net, other))
    if a.shape != b.shape:
        raise ValueError(f"outputs of different shapes: {tuple(a.shape)} and {tuple(b.shape)}")
    return Verification((a - b).abs().max().item(), max(1.0, a.abs().max().item()), tolerance)


# --- modules and the records of `merge` ------------------------------------------------------------


def _affine(module: nn.Module) -> algebra.Affine | None:
    """The record of a layer, None for what isn't affine (or not in a way that `merge` knows)."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None  # somebody listens there, or changes something
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None or (is_norm_act(module) and not isinstance(module.act, nn.Identity)):
            return None
        return algebra.batchnorm_scale(module.running_mean, module.running_var, module.eps, module.weight, module.bias)
    if type(module) is nn.Linear:
        weight = module.weight.double()
        return algebra.Dense(weight, _bias(module, weight))
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.padding_mode == "zeros":
        if isinstance(module.padding, str):
            return None
        weight = module.weight.double()
        return algebra.Conv(
            weight, _bias(module, weight), module.stride, module.padding, module.dilation, module.groups
        )
    return None


def _bias(module: nn.Module, weight: Tensor) -> Tensor:
    return algebra.zeros_like_bias(weight) if module.bias is None else module.bias.double()


def _module(record: algebra.Dense | algebra.Conv, like: nn.Module) -> nn.Module:
    """A layer with the record's weights, in the dtype of another."""
    weight, bias = (t.to(like.weight.dtype) for t in (record.weight, record.bias))
    if isinstance(record, algebra.Dense):
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        layer = type(like)(
            weight.shape[1] * record.groups, weight.shape[0], weight.shape[2:], record.stride, record.padding,
            record.dilation, record.groups, device="meta",
        )  # fmt: skip
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer.eval()


# --- passes over the graph -------------------------------------------------------------------------


def _called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _uses(traced: fx.GraphModule) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in traced.graph.nodes:
        owner = node.target.rpartition(".")[0] if node.op == "get_attr" else node.target  # a weight read directly
        if node.op in ("call_module", "get_attr"):
            counts[owner] = counts.get(owner, 0) + 1
    return counts


_NOTHINGS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _drop_nothings(traced: fx.GraphModule) -> None:
    """Identities and (in evaluation) dropout leave the graph."""
    for node in list(traced.graph.nodes):
        if isinstance(_called(traced, node), _NOTHINGS):
            node.replace_all_uses_with(input_of(node))
            traced.graph.erase_node(node)


def _flat_between(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node before `node`, skipping flattening of what is already flat (after a dense layer)."""
    source, known = input_of(node), traced.known_shapes
    while isinstance(source, fx.Node) and len(source.users) == 1 and _is_flatten(traced, source):
        before = input_of(source)
        if known[before] != known[source]:
            return None  # it moves numbers about
        source = before
    return source if isinstance(source, fx.Node) else None


def _is_flatten(traced: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_called(traced, node), nn.Flatten) or node.target in (torch.flatten, "flatten")


def _merge_norms(traced: fx.GraphModule) -> list[dict]:
    """BatchNorms and fixed factors into the layer before."""
    rows = []
    for node in list(traced.graph.nodes):
        module, before = _called(traced, node), input_of(node)
        if isinstance(module, FixedTwoSlope):
            _absorb_factor(traced, node, before)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            trouble = _why_not(traced, before, node)
            if not trouble and is_norm_act(module):
                trouble = _split_norm_act(traced, node, before)
                rows.append(_row(traced, before, node, trouble))
            elif not trouble:
                rows.append(_row(traced, before, node, ""))
                _join(traced, before, node)
            else:
                rows.append(_row(traced, before, node, trouble))
    return rows


def _why_not(traced: fx.GraphModule, before: fx.Node | None, node: fx.Node) -> str:
    """Why the layer at `before` can't take in the BatchNorm at `node`; "" if it can."""
    first, uses = _called(traced, before), _uses(traced)
    if getattr(_called(traced, node), "running_mean", 0) is None:
        return "BatchNorm without running statistics"
    if not isinstance(_affine(first) if first is not None else None, algebra.Dense | algebra.Conv):
        return "no convolution or dense layer right before it"
    if uses[before.target] > 1 or uses[node.target] > 1:
        return "a layer that is used more than once"
    if len(before.users) > 1:
        return "the value in between is used elsewhere too"
    if isinstance(first, nn.Linear) and len(traced.known_shapes[before]) != 2:
        return "a BatchNorm over another axis than the dense layer's outputs"
    return ""


def _join(traced: fx.GraphModule, before: fx.Node, node: fx.Node) -> None:
    """Two calls become one, at `before`."""
    first, second = _called(traced, before), _called(traced, node)
    joined = _module(
        algebra.merge(_affine(first), _affine(second)), like=first if not isinstance(second, nn.Linear) else second
    )
    traced.add_submodule(before.target, joined)
    traced.known_shapes[before] = traced.known_shapes[node]
    node.replace_all_uses_with(before)
    traced.graph.erase_node(node)


def _split_norm_act(traced: fx.GraphModule, node: fx.Node, before: fx.Node) -> str:
    """timm's BatchNorm with an activation inside: the norm joins the layer before, the activation stays."""
    module, first = _called(traced, node), _called(traced, before)
    if not isinstance(getattr(module, "drop", nn.Identity()), nn.Identity | nn.Dropout):
        return f"{type(module.drop).__name__} inside the norm"
    scale = algebra.batchnorm_scale(module.running_mean, module.running_var, module.eps, module.weight, module.bias)
    traced.add_submodule(before.target, _module(algebra.merge(_affine(first), scale), like=first))
    traced.add_submodule(node.target, module.act)
    if isinstance(module.act, nn.Identity):
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    elif isinstance(module.act, FixedTwoSlope):
        _absorb_factor(traced, node, before)
    return ""


def _absorb_factor(traced: fx.GraphModule, node: fx.Node, before: fx.Node) -> None:
    """positive·leaky(x) = leaky(positive·x): the factor joins the layer before, torch's LeakyReLU stays."""
    module = _called(traced, node)
    if _uses(traced)[node.target] > 1 or not isinstance(before, fx.Node):
        return
    while isinstance(_called(traced, before), nn.MaxPool1d | nn.MaxPool2d) and len(before.users) == 1:
        before = input_of(before)  # a positive factor passes through a max
    first = _called(traced, before)
    record = _affine(first) if first is not None else None
    single = _uses(traced).get(before.target) == 1 and len(before.users) == 1
    if module.positive.ndim or not single or not isinstance(record, algebra.Dense | algebra.Conv):
        return
    positive, negative = module.positive.double(), module.negative.double()
    factor = algebra.Scale(positive.expand(len(record.weight)), torch.zeros_like(record.bias))
    traced.add_submodule(before.target, _module(algebra.merge(record, factor), like=first))
    slope = (negative / positive).item()
    traced.add_submodule(node.target, (nn.LeakyReLU(slope) if slope else nn.ReLU()).eval())


def _merge_dense(traced: fx.GraphModule, objective: str) -> list[dict]:
    """Dense layers in a row, the cheapest product first (a matrix chain)."""
    rows = []
    while True:
        pairs = []
        for node in traced.graph.nodes:
            if isinstance(_called(traced, node), nn.Linear):
                before = _flat_between(traced, node)
                if isinstance(_called(traced, before), nn.Linear) and not _pair_trouble(traced, before, node):
                    first, second = _called(traced, before), _called(traced, node)
                    saved = first.weight.numel() + second.weight.numel() - first.in_features * second.out_features
                    if objective == "depth" or saved > 0:
                        work = first.in_features * first.out_features * second.out_features
                        pairs.append((work, len(pairs), before, node))
        if not pairs:
            return rows
        _, _, before, node = min(pairs)
        row = _row(traced, before, node, "")
        between = input_of(node)
        _join(traced, before, node)
        while between is not before:  # flattening of what was flat
            between, gone = input_of(between), between
            gone.replace_all_uses_with(between)
            traced.graph.erase_node(gone)
        row["weights_after"] = _called(traced, before).weight.numel()
        rows.append(row)


def _pair_trouble(traced: fx.GraphModule, before: fx.Node, node: fx.Node) -> str:
    uses = _uses(traced)
    if uses[before.target] > 1 or uses[node.target] > 1:
        return "a layer that is used more than once"
    if any(_affine(_called(traced, each)) is None for each in (before, node)):
        return "a layer with a hook on it"
    return "the value in between is used elsewhere too" if len(before.users) > 1 else ""


def _left_over(traced: fx.GraphModule) -> list[dict]:
    """Neighbouring linear layers that stay two, each with its reason."""
    rows = []
    for node in traced.graph.nodes:
        second = _called(traced, node)
        if not isinstance(second, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        source, passed = input_of(node), []
        while isinstance(source, fx.Node) and (reason := _obstacle(traced, source)):
            passed.append(reason)
            source = input_of(source) if isinstance(input_of(source), fx.Node) else None
        first = _called(traced, source) if source is not None else None
        if not isinstance(first, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
            reason = _pair_trouble(traced, source, node) or "one layer would have more weights than the two"
        else:
            reason = "; ".join(passed) or "two convolutions: merging kernels comes with the folding work"
        rows.append(_row(traced, source, node, reason))
    return rows


def _obstacle(traced: fx.GraphModule, node: fx.Node) -> str:
    """What stands between two linear layers without bending the signal as an activation does; "" if nothing."""
    module = _called(traced, node)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or (module is not None and is_activation(module)):
        return ""
    if isinstance(module, nn.MaxPool2d | nn.AdaptiveMaxPool2d) or node.target is F.max_pool2d:
        return "a max-pool in between"
    if node.target in (operator.add, torch.add, operator.iadd):
        return "an addition in between"
    if _is_flatten(traced, node):
        return "a convolution before a dense layer: comes with the folding work"
    return "" if module is None or node.op != "call_module" else f"{type(module).__name__} in between"


def _row(traced: fx.GraphModule, first: fx.Node | None, second: fx.Node, reason: str) -> dict:
    modules = [_called(traced, node) for node in (first, second)]
    before = sum(getattr(m, "weight", torch.empty(0)).numel() for m in modules if m is not None)
    after = before if reason else getattr(modules[0], "weight", torch.empty(0)).numel()
    return {
        "first": str(getattr(first, "target", first)), "second": str(second.target),
        "verdict": "refused" if reason else "exact", "reason": reason,
        "weights_before": before, "weights_after": after,
    }  # fmt: skip
