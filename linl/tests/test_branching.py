"""Branch and bound: parts of a domain are bounded soundly whatever their slopes and multipliers, and cover it."""

import math

import numpy as np
import pytest
import torch

import linl
from linl import Box
from linl.branching import Branching, Leaves, check
from linl.reading import program
from linl.tests.brute import extremes, small_net
from linl.tests.small_nets import ACTIVATIONS, NETS, make
from linl.tests.walks import walked


def _with_shape(seed):
    net, inputs = small_net(seed)
    return net, (inputs,)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_parts_are_bounded_whatever_their_slopes_and_multipliers(kind, activation):
    net, shape = make(kind, activation)
    box = Box.around(4 * torch.rand(*shape), 0.5)
    walk = walked(net, box)
    read, output = walk.program, walk.program.output
    points = torch.cat([box.sample(4000), box.corners(4000)])
    values = read.run(points)
    for attempt in range(30):
        torch.manual_seed(attempt)
        fixed, share, pull = {}, {}, {}
        inside = torch.ones(len(points), dtype=torch.bool)
        for op in read.bends:
            known, above = walk.ranges[op.sources[0]], values[op.sources[0]] >= op.pieces.bends[0]
            open_ = op.pieces.piece(known.lower, known.upper)[0] < 0
            chosen = open_ & (torch.rand(open_.shape) < 0.1) & (len(op.pieces.bends) == 1)
            fixed[op.target] = torch.where(chosen, above[attempt].int(), -1).to(torch.int8)[None]
            share[op.target] = torch.rand(1, *open_.shape)
            pull[op.target] = torch.randn(1, *open_.shape) * 10 ** (3 * torch.rand(1).item() - 2)  # of either end
            inside &= (~chosen | (above == above[attempt])).flatten(1).all(1)
        assert inside[attempt]
        walk.choose(share, fixed, pull)
        with torch.no_grad():
            for sign in (1.0, -1.0):
                bound, _ = walk.least(output, torch.tensor([0]), torch.tensor([sign]))
                assert bound.item() <= (sign * values[output].flatten(1)[inside, 0]).min(), (attempt, sign)
        walk.choose({})


DEEP = [seed for seed in range(24) if len(program(*_with_shape(seed)).bends) > 1][:10]


@pytest.mark.parametrize("seed", DEEP)
def test_a_domain_is_cut_until_the_bound_is_exact(seed):
    """Asked for the exact least value less a little, the search proves it; for a little more, it finds a point."""
    net, inputs = small_net(seed)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    read = program(net, box.shape)
    value, least = read.bends[-1].sources[0], extremes(net, -np.ones(inputs), np.ones(inputs))[-1][0][0]
    walk, near = walked(net, box, value), 1e-4 * max(1.0, abs(least))
    proof = Branching(walk, value, 0, 1.0, least - near, lambda points: False).run(math.inf)
    assert proof is not None and proof.cover()
    assert least - near <= check(walk, value, 0, 1.0, proof) <= least + 1e-7
    if len(proof) > 1:
        assert check(walk, value, 0, 1.0, proof[1:]) == -torch.inf, "a part is missing"
    seen = []

    def found(points):
        seen.extend(read.run(points)[value].flatten(1)[:, 0].tolist())
        return bool(seen) and min(seen) < least + near

    assert Branching(walk, value, 0, 1.0, least + near, found).run(20.0) is None


def test_forged_parts_prove_nothing():
    net, inputs = small_net(7)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    state = linl.analyse(net, box)
    (site, unit, sign), leaves = next(iter(state.trees.items()))
    read = program(net, box.shape)
    value = read.bends[site].sources[0]
    walk = walked(net, box, value)
    seen = (sign * read.run(box.sample(5000))[value].flatten(1)[:, unit]).min().item()
    right = check(walk, value, unit, float(sign), leaves)
    assert 0 <= right <= seen
    for forge in (lambda t: -100 * torch.ones_like(t), lambda t: torch.full_like(t, torch.nan), lambda t: 1e6 * t):
        forged = Leaves(leaves.fixed, leaves.share, {t: forge(v) for t, v in leaves.pull.items()})
        assert check(walk, value, unit, float(sign), forged) <= seen
    narrow = Leaves(*({t: v[:, :-1] for t, v in part.items()} for part in leaves.parts))
    assert check(walk, value, unit, float(sign), narrow) == -torch.inf


def test_what_covers_a_domain():
    def parts(*rows):
        fixed = torch.tensor(rows, dtype=torch.int8)
        return Leaves({1: fixed}, {1: fixed.float()}, {1: fixed.float()})

    assert parts([-1, -1, -1]).cover()
    assert parts([0, -1, -1], [1, -1, 0], [1, -1, 1]).cover()
    assert not parts([0, -1, -1], [1, -1, 0]).cover()
    assert not parts([0, -1, -1], [-1, 1, -1]).cover()
    assert not parts([0, 0, -1], [1, 1, -1], [1, 0, -1]).cover()


def test_branching_and_the_solver_agree(monkeypatch):
    """Units that linear bounds leave open, settled by either alone."""
    proofs = []
    for seed in (7, 31, 41, 42):
        net, inputs = small_net(seed)
        box = Box(-torch.ones(inputs), torch.ones(inputs))
        branched = linl.analyse(net, box)
        with monkeypatch.context() as patch:
            patch.setattr(linl.settling.Branching, "run", lambda self, seconds: None)
            solved = linl.analyse(net, box)
        assert branched.table["state"].equals(solved.table["state"])
        proofs += [*branched.table["proof"], *solved.table["proof"]]
        assert linl.verify_stability(net, branched).complete, "nothing rests on a solver"
    assert {"branching", "solver"} <= set(proofs)
