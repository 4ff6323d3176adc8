"""Trees of linear programs: what they prove is true, wherever they stop and are gone on with, and nothing is lost."""

import math
from functools import cache

import numpy as np
import pytest
import torch

import linl
from linl import Box
from linl.branching import Branching, Leaves, check
from linl.crown import Pass
from linl.reading import program
from linl.reliability import Tree
from linl.tests.brute import dense_net, extremes
from linl.tests.walks import walked
from linl.triangles import Triangles, relaxed

EVER = math.inf


def asked(seed):
    """A walk up to a network's last ReLU's inputs, their number, and their exact ends; None for one ReLU layer."""
    net, inputs = dense_net(seed)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    read = program(net, box.shape)
    if len(read.bends) < 2:
        return None
    value = read.bends[-1].sources[0]
    return walked(net, box, value), value, extremes(net, -np.ones(inputs), np.ones(inputs))[-1]


DEEP = [seed for seed in range(30) if asked(seed)]


@pytest.mark.parametrize("seed", DEEP)
def test_a_few_parts_raise_what_is_known_of_a_unit_and_never_too_high(seed):
    walk, value, (least, most) = asked(seed)
    for sign, exact in ((1.0, least[0]), (-1.0, -most[0])):
        before = -math.inf
        for count in (1, 3, 9, 10_000):
            leaves, end = Branching(walk, value, 0, sign, EVER, lambda points: False).raised(count, EVER)
            scale = max(1.0, abs(exact))
            assert before - 1e-6 * scale <= end <= exact + 1e-7 * scale
            assert leaves.cover() and len(leaves) <= max(count, 1)
            assert check(walk, value, 0, sign, leaves) == end, "anyone's check says the same"
            before = end
        assert end == pytest.approx(exact, abs=1e-5 * scale), "until nothing is left to cut"


@cache
def hard():
    """The question, of all seeds', that needs the most parts, short of the exact value by a millionth."""
    found = []
    for seed in DEEP:
        walk, value, (least, _) = asked(seed)
        end = least[0] - 1e-6 * max(1.0, abs(least[0]))
        search = Branching(walk, value, 0, 1.0, end, lambda points: False)
        assert search.run(EVER) is not None
        found.append((search.domains, seed, end))
    return max(found)


def test_a_search_goes_on_from_where_it_stopped(monkeypatch):
    """Stopped after every second program, it solves as many as in one go, and has a proof in the end."""
    domains, seed, end = hard()
    assert domains >= 5, "or there is nothing to stop"
    walk, value, _ = asked(seed)
    solve, asks = Triangles.solve, []

    def late(self, fixed, seconds):
        asks.append(fixed)
        self.late = len(asks) % 3 == 0
        return None if self.late else solve(self, fixed, seconds)

    monkeypatch.setattr(Triangles, "solve", late)
    search = Branching(walk, value, 0, 1.0, end, lambda points: False)
    runs, proof = 0, None
    while proof is None and runs < 1000:
        runs, proof = runs + 1, search.run(EVER)
    assert proof is not None and check(walk, value, 0, 1.0, proof) >= end
    assert runs == 1 + len(asks) // 3 > 2 and search.domains <= 2 * domains


def test_a_part_without_an_answer_is_cut_on(monkeypatch):
    _, seed, end = hard()
    walk, value, _ = asked(seed)
    solve = Triangles.solve

    def unknown(self, fixed, seconds):
        return None if (np.asarray(fixed) >= 0).sum() == 1 else solve(self, fixed, seconds)

    monkeypatch.setattr(Triangles, "solve", unknown)
    proof = Branching(walk, value, 0, 1.0, end, lambda points: False).run(20.0)
    assert proof is not None and check(walk, value, 0, 1.0, proof) >= end


def test_several_questions_share_a_program():
    """Asked by turns, each has the answer that it has alone."""
    walk, value, (least, most) = asked(hard()[1])
    made = relaxed(walk, value)
    units = range(len(least))
    searches = [
        Branching(walk, value, unit, sign, exact - 1e-4, lambda points: False, lambda: made)
        for unit in units
        for sign, exact in ((1.0, least[unit]), (-1.0, -most[unit]))
    ]
    proofs = {}
    for _ in range(1000):
        for search in searches:
            if search not in proofs and (proof := search.run(1e-3)):
                proofs[search] = proof
    assert len(proofs) == len(searches)
    for search, proof in proofs.items():
        assert check(walk, value, search.unit, search.sign, proof) >= search.end


def test_a_part_that_nothing_is_found_for_is_no_proof(monkeypatch):
    """Where linl's own bound never agrees with the solver, all is cut, nothing is left to cut, and nothing proved."""
    _, seed, end = hard()
    walk, value, _ = asked(seed)
    monkeypatch.setattr(Branching, "_least", lambda self, leaves, seen=None: torch.full((len(leaves),), -1e9))
    monkeypatch.setattr(
        Branching, "_bound", lambda self, leaves, steps: (torch.tensor([-1e9]), leaves, torch.ones(1, 1))
    )
    search = Branching(walk, value, 0, 1.0, end, lambda points: False)
    assert search.run(EVER) is None and search.run(EVER) is None


def test_a_point_ends_the_search():
    _, seed, _ = hard()
    walk, value, (least, _) = asked(seed)
    seen = []

    def look(points):
        seen.extend(walk.program.run(points)[value].flatten(1)[:, 0].tolist())
        return min(seen) < least[0] + 1e-3

    assert not Tree(relaxed(walk, value), 0, 1.0, least[0] + 1e-3, look).grow(EVER)
    assert min(seen) < least[0] + 1e-3


def test_ranges_that_rest_on_parts_are_checked_again(monkeypatch):
    """Units that aren't stable keep the parts their ranges come from; what isn't the whole is no part of a proof."""
    monkeypatch.setattr(linl.settling, "FEW", 0)
    walks = []
    monkeypatch.setattr(linl.certificates, "Pass", lambda *given: walks.append(Pass(*given)) or walks[-1])
    kept = 0
    for seed in range(40):
        net, inputs = dense_net(seed)
        box = Box(-torch.ones(inputs), torch.ones(inputs))
        state = linl.analyse(net, box)
        mine = [key for key in state.trees if state.codes[key[0]][key[1]] < 0]
        kept += len(mine)
        if not mine:
            continue
        exact = extremes(net, -np.ones(inputs), np.ones(inputs))
        for site, unit, _ in mine:
            least, most = (end[unit] for end in exact[site])
            assert state.lower[site][unit] <= least + 1e-7 and most - 1e-7 <= state.upper[site][unit]
        assert linl.verify_stability(net, state).complete
        walk = walks[-1]  # the verifier's
        for op, (least, most) in zip(walk.program.bends, exact, strict=True):
            known, near = walk.ranges[op.sources[0]], 1e-8 * np.maximum(1, np.abs([least, most]))
            assert (known.lower[0].numpy() <= least + near[0]).all() and (
                most - near[1] <= known.upper[0].numpy()
            ).all()
        for key in mine:
            state.trees[key] = state.trees[key][:-1]  # a part is missing: as good as none
        forged = linl.verify_stability(net, state).table
        state.trees = {key: leaves for key, leaves in state.trees.items() if key not in mine}
        assert forged.equals(linl.verify_stability(net, state).table)
    assert kept > 5


@pytest.mark.parametrize("key", [(1, 0, 0), (1, 0, 2), (1, 99, 1), (7, 0, -1)])
def test_proofs_of_what_is_no_side_of_a_unit_are_refused(key):
    net, inputs = dense_net(DEEP[0])
    state = linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    state.trees[key] = next(iter(state.trees.values()), Leaves({}, {}, {}))
    with pytest.raises(ValueError, match=r"a proof for activation \d, unit \d+, side"):
        linl.verify_stability(net, state)


def test_parts_of_hundreds_of_cuts_one_after_the_other_are_a_whole():
    depth = 1500
    fixed = torch.full((depth + 1, depth), -1, dtype=torch.int8)
    for part in range(depth):  # cut at unit 0, then 1, …: always the second half again
        fixed[part, part], fixed[part + 1 :, part] = 0, 1
    assert Leaves({1: fixed}, {}, {}).cover()
    assert not Leaves({1: fixed[:-1]}, {}, {}).cover() and not Leaves({1: fixed[1:]}, {}, {}).cover()
