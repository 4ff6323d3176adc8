"""How many units are dead: for one input, for want of incoming weights, or on every input seen.

A unit is one number of an activation's output: a neuron of a dense layer, a channel at a position of a convolution.
The names are those of Liu et al. (arXiv 2212.06145); their code computes no rate, so the definitions are ours:

| rate | share of all units that … |
|---|---|
| dynamic | are exactly 0 for an input although they have a live incoming weight; the mean over inputs |
| static | have no live incoming weight: whatever the input, the unit gives the same |
| observed | are exactly 0 on every input seen, static or not |

An incoming weight is live if it isn't 0 and a value of the network's input or of an earlier activation goes through it.
So layers that follow each other without an activation count as the one layer they fold to, a shortcut is an incoming
weight of 1, and at a border weights that read nothing but padding don't count. What counts as dead is an output of
exactly 0: a ReLU's or ReLU6's is for every input up to 0 (one held at 6 isn't dead); a LeakyReLU's, a LiNLU's and a
PartialLinear's (above p = ½, α = 0) is at a single point, so their dynamic rates are 0 in practice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.calls import SUMS
from linl.checking import shown
from linl.folding import refuse_example, refuse_other_function
from linl.graph import evaluating, input_of, is_norm_act, shapes, trace
from linl.masks import LAYERS, harden_masks
from linl.sites import Site, activation_sites
from linl.states import Stability

RATES = ("dynamic", "static", "observed")


@dataclass(frozen=True)
class DeadRate:
    """Dead-neuron rates.

    Attributes:
        table: a row an activation: layer, activation, units, dynamic, static, observed, then the same with `_channels`:
            a channel is 0 for an input if it is at all its positions, static if it is at all of them (a dense layer's
            units are its channels). With a stability, certified: the share of units proved to be 0 on its whole box.
        zero: by layer, the share of the inputs on which each unit is 0, (C, *positions).
        fixed: by layer, which units are static, likewise.
        inputs: how many were seen.
    """

    table: pd.DataFrame
    zero: dict[str, Tensor] = field(repr=False)
    fixed: dict[str, Tensor] = field(repr=False)
    inputs: int

    def share(self, column: str) -> float:
        """Of all units (for a column of channels: of all channels) in the network."""
        weights = self.table["channels" if column.endswith("_channels") else "units"]
        return float((self.table[column] * weights).sum() / weights.sum())

    @property
    def dynamic(self) -> float:
        """The network's dynamic rate."""
        return self.share("dynamic")

    @property
    def static(self) -> float:
        """The network's static rate."""
        return self.share("static")

    @property
    def observed(self) -> float:
        """The network's share of units that are 0 on every input."""
        return self.share("observed")

    def _repr_html_(self) -> str:
        told = " · ".join(f"{rate} {self.share(rate):.2%}" for rate in RATES)
        table = self.table
        if (table["channels"] == table["units"]).all():  # dense layers: each figure would stand there twice
            table = table[[column for column in table if "channels" not in column]]
        return f"<p>{told} of all units, on {self.inputs} inputs</p>" + shown(table)


@torch.no_grad()
def dead_rate(
    net: nn.Module,
    images: Tensor | Iterable,
    *,
    state: Stability | None = None,
    batch_size: int = 256,
) -> DeadRate:
    """How many of a network's units are dead, as this file defines it.

    Args:
        net: any network that can be traced, masked or not; measured in eval mode, left alone.
        images: (N, *shape), perhaps in a pair with their labels, or an iterable of such batches. Moved to the network's
            device and floating dtype batch by batch; what is kept is two numbers a unit.
        state: from `analyse` of this network (masks hardened): adds the share proved to be dead on its box.
        batch_size: how many of a tensor's images are looked at together.

    Raises:
        ValueError: no activation, no image, or a state of other activations.
        UntraceableError: as `linl.graph.trace`.
    """
    net = harden_masks(net)
    traced = trace(net).eval()
    sites = activation_sites(traced)
    if not sites:
        raise ValueError(f"{type(net).__name__} has no activation: no unit could be dead")
    like = next((t for t in traced.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    counts: dict[str, _Counts] = {}
    shape = None
    for batch in _batches(images, batch_size):
        batch = batch.to(like.device)
        batch = batch.to(like.dtype) if batch.is_floating_point() else batch
        if not len(batch):
            continue
        if counts and batch.shape[1:] != shape:
            raise ValueError(
                f"images of shape {tuple(batch.shape[1:])} behind others of {tuple(shape)}: pass a tensor of images, "
                "one pair (images, labels), or an iterable of batches alike"
            )
        if not counts:
            shape = batch.shape[1:]
            refuse_example(net, batch[:2])
            refuse_other_function(net, traced, batch[:2])
            fixed = _Incoming(traced, sites, batch[:2]).fixed()
            counts = {site.name: _Counts(fixed[site.name]) for site in sites}
        _Zeros(traced, sites, counts).run(batch)
    if not counts:
        raise ValueError("no image: a rate is a mean over inputs")
    rows = [{"layer": s.name, "activation": type(s.module).__name__, **counts[s.name].row()} for s in sites]
    if state is not None:
        _certify(rows, sites, state)
    zero = {name: (found.zero / found.inputs).cpu() for name, found in counts.items()}
    fixed = {name: found.fixed.cpu() for name, found in counts.items()}
    return DeadRate(pd.DataFrame(rows), zero, fixed, next(iter(counts.values())).inputs)


def watch(images: Tensor | Iterable, **options) -> Callable[[nn.Module], dict[str, float]]:
    """For `linl.train.fit(…, watch=…)`: a function that gives a network's three rates on the same images each time.

    Args:
        images: as in `dead_rate`; batches must be in a list, since they are gone through again and again.
        options: of `dead_rate`.
    """

    def rates(net: nn.Module) -> dict[str, float]:
        found = dead_rate(net, images, **options)
        return {rate: found.share(rate) for rate in RATES}

    return rates


def _batches(images: Tensor | Iterable, batch_size: int) -> Iterator[Tensor]:
    if isinstance(images, tuple) and len(images) == 2 and images[0].ndim > images[1].ndim:  # with their labels
        images = images[0]
    if isinstance(images, Tensor):
        yield from images.split(batch_size)
        return
    for batch in images:
        yield batch if isinstance(batch, Tensor) else batch[0]


def _certify(rows: list[dict], sites: list[Site], state: Stability) -> None:
    """Adds the share of units whose output is proved to be 0; an inactive unit of a leaky activation isn't."""
    if [row["layer"] for row in rows] != state.names:
        raise ValueError("the state is of another network: its activations have other names")
    for row, site, codes in zip(rows, sites, state.codes, strict=True):
        flat = isinstance(site.module, nn.ReLU | nn.ReLU6)
        row["certified"] = float((codes == 0).double().mean()) if flat else 0.0


# --- zeros -----------------------------------------------------------------------------------------


class _Counts:
    """One activation's units, counted.

    Attributes:
        fixed: which are static, (C, *positions).
        zero: on how many inputs each was 0, likewise; `channels`: each channel as a whole, (C,).
    """

    def __init__(self, fixed: Tensor) -> None:
        self.fixed, self.inputs = fixed, 0
        self.zero = torch.zeros(fixed.shape, dtype=torch.float64, device=fixed.device)
        self.channels = torch.zeros(fixed.shape[:1], dtype=torch.float64, device=fixed.device)

    def add(self, zero: Tensor) -> None:
        """Counts (N, C, *positions), bool."""
        self.inputs += len(zero)
        self.zero += zero.sum(0)
        self.channels += zero.flatten(2).all(2).sum(0) if zero.ndim > 2 else zero.sum(0)

    def row(self) -> dict:
        """The rates, of units and of channels."""
        row = {"units": self.fixed.numel(), **self._rates(self.zero, self.fixed)}
        by_channel = self._rates(self.channels, self.fixed.flatten(1).all(1) if self.fixed.ndim > 1 else self.fixed)
        return {**row, "channels": len(self.fixed), **{f"{rate}_channels": v for rate, v in by_channel.items()}}

    def _rates(self, zero: Tensor, fixed: Tensor) -> dict[str, float]:
        shares = torch.where(fixed, 0, zero) / self.inputs, fixed.double(), (zero == self.inputs).double()
        return {rate: float(share.mean()) for rate, share in zip(RATES, shares, strict=True)}


class _Zeros(fx.Interpreter):
    """A forward pass that counts the zeros of every activation's output as it comes."""

    def __init__(self, traced: fx.GraphModule, sites: list[Site], counts: dict[str, _Counts]) -> None:
        super().__init__(traced)
        self.sites = {site.node: site.name for site in sites}
        self.counts = counts

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node in self.sites:
            self.counts[self.sites[node]].add((value == 0).movedim(channel_axis(self.module, node, value.ndim), 1))
        return value


def channel_axis(traced: fx.GraphModule, node: fx.Node, ndim: int) -> int:
    """Where an activation's channels are: last behind a dense layer (on tokens, as well), else dimension 1."""
    while isinstance(node, fx.Node):
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, LAYERS):
            return ndim - 1 if isinstance(module, nn.Linear) else 1
        node = input_of(node)
    return 1


# --- incoming weights ------------------------------------------------------------------------------


class _Incoming(fx.Interpreter):
    """Which numbers of every value something flows into: a forward pass of zeros and ones.

    The input and every activation's output are ones, every weight that isn't 0 is a 1; operations that only move, add
    or pool numbers are run as they are. What any other operation gives counts as reached.
    """

    def __init__(self, traced: fx.GraphModule, sites: list[Site], example: Tensor) -> None:
        super().__init__(traced)
        self.sites, self.example = {site.node: site for site in sites}, example
        self.known = shapes(traced, example)
        self.found: dict[str, Tensor] = {}

    def fixed(self) -> dict[str, Tensor]:
        """By activation, the units that nothing flows into, (C, *positions)."""
        with evaluating(self.module):
            self.run(self.example)
        return self.found

    def run_node(self, node: fx.Node):
        if node in self.sites:
            self._note(node)
            return self._ones(node)
        if node.op in ("placeholder", "get_attr") or node not in self.known:
            given = super().run_node(node)
            return self._ones(node) if node.op == "placeholder" and node in self.known else given
        reached = self._reached(node)
        return self._ones(node) if reached is None else (reached != 0).to(self.example.dtype)

    def _ones(self, node: fx.Node) -> Tensor:
        return torch.ones(self.known[node], dtype=self.example.dtype, device=self.example.device)

    def _note(self, node: fx.Node) -> None:
        value = self.env[input_of(node)]
        module = self.fetch_attr(node.target) if node.op == "call_module" else None
        if is_norm_act(module):  # a factor of 0 cuts a channel off
            value = value * _by_channel(module.weight, value)
        axis = channel_axis(self.module, node, value.ndim)
        self.found[self.sites[node].name] = value.movedim(axis, 1)[0] == 0

    def _reached(self, node: fx.Node) -> Tensor | None:
        """An operation's value, something else than 0 where anything flows in; None: not known."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "call_module":
            return self._through(self.fetch_attr(node.target), args[0], args, kwargs)
        if node.target in SUMS:  # numbers and parameters that are added bring nothing in
            moving = [a for n, a in zip(node.args, args, strict=True) if isinstance(n, fx.Node) and n.op != "get_attr"]
            return sum(torch.broadcast_to(value, self.known[node]) for value in moving)
        if node.target in _MOVES:
            return super().run_node(node)
        return None

    def _through(self, module: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
        if isinstance(module, LAYERS):
            state = {"weight": (module.weight != 0).to(x)}
            if module.bias is not None:
                state["bias"] = torch.zeros_like(module.bias, dtype=x.dtype)
            return torch.func.functional_call(module, state, (x,))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return x * _by_channel(module.weight, x)
        return module(*args, **kwargs) if isinstance(module, _MOVING) else None


def _by_channel(weight: Tensor | None, x: Tensor) -> Tensor | float:
    return 1.0 if weight is None else (weight != 0).to(x).view(-1, *[1] * (x.ndim - 2))


_MOVES = {
    torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.cat, torch.mean, torch.sum, F.pad, F.dropout,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, operator.getitem, "flatten", "reshape", "view",
    "transpose", "permute", "mean", "sum", "contiguous", "squeeze", "unsqueeze", torch.squeeze, torch.unsqueeze,
    torch.max_pool2d, torch.avg_pool1d,
}  # fmt: skip
_MOVING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
"""Operations that take numbers, or sums and maxima of them, to other places."""
