"""What folding did, run by run, and why two linear layers stayed two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pandas as pd
from torch import Tensor, fx, nn

from linl.affine import CannotMerge
from linl.chains import Chains, Fork
from linl.checking import shown
from linl.graph import input_of, is_activation, is_norm_act
from linl.joining import geometry_of
from linl.operations import Link
from linl.planning import Cost, Step, joint_cost, layers_in
from linl.rewriting import called, weight_of
from linl.sizes import any_size

COLUMNS = ["layer", "first", "last", "operations", "layers", "verdict", "reason", "numbers_before", "numbers_after",
           "macs_before", "macs_after", "ms_before", "ms_after", "error_interior", "error_border"]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a merged run's value is.

    Attributes:
        end, value: its last node before and after.
        interior: positions that no padding inside the run reaches, a mask a dimension; None for features.
        factor: what the merged layer has taken over from the unit behind it: its value is that many times the run's.
    """

    end: str
    value: str
    interior: list[Tensor] | None
    factor: float = 1.0


@dataclass(frozen=True)
class FoldReport:
    """What folding did.

    `.table` has a row for each run that became one layer, and one for each pair of linear layers that stay two.

    | column | |
    |---|---|
    | layer | the run's name in the folded network |
    | first, last | the calls it was made of; of a pair, the two layers |
    | operations, layers | how many; of them convolutions and dense layers |
    | verdict, reason | "exact", "interior only" or "refused", and why |
    | numbers_*, macs_* | weights and biases stored, multiply-adds an example |
    | ms_* | milliseconds for the example, where they were measured |
    | error_* | largest relative error against the original, in float64, on the example |
    """

    table: pd.DataFrame
    objective: str
    border: str
    places: dict[str, Place] = field(default_factory=dict, repr=False)
    source: tuple = field(default=(), repr=False)  # whose runs they were, as `shape_of` tells

    @property
    def merged(self) -> int:
        """Runs that became one layer."""
        return int((self.table["verdict"] != "refused").sum())

    def _repr_html_(self) -> str:
        return shown(self.table)

    def __deepcopy__(self, memo: dict) -> FoldReport:
        return self

    def __reduce__(self):
        # a saved network must load where there is no linl: its report becomes a plain namespace
        return SimpleNamespace, (), {"table": self.table, "objective": self.objective, "border": self.border}


def row_of(traced: fx.GraphModule, step: Step, border: str) -> dict:
    """A merged step's row, before it is checked and timed."""
    verdict, reason = "exact", ""
    if border == "interior":
        try:
            if geometry_of(step.links, "exact") != step.geometry:
                verdict, reason = "interior only", "the bias at the border would be a map"
        except CannotMerge as error:
            verdict, reason = "interior only", str(error)
    elif step.geometry.bias == "map":
        reason = f"exact at the border by a bias map, for {'×'.join(map(str, step.size))} positions"
    elif not any_size(step.links, border):
        reason = f"for {'×'.join(map(str, step.size))} positions: strides, pools or padding meet another size otherwise"
    names = _names(step)
    return {
        "layer": weight_of(traced, step)[0], "first": names[0], "last": names[-1],
        "operations": sum(len(link.nodes) for link in step.links), "layers": layers_in(step.links),
        "verdict": verdict, "reason": reason, **_costs(step.before, step.after),
    }  # fmt: skip


def _costs(before: Cost, after: Cost) -> dict:
    return {
        "numbers_before": before.numbers, "numbers_after": after.numbers,
        "macs_before": before.macs, "macs_after": after.macs, "ms_before": math.nan, "ms_after": math.nan,
        "error_interior": math.nan, "error_border": math.nan,
    }  # fmt: skip


def undone(row: dict, reason: str) -> dict:
    """The row of a merge that was given up."""
    same = {f"{what}_after": row[f"{what}_before"] for what in ("numbers", "macs")}
    return {**row, "verdict": "refused", "reason": reason, **same}


def _names(step: Step) -> list[str]:
    """Its layers' names in the original, first to last; its nodes' where it calls none."""
    nodes = [node for link in step.links for node in link.nodes]
    return [str(node.target) for node in nodes if node.op == "call_module"] or [node.name for node in nodes]


def pair_reasons(traced: fx.GraphModule, chains: Chains, plans, objective: str, border: str) -> list[dict]:
    """A row for each two linear layers that stay two although no activation parts them, with the reason."""
    rows = []
    for steps in plans:
        rows += _inside(steps, objective, border)
    ends = {chain.end: chain for chain in chains.chains if layers_in(chain.links)}
    for chain in chains.chains:
        if layers_in(chain.links) and (found := _before(traced, chains, ends, chain.source)):
            before, reason = found
            rows.append(_pair(layer_names(ends[before].links)[-1], layer_names(chain.links)[0], reason))
    return rows


def left_over(
    traced: fx.GraphModule, chains: Chains, plans: Sequence[Sequence[Step]], objective: str, border: str
) -> list[dict]:
    """`pair_reasons`, and a row for each layer that could not be read as one."""
    rows = pair_reasons(traced, chains, plans, objective, border)
    for node, reason in chains.reasons.items():
        module = called(traced, node)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._BatchNorm):
            source = input_of(node)
            before = getattr(source, "target", "") if getattr(source, "op", "") == "call_module" else ""
            rows.append(_pair(str(before), str(node.target), reason))
    return rows


def _inside(steps: Sequence[Step], objective: str, border: str) -> list[dict]:
    """Neighbours within one run."""
    rows, last = [], None
    for at, step in enumerate(steps):
        for branch in (step.branches or []) if step.geometry is None else []:
            rows += _inside(branch, objective, border)
        if not layers_in(step.links):
            continue
        if step.geometry is None and isinstance(step.links[0], Fork):
            rows.append(
                _pair(
                    layer_names(step.links)[0],
                    step.links[0].end.name,
                    _why(step.links, step.after, objective, border),
                )
            )
        if last is not None:
            links = [link for part in steps[last : at + 1] for link in part.links]
            before = sum((part.after for part in steps[last : at + 1]), Cost())
            names = layer_names(steps[last].links)[-1], layer_names(step.links)[0]
            rows.append(_pair(*names, _why(links, before, objective, border)))
        last = at
    return rows


def _why(links, before: Cost, objective: str, border: str) -> str:
    """Why these links are not one layer."""
    try:
        geometry = geometry_of(links, border)
    except CannotMerge as error:
        return str(error)
    after = joint_cost(links, geometry)
    counted = {"numbers": (after.numbers, before.numbers), "multiply-adds": (after.macs, before.macs)}
    more = [f"{new:,} {word} instead of {old:,}" for word, (new, old) in counted.items() if new > old]
    told = f": {' and '.join(more)}" if more else ""
    return f"one layer would not pay ({objective}){told}"


def _pair(first: str, last: str, reason: str) -> dict:
    return {"layer": "", "first": first, "last": last, "operations": 2, "layers": 2, "verdict": "refused",
            "reason": reason, **dict.fromkeys(_costs(Cost(), Cost()), math.nan)}  # fmt: skip


def layer_names(links: Sequence[Link | Fork]) -> list[str]:
    """The convolutions and dense layers among links and in their forks."""
    found = []
    for link in links:
        if isinstance(link, Fork):
            found += [name for branch in link.branches for name in layer_names(branch)]
        elif link.kind == "conv":
            found.append(str(link.end.target) if link.end.op == "call_module" else link.end.name)
    return found


def _before(traced, chains: Chains, ends: dict, source: fx.Node) -> tuple[fx.Node, str] | None:
    """The run that ends before a value, if nothing in between bends the signal; and what is in between."""
    passed: list[str] = []
    while isinstance(source, fx.Node) and source.op.startswith("call"):
        if source in ends:
            return source, "; ".join(passed) or "the value in between is used elsewhere too"
        module = called(traced, source)
        if module is not None and (
            is_activation(module) or (is_norm_act(module) and not isinstance(module.act, nn.Identity))
        ):
            return None
        passed.append(chains.reasons.get(source) or f"{type(module).__name__ if module else _word(source)} in between")
        source = input_of(source)
    return None


def _word(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
