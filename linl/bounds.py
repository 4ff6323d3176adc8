"""Sound bounds on every activation's input, for all inputs in a box: intervals, CROWN, and what lies between.

How they are made and what their rounding costs is told in linl.crown and linl.windows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from linl.boxes import Box
from linl.checking import shown
from linl.crown import Pass
from linl.program import Bend, Program
from linl.ranges import Range
from linl.reading import program

METHODS = ("interval", "local", "crown")
MOST = 0.9
"""Where more than this share of a layer's units is asked of CROWN, all are: the few others cost little, and get
narrower ranges; what lies behind them stays as it is."""


@dataclass
class Bounds:
    """Bounds on every activation's input and on the output.

    Attributes:
        names: of the activations, in the order of the forward pass.
        inputs: their ranges.
        output: the network's range.
        method: "interval", "local" or "crown".
        pieces: number of the linear piece each unit stays in, −1 while it may leave it; (boxes, *shape) int8.
        seconds: by stage.
    """

    names: list[str]
    inputs: list[Range]
    output: Range
    method: str
    pieces: list[Tensor]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """A row an activation: units, how many stay in each piece over all boxes, mean width of the bounds."""
        rows = []
        for name, range_, piece in zip(self.names, self.inputs, self.pieces, strict=True):
            counts = {state: int((piece == i).all(0).sum()) for i, state in enumerate(("inactive", "active"))}
            width = (range_.upper - range_.lower).mean().item()
            rows.append({"layer": name, "units": piece[0].numel(), **counts, "mean_width": width})
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return shown(self.table)


def bound(net: nn.Module | Program, box: Box, method: str = "crown", dtype: torch.dtype = torch.float64) -> Bounds:
    """Bounds on every activation's input, for all inputs in a box.

    Args:
        net: in eval mode; or what `linl.reading.program` made of it.
        box: one or several; all are bounded at once.
        method: "interval"; "crown" (intersected with the intervals), for units whose sign the intervals leave open,
            and all of a layer where most are; or "local", for networks that are too large for that: each activation's
            input from one activation back, at the start of its residual block, and CROWN for the output alone.
        dtype: of the arithmetic; float32 is faster and wider.

    Returns: `Bounds`; a range is (boxes, *shape of the value).

    Raises:
        ValueError: an unknown method, a box of another shape than the network takes.
        NoBoundRule: an operation that no bound is known for.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    read = net if isinstance(net, Program) else program(net, box.shape)
    if read.shapes[0] != box.shape:
        raise ValueError(f"the box has shape {tuple(box.shape)}, the network takes {tuple(read.shapes[0])}")
    with torch.no_grad():
        return _all(Pass(read, box, dtype, back=method != "interval"), method)


def _asked(walk: Pass, op: Bend) -> Tensor:
    """Flat positions of the units that CROWN bounds, before an activation."""
    open_, count = walk.open(op), math.prod(walk.program.shapes[op.target])
    return torch.arange(count) if len(open_) > MOST * count else open_


def _all(walk: Pass, method: str) -> Bounds:
    """Every activation's input, in order, then the output."""
    began, spent = time.perf_counter(), 0.0
    found: dict[int, Range] = {}
    for op in walk.program.ops:
        if isinstance(op, Bend):
            source = op.sources[0]
            start = time.perf_counter()
            if method == "crown":
                walk.tighten(source, _asked(walk, op))
            elif method == "local":
                walk.tighten_locally(source, walk.open(op))
            spent += time.perf_counter() - start
            found[op.site] = walk.ranges[source]
        walk.step(op)
    start = time.perf_counter()
    if method != "interval":
        walk.tighten(walk.program.output, torch.arange(math.prod(walk.program.shapes[walk.program.output])))
    spent += time.perf_counter() - start
    seconds = {"interval": time.perf_counter() - began - spent} | ({method: spent} if method != "interval" else {})
    bends = walk.program.bends
    inputs = [found[op.site] for op in bends]
    pieces = [op.pieces.piece(r.lower, r.upper) for op, r in zip(bends, inputs, strict=True)]
    names = [op.name for op in bends]
    return Bounds(names, inputs, walk.ranges[walk.program.output], method, pieces, seconds)
