"""Folding: every linear run of a network becomes as few layers as pay, exactly, or the report says why not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl import rewriting
from linl.affine import Affine
from linl.chains import Fork, find
from linl.checking import difference, error, interior_of, one_tensor, shape_of, values
from linl.constants import forget_
from linl.cost import latencies
from linl.files import first_line
from linl.graph import (
    UntraceableError,
    evaluating,
    graph_of,
    input_of,
    is_activation,
    is_norm_act,
    part_from_,
    shapes,
    shapes_and_output,
    standing_alone,
    trace,
)
from linl.joining import merged
from linl.masks import refuse_masks
from linl.obstacles import is_hooked, is_plain_conv, norm_trouble, shared_names
from linl.operations import Link
from linl.planning import OBJECTIVES, Step, layers_in, plan
from linl.reports import COLUMNS, FoldReport, Place, left_over, row_of, undone
from linl.timing import built, layer_timer
from linl.units import units_of

BORDERS = ("exact", "interior")
TOLERANCE = 1e-10
"""Relative error in float64 up to which a merge counts as exact."""
ROUNDING = {torch.float64: TOLERANCE, torch.float32: 1e-3}
"""The same for the whole network, whose merged weights are rounded to its dtype; coarser ones aren't judged."""


def fold(
    net: nn.Module, example: Tensor, border: str = "exact", objective: str = "latency", check: bool = True
) -> nn.Module:
    """A network with fewer layers that computes the same.

    Args:
        net: in eval mode, without trainable units (`harden` first); left alone.
        example: one input batch (N, ...): sizes, the check and the timing follow it.
        border: "exact": only what is equal everywhere. Some of it is so for inputs of the example's size alone, and
            its reason in the report says so: bias maps, one matrix over the whole image, pools and padding that follow
            the size, strides that meet another size otherwise. "interior": also what is wrong near the border; the
            error is reported.
        objective: what is made small: "latency" (measured on this machine), "parameters", "macs" or
            "depth". A fold never raises it.
        check: compare every merged run with the original in float64 and, where the objective is latency,
            time it; what fails is undone.

    Returns: a traced copy of torch's own layers, `.fold_report` attached; it saves, exports and loads
        without linl.

    Raises:
        ValueError: train mode, trainable units, masks, an unknown option, or a network that can't be traced.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    if border not in BORDERS:
        raise ValueError(f"unknown border {border!r}: choose from {', '.join(BORDERS)}")
    wanted = refuse_example(net, example)
    refuse_unfinished(net)
    with torch.no_grad():
        traced, known = _prepared(net, example, wanted)
        chains = find(traced, known)
        timer = layer_timer(len(example), next(traced.parameters(), example)) if objective == "latency" else None
        plans = [plan(chain.links, objective, border, timer) for chain in chains.chains]
        steps = [step for steps in plans for step in joined(steps)]
        work = _Work(traced, known, example, border, check)
        for step in steps:
            work.merge(step, timed=objective == "latency" and check)
        rows = work.rows + left_over(traced, chains, plans, objective, border)
        places = work.write()
        part_from_(traced, net)
    finish_(traced)
    if check and border == "exact" and work.rows:
        traced, rows, places = _checked_whole(net, traced, example, rows, places)
    traced.fold_report = FoldReport(pd.DataFrame(rows, columns=COLUMNS), objective, border, places, shape_of(net))
    return traced


def _checked_whole(net: nn.Module, folded: fx.GraphModule, example: Tensor, rows: list[dict], places: dict):
    """The folded network if it is equal to the one given, else that one, traced and otherwise untouched."""
    with torch.no_grad():
        a, b = values(net, example)[""], values(folded, example)[""]
    found = difference(a, b, None)
    dtype = next((p.dtype for p in folded.parameters()), torch.float64)
    if found["largest"] <= ROUNDING.get(dtype, math.inf) * found["scale"]:
        return folded, rows, places
    reason = f"the whole network was off by {found['largest'] / found['scale']:.1e}: nothing was folded"
    return trace(net), [undone(row, reason) for row in rows], {}


# --- BatchNorms alone ------------------------------------------------------------------------------


def fold_norms(net: nn.Module) -> nn.Module:
    """A network for inference whose BatchNorms are in the layers right before them, otherwise as it was.

    It takes no example, and the result holds for every input size: nothing is run, timed, or merged besides, which is
    what makes it quick. `fold` does more: BatchNorms before a layer, or behind whatever else is linear, and layers with
    each other. Compare with `verify(net, folded, example)`.

    Args:
        net: in eval mode, without trainable units; left alone.

    Returns: a traced copy of torch's own layers, `.fold_report` attached: a row for each BatchNorm, taken in or
        "refused", and why.

    Raises:
        ValueError: train mode, trainable units, masks, or a network that can't be traced.
    """
    refuse_unfinished(net)
    graph, modules = graph_of(net), dict(net.named_modules(remove_duplicate=False))
    shared, made, rows = shared_names(net, graph), {}, []
    with torch.no_grad():
        for node in list(graph.nodes):
            if reason := _no_norm(node, modules, shared):
                rows.append(_norm_row(node, reason))
            elif isinstance(norm := modules.get(node.target), nn.modules.batchnorm._BatchNorm):
                before = input_of(node)  # which may have taken in one already
                made[before.target] = modules[before.target] = rewriting.with_norm(modules[before.target], norm)
                rows.append(_norm_row(node))
                if is_norm_act(norm) and not isinstance(norm.act, nn.Identity):
                    modules[node.target] = norm.act
                else:
                    node.replace_all_uses_with(before)
                    graph.erase_node(node)
    folded = standing_alone(net, graph, modules, made)
    folded.fold_report = FoldReport(pd.DataFrame(rows, columns=COLUMNS), "norms", "exact", {}, shape_of(net))
    return folded


def _norm_row(node: fx.Node, reason: str = "") -> dict:
    """A BatchNorm's row in the report."""
    before = input_of(node)
    first = str(before.target) if getattr(before, "op", "") == "call_module" else str(before)
    last = str(node.target) if node.op == "call_module" else node.name
    told = {"layer": "" if reason else first, "first": first, "last": last, "operations": 2, "layers": 1}
    return told | {"verdict": "refused" if reason else "exact", "reason": reason}


def _no_norm(node: fx.Node, modules: dict[str, nn.Module], shared: dict[str, str]) -> str:
    """Why a call of a BatchNorm can't be taken in by the layer before it; "" where it can, or is no BatchNorm."""
    if node.target in (F.batch_norm, torch.batch_norm):
        return "BatchNorm called as a function"
    norm, before = modules.get(node.target) if node.op == "call_module" else None, input_of(node)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return ""
    layer = modules.get(before.target) if getattr(before, "op", "") == "call_module" else None
    if type(layer) is not nn.Linear and not is_plain_conv(layer):
        return "no convolution or dense layer right before it"
    if trouble := norm_trouble(norm) or shared.get(node.target) or shared.get(before.target):
        return trouble
    if layer.weight is not layer._parameters.get("weight") or any(map(is_hooked, (layer, norm))):
        return "a layer with a hook on it"
    if len(before.users) > 1:
        return "the value in between is used elsewhere too"
    if layer.weight.is_complex():
        return "complex weights"
    if type(layer) is nn.Linear and not _reads_features(before, modules):
        return "a dense layer that may work on more than features (N, F): fold(net, example) sees what it reads"
    return ""


def _reads_features(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the graph shows that a call reads (N, F): behind what flattens, only layers that keep that shape."""
    while isinstance(node := input_of(node), fx.Node):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        if node.target is torch.flatten or node.op == "call_method":
            return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and len(node.kwargs) == 0
        kept = (nn.Linear, nn.Dropout, nn.Identity, nn.modules.batchnorm._BatchNorm)
        if not (isinstance(module, kept) or (module is not None and is_activation(module))):
            return False
    return False


def refuse_unfinished(net: nn.Module) -> None:
    """Train mode, trainable units and masks, by name."""
    refuse_training(net)
    refuse_units(net)
    refuse_masks(net)


def refuse_training(net: nn.Module) -> None:
    """Train mode, by name."""
    training = [name or "the network" for name, module in net.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode: call .eval() first, BatchNorm and dropout behave otherwise")


def refuse_units(net: nn.Module) -> None:
    """Trainable units, whose nonlinearity isn't settled yet."""
    if units_of(net):
        raise ValueError(f"{len(units_of(net))} trainable units are left: call linl.harden(net) first")


def prepared(net: nn.Module, example: Tensor) -> tuple[fx.GraphModule, dict[fx.Node, torch.Size]]:
    """A traced copy in plain form, and the shapes of its values."""
    wanted = refuse_example(net, example)
    traced, known = _prepared(net, example, wanted)
    part_from_(traced, net)
    return traced, known


def _prepared(net: nn.Module, example: Tensor, wanted: object) -> tuple[fx.GraphModule, dict[fx.Node, torch.Size]]:
    """`prepared`, given the network's output, around the network's own weights: most will be merged into new ones."""
    traced = trace(net, own=False)
    known, output = shapes_and_output(traced, example)
    _refuse_other_output(net, wanted, output)
    rewriting.plain_(traced, known)
    return traced, known


def refuse_example(net: nn.Module, example: Tensor) -> object:
    """An example that the network can't take, or that shows nothing.

    Returns: what the network makes of it in eval mode.

    Raises:
        ValueError: saying which.
    """
    if not isinstance(net, nn.Module) or not isinstance(example, Tensor):
        raise ValueError(f"wanted a torch module and a tensor, not {type(net).__name__} and {type(example).__name__}")
    if not example.numel():
        raise ValueError("the example is empty: at least one input is needed")
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in [*net.parameters(), *net.buffers()]):
        raise ValueError(f"{type(net).__name__} has lazy layers without weights: run it once first")
    try:
        with torch.no_grad(), evaluating(net):
            return net(example)
    except Exception as error:
        why = first_line(error)
        told = f"{tuple(example.shape)}, {example.dtype}"
        raise ValueError(f"{type(net).__name__} doesn't run on this example ({told}): {why}") from error


def refuse_other_function(net: nn.Module, traced: nn.Module, example: Tensor) -> None:
    """Compares a traced network with the one it was made of: torch.fx reads `y += z` as `y = y + z`.

    Raises:
        UntraceableError: they differ, because something else holds on to the value that was changed.
    """
    with torch.no_grad(), evaluating(net, traced):
        _refuse_other_output(net, net(example), traced(example))


def _refuse_other_output(net: nn.Module, wanted: object, output: object) -> None:
    a, b = one_tensor(wanted), one_tensor(output)
    if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * max(1.0, a.abs().max().item()), equal_nan=True):
        raise UntraceableError(
            f"{type(net).__name__} computes something else when traced: somewhere it changes a value in place (+=) "
            "that has another name too. Write y = y + z instead."
        )


def finish_(traced: fx.GraphModule) -> None:
    """Removes what is no longer called, and makes the code anew."""
    forget_(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced._tracer_cls = traced.graph._tracer_cls = None  # else a saved network asks for linl's tracer
    traced.recompile()


def joined(steps: Sequence[Step]) -> list[Step]:
    """The steps that become one layer, those inside kept forks included, in order."""
    found = []
    for step in steps:
        if step.geometry is not None:
            found.append(step)
        else:
            for branch in step.branches or []:
                found += joined(branch)
    return found


class _Work:
    """Merged layers, checked and timed one by one, then written into the graph together."""

    def __init__(self, traced: fx.GraphModule, known: dict, example: Tensor, border: str, check: bool) -> None:
        self.traced, self.known, self.example = traced, known, example
        self.border, self.check = border, check
        self.ends = {
            n.name for node in traced.graph.nodes for n in (node, *node.all_input_nodes) if node.op != "output"
        }
        self.rows: list[dict] = []
        self.accepted: list[tuple[Step, Affine, dict]] = []
        self.seen: dict[str, Tensor] | None = None

    def merge(self, step: Step, timed: bool) -> None:
        """Merges a step; where that fails its check or is slow, only the BatchNorms in it."""
        row, layer = row_of(self.traced, step, self.border), merged(step.links, self.border)
        trouble = (self.check and self._wrong(step, layer, row)) or (timed and self._slow(step, layer, row))
        self.rows.append(undone(row, trouble) if trouble else row)
        if not trouble:
            self.accepted.append((step, layer, row))
        elif layers_in(step.links) > 1:
            for smaller in joined(plan(step.links, "macs", self.border, most=1)):
                self.merge(smaller, timed=False)

    def _wrong(self, step: Step, layer: Affine, row: dict) -> str:
        """Compares with the original in float64; says so if an exact merge isn't."""
        source, end = step.links[0].source.name, step.links[-1].end.name
        if self.seen is None:
            self.seen = values(self.traced, self.example, self._names())
        written = built(layer, step.size, step.flat).double()
        found = error(written, self.seen[source], self.seen[end], interior_of(step.links, step.size))
        if not step.size or step.flat:  # features have no positions: all of them read the border, or none
            found = {**found, "border": found["largest"]} if row["verdict"] == "interior only" else found
        row |= {f"error_{where}": found[where] / found["scale"] for where in ("interior", "border")}
        wrong = row["verdict"] == "exact" and not found["largest"] <= TOLERANCE * found["scale"]
        return f"the check failed: off by {found['largest'] / found['scale']:.1e}" if wrong else ""

    def _names(self) -> list[str]:
        """Of the values that runs begin and end with."""
        return sorted(self.ends)

    def _slow(self, step: Step, layer: Affine, row: dict) -> str:
        """Times against the same run with only its BatchNorms merged."""
        if layers_in(step.links) < 2:
            return ""
        like = rewriting.weight_of(self.traced, step)[1]
        shape = self.known[step.links[0].source]
        x = torch.randn(shape, device=like.device, dtype=like.dtype)
        after = built(layer, step.size, step.flat).to(device=like.device, dtype=like.dtype)
        with evaluating(before := floor(self.traced, step.links, self.known, x)):
            row["ms_before"], row["ms_after"] = latencies([before, after], x, seconds=0.15)
        return "measured: one layer is slower" if row["ms_after"] >= row["ms_before"] else ""

    def write(self) -> dict[str, Place]:
        """Everything accepted into the graph."""
        places = {}
        for step, layer, row in self.accepted:
            end = step.links[-1].end
            name, factor = end.name, end.meta.get("factor", 1.0)
            row["layer"], value = rewriting.write_(self.traced, step, layer, self.example)
            places[row["layer"]] = Place(name, value.name, interior_of(step.links, step.size), factor)
        return places


def floor(traced: fx.GraphModule, links: Sequence[Link | Fork], known: dict, example: Tensor) -> fx.GraphModule:
    """Some links as a network of their own, every BatchNorm in its layer and nothing else merged."""
    alone = rewriting.part(traced, links)
    chains = find(alone, shapes(alone, example))
    for chain in chains.chains:
        for step in joined(plan(chain.links, "macs", "exact", most=1)):
            rewriting.write_(alone, step, merged(step.links, "exact"), example)
    finish_(alone)
    return alone
