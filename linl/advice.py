"""Before any training: which activation stands in the way of what, and what its removal would gain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor, fx, nn

from linl.chains import Chains, find
from linl.checking import shown
from linl.folding import prepared, refuse_units
from linl.graph import evaluating, input_of, trace
from linl.planning import OBJECTIVES, Cost, Step, plan
from linl.reports import pair_reasons
from linl.sites import Site, activation_sites
from linl.timing import layer_timer

GAINS = ["layers", "numbers", "macs", "ms"]


@dataclass(frozen=True)
class FoldAdvice:
    """What stands in the way of folding.

    `.table` has a row for each activation: activation, kind, before and after (the layers it parts), verdict
    if it alone were removed ("exact": merges as it is; "pad first": merges after `pad_first`; "nothing"),
    reason, group (its number in `.groups`, or empty), and what its removal saves: layers, numbers (weights
    and biases), macs (multiply-adds an example), ms (milliseconds; nan unless the objective is latency).

    `.groups` has a row for each set of neighbouring activations that are worth removing together, as the two
    of an inverted bottleneck: of all sets that don't overlap, those that save most by the objective. Columns:
    activations, first and last of the layers they part, verdict, and what is saved.
    """

    table: pd.DataFrame
    groups: pd.DataFrame
    objective: str

    def _repr_html_(self) -> str:
        return shown(self.table) + shown(self.groups)


def foldable(net: nn.Module, example: Tensor, objective: str = "latency", together: int = 2) -> FoldAdvice:
    """Which activation stands in the way of what, and what removing it would gain.

    Args:
        net: any network that can be traced; left alone, its mode doesn't matter.
        example: one input batch.
        objective: what counts as a gain, as in `fold`; "latency" is measured on this machine.
        together: how many neighbouring activations to try removing at once (without a limit, a network
            of no activation at all would always win: it is one matrix).

    Raises:
        ValueError: trainable units, an unknown objective, or a network that can't be traced.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    refuse_units(net)
    with torch.no_grad(), evaluating(net):
        judge = _Judge(net, example, objective)
        # in plain form a timm norm's activation is a call of its own; it keeps the name that `linearize` gives it
        names = [site.name for site in activation_sites(trace(net))]
        plain = activation_sites(judge.traced)
        sites = [replace(site, name=name) for site, name in zip(plain, names, strict=True)]
        groups = judge.groups(sites, together)
        rows = [judge.row(site, groups) for site in sites]
    told = [{k: v for k, v in group.items() if k != "members"} for group in groups]
    return FoldAdvice(pd.DataFrame(rows), pd.DataFrame(told, columns=GROUP_COLUMNS), objective)


_SAVED = {"latency": "ms", "parameters": "numbers", "macs": "macs", "depth": "layers"}
GROUP_COLUMNS = ["group", "activations", "first", "last", "verdict", *(f"saves_{what}" for what in GAINS)]


class _Judge:
    """Costs of a network with some of its activations removed."""

    def __init__(self, net: nn.Module, example: Tensor, objective: str) -> None:
        self.traced, self.known = prepared(net, example)
        self.shapes = {node.name: shape for node, shape in self.known.items()}
        self.objective = objective
        like = next(net.parameters(), example)
        self.timer = layer_timer(len(example), like) if objective == "latency" else None
        self.totals: dict[tuple[frozenset[str], str], Cost] = {}
        self.base = self.total(())

    def without(self, removed: Iterable[str]) -> Chains:
        """The linear runs of the network without some activations (by their calls' names)."""
        graph, gone = fx.Graph(), set(removed)
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.traced.graph.nodes:
            if node.name in gone:
                mapping[node] = mapping[input_of(node)]
            elif node.op == "output":
                graph.output(fx.map_arg(node.args[0], lambda n: mapping[n]))
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        alone = fx.GraphModule(self.traced, graph)
        known = {mapping[node]: shape for node, shape in self.known.items() if node in mapping}
        return find(alone, known)

    def plans(self, chains: Chains, border: str) -> list[list[Step]]:
        """The best plan of each run."""
        return [plan(chain.links, self.objective, border, self.timer, time_all=True) for chain in chains.chains]

    def total(self, removed: Iterable[str], border: str = "exact") -> Cost:
        """What all layers cost with the best plan."""
        key = frozenset(removed), border
        if key not in self.totals:
            plans = self.plans(self.without(key[0]), border)
            self.totals[key] = sum((step.after for steps in plans for step in steps), Cost())
        return self.totals[key]

    def price(self, cost: Cost) -> float:
        """What the objective makes small."""
        return OBJECTIVES[self.objective](cost)[0]

    def gain(self, removed: Iterable[str]) -> tuple[str, dict]:
        """("exact" | "pad first" | "nothing", what is saved) by removing activations."""
        for border, verdict in (("exact", "exact"), ("interior", "pad first")):
            after = self.total(removed, border)
            if self.price(after) < self.price(self.base):
                return verdict, self._saved(after)
        return "nothing", self._saved(self.base)

    def _saved(self, after: Cost) -> dict:
        saved = {f"saves_{what}": getattr(self.base, what) - getattr(after, what) for what in GAINS}
        return saved if self.timer else {**saved, "saves_ms": math.nan}

    def groups(self, sites: Sequence[Site], together: int) -> list[dict]:
        """The best sets of neighbouring activations to remove: those that save most without overlapping."""
        best: list[tuple[float, list[dict]]] = [(0.0, [])]
        for end in range(1, len(sites) + 1):
            ways = [best[-1]]
            for start in range(max(0, end - together), end):
                members = sites[start:end]
                verdict, saved = self.gain([site.node.name for site in members])
                if verdict != "nothing":
                    worth = saved[f"saves_{_SAVED[self.objective]}"]
                    told = {"members": {site.name for site in members}, "first": self._layer_before(members[0].node),
                            "activations": ", ".join(site.name for site in members),
                            "last": self._layer_after(members[-1].node), "verdict": verdict, **saved}  # fmt: skip
                    ways.append((best[start][0] + worth, [*best[start][1], told]))
            best.append(max(ways, key=lambda way: way[0]))
        return [{"group": i, **told} for i, told in enumerate(best[-1][1])]

    def row(self, site: Site, groups: list[dict]) -> dict:
        """What removing one activation alone would do."""
        verdict, saved = self.gain([site.node.name])
        before, after = self._layer_before(site.node), self._layer_after(site.node)
        reason = "" if verdict == "exact" else self._reason(site, before, after, verdict)
        group = next((g["group"] for g in groups if site.name in g["members"]), "")
        return {"activation": site.name, "kind": type(site.module).__name__, "before": before, "after": after,
                "verdict": verdict, "reason": reason, "group": group, **saved}  # fmt: skip

    def _reason(self, site: Site, before: str, after: str, verdict: str) -> str:
        chains = self.without([site.node.name])
        pairs = pair_reasons(self.traced, chains, self.plans(chains, "exact"), self.objective, "exact")
        exact = [p for p in pairs if p["first"] == before and p["last"] == after]
        near = exact or [p for p in pairs if before in (p["first"], p["last"]) or after in (p["first"], p["last"])]
        if near:
            return near[0]["reason"]
        if verdict == "pad first":
            return "differs at the border"
        return (
            f"one layer would not pay ({self.objective})" if before and after else "no linear layer on its other side"
        )

    def _layer_before(self, node: fx.Node) -> str:
        source = input_of(node)
        while isinstance(source, fx.Node) and source.op != "placeholder":
            if source.op == "call_module" and _is_layer(self.traced.get_submodule(source.target)):
                return str(source.target)
            source = input_of(source)
        return ""

    def _layer_after(self, node: fx.Node) -> str:
        waiting, seen = list(node.users), set()
        while waiting:
            user = waiting.pop(0)
            if user in seen:
                continue
            seen.add(user)
            if user.op == "call_module" and _is_layer(self.traced.get_submodule(user.target)):
                return str(user.target)
            waiting += list(user.users)
        return ""


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
