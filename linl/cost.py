"""What a network costs: parameters, multiply-adds, depth, activations, bytes, latency, side by side."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, fx, nn

from linl.graph import evaluating, trace
from linl.machines import processor
from linl.sites import activation_sites

_LINEAR = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
ROUNDS = 5  # of measuring each network in turn
PAIRS = 21  # where a ratio is told


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
        (linear layers on the longest path; nan where no graph can be made), activations (places; nan where something
        bends that can't be told as one), mbytes (parameters and buffers),
        ms_<batch> (median milliseconds, networks measured in turn), and ms_<batch>_compiled.

    Raises:
        ValueError: no network or no example, or another number of names than of networks.
    """
    *nets, example = nets_and_example
    if not isinstance(example, Tensor) or not nets:
        raise ValueError("measure(net, …, example): one or more networks, then an example tensor")
    names = list(names) if names is not None else [str(i) for i in range(len(nets))]
    if len(names) != len(nets):
        raise ValueError(f"{len(names)} names for {len(nets)} networks")
    rows = [_static(net, example[:1]) for net in nets]
    with evaluating(*nets):
        for batch in batches:
            x = example[:1].expand(batch, *example.shape[1:]).contiguous()
            for column, times in _latencies(nets, x, seconds, compiled).items():
                for row, time in zip(rows, times, strict=True):
                    row[column] = time
    return Measurement(pd.DataFrame(rows, index=names))


def _static(net: nn.Module, example: Tensor) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    with evaluating(net), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(example)
    layers = places = math.nan
    with contextlib.suppress(ValueError):  # a network without a graph still has parameters and a latency
        traced = trace(net)
        layers = depth(traced)
        places = len(activation_sites(traced))  # refused where something bends that is none: the depth is known still
    return {
        "parameters": sum(p.numel() for p in {id(p): p for p in net.parameters()}.values()),
        "gmacs": counter.get_total_flops() / 2 / 1e9 / len(example),
        "depth": layers,
        "activations": places,
        "mbytes": sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6,
    }


def depth(net: nn.Module) -> int:
    """Convolutions and dense layers on the longest path from input to output.

    Args:
        net: any network that can be traced; left alone.

    Raises:
        UntraceableError: one that can't.
    """
    traced = net if isinstance(net, fx.GraphModule) else trace(net)
    longest: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        own = int(node.op == "call_module" and isinstance(traced.get_submodule(node.target), _LINEAR))
        longest[node] = own + max((longest[n] for n in node.all_input_nodes), default=0)
    return max(longest.values(), default=0)


def _latencies(nets: Sequence[nn.Module], x: Tensor, seconds: float, compiled: bool) -> dict[str, list[float]]:
    """One column, or two with torch.compile'd copies, of `latencies`."""
    found = {f"ms_{len(x)}": latencies(nets, x, seconds)}
    if compiled:
        found[f"ms_{len(x)}_compiled"] = latencies([torch.compile(net) for net in nets], x, seconds)
    return found


@torch.no_grad()
def latencies(nets: Sequence[Callable], x: Tensor, seconds: float = 0.5) -> list[float]:
    """Median milliseconds of each; they take turns, so that a slow moment hits all of them.

    Args:
        nets: called with x, in the mode they are in.
        x: one input batch, on the device that is measured.
        seconds: least time for each.
    """
    return in_turn([partial(net, x) for net in nets], seconds).median().tolist()


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float = 0.5, rounds: int = ROUNDS) -> pd.DataFrame:
    """Milliseconds of each call, a column each, a row a round; ratios of one row were measured side by side.

    Every other round goes through the calls backwards, so that of two each is as often the first. Each turn begins with
    a call that isn't counted, unless one alone takes all the time there is. No garbage is collected under the clock.

    Args:
        calls: they take turns, so that a slow moment hits all of them.
        seconds: least time for each, over all rounds.
        rounds: how many turns each has.
    """
    took = [_alone(call) for call in calls]
    often = [max(1, round(seconds / rounds / max(one, 1e-9))) for one in took]
    table = pd.DataFrame(0.0, index=range(rounds), columns=range(len(calls)))
    for number in range(rounds):
        for i in alternating(range(len(calls)), number):
            if took[i] < seconds:
                calls[i]()
            table.loc[number, i] = 1e3 * _mean_seconds(calls[i], often[i])
    return table


def alternating(items: Sequence, number: int) -> list:
    """Items in their order in rounds of even numbers, backwards in odd ones.

    Args:
        items: left alone.
        number: of the round.
    """
    return list(items) if number % 2 == 0 else list(items)[::-1]


def ratio(took: pd.DataFrame, mine, other) -> dict[str, float]:
    """How long one takes, in times of the other: `ratio`, the median of the rounds' own ratios, and the ends of their
    middle half, `ratio_low` and `ratio_high`.

    Args:
        took: as `in_turn` gives it.
        mine, other: columns of it.
    """
    low, middle, high = (took[mine] / took[other]).quantile([0.25, 0.5, 0.75])
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def faster(before: Callable, after: Callable, x: Tensor, seconds: float = 0.5, rounds: int = PAIRS) -> dict[str, Any]:
    """Two networks on the same input, in pairs: how many times as fast is the second?

    Args:
        before, after, x, seconds, rounds: as in `pairs`.

    Returns: as `times_as_fast` tells it.
    """
    return times_as_fast(pairs(before, after, x, seconds, rounds))


@torch.no_grad()
def pairs(before: Callable, after: Callable, x: Tensor, seconds: float = 0.5, rounds: int = PAIRS) -> pd.DataFrame:
    """Milliseconds of two networks on the same input, measured in turn: a row a pair, columns `before` and `after`.

    What disturbs a shared machine may last for seconds: pairs of several visits, with other work between them, say more
    than as many of one. Their tables are concatenated for `times_as_fast`.

    Args:
        before, after: called with x, in the mode they are in, without gradients.
        x: one input batch, on the device that is measured.
        seconds: least time for each.
        rounds: how many pairs.
    """
    took = in_turn([partial(before, x), partial(after, x)], seconds, rounds)
    return took.set_axis(["before", "after"], axis=1)


def times_as_fast(took: pd.DataFrame) -> dict[str, Any]:
    """What pairs say of two networks.

    Args:
        took: of `pairs`, of one visit or of several.

    Returns: `before` and `after`, median milliseconds; `ratio`, the median of the pairs' own ratios of before to after,
        with the ends of their middle half as in `ratio`; and `ratios`, all of them.
    """
    every = (took["before"] / took["after"]).round(4).tolist()
    return {**took.median().to_dict(), **ratio(took, "before", "after"), "ratios": every}


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python collects no garbage inside: it would count for whoever is timed just then."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _alone(call: Callable[[], Any]) -> float:
    """Seconds of one call, after one that may compile and fill what is kept."""
    call()
    return _mean_seconds(call, 1)


def _mean_seconds(call: Callable[[], Any], times: int) -> float:
    """Mean seconds of so many calls; of an accelerator all of its work."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    with no_collection():
        wait()
        began = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return (time.perf_counter() - began) / times


class LatencyTable:
    """Milliseconds of layers on this machine, measured once and kept in a file.

    The file, `latency.json`, lies in the folder named by LINL_CACHE, else in the user's cache folder; an
    empty LINL_CACHE keeps the table in memory alone. Entries hold for one processor, number of threads,
    torch version, dtype and shape of input.
    """

    memory: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        folder = os.environ.get("LINL_CACHE", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "linl"))
        self.path = Path(folder).expanduser() / "latency.json" if folder else None
        if self.path and self.path.is_file():
            with contextlib.suppress(OSError, ValueError):  # a broken cache is measured anew
                self.memory.update(json.loads(self.path.read_text()))

    def ms(self, key: str, make: Callable[[], nn.Module], shape: Sequence[int], like: Tensor) -> float:
        """Median milliseconds of `make()` in eval mode.

        Args:
            key: what the layer is.
            shape, like: of its input; whose dtype and device.
        """
        unit = torch.cuda.get_device_name(like.device) if like.device.type == "cuda" else processor()
        full = f"{unit} {torch.get_num_threads()} {torch.__version__} {like.dtype} {tuple(shape)} {key}"
        if full not in self.memory:
            layer = make().to(device=like.device, dtype=like.dtype).eval()
            x = torch.randn(*shape, device=like.device, dtype=like.dtype)
            self.memory[full] = latencies([layer], x, seconds=0.03)[0]
            self._save()
        return self.memory[full]

    def _save(self) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # a read-only home costs time, no more
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".latency.{os.getpid()}.part")
            part.write_text(json.dumps(self.memory, indent=0))
            os.replace(part, self.path)
