"""Branch and bound on the pieces of activations: proofs that linear bounds alone don't reach, without a solver.

Where a unit's bound leaves its sign open, the domain is cut in two: an activation before it is assumed in its first
piece, or in its second. Either half is bounded by CROWN with slopes of its own and with multipliers for what is assumed
(Wang et al., Beta-CROWN, NeurIPS 2021), many halves at once; those that stay open are cut again. The leaves, with their
slopes and multipliers, are a proof that anyone checks by evaluating each bound once.
Every half also names the corner of the box where its bound is least: where the unit is unstable after all, such
corners lead to the witness.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linl.crown import Pass, ascend_, rounded
from linl.program import Bend
from linl.reliability import Part, Tree
from linl.triangles import Triangles, relaxed

AT_ONCE = 64  # domains that are cut at a time
TRIED = 12  # cuts that are tried for each
STEPS = 8  # of gradient ascent on a half's slopes and multipliers
MORE = 300  # likewise, where nothing is left to cut


@dataclass
class Leaves:
    """Parts of a domain, each with what its bound needs; by activation's target.

    Attributes:
        fixed: (n, *shape) int8, the piece that a unit is assumed to be in, −1 for none.
        share, pull: (n, *shape) float32, slopes below and multipliers, as `linl.crown.Pass.choose` takes them.
    """

    fixed: dict[int, Tensor]
    share: dict[int, Tensor]
    pull: dict[int, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.fixed.values())))

    def __getitem__(self, some: Tensor | slice) -> Leaves:
        return Leaves(*({t: v[some] for t, v in part.items()} for part in (self.fixed, self.share, self.pull)))

    def __add__(self, other: Leaves) -> Leaves:
        pairs = zip(self.parts, other.parts, strict=True)
        return Leaves(*({t: torch.cat([v, theirs[t]]) for t, v in mine.items()} for mine, theirs in pairs))

    @property
    def parts(self) -> tuple[dict[int, Tensor], ...]:
        """fixed, share, pull."""
        return self.fixed, self.share, self.pull

    def flat(self) -> Tensor:
        """All of `fixed` in one matrix, (n, units of all activations)."""
        return torch.cat([v.flatten(1) for v in self.fixed.values()], dim=1)

    def cover(self) -> bool:
        """Whether the parts are the whole domain: a tree of cuts, every cut with both its sides."""
        return _covers(self.flat().numpy())


def _covers(fixed: np.ndarray) -> bool:
    """Whether some parts, (n, units), are the whole: all of them cut at one unit, and either half's again covered."""
    left = [(np.arange(len(fixed)), np.zeros(fixed.shape[1], dtype=bool))]  # rows, and the units they are cut at so far
    while left:
        rows, used = left.pop()
        assumed = (fixed[rows] >= 0) & ~used
        if len(rows) and not assumed.any(1).all():  # in one of them nothing more is assumed
            continue
        cuts = np.flatnonzero(assumed.all(0)) if len(rows) else ()
        if not len(cuts):
            return False
        used = used.copy()
        used[cuts[0]] = True
        left += [(rows[fixed[rows, cuts[0]] == piece], used) for piece in (0, 1)]
    return True


def check(walk: Pass, value: int, unit: int, sign: float, leaves: Leaves) -> float:
    """A lower bound of sign·unit from the parts of a domain; −∞ where they don't cover it, or are no parts at all.

    Nothing about the leaves is trusted: whatever slopes and multipliers they hold, the bound is sound.
    """
    bends = {op.target: op for op in walk.program.upto(value) if isinstance(op, Bend)}
    if not bends:  # there is nothing to cut
        return -torch.inf
    known = {t: walk.program.shapes[t] for t in bends}
    if any({t: v.shape[1:] for t, v in part.items()} != known for part in leaves.parts) or not leaves.cover():
        return -torch.inf
    if any(len(op.pieces.bends) > 1 and (leaves.fixed[t] >= 0).any() for t, op in bends.items()):
        return -torch.inf  # two sides aren't the whole of three pieces
    least = torch.inf
    with torch.no_grad():
        for start in range(0, len(leaves), 8 * AT_ONCE):
            some = leaves[start : start + 8 * AT_ONCE]
            walk.choose(some.share, some.fixed, some.pull)
            bound, _ = walk.least(value, torch.full((len(some),), unit), torch.full((len(some),), sign))
            least = min(least, bound.min().item() if bound.isfinite().all() else -torch.inf)
    walk.choose({})
    return least


class _SettledError(Exception):
    """A point settled the question."""


class Branching:
    """The search for one question: is sign·unit nowhere below `end`?

    Args:
        walk: with sound ranges of every value before `value`; of one box.
        value, unit, sign, end: the question.
        look: takes points (n, *shape) and says whether the question is settled by one of them.
        made: the linear program for the value's units, if there is one; it may be shared by several searches. None: it
            is made here.

    Attributes:
        domains: how many parts were bounded.
    """

    def __init__(
        self,
        walk: Pass,
        value: int,
        unit: int,
        sign: float,
        end: float,
        look: Callable[[Tensor], bool],
        made: Callable[[], Triangles | None] | None = None,
    ) -> None:
        self.walk, self.value, self.unit, self.sign, self.end, self.look = walk, value, unit, sign, end, look
        self.made = made or (lambda: relaxed(walk, value))
        self.bends = [op for op in walk.program.upto(value) if isinstance(op, Bend)]
        self.domains = 0
        self.tree: Tree | None = None
        self.hopeless = False  # nothing is left to cut, and no proof

    @property
    def kept(self) -> int:
        """Numbers that it keeps to go on with."""
        if self.tree is None:
            return 0
        return (len(self.tree.parts) + len(self.proved)) * 3 * len(self.tree.program.open)

    def run(self, seconds: float) -> Leaves | None:
        """The leaves of a proof; None where there is none: a point was found, time is up, or nothing is left to cut.

        Asked again, a search by linear programs goes on from where it stopped, as long as nothing before the value is
        known better than it was.

        Args:
            seconds: after which it gives up.
        """
        self.until = time.perf_counter() + seconds
        if not self.bends or self.hopeless:
            return None
        try:
            return self._by_programs(self.tree) if self.tree else self._search()
        except _SettledError:
            return None

    def _by_programs(self, tree: Tree) -> Leaves | None:
        """Parts that linear programs find; what holds by the solver's word alone is cut on."""
        while tree.open and tree.grow(self.until):
            parts, tree.parts = tree.parts, []
            leaves = _leaves(tree.program, parts)
            sure = self._least(leaves) >= self.end
            self.proved = self.proved + leaves[sure]
            short = (~sure).nonzero()[:, 0].tolist()
            if not all(tree.cut_anywhere(parts[i].fixed) for i in short):
                self.hopeless = True
                return None
        self.domains = tree.solved
        # no part is open, and none is missing: a search's own books aren't believed
        return self.proved if not tree.open and self.proved.cover() else None

    def raised(self, count: int, seconds: float) -> tuple[Leaves, float] | None:
        """So many parts at most, and what they bound sign·unit by from below; None where there is no linear program.

        Args:
            count: of parts.
            seconds: for them.
        """
        made = self.made() if self.bends else None
        parts = made and Tree(made, self.unit, self.sign, math.inf).raised(count, time.perf_counter() + seconds)
        if not parts:
            return None
        leaves = _leaves(made, parts)
        return (leaves, self._least(leaves).min().item()) if leaves.cover() else None

    def _whole(self) -> Leaves:
        shapes = {op.target: self.walk.program.shapes[op.target] for op in self.bends}
        return Leaves(
            {t: torch.full((1, *shape), -1, dtype=torch.int8) for t, shape in shapes.items()},
            {op.target: self.walk.first_share(op, 1).float() for op in self.bends},
            {t: torch.zeros(1, *shape) for t, shape in shapes.items()},
        )

    def _search(self) -> Leaves | None:
        first, rows = self._whole(), {}
        self._least(first, rows)
        # multipliers are found in shares of what they are weighed against
        self.size = {t: float(rows[t].abs().max()) if t in rows else 0.0 for t in first.fixed}
        bound, first, score = self._bound(first, STEPS)
        if bound < self.end and (made := self.made()):
            self.tree, self.proved = Tree(made, self.unit, self.sign, self.end, self.look), first[:0]
            return self._by_programs(self.tree)
        sure = bound >= self.end
        proved, open_, scores = first[sure], first[~sure], score[~sure]
        while len(open_):
            if time.perf_counter() > self.until:
                return None
            whole = scores.amax(1) <= 0
            if whole.any():  # nothing is left to cut: exact, but for slopes and multipliers
                bound, last, _ = self._bound(open_[whole], MORE)
                if not (bound >= self.end).all():
                    return None
                proved, open_, scores = proved + last, open_[~whole], scores[~whole]
                continue
            kept = torch.arange(len(open_)) < len(open_) - AT_ONCE
            bound, parts, score = self._bound(self._halves(open_[~kept], scores[~kept]), STEPS)
            self.domains += len(bound)
            sure = bound >= self.end
            order = bound[~sure].argsort(descending=True)  # the worst last: it is cut first
            proved = proved + parts[sure]
            open_ = open_[kept] + parts[~sure][order]
            scores = torch.cat([scores[kept], score[~sure][order]])
        return proved

    def _halves(self, parents: Leaves, scores: Tensor) -> Leaves:
        """Each domain cut in two at the unit that lifts the worse half most, of those with the highest scores."""
        best = scores.topk(min(TRIED, scores.shape[1]), dim=1)
        n, tried = best.indices.shape
        each = torch.arange(n).repeat_interleave(2 * tried)
        units = best.indices.repeat_interleave(2, dim=1).flatten()
        pieces = torch.tensor([0, 1], dtype=torch.int8).repeat(n * tried)
        halves = _cut(parents[each], units, pieces)
        bound = self._least(halves)
        worse = bound.view(n, tried, 2).amin(2)
        worse[best.values <= 0] = -torch.inf
        chosen = worse.argmax(1)
        at = (torch.arange(n) * tried + chosen)[:, None] * 2 + torch.arange(2)
        return halves[at.flatten()]

    @torch.no_grad()
    def _least(self, leaves: Leaves, seen: dict[int, Tensor] | None = None) -> Tensor:
        """Each part's bound as its slopes and multipliers stand; `seen` is given the rows, as by `Pass.least`."""
        n = len(leaves)
        if n > 8 * AT_ONCE:
            return torch.cat([self._least(leaves[start : start + 8 * AT_ONCE]) for start in range(0, n, 8 * AT_ONCE)])
        self.walk.choose(leaves.share, leaves.fixed, leaves.pull)
        bound, _ = self.walk.least(self.value, torch.full((n,), self.unit), torch.full((n,), self.sign), seen=seen)
        self.walk.choose({})
        return bound[0]

    def _bound(self, leaves: Leaves, steps: int) -> tuple[Tensor, Leaves, Tensor]:
        """Bounds by gradient ascent, what they were had with, and how much each unit's lines cost (n, units).

        Raises:
            _SettledError: a point settled the question.
        """
        walk, n = self.walk, len(leaves)
        units, signs = torch.full((n,), self.unit), torch.full((n,), self.sign)
        share = {t: v.double().requires_grad_() for t, v in leaves.share.items()}
        pull = {t: (v.double() / (self.size[t] or 1)).requires_grad_() for t, v in leaves.pull.items()}
        variables = [*share.values(), *pull.values()]
        steady = [(torch.zeros_like(v), torch.zeros_like(v)) for v in variables]
        best = torch.full((n,), -torch.inf, dtype=torch.float64)
        kept = Leaves(leaves.fixed, *({t: v.clone() for t, v in part.items()} for part in leaves.parts[1:]))
        for step in range(steps + 1):
            with torch.enable_grad():
                # of assumptions alone: multipliers of ranges' ends only a linear program chooses
                used = {t: rounded(v * self.size[t]) * (leaves.fixed[t] >= 0) for t, v in pull.items()}
                walk.choose({t: rounded(v) for t, v in share.items()}, leaves.fixed, used)
                bound, row = walk.least(self.value, units, signs)
            better = bound[0].detach() > best
            best = torch.where(better, bound[0].detach(), best)
            for mine, now in ((kept.share, share), (kept.pull, used)):
                for t, v in now.items():
                    mine[t][better] = v.detach().float()[better]
            if step == steps or bool((best >= self.end).all()):
                break
            slopes = torch.autograd.grad(bound.sum(), variables, allow_unused=True)
            for i, (v, slope) in enumerate(zip(variables, slopes, strict=True)):
                if slope is not None:
                    shared = i < len(share)
                    ascend_(
                        v,
                        slope,
                        *steady[i],
                        step + 1,
                        (0.1 if shared else 0.05) * 0.98**step,
                        1.0 if shared else torch.inf,
                    )
        box = walk.ranges[0]
        corners = torch.where(row[0].detach() < 0, box.upper[0], box.lower[0])
        walk.choose({})
        if self.look(corners[best < self.end]):
            raise _SettledError
        return best, kept, self._scores(kept)

    def _scores(self, leaves: Leaves) -> Tensor:
        """How much a unit's lines are apart, times its weight in the row: what a cut there may give. (n, units)"""
        rows: dict[int, Tensor] = {}
        self._least(leaves, rows)
        n, found = len(leaves), []
        for op in self.bends:
            known = self.walk.ranges[op.sources[0]]
            below, low, above, high = self.walk.lines_of(op)
            mid = 0.0 if len(op.pieces.bends) > 1 else op.pieces.bends[0]
            gap = ((above * mid + high) - (below * mid + low)).clamp(min=0)[0]
            open_ = (op.pieces.piece(known.lower, known.upper)[0] < 0) & (leaves.fixed[op.target] < 0)
            if len(op.pieces.bends) > 1:
                open_ = torch.zeros_like(open_)  # three pieces: no cut here
            here = rows.get(op.target)
            score = torch.zeros(n, *open_.shape[1:]) if here is None else here[0].abs() * gap
            found.append((score * open_).flatten(1))
        return torch.cat(found, dim=1)


def _cut(parents: Leaves, units: Tensor, pieces: Tensor) -> Leaves:
    """Each domain with one more unit (by its number in `flat`) assumed in a piece."""
    fixed, start = {}, 0
    for t, v in parents.fixed.items():
        flat, count = v.flatten(1).clone(), v[0].numel()
        mine = ((units >= start) & (units < start + count)).nonzero()[:, 0]
        flat[mine, units[mine] - start] = pieces[mine]
        fixed[t], start = flat.view(v.shape), start + count
    return Leaves(fixed, parents.share, parents.pull)


def _leaves(made: Triangles, parts: list[Part]) -> Leaves:
    fixed = made.by_target(torch.from_numpy(np.stack([part.fixed for part in parts])))
    share = {t: torch.stack([part.share[t] for part in parts]) for t in fixed}
    pull = {t: torch.stack([part.pull[t] for part in parts]) for t in fixed}
    return Leaves(fixed, share, pull)
