"""A network with two hidden layers in place of a deep one, exact on a box save for a shell around each face.

**Construction** (Kumar, Serra, Ramalingam, arXiv 1905.11428, section 4; a reconstruction, the paper was not at hand).
On the box, let S be an activation pattern. If every unit stays in its piece of S the network is the affine map
l_S(x) = T_S·x + t_S, and each unit's input is affine too; that it really is in its piece means inequalities
g_{S,i}(x) ≥ 0, one for each end of a piece. They cut out the polyhedron R_S of the box, on which the network is l_S.

- Layer 1: x − lower (not below 0 on the box, so its ReLU is itself), and the violations v_{S,i} = ReLU(−g_{S,i}).
- Layer 2, with V_S = Σ_i v_{S,i} and C_S > 0 at least as large as every |l_{S,k}| on the box:
  p_{S,k} = ReLU(l_{S,k}(x) + C_S − H·V_S) for each output k, and q_S = ReLU(C_S − H·V_S).
- Output k: Σ_S (p_{S,k} − q_S).

**Why it is right.** (1) In R_S all violations are 0; l_{S,k} + C_S ≥ 0 and C_S > 0, so both ReLUs are what is in them
and p_{S,k} − q_S = l_{S,k}(x) exactly. (2) Where H·V_S(x) ≥ 2·C_S, both are 0, for l_{S,k} ≤ C_S: S gives nothing.
(3) So at an x of the box that lies in one R_S and has V_S'(x) ≥ 2·C_S'/H for all other patterns S', output k is
l_{S,k}(x), which is the network. (4) What remains lies in the shells {x: V_S(x) < 2·C_S/H, x not inside R_S}. V_S is
piecewise linear and 0 on R_S alone, hence at least κ_S·dist(x, R_S) with some κ_S > 0 (Hoffman 1952) if R_S isn't
empty: a shell is no wider than 2·C_S/(κ_S·H). If R_S is empty, V_S has a least value above 0 on the box, and from some
H on the pattern gives nothing anywhere. The shells' share of the volume goes to 0 as 1/H. (5) The regions of all
patterns with an interior cover the box but for a set without volume, so those patterns are enough ("feasible"); the
others only add shells of their own. (A unit that lies exactly on its bend all over a region has two patterns for one
region there; of those, only that with the upper piece is used.)

**Units, known beforehand.** Layer 2 has (m + 1)·R units for m outputs and R patterns. Layer 1 has one for each input
and each inequality. An inequality of the first activation doesn't depend on S, one of a later activation only on the
pieces before it, so they are shared; the formula without sharing, n + N·R, is in the report as well.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from linl.asking import one, wide_or_own, without_pools
from linl.boxes import Box
from linl.checking import shown
from linl.program import Bend, Program
from linl.regions import count
from linl.sweep import Sweep, straight

PATTERNS = ("feasible", "all")
LARGEST = 50_000_000
"""Numbers in the two layers' weights; beyond that it isn't built."""


@dataclass(repr=False, eq=False)
class ShallowReport:
    """What a shallow network is made of.

    Attributes:
        patterns: "feasible" or "all".
        sharpness: H.
        regions: patterns used, R.
        inputs, outputs: n and m.
        violations: units of layer 1 for inequalities; `unshared` if each pattern had its own.
        room: C of each pattern, (R,).
    """

    patterns: str
    sharpness: float
    regions: int
    inputs: int
    outputs: int
    violations: int
    unshared: int
    room: Tensor

    @property
    def units(self) -> tuple[int, int]:
        """Of the two hidden layers."""
        return self.inputs + self.violations, (self.outputs + 1) * self.regions

    @property
    def table(self) -> pd.DataFrame:
        """One row: patterns, sharpness, regions, layer_1, layer_2, layer_1_unshared."""
        return pd.DataFrame([{
            "patterns": self.patterns, "sharpness": self.sharpness, "regions": self.regions, "layer_1": self.units[0],
            "layer_2": self.units[1], "layer_1_unshared": self.inputs + self.unshared,
        }])  # fmt: skip

    def __repr__(self) -> str:
        return self.table.to_string(index=False)

    def _repr_html_(self) -> str:
        return shown(self.table)


def shallow(
    net: nn.Module | Program,
    box: Box,
    patterns: str = "feasible",
    sharpness: float = 1e6,
    time_limit: float | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """The two-hidden-layer network that computes what a network does on a box, save for thin shells around faces.

    At every input of the box that lies in one region and outside the shells of the others, it gives the network's
    output (up to rounding): `exact_at` says where that is promised, `compare` measures its share and the error.

    Args:
        net: in eval mode, small: as for `linl.regions.count`; left alone.
        box: one, with a width at every position.
        patterns: "feasible": those whose regions have an interior, counted first. "all": every combination of
            pieces, without a count.
        sharpness: H; the shells are of width O(1/H). In float32 its rounding counts: H·1e-7 of a unit's input.
        time_limit: seconds for the count.
        dtype: of the result; None: the network's.

    Returns: an `nn.Sequential` of Flatten, Linear, ReLU, Linear, ReLU, Linear, with a `shallow_report`.

    Raises:
        ValueError: unknown patterns, a sharpness not above 0, a count that isn't complete, more numbers than
            `LARGEST`; as `linl.regions.count`.
        NoBoundRule, UntraceableError: an operation that isn't known, by name.
    """
    if patterns not in PATTERNS:
        raise ValueError(f"unknown patterns {patterns!r}: choose from {', '.join(PATTERNS)}")
    if not (sharpness > 0 and math.isfinite(sharpness)):
        raise ValueError(f"sharpness = {sharpness}: must be a number above 0")
    if not (one(box).upper > box.lower).all():
        raise ValueError("a shallow network wants a box with a width at every position")
    read = without_pools(net, box.shape)
    if patterns == "feasible":
        known = count(read, box, time_limit)
        if known.count is None:
            raise ValueError(f"not all regions are known ({known!r}): give it more time, a smaller box or network")
        rows = [[part[i].numpy() for part in known.patterns] for i in range(known.lower)]
    else:
        rows = _every(read)
    if dtype is None:
        dtype = wide_or_own(net)
    with torch.no_grad():
        return _Shallow(read, box, rows, patterns, float(sharpness)).network().to(dtype).eval()


def exact_at(made: nn.Sequential, x: Tensor) -> Tensor:
    """Where a shallow network promises its original's output: inputs (N, *shape) of the box to (N,) bool.

    True where one pattern has no violation and every other one has H·V ≥ 2·C.
    """
    report: ShallowReport = made.shallow_report
    near = 4 * torch.finfo(made[1].weight.dtype).eps  # C itself was rounded
    wide = copy.deepcopy(made[:4]).double()
    with torch.no_grad():
        room = wide(x.double())[:, -report.regions :]  # C − H·V of each pattern
    full = room >= report.room * (1 - near)
    return (full.sum(1) == 1) & ((room <= -report.room * (1 - near)) | full).all(1)


def compare(net: nn.Module, made: nn.Sequential, box: Box, n: int = 100_000, seed: int = 0) -> pd.DataFrame:
    """A shallow network beside its original at n points of the box by chance.

    Returns: one row: the report's, `exact` (share of the points where equality is promised), `error_exact` (largest
        difference there), `error` and `error_mean` (largest and mean of all), each relative to max(1, |output|).
    """
    x = box.sample(n, torch.Generator().manual_seed(seed))
    dtype = wide_or_own(net)
    with torch.no_grad():
        y = torch.cat([net(part.to(dtype)).flatten(1) for part in x.split(4096)]).double()
        z = torch.cat([made(part.to(made[1].weight)) for part in x.split(4096)]).double()
    where = torch.cat([exact_at(made, part) for part in x.split(4096)])
    apart = (y - z).abs().amax(1) / y.abs().amax().clamp(min=1)
    inside = float(apart[where].max()) if where.any() else math.nan
    found = {"exact": float(where.double().mean()), "error_exact": inside, "error": float(apart.max())}
    return made.shallow_report.table.assign(**found, error_mean=float(apart.mean()))


def _every(read: Program) -> list[list[np.ndarray]]:
    """Every combination of pieces."""
    pieces, sizes = [], []
    for op in read.bends:
        real = op.pieces.bending(read.shapes[op.sources[0]]).flatten(1)
        # pieces between which the slope doesn't change are one, and go by the lowest number
        for unit in range(real.shape[1]):
            pieces.append([0, *(int(i) + 1 for i in real[:, unit].nonzero()[:, 0])])
        sizes.append(real.shape[1])
    many = math.prod(map(len, pieces))
    if many * len(pieces) > LARGEST:
        raise ValueError(f"{many:.3g} patterns of {len(pieces)} units are too many: take patterns='feasible'")
    cuts = np.cumsum(sizes)[:-1]
    return [np.split(np.array(row, dtype=np.int8), cuts) for row in itertools.product(*pieces)]


class _Shallow:
    """One network under construction."""

    def __init__(self, read: Program, box: Box, rows: list, patterns: str, sharpness: float) -> None:
        self.program, self.box, self.sweep = read, box, Sweep(read)
        self.rows, self.patterns, self.sharpness = rows, patterns, sharpness
        self.lower = box.lower[0].flatten()
        self.number: dict[tuple, int] = {}  # of each inequality
        self.slopes: list[Tensor] = []
        self.constants: list[float] = []

    def network(self) -> nn.Sequential:
        """All three layers."""
        n, parts, used, unshared = len(self.lower), [], [], 0
        for row in self.rows:
            weight, constant, mine = self._pattern(row)
            if self.twin:
                continue
            parts.append((weight, constant))
            used.append(mine)
            unshared += len(mine)
            units = n + len(self.slopes)
            if units * (n + len(parts) * (1 + len(constant))) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} weights: take a smaller network, or patterns='feasible'")
        weights, starts = (torch.stack(t) for t in zip(*parts, strict=True))  # (R, m, n), (R, m)
        width = self.box.upper[0].flatten() - self.lower
        reach = (starts + weights.clamp(max=0) @ width).abs(), (starts + weights.clamp(min=0) @ width).abs()
        room = torch.maximum(*reach).amax(1) * (1 + 1e-9)
        room = torch.where(room > 0, room, 1.0)
        return self._assemble(weights, starts, room, used, unshared)

    def _assemble(self, weights, starts, room, used, unshared) -> nn.Sequential:
        (count_, outputs, n), violations = weights.shape, len(self.slopes)
        first = nn.Linear(n, n + violations).double()
        first.weight.copy_(torch.cat([torch.eye(n).double(), *(t[None] for t in self.slopes)]))
        first.bias.copy_(torch.cat([-self.lower, torch.tensor(self.constants, dtype=torch.float64)]))
        second = nn.Linear(n + violations, (outputs + 1) * count_).double()
        second.weight.zero_()
        wide = second.weight.view(outputs + 1, count_, n + violations)
        wide[:outputs, :, :n] = weights.transpose(0, 1)
        for pattern, mine in enumerate(used):
            wide[:, pattern, [n + i for i in mine]] = -self.sharpness
        second.bias.copy_(torch.cat([(starts + room[:, None]).T.flatten(), room]))
        last = nn.Linear((outputs + 1) * count_, outputs).double()
        last.weight.zero_()
        last.weight.view(outputs, outputs + 1, count_)[range(outputs), range(outputs)] = 1.0
        last.weight.view(outputs, outputs + 1, count_)[:, outputs] = -1.0
        last.bias.zero_()
        made = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
        made.shallow_report = ShallowReport(
            self.patterns, self.sharpness, count_, n, outputs, violations, unshared, room
        )
        return made

    def _pattern(self, row: list[np.ndarray]) -> tuple[Tensor, Tensor, list[int]]:
        """A pattern's map from x − lower, (m, n) and (m,), and the numbers of its inequalities.

        A unit that is exactly on its bend everywhere has the same region in both pieces: the pattern with the lower
        one is the other's `twin`, and would make the region count twice.
        """
        mine: list[int] = []
        self.twin, n = False, len(self.lower)
        rows = torch.cat([self.lower[None], torch.eye(n, dtype=torch.float64)])  # directions from the lower corner
        values = {0: rows.view(-1, *self.box.shape)}

        def bend(op: Bend, rows: Tensor) -> Tensor:
            mine.extend(self._inequalities(op, rows.flatten(1), row))
            return straight(op, rows, torch.from_numpy(row[op.site]).view(rows.shape[1:]))

        for at in range(len(self.sweep.ops)):
            values = self.sweep.rows(at, values, bend)
        made = values[self.program.output].flatten(1)
        return made[1:].T, made[0], mine

    def _inequalities(self, op: Bend, rows: Tensor, row: list[np.ndarray]) -> list[int]:
        """One for each end of each unit's piece at which the unit bends."""
        found = []
        real = op.pieces.bending(self.program.shapes[op.sources[0]]).flatten(1)
        before = b"|".join(part.tobytes() for part in row[: op.site])
        for unit, piece in enumerate(row[op.site].tolist()):
            ends = real[:, unit].nonzero()[:, 0].tolist()
            below = [i for i in ends if i < piece][-1:]
            above = [i for i in ends if i >= piece][:1]
            for number, sign in [(i, -1.0) for i in below] + [(i, 1.0) for i in above]:
                key = (op.site, before, unit, number, sign)
                level = rows[0, unit] == op.pieces.bends[number] and not rows[1:, unit].any()
                self.twin |= bool(level) and sign > 0
                if key not in self.number:
                    self.number[key] = len(self.slopes)
                    # above 0 where the unit is beyond this end; from x itself, as the first layer reads it
                    slope, bend = sign * rows[1:, unit], op.pieces.bends[number]
                    self.slopes.append(slope)
                    self.constants.append(float(sign * (rows[0, unit] - bend) - slope @ self.lower))
                found.append(self.number[key])
        return found
