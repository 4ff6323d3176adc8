"""Networks at random for the property tests of folding, and `python -m linl.tests.random_networks 1000`.

A network is a row of pieces. Every piece knows by construction whether a linear run goes through it and how
many convolutions and dense layers it holds, so the generator knows how many layers the best fold leaves
(`left`) without asking linl anything. Three families:

| family | what is in it | when `left` is reached |
|---|---|---|
| "wild" | everything, traps as well | not said |
| "padded" | padding anywhere in a run, all else unambiguous | after `linl.pad_first` |
| "bare" | padding only where a run begins, or behind 1×1 layers alone | at once |
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.tests.random_pieces import (
    ADAPTIVES,
    CONSTANTS,
    CONVS,
    FACTORS,
    FLATTENINGS,
    FRESH,
    IMAGE_TRAPS,
    LINEAR_SUMS,
    MAXES,
    NORMS,
    POOLS,
    SKIPPED,
    TRAPS,
    ZEROS,
    Call,
    Constant,
    D,
    Network,
    Pad,
    Piece,
    Pool,
    Sum,
    Twice,
    left,
    odd_layers,
    run,
    shaken_,
)  # fmt: skip

FAMILIES = ("wild", "padded", "bare")


def network(seed: int, family: str, runs: bool = False) -> Network:
    """The network of a seed; `runs`: one linear run from image to image."""
    torch.manual_seed(seed)
    make = _Builder(random.Random(f"{seed} {family} {runs}"), family)
    dims = make.rng.choice((1, 2, 2, 2, 2) if runs else (0, 1, 2, 2, 2, 2))
    size = [make.rng.randint(9, 17) for _ in range(dims)]
    if family == "wild" and not dims and make.chance(0.3):
        size = [5]  # tokens, or a signal
    x = torch.randn(2, make.rng.choice(_WIDTHS), *size, dtype=D)
    pieces, y = make.grow(x, make.rng.randint(2, 5), nesting=2, linear=runs)
    if dims and not runs and make.chance(0.6):
        while not (end := make.attempt(make.tail, y)):
            pass
        more, _ = make.grow(end[1], make.rng.randint(0, 3), nesting=1)
        pieces += end[0] + more
    net = nn.Sequential(*(piece.module for piece in pieces))
    shaken_(net)
    return Network(seed, family, net, x, None if family == "wild" else left(pieces), make.inner, runs)


# --- the builder -------------------------------------------------------------------------------------

_WIDTHS = (2, 3, 4, 6)
HEAD, POINTWISE, SPATIAL, MIRRORED = 0, 1, 2, 3
"""How far the run has come: nothing yet, single positions alone, neighbours read, and all behind mirrors."""


class _Unfit(Exception):  # noqa: N818 - an answer, not a fault
    """This piece doesn't fit here."""


class _Builder:
    """Draws pieces that fit; `come` is how far the present run has come, `inner` whether one pads inside."""

    def __init__(self, rng: random.Random, family: str) -> None:
        self.rng, self.family = rng, family
        self.wild, self.come, self.inner = family == "wild", HEAD, False

    # what the rules of the family allow

    def may_pad(self) -> bool:
        """Whether a piece may pad here."""
        return self.family != "bare" or self.come < SPATIAL

    def padded(self) -> None:
        """Notes a padding here."""
        self.inner |= self.come != HEAD

    def each(self, dims: int, *among: int) -> tuple[int, ...]:
        return tuple(self.rng.choice(among) for _ in range(dims))

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    # rows of pieces

    def grow(self, x: Tensor, count: int, nesting: int, linear: bool = False) -> tuple[list[Piece], Tensor]:
        """So many pieces in a row; `linear`: none where a run would end."""
        row: list[Piece] = []
        while count > 0:
            kinds = self.kinds(x, nesting, linear)
            made = self.attempt(self.rng.choices(list(kinds), list(kinds.values()))[0], x, nesting, linear)
            if made:
                count, (pieces, x) = count - 1, made
                row += pieces
        return row, x

    def attempt(self, kind: Callable, x: Tensor, *rules) -> tuple[list[Piece], Tensor] | None:
        """Pieces of a kind and their value; None where they don't fit."""
        come = self.come, self.inner
        try:
            pieces = kind(x, *rules) if kind == self.residual else kind(x)
            pieces = pieces if isinstance(pieces, list) else [pieces]
            y = x
            for piece in pieces:
                before, y = y, run([piece], y)
                piece.single = math.prod(y.shape[2:]) == 1 and not _flattened(before, y)
            if y.numel() and y.shape[1] <= 12 and (y.ndim < 3 or True not in rules or min(y.shape[2:]) > 1):
                return pieces, y
        except (_Unfit, RuntimeError, ValueError):  # torch: a kernel larger than the image, and the like
            pass
        self.come, self.inner = come
        return None

    def kinds(self, x: Tensor, nesting: int, linear: bool) -> dict[Callable, float]:
        """What may come next, with weights."""
        image = x.ndim > 2
        found = {
            self.norm: 2,
            self.factor: 1,
            self.constant: 1.5,
            self.nothing: 1,
            self.residual: 2.5 if nesting else 0,
        }
        found |= {self.conv: 6, self.pool: 1.5, self.pad: 1, self.slices: 0.5} if image else {self.dense: 5}
        found |= {self.adaptive: 0.4} if image and not linear else {}
        if not linear:
            found |= {self.bend: 4, self.twice: 0.5, self.tied: 0.4, self.product: 0.4}
            found |= {self.max_pool: 0.7, self.reflect: 0.5} if image else {}
        if self.wild:
            found |= (
                {self.trap: 3, self.odd: 2, self.pool: 3, self.adaptive: 2} if image else {self.trap: 3, self.odd: 2}
            )
        return found

    # linear pieces

    def conv(self, x: Tensor, outputs: int | None = None, stride: int | None = None, **options) -> list[Piece]:
        """A convolution of any kind, perhaps with a padding of its own before it."""
        dims, inputs = x.ndim - 2, x.shape[1]
        outputs = outputs or self.rng.choice((*_WIDTHS, inputs))
        common = math.gcd(inputs, outputs)
        groups = self.rng.choice([1, 1, common, *(g for g in (2, 3) if common % g == 0)])
        kernel = self.each(dims, 1) if self.chance(0.3) else self.each(dims, 1, 2, 3, 3, 4)
        dilation = self.each(dims, 1, 1, 2)
        strides = self.each(dims, 1, 1, 1, 2, 3) if stride is None else (stride,) * dims
        padding, before = 0, []
        if self.may_pad() and "padding_mode" not in options and self.chance(0.9 if self.come == POINTWISE else 0.6):
            way = self.rng.choice(("number", "number", "pieces", "same"))
            if way == "same" and strides == (1,) * dims:
                padding = "same"
            elif way == "pieces":
                before = [self.pad(x)]
            else:
                padding = self.each(dims, 0, 1, 2)
        options = {"padding": padding, **options}
        if options["padding"] not in (0, (0,) * dims):
            self.padded()
        made = CONVS[dims](
            inputs, outputs, kernel, strides, dilation=dilation, groups=groups, bias=self.chance(0.6), **options
        )
        wide = kernel != (1,) * dims or any(strides[i] > 1 for i in range(dims)) or padding not in (0, (0,) * dims)
        self.come = max(self.come, SPATIAL if wide or before else POINTWISE)
        return [*before, Piece(made, 1)]

    def dense(self, x: Tensor, outputs: int | None = None) -> Piece:
        self.come = max(self.come, POINTWISE)
        return Piece(nn.Linear(x.shape[-1], outputs or self.rng.choice(_WIDTHS), bias=self.chance(0.6)), 1)

    def norm(self, x: Tensor) -> Piece:
        self.come = max(self.come, POINTWISE)
        return Piece(NORMS[x.ndim - 2](x.shape[1], affine=self.chance(0.7)))

    def factor(self, x: Tensor) -> Piece:
        self.come = max(self.come, POINTWISE)
        return Piece(Call(*self.rng.choice(list(FACTORS.items()))))

    def constant(self, x: Tensor) -> Piece:
        """A number, or one for each channel, that is added, multiplied and the like."""
        self.come = max(self.come, POINTWISE)
        channels, ones = x.shape[1], (1,) * (x.ndim - 2)
        shapes = [(), (1,), (channels, *ones), (1, channels, *ones)]
        if self.wild:  # by position: no layer does that; or on the last axis, where tokens have theirs
            shapes += [x.shape[1:], (x.shape[-1],), (1, *x.shape[2:])]
        how, held = self.rng.choice(list(CONSTANTS)), self.rng.choice(("parameter", "buffer", "number"))
        return Piece(Constant(how, held, self.rng.choice(shapes)))

    def nothing(self, x: Tensor) -> Piece:
        return Piece(self.rng.choice((nn.Identity(), nn.Dropout(0.2))))

    def pool(self, x: Tensor, stride: int | None = None) -> Piece:
        """An average pool; without the wild ones, one that is the same average everywhere."""
        dims = x.ndim - 2
        kernel, strides = self.each(dims, 2, 3), self.each(dims, 1, 2) if stride is None else (stride,) * dims
        padding = self.each(dims, 0, 1) if self.may_pad() else (0,) * dims
        count, ceil = self.chance(0.5), self.chance(0.3)
        if any(padding):
            self.padded()
            count = count or not self.wild
        made = POOLS[dims](kernel, strides, padding, ceil, count)
        if ceil and not self.wild and run(made, x).shape != run(POOLS[dims](kernel, strides, padding), x).shape:
            raise _Unfit
        self.come = max(self.come, SPATIAL)
        if dims == 2 and count and not ceil and self.chance(0.3):
            return Piece(Pool(kernel, strides, padding))
        return Piece(made)

    def adaptive(self, x: Tensor) -> Piece:
        """An adaptive pool to an even division of the image, in the wild also to another."""
        self.come, dims = max(self.come, SPATIAL), x.ndim - 2
        if self.chance(0.2):
            axes = self.rng.choice((tuple(range(2, x.ndim)), tuple(range(-dims, 0))))
            return Piece(Call(f"x.mean({axes}, True)", lambda x: x.mean(axes, keepdim=True)))
        among = [[m for m in range(1, n + 1) if self.wild or n % m == 0] for n in x.shape[2:]]
        return Piece(ADAPTIVES[dims](tuple(map(self.rng.choice, among))))

    def pad(self, x: Tensor) -> Piece:
        """Zeros around the image, or some of it cut off, each side for itself; sometimes more channels."""
        if self.chance(0.15):
            extra = self.each(2, 0, 1, 2)
            self.come = max(self.come, POINTWISE)
            return Piece(Pad((0, 0) * (x.ndim - 2) + extra))
        if self.may_pad():
            self.padded()
            sides = self.each(2 * (x.ndim - 2), 0, 1, 2, 1, -1)
        else:
            sides = self.each(2 * (x.ndim - 2), 0, -1, -1)
        self.come = max(self.come, SPATIAL)
        return Piece(self.rng.choice((Pad, ZEROS[x.ndim - 2]))(sides))

    def slices(self, x: Tensor, stride: int | None = None) -> Piece:
        """Every n-th position."""
        n = stride or self.rng.choice((1, 2, 3))
        self.come = max(self.come, POINTWISE)
        if x.ndim == 3:
            return Piece(Call(f"x[:, :, ::{n}]", lambda x: x[:, :, ::n]))
        return Piece(Call(f"x[:, :, ::{n}, ::{n}]", lambda x: x[:, :, ::n, ::n]))

    # sums

    def residual(self, x: Tensor, nesting: int, linear: bool, stride: int | None = None, outputs: int = 0) -> Piece:
        """Branches from one value that meet again; all linear, or one bent at least."""
        bent, start = not linear and self.chance(0.4), self.come
        stride = stride or (self.rng.choice((1, 1, 2, 3)) if x.ndim > 2 else 1)
        outputs = outputs or self.rng.choice((x.shape[1], x.shape[1], *_WIDTHS))
        rows, reached = [], [start, POINTWISE]
        for i in range(2 if bent else self.rng.choice((2, 2, 3))):
            self.come = HEAD if bent else start
            rows.append(self.branch(x, outputs, stride, nesting - 1, bent and (i == 0 or self.chance(0.2))))
            reached.append(self.come)
        self.come = HEAD if bent else max(reached)
        self.rng.shuffle(rows)
        self.fit(rows, x)
        how = self.rng.choice(LINEAR_SUMS if not self.wild or self.chance(0.9) else ("add, alpha=2", "cat", "*"))
        if how in ("+=", "method add_") and not (rows[0] and isinstance(rows[0][-1].module, FRESH)):
            how = "+"  # in place only where nobody else reads the value
        made = Sum(how, *(nn.Sequential(*(piece.module for piece in row)) for row in rows))
        if bent:
            return Piece(made, None, sum(map(left, rows)))
        return Piece(made, sum(piece.layers or 0 for row in rows for piece in row))

    def branch(self, x: Tensor, outputs: int, stride: int, nesting: int, bent: bool) -> list[Piece]:
        """A row of pieces of a stride and of so many output channels."""
        image, plain, row = x.ndim > 2, x.shape[1] == outputs, []
        ways = ["chain", "chain", *(["identity"] * 2 if plain and stride == 1 else [])]
        ways += ["option A"] * (image and outputs >= x.shape[1]) + ["pool"] * (image and plain) + ["projection"] * image
        way = "chain" if bent else self.rng.choice(ways)
        if way == "pool":
            row.append(self.pool(x, stride))
        elif way == "option A":
            more, low = outputs - x.shape[1], self.rng.randint(0, outputs - x.shape[1])
            row += [self.slices(x, stride), Piece(Pad((0, 0) * (x.ndim - 2) + (low, more - low)))]
        elif way == "projection":
            self.come = max(self.come, SPATIAL if stride > 1 else POINTWISE)
            row += [Piece(CONVS[x.ndim - 2](x.shape[1], outputs, 1, stride, bias=self.chance(0.3)), 1)]
        elif way == "chain":
            count = self.rng.randint(1, 3)
            at, bend_at, value = self.rng.randrange(count), self.rng.randrange(count) if bent else -1, x
            for i in range(count):
                made = self.link(value, outputs if i == count - 1 else 0, stride if i == at else 1)
                if i == bend_at:
                    made += self.bend(run(made, value))
                value, row = run(made, value), row + made
                if nesting > 0 and self.chance(0.3):
                    row.append(self.residual(value, nesting, not bent, 1, value.shape[1]))
                    value = run(row[-1:], value)
        if row and self.chance(0.5):
            row.append(self.rng.choice((self.norm, self.factor, self.constant, self.nothing))(run(row, x)))
        return row

    def link(self, x: Tensor, outputs: int, stride: int) -> list[Piece]:
        """A convolution or a dense layer, perhaps with something small before it."""
        row = [self.rng.choice((self.norm, self.factor, self.constant, self.nothing))(x)] if self.chance(0.3) else []
        return row + (self.conv(x, outputs, stride) if x.ndim > 2 else [self.dense(x, outputs)])

    def fit(self, rows: list[list[Piece]], x: Tensor) -> None:
        """Cuts the ends of branches to one size; where padding is allowed, some grow."""
        sizes = [tuple(run(row, x).shape[2:]) for row in rows]
        wanted = tuple(map(min if self.family == "bare" else self.rng.choice, zip(*sizes, strict=True)))
        if wanted and min(wanted) < 1:
            raise _Unfit
        for row, size in zip(rows, sizes, strict=True):
            sides = []
            for n, m in list(zip(size, wanted, strict=True))[::-1]:
                low = self.rng.randint(min(m - n, 0), max(m - n, 0))
                sides += [low, m - n - low]
            if any(sides):
                self.inner |= max(sides) > 0
                self.come = max(self.come, SPATIAL) if self.come else HEAD
                row.append(Piece(Pad(sides)))

    # where runs end

    def bend(self, x: Tensor) -> list[Piece]:
        self.come = HEAD
        among = (nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.GroupNorm(1, x.shape[1]), Call("F.relu(x)", F.relu))
        return [Piece(self.rng.choice(among), None)]

    def max_pool(self, x: Tensor) -> Piece:
        self.come = HEAD
        return Piece(MAXES[x.ndim - 2](self.rng.choice((2, 3)), self.rng.choice((1, 2))), None)

    def square(self, x: Tensor) -> nn.Module:
        """A layer of as many outputs as inputs, at the beginning of a run."""
        self.come = HEAD
        row = self.conv(x, x.shape[1], 1) if x.ndim > 2 else [self.dense(x, x.shape[1])]
        self.come = HEAD
        return row[-1].module

    def twice(self, x: Tensor) -> Piece:
        return Piece(Twice(self.square(x)), None, 2)

    def tied(self, x: Tensor) -> Piece:
        """Two layers of one weight, a norm between them perhaps."""
        one = self.square(x)
        other = copy.deepcopy(one)
        other.weight = one.weight
        return Piece(nn.Sequential(one, *([self.norm(x).module] if self.chance(0.5) else []), other), None, 2)

    def product(self, x: Tensor) -> Piece:
        layer = self.square(x)
        return Piece(Sum("*", layer, copy.deepcopy(layer)), None, 2)

    def reflect(self, x: Tensor) -> list[Piece]:
        """A convolution that pads with something else than zeros: a run may begin with it."""
        self.come = HEAD
        mode = self.rng.choice(("reflect", "replicate", "circular"))
        row = self.conv(x, padding=self.each(x.ndim - 2, 1, 2), padding_mode=mode)
        row[-1].begins, self.come = True, MIRRORED
        return row if self.family != "padded" else row + self.bend(x)

    # the end of a network

    def tail(self, x: Tensor) -> list[Piece]:
        """From an image to features."""
        axes, pooled = tuple(range(2, x.ndim)), ADAPTIVES[x.ndim - 2](1)
        flat = Call(*self.rng.choice(list(FLATTENINGS.items())))
        way = self.rng.choice(("mean", "pool", "flatten", "flatten", "bent"))
        row = [Piece(Call(f"x.mean({axes})", lambda x: x.mean(axes)))] if way == "mean" else [Piece(flat)]
        if way == "pool":
            row.insert(0, Piece(pooled))
        value = run(row, x)
        if way == "bent":
            row += self.bend(value)
        elif self.chance(0.3):
            row.append(self.norm(value))
        if way in ("flatten", "bent"):
            row += [self.nothing(value), self.dense(value)]
        return row

    # the wild

    def trap(self, x: Tensor) -> Piece:
        among = TRAPS | IMAGE_TRAPS if x.ndim > 2 else TRAPS
        return Piece(Call(*self.rng.choice([item for item in among.items() if item[0] not in SKIPPED])))

    def odd(self, x: Tensor) -> Piece:
        return Piece(self.rng.choice(odd_layers(x.shape, lambda: self.square(x))))


def _flattened(x: Tensor, y: Tensor) -> bool:
    """Whether many positions became features: nothing reads them at once yet."""
    return y.ndim == 2 < x.ndim and y.numel() == x.numel() and math.prod(x.shape[2:]) > 1


def main(arguments: Sequence[str]) -> int:
    """Checks so many networks; 0 if all of them are as they should be."""
    from linl.tests import test_folding_random as checks

    return checks.campaign(int(arguments[0]) if arguments else 100, *map(int, arguments[1:2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
