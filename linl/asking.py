"""What is asked about a network's regions, read and checked: the network, inputs, a box, a time limit."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from linl.boxes import Box
from linl.program import MaxPool, Program
from linl.reading import program


def seconds(time_limit: float | None) -> float:
    """A time limit, ∞ for None.

    Raises:
        ValueError: not a number above 0.
    """
    if time_limit is None:
        return math.inf
    if not isinstance(time_limit, Real) or not time_limit > 0:
        raise ValueError(f"time_limit = {time_limit!r}: seconds above 0, or None")
    return float(time_limit)


def one(box: Box) -> Box:
    """The box, if it is one.

    Raises:
        ValueError: several boxes, or something else.
    """
    if not isinstance(box, Box):
        raise ValueError(f"the box is a {type(box).__name__}: make a linl.Box, e.g. Box.around(x, eps)")
    if len(box) != 1:
        raise ValueError(f"{len(box)} boxes: one at a time; take box[0]")
    return box


def wide_or_own(net: nn.Module | Program) -> torch.dtype:
    """The dtype of a network's parameters; float64 where there are none."""
    first = None if isinstance(net, Program) else next(net.parameters(), None)
    return torch.float64 if first is None else first.dtype


def readable(net: nn.Module | Program, shape: torch.Size) -> Program:
    """A network read for inputs of a shape.

    Raises:
        ValueError, NoBoundRule, UntraceableError: as `linl.reading.program`; a program for another shape.
    """
    if not isinstance(net, Program):
        return program(net, shape)
    if net.shapes[0] != shape:
        raise ValueError(f"the program takes inputs of shape {tuple(net.shapes[0])}, not {tuple(shape)}")
    return net


def without_pools(net: nn.Module | Program, shape: torch.Size) -> Program:
    """A network read for what knows activations alone.

    Raises:
        ValueError, NoBoundRule, UntraceableError: as `readable`; a max-pool.
    """
    read = readable(net, shape)
    pool = next((op for op in read.ops if isinstance(op, MaxPool)), None)
    if pool is not None:
        raise ValueError(
            f"{pool.name} is a max-pool: with one, regions aren't counted on a box; take a segment (along), a plane "
            "(in_plane, draw_slice) or one piece (affine_at)"
        )
    return read


def given(net: nn.Module | Program, *inputs: Tensor) -> tuple[Program, Tensor]:
    """A network, and inputs for it in float64 on the CPU, (n, *shape); a leading 1 of each is dropped.

    Raises:
        ValueError: inputs of different shapes, or with values that are no finite numbers, or several examples in one;
            as `readable`.
        NoBoundRule, UntraceableError: as `readable`.
    """
    taken = [torch.as_tensor(x).detach().cpu().double() for x in inputs]
    if len({x.shape for x in taken}) > 1:
        raise ValueError(f"the inputs have shapes {', '.join(str(tuple(x.shape)) for x in taken)}: give one shape")
    if not all(x.isfinite().all() for x in taken):
        raise ValueError("an input holds values that are no finite numbers")
    together = torch.stack(taken)
    shape = together.shape[1:]
    if len(shape) > 1 and shape[0] == 1 and _drops(net, shape):
        together, shape = together[:, 0], shape[1:]
    try:
        return readable(net, shape), together
    except ValueError as error:
        if len(shape) > 1 and _reads(net, shape[1:]):
            examples = f"{shape[0]} examples of shape {tuple(shape[1:])}"
            raise ValueError(f"an input of shape {tuple(shape)} is {examples}: give one at a time") from error
        raise


def _drops(net: nn.Module | Program, shape: torch.Size) -> bool:
    """Whether a leading 1 counts examples: features (1, F) and images (1, C, H, W), unless only the whole is taken."""
    rest = shape[1:]
    if isinstance(net, Program):
        return net.shapes[0] == rest
    if len(shape) in (2, 4):
        return _takes(net, rest) or not _takes(net, shape)
    return _takes(net, rest) and not _takes(net, shape)


def _takes(net: nn.Module, shape: torch.Size) -> bool:
    if any(module.training for module in net.modules()):  # a BatchNorm would learn from it; it is refused anyway
        return False
    like = next(net.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            net(torch.zeros(2, *shape, dtype=like.dtype, device=like.device))
    except Exception:
        return False
    return True


def _reads(net: nn.Module | Program, shape: torch.Size) -> bool:
    try:
        readable(net, shape)
    except ValueError:
        return False
    return True
