"""Every claim about a unit checked again, without a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pandas as pd
import torch
from torch import Tensor, nn

from linl.branching import Branching, check
from linl.checking import shown
from linl.crown import Pass
from linl.evidence import cut
from linl.program import Bend, Program
from linl.reading import program
from linl.states import PROOFS, UNDECIDED, UNSTABLE, Stability
from linl.triangles import relaxed

COLUMNS = (
    "layer", "stable", "bound", "solver", "not_proved", "unstable", "witness", "not_shown", "undecided",
)  # fmt: skip
SECONDS = 30.0  # for a unit whose kept parts of the box prove it no more
POINTS = 64  # by chance, and as many corners


@dataclass(frozen=True, repr=False)
class CheckedStability:
    """What became of a state's claims.

    `.table` has a row an activation: layer; stable units, and of those proved again by a linear bound, resting on the
    solver's word, and not proved again; unstable units, and of those shown again by their two inputs, and not;
    undecided units, which claim nothing.

    Attributes:
        ok: no claim failed. What rests on the solver alone is no failure, and is counted.
        complete: ok, and nothing rests on the solver.
    """

    table: pd.DataFrame

    @property
    def ok(self) -> bool:
        return not self.table[["not_proved", "not_shown"]].to_numpy().any()

    @property
    def complete(self) -> bool:
        return self.ok and not self.table["solver"].any()

    def __repr__(self) -> str:
        return self.table.to_string(index=False)

    def _repr_html_(self) -> str:
        return shown(self.table)


def verify_stability(net: nn.Module, state: Stability) -> CheckedStability:
    """Checks every claim of a state again: stable units by linear bounds, unstable ones by evaluating their witnesses.

    Nothing of the state is trusted but what the solver alone has proved (those units are counted apart), on which
    later layers' bounds may rest. The state's own `lower` and `upper` are not read, nor checked.

    Args:
        net: the network, in eval mode.
        state: from `analyse`, or loaded.

    Raises:
        ValueError: the state of another network, or with numbers that no state has.
    """
    read = program(net, state.box.shape)
    state.refuse_other(read.fingerprint())
    _refuse_codes(read, state)
    seen = state.witnesses.copy(read)
    pieces = seen.pieces_at(seen.points) if len(seen.points) else None
    against = seen.pieces_at(_contradicting(state))
    walk, rows = Pass(read, state.box, torch.float32 if state.method == "local" else torch.float64), {}
    for op in read.ops:
        if isinstance(op, Bend):
            again = _proved_again(walk, op, state, against[op.site])
            rests = _rests(op, state, again, against[op.site])
            rows[op.site] = _row(op, state, again, rests, _shown_again(op, state, pieces))
        with torch.no_grad():
            walk.step(op)
    return CheckedStability(pd.DataFrame([rows[site] for site in sorted(rows)], columns=COLUMNS))


def _refuse_codes(read: Program, state: Stability) -> None:
    if len(state.codes) != len(read.bends):
        counts = f"{len(state.codes)} activations, the network {len(read.bends)}"
        raise ValueError(f"the state has {counts}: analyse it anew")
    for op in read.bends:
        codes, seen = state.codes[op.site], state.witnesses
        if codes.shape != (read.shapes[op.sources[0]].numel(),):
            raise ValueError(f"the state has {codes.numel()} units of {op.name}: analyse the network anew")
        if ((codes < UNDECIDED) | (codes >= len(op.pieces.slopes))).any():
            raise ValueError(f"the state has codes of {op.name} that no unit can have: analyse the network anew")
        if any((t[op.site] >= len(seen.points)).any() for t in (seen.low, seen.high)):
            raise ValueError(f"the state has witnesses of {op.name} without a point: analyse the network anew")
    counts = [len(codes) for codes in state.codes]
    for site, unit, sign in [*state.trees, *state.shares]:
        if not (0 <= site < len(counts) and 0 <= unit < counts[site] and sign in (1, -1)):
            raise ValueError(f"the state has a proof for activation {site}, unit {unit}, side {sign}: analyse it anew")


def _contradicting(state: Stability) -> Tensor:
    """Points of the box that look for contradictions of what the solver said: its centre, some by chance, witnesses."""
    box, generator = state.box, torch.Generator().manual_seed(0)
    points = state.witnesses.points
    points = points[box.contains(points)] if len(points) else points
    return torch.cat([box.center, box.sample(POINTS, generator), box.corners(POINTS, generator), points])


def _proved_again(walk: Pass, op: Bend, state: Stability, against: Tensor) -> Tensor:
    """Stable units that linear bounds prove; afterwards the walk's range takes over what the solver said. (units,)

    Where a point (`against`: each unit's piece at some) lies in another piece, the solver's word is worth nothing.
    """
    value, codes, site = op.sources[0], state.codes[op.site], op.site
    later = any((proofs > PROOFS.index("interval")).any() for proofs in state.proofs[site + 1 :])
    with torch.no_grad():
        proved = _agrees(walk, op, codes)
        wanted = walk.open(op) if later else ((codes >= 0) & ~proved).nonzero()[:, 0]
        if any((proofs == PROOFS.index("local")).any() for proofs in state.proofs):
            walk.tighten_locally(value, walk.open(op))
        if state.method != "local":
            walk.tighten(value, wanted)
        proved = _agrees(walk, op, codes)
    if state.method == "local":
        return proved
    _as_kept(walk, op, state)
    _by_parts(walk, op, state)
    made = cache(lambda: relaxed(walk, value))
    for unit in ((codes >= 0) & ~_agrees(walk, op, codes)).nonzero()[:, 0].tolist():
        _proved_anew(walk, op, unit, state, made)
    proved = _agrees(walk, op, codes)
    rests = _rests(op, state, proved, against)
    edges = torch.tensor(op.pieces.edges, dtype=torch.float64)
    units = rests.nonzero()[:, 0]
    piece = codes[units].long()
    walk.ranges[value] = walk.ranges[value].narrowed(units, edges[piece][None], edges[piece + 1][None])
    return proved


def _rests(op: Bend, state: Stability, proved: Tensor, against: Tensor) -> Tensor:
    """Units that rest on the solver's word, which no point contradicts; (units,) bool."""
    codes = state.codes[op.site]
    contradicted = ((against >= 0) & (against != codes)).any(0)
    return (codes >= 0) & ~proved & (state.proofs[op.site] == PROOFS.index("solver")) & ~contradicted


def _agrees(walk: Pass, op: Bend, codes: Tensor) -> Tensor:
    known = walk.ranges[op.sources[0]]
    return (codes >= 0) & (op.pieces.piece(known.lower, known.upper)[0].flatten() == codes)


def _as_kept(walk: Pass, op: Bend, state: Stability) -> None:
    """Bounds with the slopes that the state keeps for units of this activation, all at once."""
    value = op.sources[0]
    for sign, side in ((1, "lower"), (-1, "upper")):
        units = sorted(unit for site, unit, kept in state.shares if (site, kept) == (op.site, sign))
        for some in torch.tensor(units, dtype=torch.long).split(1 << 10):
            if len(some):
                kept = [state.shares[op.site, unit, sign] for unit in some.tolist()]
                with torch.no_grad():
                    walk.choose({target: torch.stack([each[target] for each in kept]) for target in kept[0]})
                    bound, _ = walk.least(value, some, torch.full((len(some),), float(sign)))
                    walk.choose({})
                walk.ranges[value] = walk.ranges[value].narrowed(some, **{side: sign * bound})


def _by_parts(walk: Pass, op: Bend, state: Stability) -> None:
    """Bounds of units that aren't stable, through the parts of the box that the state keeps for them."""
    value = op.sources[0]
    for site, unit, sign in sorted(state.trees):
        if site == op.site and state.codes[site][unit] < 0:
            end = check(walk, value, unit, float(sign), state.trees[site, unit, sign])
            walk.ranges[value] = cut(walk.ranges[value], unit, sign < 0, sign * end)


def _proved_anew(walk: Pass, op: Bend, unit: int, state: Stability, made: Callable) -> None:
    """A unit's bounds through the parts of the box that the state keeps; else with slopes, or parts, found anew."""
    value, one = op.sources[0], torch.tensor([unit])
    piece, bends = int(state.codes[op.site][unit]), op.pieces.bends
    for sign, edge in ((1, bends[piece - 1] if piece else None), (-1, bends[piece] if piece < len(bends) else None)):
        known = walk.ranges[value]
        end = (known.lower if sign > 0 else -known.upper).flatten()[unit].item()
        if edge is None or end >= sign * edge:
            continue
        tree = state.trees.get((op.site, unit, sign))
        if tree is not None:
            end = check(walk, value, unit, float(sign), tree)
        if end < sign * edge:
            end = walk.optimized(value, one, torch.tensor([float(sign)]))[0][0].item()
        # slopes that proved it in the analysis had sharper bounds before them than the newest slopes kept give
        by_slopes = state.proofs[op.site][unit] == PROOFS.index("optimized")
        if end < sign * edge and (tree is not None or by_slopes):
            search = Branching(walk, value, unit, float(sign), sign * edge, lambda points: False, made)
            leaves = search.run(SECONDS)
            end = sign * edge if leaves is not None else end
        walk.ranges[value] = cut(known, unit, sign < 0, sign * end)


def _shown_again(op: Bend, state: Stability, pieces: list[Tensor] | None) -> Tensor:
    """Units whose two inputs lie in the box and put them in different pieces; (units,) bool."""
    low, high = state.witnesses.low[op.site].long(), state.witnesses.high[op.site].long()
    both = (low >= 0) & (high >= 0)
    if pieces is None or not both.any():
        return torch.zeros_like(both)
    units = both.nonzero()[:, 0]
    inside = state.box.contains(state.witnesses.points)
    first, second = pieces[op.site][low[units], units], pieces[op.site][high[units], units]
    differ = (first >= 0) & (second >= 0) & (first != second) & inside[low[units]] & inside[high[units]]
    found = torch.zeros_like(both)
    found[units] = differ
    return found


def _row(op: Bend, state: Stability, proved: Tensor, solver: Tensor, shown_again: Tensor) -> dict:
    codes, stable = state.codes[op.site], state.codes[op.site] >= 0
    unstable = codes == UNSTABLE
    return {
        "layer": op.name, "stable": int(stable.sum()), "bound": int(proved.sum()), "solver": int(solver.sum()),
        "not_proved": int((stable & ~proved & ~solver).sum()), "unstable": int(unstable.sum()),
        "witness": int((unstable & shown_again).sum()), "not_shown": int((unstable & ~shown_again).sum()),
        "undecided": int((codes == UNDECIDED).sum()),
    }  # fmt: skip
