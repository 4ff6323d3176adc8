"""The linear runs of a traced network: which affine layers follow each other alone.

A chain is a maximal row of linear operations in which every value in between has one reader. Its links are
single operations (`Link`) or sums of branches that leave one value and meet again (`Fork`: a residual block
without activations).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from linl.affine import CannotMerge, Size
from linl.calls import DIFFERENCES, SUMS
from linl.obstacles import refuse_aliases
from linl.operations import Link, Reader


@dataclass
class Fork:
    """Σ of branches that read one value; an empty branch is that value itself.

    Attributes:
        end: the addition.
        branches: links from the source to the addition.
        signs: of each branch, 1 or −1.
        size, channels: of the source.
        out: spatial size of the sum.
        last_axis: as in `Link`.
    """

    end: fx.Node
    branches: list[list[Link | Fork]]
    signs: list[int]
    size: Size
    channels: int
    out: Size = ()
    last_axis: bool = False
    flat: bool = False

    @property
    def source(self) -> fx.Node:
        """The value that all branches read."""
        return next((branch[0].source for branch in self.branches if branch), self.end.args[0])

    @property
    def nodes(self) -> list[fx.Node]:
        """Every call inside, the addition last."""
        return [node for branch in self.branches for link in branch for node in link.nodes] + [self.end]

    @property
    def readers(self) -> set[fx.Node]:
        """Calls inside that read the source."""
        return {node for branch in self.branches for node in (branch[0].readers if branch else {self.end})}


@dataclass
class Chain:
    """A maximal linear run: links in order, all single readers of what is before them."""

    links: list[Link | Fork]

    @property
    def source(self) -> fx.Node:
        """The node that the run reads."""
        return self.links[0].source

    @property
    def end(self) -> fx.Node:
        """The node that gives its value."""
        return self.links[-1].end


@dataclass
class Chains:
    """All linear runs of a network.

    Attributes:
        chains: in the order of the forward pass.
        reasons: for calls that are linear, or nearly, and yet no link: why.
    """

    chains: list[Chain]
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def find(traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> Chains:
    """The linear runs of a traced network in eval mode; `known` are the shapes of its values."""
    finder = _Finder(traced, known)
    chains, covered = [], set()
    for node in reversed(traced.graph.nodes):
        if node in covered or (element := finder.element(node)) is None:
            continue
        links = finder.trail(node, element)
        covered.update(n for link in links for n in link.nodes)
        chains.append(Chain(links))
    return Chains(chains[::-1], finder.reasons)


class _Finder:
    """The search, with what it has found so far."""

    def __init__(self, traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
        self.known, self.reader = known, Reader(traced, known)
        self.reasons: dict[fx.Node, str] = {}
        self.elements: dict[fx.Node, Link | Fork | None] = {}

    def element(self, node: fx.Node) -> Link | Fork | None:
        """The link or fork that gives a node's value."""
        if node not in self.elements:
            self.elements[node] = None
            if node.op.startswith("call") and node in self.known:
                try:
                    found = self.reader.view(node) or self.reader.link(node)
                    self.elements[node] = found or (self._fork(node) if _is_sum(node) else None)
                except CannotMerge as reason:
                    self.reasons[node] = str(reason)
        return self.elements[node]

    def trail(self, value: fx.Node, element: Link | Fork | None) -> list[Link | Fork]:
        """The links that end in a value, from as far back as they go."""
        links: list[Link | Fork] = []
        while element is not None and (not links or element.last_axis == links[0].last_axis):
            links.insert(0, element)
            value = element.source
            if set(value.users) != element.readers:
                break
            element = self.element(value)
        return links

    def _fork(self, node: fx.Node) -> Fork | None:
        a, b = node.args[:2]
        if not all(isinstance(v, fx.Node) and v in self.known for v in (a, b)):
            raise CannotMerge("an addition of something that isn't computed from the input")
        refuse_aliases(node)
        if self.known[a] != self.known[b] or node.kwargs.get("alpha", 1) != 1:
            raise CannotMerge("an addition of different shapes")
        branches, sources = [], []
        for value in (a, b):
            alone = set(value.users) == {node} and a is not b
            links = self.trail(value, self.element(value)) if alone else []
            branches.append(links)
            sources.append(links[0].source if links else value)
        if sources[0] is not sources[1]:
            raise CannotMerge("an addition of values from different places")
        if any(link.flat for branch in branches for link in branch):
            raise CannotMerge("an addition of flattened branches")
        shape = self.known[sources[0]]
        last_axis = any(link.last_axis for branch in branches for link in branch)
        minus = node.target in DIFFERENCES
        size = () if last_axis else tuple(shape[2:])
        out = () if last_axis else tuple(self.known[node][2:])
        channels = shape[-1] if last_axis else shape[1]
        return Fork(node, branches, [1, -1 if minus else 1], size, channels, out, last_axis)


def _is_sum(node: fx.Node) -> bool:
    return node.target in SUMS and len(node.all_input_nodes) >= 1 and all(isinstance(a, fx.Node) for a in node.args[:2])
