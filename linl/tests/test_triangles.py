"""The linear program over triangles: its optimum is scipy's, and CROWN's bound with what is read off it is as high."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import linl
from linl import Box
from linl.branching import Branching, Leaves, check
from linl.crown import Pass
from linl.reading import program
from linl.tests.brute import dense_net, extremes
from linl.tests.walks import walked
from linl.triangles import Triangles, relaxed

SEEDS = range(30)


def asked(seed, unit=0):
    """A walk up to the last ReLU's input of a random network of at least two ReLU layers; None where it has fewer."""
    net, inputs = dense_net(seed)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    read = program(net, box.shape)
    value = read.bends[-1].sources[0]
    return (net, inputs, walked(net, box, value), value) if len(read.bends) > 1 else None


DEEP = [seed for seed in SEEDS if asked(seed)]


def as_textbooks_write_it(net, walk, unit, fixed):
    """min of a unit over the box with a triangle for each open ReLU; scipy, columns x and then h of each layer."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linears[:-1]]
    *hidden, last = layers
    inputs, sizes = hidden[0][0].shape[1], [len(b) for _, b in hidden]
    width, rows, right, ends = inputs + sum(sizes), [], [], [(-1.0, 1.0)] * inputs
    read, row_of, unit_number = 0, inputs, 0
    for (weight, bias), op in zip(hidden, walk.program.bends, strict=False):
        known = walk.ranges[op.sources[0]]
        for i, (low, high) in enumerate(zip(known.lower[0].tolist(), known.upper[0].tolist(), strict=True)):
            a, h = np.zeros(width), np.zeros(width)
            a[read : read + weight.shape[1]], h[row_of + i] = weight[i], 1.0
            piece = int(fixed[unit_number]) if low < 0 < high else int(low >= 0)
            unit_number += 1
            if piece < 0:
                slope = high / (high - low)
                rows += [a - h, h - slope * a]  # h ≥ a + b; h ≤ slope·(a + b − low)
                right += [-bias[i], slope * (bias[i] - low)]
            elif piece == 1:
                rows += [a - h, h - a, -a]
                right += [-bias[i], bias[i], bias[i]]
            else:
                rows += [h, a]
                right += [0.0, -bias[i]]
            ends.append((0.0, None) if piece < 1 else (None, None))
        read, row_of = row_of, row_of + len(bias)
    cost = np.zeros(width)
    cost[read:] = last[0][unit]
    found = linprog(cost, np.array(rows), np.array(right), bounds=ends, method="highs")
    return found.fun + last[1][unit] if found.status == 0 else math.inf


def bounded(walk, value, fixed, solved):
    """linl's own bound with what was read off the program."""
    shaped, start = {}, 0
    for target, share in solved.share.items():
        shaped[target] = fixed[start : start + share.numel()].view(1, *share.shape)
        start += share.numel()
    parts = Leaves(shaped, *({t: v[None] for t, v in part.items()} for part in (solved.share, solved.pull)))
    walk.choose(parts.share, parts.fixed, parts.pull)
    with torch.no_grad():
        bound, _ = walk.least(value, torch.tensor([0]), torch.tensor([1.0]))
    walk.choose({})
    return bound.item()


def some_parts(made, count=6):
    """No assumption, and then some by chance, of open units, of which a few hold nowhere."""
    open_, generator = torch.from_numpy(made.open), torch.Generator().manual_seed(len(made.open))
    yield torch.full((len(open_),), -1, dtype=torch.int8)
    for _ in range(count):
        drawn = torch.randint(-1, 2, (len(open_),), generator=generator, dtype=torch.int8)
        yield torch.where(open_, drawn, -1).to(torch.int8)


def solved_parts(walk, value):
    """Parts, and what the program says of each."""
    made = relaxed(walk, value).ask(0, 1.0)
    for fixed in some_parts(made):
        yield fixed, made.solve(fixed, 10.0)


@pytest.mark.parametrize("seed", DEEP)
def test_optimum_and_bound_are_those_of_the_textbook(seed):
    net, _, walk, value = asked(seed)
    for fixed, solved in solved_parts(walk, value):
        right = as_textbooks_write_it(net, walk, 0, fixed)
        assert solved is not None
        if math.isinf(right):
            assert solved.point is None
            assert bounded(walk, value, fixed, solved) > 10, "an empty part is bounded as high as one likes"
        else:
            assert solved.point is not None and walk.box.lower.shape[1:] == solved.point.shape
            scale = max(1.0, abs(right))
            assert solved.least == pytest.approx(right, abs=1e-6 * scale)
            assert bounded(walk, value, fixed, solved) <= right + 1e-6 * scale


@pytest.mark.parametrize("seed", DEEP)
def test_the_bound_is_as_high_as_the_optimum(seed):
    _, _, walk, value = asked(seed)
    for fixed, solved in solved_parts(walk, value):
        if solved.point is not None:
            scale = max(1.0, abs(solved.least))
            assert bounded(walk, value, fixed, solved) == pytest.approx(solved.least, abs=1e-5 * scale)


def test_some_parts_are_empty_and_some_are_not():
    parts = [solved for _, _, walk, value in map(asked, DEEP) for _, solved in solved_parts(walk, value)]
    kinds = {solved.point is None for solved in parts}
    assert kinds == {True, False}


@pytest.mark.parametrize("seed", DEEP)
def test_without_a_gap_the_point_is_the_networks_own(seed):
    net, _, walk, value = asked(seed)
    for fixed, solved in solved_parts(walk, value):
        if solved.point is not None and not solved.apart.any():
            here = walk.program.run(solved.point[None])[value].flatten()[0].item()
            assert here == pytest.approx(as_textbooks_write_it(net, walk, 0, fixed), abs=1e-5)
        cut = solved.apart.any(0)
        assert (fixed[cut] < 0).all(), "what is assumed needs no cut"


@pytest.mark.parametrize("seed", DEEP)
def test_near_ties_need_few_parts(seed, monkeypatch):
    """A question short of the exact least value by a ten-thousandth: proved, and never with many more parts."""
    net, inputs, walk, value = asked(seed)
    least = extremes(net, -np.ones(inputs), np.ones(inputs))[-1][0][0]
    end = least - 1e-4 * max(1.0, abs(least))
    search = Branching(walk, value, 0, 1.0, end, lambda points: False)
    proof = search.run(math.inf)
    assert proof is not None and check(walk, value, 0, 1.0, proof) >= end
    monkeypatch.setattr("linl.branching.relaxed", lambda *asked: None)
    without = Branching(walk, value, 0, 1.0, end, lambda points: False)
    assert without.run(20.0) is None or search.domains <= 2 * without.domains


def test_the_program_proves_in_a_few_parts_what_ascent_does_not_in_hundreds(monkeypatch):
    torch.manual_seed(0)
    data = linl.data.load("digits", limit=400, normalize="none")
    training = linl.train.recipe("stability-digits", 15, l1=0.01)
    net = linl.models.create("mlp", 10, data.input_size, hidden=(12, 12), norm=False, dropout=0.0, init=training.init)
    linl.train.fit(net, data, training, device="cpu", precision="fp32", verbose=False)
    state = linl.analyse(net.eval(), Box.unit(data.input_size))
    assert state.decided and linl.verify_stability(net, state).complete, "nothing rests on a solver"
    counted = []
    search = Branching._search
    monkeypatch.setattr(Branching, "_search", lambda self: (search(self), counted.append(self.domains))[0])
    linl.analyse(net, Box.unit(data.input_size))
    with_program = max(counted, default=0)
    counted.clear()
    monkeypatch.setattr("linl.settling.relaxed", lambda *asked: None)
    linl.analyse(net, Box.unit(data.input_size), unit_time_limit=2.0)
    assert 0 < 10 * with_program < max(counted)


def test_other_networks_have_no_such_program():
    walk = Pass(program(nn.Sequential(nn.Linear(2, 3), nn.ReLU6(), nn.Linear(3, 1)).eval(), (2,)), Box.unit((2,)))
    assert relaxed(walk, walk.program.output) is None
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)).eval()
    walk = Pass(program(conv, (1, 4, 4)), Box.unit((1, 4, 4)))
    assert relaxed(walk, walk.program.output) is None


def test_a_network_of_stable_units_alone_is_one_program():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0], [1.0]]).double(), torch.tensor([2.0, -2.0]).double()
    net[2].weight.data, net[2].bias.data = torch.tensor([[3.0, 5.0]]).double(), torch.tensor([0.5]).double()
    walk = Pass(program(net, (1,)), Box(-torch.ones(1), torch.ones(1)))
    with torch.no_grad():
        for op in walk.program.ops:
            walk.step(op)
    made = relaxed(walk, walk.program.bends[1].sources[0]).ask(0, 1.0)
    assert isinstance(made, Triangles) and not made.open.any()
    solved = made.solve(torch.full((2,), -1, dtype=torch.int8), 5.0)
    assert solved.point.item() == -1 and not solved.apart.any()  # 3·(x + 2) + ½ at x = −1
