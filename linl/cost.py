"""What a network costs: parameters, multiply-adds, depth, activations, bytes, latency, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, fx, nn

from linl.graph import activation_sites, trace

_LINEAR = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Measurement:
    """`.table`: a row a network. Columns as `measure` says."""

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        return self.table.to_html()


def measure(
    *nets_and_example,
    names: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 64),
    compiled: bool = False,
    seconds: float = 0.5,
) -> Measurement:
    """Costs of one or more networks on the same input: `measure(net, small, example)`.

    Args:
        nets_and_example: the networks, then an input batch (its first item is used).
        names: row names; numbered when None.
        batches: batch sizes to time at; empty for no timing.
        compiled: also time torch.compile'd copies (6 to 14 s each, once).
        seconds: least time for each latency.

    Returns: a table with parameters, gmacs (10⁹ multiply-adds an example, without activations), depth
        (linear layers on the longest path), activations (places), mbytes (parameters and buffers),
        ms_<batch> (median milliseconds, networks measured in turn), and ms_<batch>_compiled.
    """
    *nets, example = nets_and_example
    if not isinstance(example, Tensor) or not nets:
        raise ValueError("measure(net, …, example): one or more networks, then an example tensor")
    names = list(names) if names is not None else [str(i) for i in range(len(nets))]
    if len(names) != len(nets):
        raise ValueError(f"{len(names)} names for {len(nets)} networks")
    rows = [_static(net, example[:1]) for net in nets]
    modes = [[(module, module.training) for module in net.modules()] for net in nets]
    for net in nets:
        net.eval()
    try:
        for batch in batches:
            x = example[:1].expand(batch, *example.shape[1:]).contiguous()
            for column, times in _latencies(nets, x, seconds, compiled).items():
                for row, time in zip(rows, times, strict=True):
                    row[column] = time
    finally:
        for saved in modes:
            for module, training in saved:
                module.training = training
    return Measurement(pd.DataFrame(rows, index=names))


def _static(net: nn.Module, example: Tensor) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(example)
    for module, training in modes:
        module.training = training
    try:
        traced = trace(net)
        layers, places = depth(traced), len(activation_sites(traced))
    except ValueError:  # a network that can't be written as a graph still has parameters and a latency
        layers = places = math.nan
    return {
        "parameters": sum(p.numel() for p in {id(p): p for p in net.parameters()}.values()),
        "gmacs": counter.get_total_flops() / 2 / 1e9 / len(example),
        "depth": layers,
        "activations": places,
        "mbytes": sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6,
    }


def depth(net: nn.Module) -> int:
    """Convolutions and dense layers on the longest path from input to output."""
    traced = net if isinstance(net, fx.GraphModule) else trace(net)
    longest: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        own = int(node.op == "call_module" and isinstance(traced.get_submodule(node.target), _LINEAR))
        longest[node] = own + max((longest[n] for n in node.all_input_nodes), default=0)
    return max(longest.values(), default=0)


@torch.no_grad()
def _latencies(nets: Sequence[nn.Module], x: Tensor, seconds: float, compiled: bool) -> dict[str, list[float]]:
    """Medians in milliseconds; the networks take turns, so that a slow moment hits all of them."""
    from torch.utils import benchmark

    columns = {f"ms_{len(x)}": list(nets)}
    if compiled:
        columns[f"ms_{len(x)}_compiled"] = [torch.compile(net) for net in nets]
    found = {}
    for column, calls in columns.items():
        timers = [
            benchmark.Timer("net(x)", globals={"net": net, "x": x}, num_threads=torch.get_num_threads())
            for net in calls
        ]
        rounds: list[list[float]] = [[] for _ in timers]
        for timer in timers:
            timer.timeit(2)
        for _ in range(5):
            for timer, times in zip(timers, rounds, strict=True):
                times.append(timer.blocked_autorange(min_run_time=seconds / 5).median)
        found[column] = [sorted(times)[len(times) // 2] * 1e3 for times in rounds]
    return found
