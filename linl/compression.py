"""An equivalent smaller network: units that never bend on a box are taken out or merged.

The steps are those of Serra et al. (arXiv 2102.07804, Algorithm 1) on the program of a network, in float64:
an inactive ReLU's unit gives nothing and is deleted; a saturated one gives a constant, which the next layer's bias
takes in; of units that are straight lines, those whose weights depend on the others' go, the next layer taking
over their part; an activation that is a straight line as a whole is dropped, so that folding can merge the layers
on both sides. Convolutions go by channel: a channel is deleted if all its positions are inactive.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.affine import Affine
from linl.checking import shown
from linl.emitting import emit, emit_constant, leaky
from linl.folding import fold
from linl.pieces import Pieces
from linl.program import Bend, Conv, Dense, MaxPool, Op, Program, Reshape, Sum, apply
from linl.reading import program
from linl.states import Stability
from linl.units import FixedTwoSlope, LiNLU, PartialLinear

RANK = 1e-12
"""Relative to the largest: from how small a pivot on a row counts as dependent on those before it."""


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did.

    `.table` has a row an activation: layer, units before and left, inactive, merged (straight lines that depend on
    others), dropped (whether the whole activation was a straight line), note (why nothing could be done).
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        return shown(self.table)


def compress(net: nn.Module, state: Stability, objective: str = "parameters") -> nn.Module:
    """A network with fewer units and layers that computes the same on the box of `state`.

    Args:
        net: the network that was analysed; left alone.
        state: from `analyse`. Undecided units are kept as they are.
        objective: by which layers with nothing left between them are merged, as in `fold`; never "latency" by default,
            so that the same network comes out on every machine.

    Returns: a traced copy of torch's own layers, `.compress_report` attached, in the network's dtype. Outside the box
        it may compute anything: see `guard`.

    Raises:
        ValueError: the state of another network, train mode.
        NoBoundRule: an activation that can't be written as one of torch's own.
    """
    read = program(net, state.box.shape)
    state.refuse_other(read.fingerprint())
    work = _Work(read, state)
    work.run()
    like = next(net.parameters(), torch.zeros(()))
    wide, name = torch.zeros((), dtype=torch.float64), type(net).__name__
    constant = work.constant()
    if constant is not None:
        made = emit_constant(constant, wide, name)
    else:
        made = fold(emit(work.program, wide, name), state.box.center, objective=objective)
    made.to(device=like.device, dtype=like.dtype).requires_grad_(like.requires_grad)
    made.compress_report = CompressReport(pd.DataFrame(work.rows))
    return made


class _Work:
    """A program being made smaller."""

    def __init__(self, read: Program, state: Stability) -> None:
        self.program = Program([copy.copy(op) for op in read.ops], list(read.shapes), read.output, read.names)
        self.codes = [codes.view(shape) for codes, shape in zip(state.codes, state.shapes, strict=True)]
        self.rows: list[dict] = []
        self._old_shapes = dict(enumerate(self.program.shapes))  # before the last cut

    def run(self) -> None:
        """Every activation in turn."""
        self._absorb_norms()
        for op in self.program.bends:
            self._plain(op)
        for op in list(self.program.bends):
            codes = self.codes[op.site]
            row = {"layer": op.name, "units": codes.numel(), "left": codes.numel(), "inactive": 0, "merged": 0,
                   "dropped": False, "note": ""}  # fmt: skip
            self.rows.append(row)
            if (codes >= 0).any():
                stay = self._delete(op, codes, row)
                op = next(o for o in self.program.bends if o.site == op.site)
                if (codes[stay] >= 0).all() and len(stay):
                    self._drop(op, codes[stay], row)

    def constant(self) -> Tensor | None:
        """The output, if nothing of the input is left in it; else sums of a constant and a value are put right."""
        known: dict[int, Tensor] = {}
        for op in list(self.program.ops):
            fixed = [known.get(s) for s in op.sources]
            if isinstance(op, Dense) and op.weight.shape[1] == 0:
                known[op.target] = torch.zeros(len(op.weight), dtype=torch.float64) if op.bias is None else op.bias
            elif isinstance(op, Conv) and op.layer.geometry.inputs == 0:  # torch's convolutions refuse no channels
                zero = torch.zeros(op.outputs, dtype=torch.float64)
                known[op.target] = zero if op.bias is None else zero + op.bias
            elif all(value is not None for value in fixed) and fixed:
                known[op.target] = apply(op, [value[None] for value in fixed], self.program.shapes[op.target])[0]
            elif isinstance(op, Sum) and any(value is not None for value in fixed):
                (i, value), (j, _) = sorted(enumerate(fixed), key=lambda pair: pair[1] is None)
                made = replace(op, sources=(op.sources[j],), signs=(op.signs[j],), constant=op.signs[i] * value)
                self._replace(op, made)
        if self.program.output not in known:  # what only fed constants goes as well
            self.program.ops = self.program.upto(self.program.output)
        return known.get(self.program.output)

    # --- a form in which units can be taken out ----------------------------------------------------

    def _absorb_norms(self) -> None:
        """A BatchNorm right behind a layer joins it."""
        for op in list(self.program.ops):
            before = self.program.giver(op.sources[0])
            if not isinstance(before, Dense | Conv) or len(self.program.readers(before.target)) != 1:
                continue
            if before.target == self.program.output:
                continue
            factor = _factor_of(op)
            if factor is None:
                continue
            scale, shift = factor
            made = _scaled(before, scale, shift)
            made.target = op.target
            self._replace(before, made)
            self.program.ops.remove(op)

    def _plain(self, op: Bend) -> None:
        """linl's units as torch's own activations: p·leaky(x) = leaky(p·x), the factor joins the layer before."""
        if not isinstance(op.module, LiNLU | PartialLinear | FixedTwoSlope) or len(op.pieces.bends) > 1:
            return
        negative, positive = op.pieces.slopes
        before = self.program.giver(op.sources[0])
        if (positive != 1).any():
            alone = isinstance(before, Dense | Conv) and len(self.program.readers(before.target)) == 1
            if not alone or not (positive > 0).all():
                return
            channels = self.program.shapes[op.sources[0]][0]
            self._replace(before, _scaled(before, positive.reshape(-1).expand(channels), None))
        module, one = leaky(negative / positive), torch.ones((), dtype=torch.float64)
        self._replace(op, replace(op, module=module, pieces=Pieces((0.0,), (0.0,), (negative / positive, one))))

    def _replace(self, old: Op, new: Op) -> None:
        self.program.ops[self.program.ops.index(old)] = new

    # --- whole activations -------------------------------------------------------------------------

    def _drop(self, op: Bend, codes: Tensor, row: dict) -> None:
        """An activation that is a straight line in every unit: its slopes join the layer before, and it goes."""
        before = self.program.giver(op.sources[0])
        alone = isinstance(before, Dense | Conv) and len(self.program.readers(before.target)) == 1
        by_channel = (codes.flatten(1) == codes.flatten(1)[:, :1]).all() if codes.ndim > 1 else True
        slopes, offsets = op.pieces.straight(codes)
        same = bool((slopes == 1).all() and (offsets == 0).all())
        if not same and not (alone and by_channel):
            row["note"] = "every position is a straight line, but not of one kind by channel, or the layer is shared"
            return
        if not same:
            scale, shift = (t.flatten(1)[:, 0] if t.ndim > 1 else t for t in (slopes, offsets))
            self._replace(before, _scaled(before, scale, shift))
        self._bypass(op)
        row |= {"left": 0, "dropped": True}

    def _bypass(self, op: Op) -> None:
        """What read an operation's value reads its source instead."""
        self.program.ops.remove(op)
        for other in self.program.ops:
            other.sources = tuple(op.sources[0] if s == op.target else s for s in other.sources)
        if self.program.output == op.target:
            self.program.output = op.sources[0]

    # --- single units ------------------------------------------------------------------------------

    def _delete(self, op: Bend, codes: Tensor, row: dict) -> Tensor:
        """Takes out what can be, channel by channel; the positions of what stays."""
        before, after = self.program.giver(op.sources[0]), self._readers(op.target)
        everything = torch.arange(len(codes))
        if self._is_output(op.target):
            row["note"] = "gives the network's output"
            return everything
        if not isinstance(before, Dense | Conv) or len(self.program.readers(before.target)) != 1 or after is None:
            row["note"] = "its value, or the layer before it, is used elsewhere too"
            return everything
        if isinstance(before, Conv) and before.layer.geometry.groups > 1:
            row["note"] = "a convolution in groups"
            return everything
        gone = silent = _silent(op.pieces, codes)
        if isinstance(before, Dense) and all(isinstance(reader, Dense) and len(path) == 1 for reader, path in after):
            merged = self._merge_lines(op, before, [reader for reader, _ in after], codes, silent)
            row["merged"] = int(merged.sum())
            gone = silent | merged
        stay = (~gone).nonzero()[:, 0]
        if len(stay) < len(gone):
            before = self.program.giver(op.sources[0])
            self._cut(op, before, stay, [path for _, path in after])
        positions = math.prod(codes.shape[1:])
        row |= {"left": len(stay) * positions, "inactive": int(silent.sum()) * positions}
        return stay

    def _is_output(self, value: int) -> bool:
        """Whether a value is the network's output, perhaps in another shape."""
        while value != self.program.output:
            readers = self.program.readers(value)
            if len(readers) != 1 or not isinstance(readers[0], Reshape):
                return False
            value = readers[0].target
        return True

    def _readers(self, value: int) -> list[tuple[Op, list[Op]]] | None:
        """The layers that read a value, each with the operations on the way there; None if anything else does."""
        found = []
        for reader in self.program.readers(value):
            path: list[Op] = [reader]
            while self._passes(path[-1]):
                following = self.program.readers(path[-1].target)
                if len(following) != 1 or path[-1].target == self.program.output:
                    return None
                path.append(following[0])
            last = path[-1]
            if not isinstance(last, Dense) and not (isinstance(last, Conv) and last.layer.geometry.groups == 1):
                return None
            found.append((last, path))
        return found

    def _passes(self, op: Op) -> bool:
        """Whether channels go through an operation one by one, zeros staying zeros."""
        return self._flattens(op) or isinstance(op, MaxPool) or (isinstance(op, Conv) and _keeps_zero(op))

    def _flattens(self, op: Op) -> bool:
        """A reshaping after which each channel's numbers are still in one row; others mix channels."""
        return isinstance(op, Reshape) and len(self.program.shapes[op.target]) == 1

    def _merge_lines(self, op: Bend, before: Dense, after: list[Dense], codes: Tensor, gone: Tensor) -> Tensor:
        """Straight-line units that depend on others: the readers take over their part. Returns them, bool."""
        slopes, offsets = op.pieces.straight(codes)
        lines = (codes >= 0) & ~gone
        # a constant that isn't 0 goes into the readers' biases
        flat = lines & (slopes == 0)
        units = (lines & (slopes != 0)).nonzero()[:, 0]
        weight = before.weight[units] * slopes[units, None]
        bias = offsets[units] + (0 if before.bias is None else before.bias[units] * slopes[units])
        kept, coefficients = _independent(weight)
        lost = torch.ones(len(units), dtype=torch.bool)
        lost[kept] = False
        merged = torch.zeros_like(lines)
        merged[units[lost]] = True
        for reader in after:
            new, shift = reader.weight.clone(), reader.weight[:, flat] @ offsets[flat]
            part = reader.weight[:, units[lost]]
            new[:, units[kept]] += part @ coefficients[lost]
            shift = shift + part @ (bias[lost] - coefficients[lost] @ bias[kept])
            before_bias = 0 if reader.bias is None else reader.bias
            self._replace(reader, replace(reader, weight=new, bias=before_bias + shift))
        return merged | flat

    def _cut(self, op: Bend, before: Op, stay: Tensor, paths: list[list[Op]]) -> None:
        """Leaves some channels (or units) of a layer, its activation, and everything up to the next layers."""
        self._shrink_value(before.target, stay)
        self._replace(before, _rows(before, stay, self.program.shapes[before.target]))
        module, pieces = op.module, op.pieces
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            module = nn.PReLU(max(1, len(stay)), dtype=torch.float64)
            module.weight.data = op.module.weight.detach().double()[stay]
        slopes = tuple(s[stay] if s.ndim else s for s in pieces.slopes)
        pieces = Pieces(pieces.bends, pieces.values, slopes)
        self._replace(op, replace(op, module=module, pieces=pieces))
        self._shrink_value(op.target, stay)
        for reader in {id(path[0]): path for path in paths}.values():
            self._cut_path(reader, stay, op.target)

    def _cut_path(self, path: list[Op], stay: Tensor, value: int) -> None:
        """Takes channels out of operations up to and including the next layer."""
        index = stay
        for i, op in enumerate(path):
            op = next(o for o in self.program.ops if o.target == op.target)
            last = i == len(path) - 1
            inputs = self.program.shapes[op.sources[0]]
            if isinstance(op, Reshape):
                old = self._old_shapes[op.sources[0]]
                positions = math.prod(old) // old[0]
                index = (index[:, None] * positions + torch.arange(positions)).flatten()
                self._shrink_value(op.target, index)
            elif isinstance(op, Dense):
                old = self._old_shapes[op.sources[0]]
                positions = math.prod(old[1:])
                index = (index[:, None] * positions + torch.arange(positions)).flatten() if len(old) > 1 else index
                self._replace(op, replace(op, weight=op.weight[:, index], inputs=inputs))
            elif isinstance(op, MaxPool):
                self._shrink_value(op.target, index)
            elif last:
                layer = Affine(replace(op.layer.geometry, inputs=len(index)), op.layer.weight[:, index], op.layer.bias)
                self._replace(op, replace(op, layer=layer, inputs=inputs))
            else:
                g = replace(op.layer.geometry, inputs=len(index), outputs=len(index), groups=len(index))
                layer = Affine(g, op.layer.weight[index], op.layer.bias)
                self._shrink_value(op.target, index)
                outputs = self.program.shapes[op.target]
                self._replace(op, replace(op, layer=layer, inputs=inputs, outputs=outputs))

    def _shrink_value(self, value: int, stay: Tensor) -> None:
        self._old_shapes[value] = self.program.shapes[value]
        self.program.shapes[value] = torch.Size((len(stay), *self.program.shapes[value][1:]))


def _silent(pieces: Pieces, codes: Tensor) -> Tensor:
    """Channels that give 0 wherever they are; (C,) bool."""
    slopes, offsets = pieces.straight(codes)
    nothing = (codes >= 0) & (slopes == 0) & (offsets == 0)
    return nothing.flatten(1).all(1) if codes.ndim > 1 else nothing


def _independent(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that span the others, and each row's coefficients in them.

    Returns: (positions of the kept rows, coefficients (n, kept)); by a QR decomposition with column pivoting, checked:
        a row that its coefficients don't reproduce to 1e-13 of its norm, or whose coefficients are large, is kept.
    """
    count = len(rows)
    everything = torch.arange(count), torch.eye(count, dtype=torch.float64)
    if not count or not rows.shape[1]:
        return everything
    from scipy.linalg import qr

    _, r, order = qr(rows.numpy().T, mode="economic", pivoting=True)
    pivots = torch.from_numpy(abs(r.diagonal()).copy())
    rank = int((pivots > RANK * max(1e-300, pivots[0].item())).sum())
    if rank == count:
        return everything
    kept = torch.from_numpy(order[:rank].copy()).long()
    coefficients = torch.linalg.lstsq(rows[kept].T, rows.T, driver="gelsd").solution.T
    error = (coefficients @ rows[kept] - rows).norm(dim=1)
    # by its own norm: a row of 1e-14 matters as much as one of 1 to a reader with weights of 1e14
    sure = (error <= 1e-13 * max(rows.shape) * rows.norm(dim=1)) & (coefficients.abs() < 1e3).all(1)
    sure[kept] = True
    unsure = (~sure).nonzero()[:, 0]
    return torch.cat([kept, unsure]), F.pad(coefficients, (0, len(unsure)))


def _factor_of(op: Op) -> tuple[Tensor, Tensor | None] | None:
    """Factor and shift by channel of a BatchNorm; None for any other operation."""
    if isinstance(op, Conv) and op.pointwise and math.prod(op.layer.geometry.stride) == 1:
        g = op.layer.geometry
        if any(side for pair in g.padding for side in pair) or (op.layer.bias is not None and op.layer.bias.ndim > 1):
            return None
        return op.layer.weight.flatten(), op.layer.bias
    if isinstance(op, Dense) and len(op.inputs) == 1 and op.weight.shape[0] == op.weight.shape[1]:
        diagonal = op.weight.diagonal()
        return (diagonal, op.bias) if torch.equal(op.weight, torch.diag(diagonal)) else None
    return None


def _scaled(op: Dense | Conv, scale: Tensor, shift: Tensor | None) -> Op:
    """A layer with its outputs times a factor, plus a shift, by channel."""
    if isinstance(op, Dense):
        bias = None if op.bias is None else op.bias * scale
        bias = bias if shift is None else (shift.clone() if bias is None else bias + shift)
        return replace(op, weight=op.weight * scale[:, None], bias=bias)
    layer, dims = op.layer, op.layer.geometry.dims
    weight = layer.weight * scale.view(-1, 1, *[1] * dims)
    bias = layer.bias
    if bias is not None:
        bias = bias * scale.view(-1, *[1] * (bias.ndim - 1))
    if shift is not None:
        bias = shift.clone() if bias is None else bias + shift.view(-1, *[1] * (bias.ndim - 1))
    kind = "none" if bias is None else "map" if bias.ndim > 1 else "channel"
    return replace(op, layer=Affine(replace(layer.geometry, bias=kind, uniform=False), weight, bias))


def _rows(op: Dense | Conv, stay: Tensor, outputs: torch.Size) -> Op:
    """A layer with some of its outputs."""
    if isinstance(op, Dense):
        return replace(op, weight=op.weight[stay], bias=None if op.bias is None else op.bias[stay])
    layer = op.layer
    geometry = replace(layer.geometry, outputs=len(stay))
    made = Affine(geometry, layer.weight[stay], None if layer.bias is None else layer.bias[stay])
    return replace(op, layer=made, outputs=outputs)


def _keeps_zero(op: Conv) -> bool:
    """Whether a channel of zeros stays one, and none else reads it: an average pool, a padding."""
    g = op.layer.geometry
    return g.groups == g.inputs == g.outputs and op.layer.bias is None


__all__ = ["CompressReport", "compress"]
