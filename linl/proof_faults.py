"""Errata of bounds, solvers, stable units and regions, and of an attack."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.bounds import bound
from linl.boxes import Box
from linl.compression import compress
from linl.faults import EQUAL, Figures, erratum, mlp, off
from linl.losses import pgd, single_gradient
from linl.milp import Model, solver_with
from linl.ranges import Range
from linl.reading import program
from linl.regions import count
from linl.stability import analyse
from linl.weights import load_weights_


@erratum(
    "bounds without rounding (auto_LiRPA, ERAN)",
    "trap",
    "units called inactive that aren't",
    "their arithmetic; ERAN issue 105",
)
def rounded_bounds() -> Figures:
    """Bounds are computed in floating point as if it were exact. x₁ + x₂ − x₃ with x₁ = x₃ = 2²⁴ and x₂ from 0 to 1
    is at most 1; in float32 the sum is 0, and the unit is called inactive. linl adds what rounding can have cost."""
    net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)).eval()
    net[0].weight.data = torch.tensor([[1.0, 1.0, -1.0]])
    low, high = torch.tensor([2.0**24, 0, 2.0**24]), torch.tensor([2.0**24, 1, 2.0**24])
    w = net[0].weight
    upper = w.clamp(min=0) @ high + w.clamp(max=0) @ low
    ours = bound(net, Box(low, high), "interval", torch.float32).inputs[0].upper
    return int((upper <= 0).sum()), int((ours <= 0).sum()), 0


@erratum(
    "CROWN alone (auto_LiRPA)",
    "trap",
    "of 64 outputs, those with wider bounds than plain intervals",
    "auto_LiRPA 0.7.1",
)
def wider_than_intervals() -> Figures:
    """CROWN is taken for tighter than intervals. It can be wider: a straight line below a ReLU goes below 0, which the
    ReLU never does. Where units read different inputs, as after a strong penalty on weights, intervals are exact and
    CROWN alone isn't. linl's bounds are the intersection of both."""
    net, box = mlp(16, 16, 64), Box(-torch.ones(16), torch.ones(16))
    nn.init.eye_(net[0].weight)
    nn.init.constant_(net[0].bias, 0.1)
    w2, b2 = net[2].weight, net[2].bias
    low, high = -0.9, 1.1  # what every unit reads
    steep, flat = high / (high - low), 1.0  # slopes of the chord above a ReLU and, by area, of the line below it

    def upper(w: Tensor, b: Tensor) -> Tensor:
        slope, lift = torch.where(w > 0, steep, flat), torch.where(w > 0, -steep * low, 0)
        return (w * slope).abs().sum(1) + (w * (0.1 * slope + lift)).sum(1) + b

    width = upper(w2, b2) + upper(-w2, -b2)
    narrow = high * w2.abs().sum(1)
    ours = bound(net, box, "crown").output
    return int((width > narrow + 1e-9).sum()), int((ours.upper - ours.lower > narrow + 1e-9).sum()), 0


@erratum(
    "HiGHS as it is",
    "trap",
    "false proofs that 10⁻¹⁰·x − ½ stays below 0, x up to 10¹⁰",
    "highspy 1.15, called: small_matrix_value",
)
def small_numbers_dropped() -> Figures:
    """The solver takes numbers below 1e-9 in a model for nothing. A weight of 1e-10 on an input of 1e10 is gone, and
    what it decides is "proved". linl hands over shares of ranges, and rows over their largest number."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU()).double().eval()
    for layer, weight, bias in ((net[0], 1.0, -1.0), (net[2], 1e-10, -0.5)):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    import highspy

    solver = solver_with(threads=1)
    solver.addVar(0.0, 1e10)  # x
    solver.addRow(0.5, highspy.kHighsInf, 1, np.array([0], dtype=np.int32), np.array([1e-10]))  # 1e-10 x ≥ ½
    solver.run()
    theirs = solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible
    read, box = program(net, (1,)), Box(torch.zeros(1), torch.full((1,), 1e10))
    known = dict(enumerate(bound(read, box, "interval").inputs))
    answer = Model(read, Range(box.lower, box.upper), known, 1).cross(0, 0.0, True, known[1], 10)
    return int(theirs), int(answer.verdict == "impossible"), 0


@erratum(
    "HiGHS as it is",
    "trap",
    "units called never on, of 14 that can be on",
    "highspy 1.15, called: threads; HiGHS.jl issue 130",
)
def threads_changed() -> Figures:
    """Once a process has asked HiGHS with one number of threads, it gets no answer with another number, not even from a
    new solver: the run fails, and the model's status is "Not Set". Its figures are there all the same, the bound a 0.
    Whoever takes a bound of at most 0 for a proof and doesn't look at the status has "proved" that each unit is never
    on. For linl the status "Infeasible" alone is a proof; where it is "Not Set" linl ends the old threads and asks
    again."""
    import highspy

    net = mlp(6, 14, 3)
    nn.init.constant_(net[0].bias, 0.1)  # at the middle, x = 0, all units are on
    weights, columns = net[0].weight.detach().numpy(), np.arange(6, dtype=np.int32)

    def most(unit: int, threads: int) -> float:
        """Upper bound of what a unit reads at the corners, of −1 and 1: x = 2z − 1, z of 0 and 1."""
        solver, row = solver_with(threads=threads), weights[unit]
        for column in columns:
            solver.addVar(0.0, 1.0)
            solver.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        solver.changeColsCost(6, columns, -2 * row)
        solver.changeObjectiveOffset(row.sum() - 0.1)
        solver.run()
        return -solver.getInfo().mip_dual_bound

    highspy.Highs.resetGlobalScheduler(True)
    assert abs(most(0, threads=2) - 0.1 - np.abs(weights[0]).sum()) < EQUAL
    theirs = sum(most(unit, threads=1) <= 0 for unit in range(14))
    read, box = program(net, (6,)), Box(-torch.ones(6), torch.ones(6))
    known = dict(enumerate(bound(read, box, "interval").inputs))
    model = Model(read, Range(box.lower, box.upper), known, 0)
    verdicts = [model.cross(unit, 0.0, True, known[0], 10).verdict for unit in range(14)]
    assert verdicts == ["point"] * 14, "asked again, and answered"
    return theirs, verdicts.count("impossible"), 0


@erratum(
    "any rule by data",
    "trap",
    "units called stable that aren't",
    "arithmetic; compression by activation rates alone",
)
def stable_on_data() -> Figures:
    """Units that never switch on the images seen are taken for units that can't. On all inputs allowed many of them
    do; the network with them taken out is another. (As an approximation, and said to be one, that is no mistake.)
    linl's claims come with proofs, and the others with a point that switches the unit."""
    net, box = mlp(6, 24, 4), Box(torch.zeros(6), torch.ones(6))
    seen = net[0](0.5 + 0.05 * torch.randn(200, 6, dtype=torch.float64)) > 0
    data = seen.all(0) | ~seen.any(0)
    proved = torch.tensor((analyse(net, box).table["state"] != "unstable").to_numpy())
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    signs = net[0](corners) > 0  # of an affine function on a box the corners decide
    stable = signs.all(0) | ~signs.any(0)
    return int((data & ~stable).sum()), int((proved & ~stable).sum()), 0


@erratum(
    "ExactCompression (yuxwind)",
    "gap",
    "hidden layers left of one that is always active",
    "prune_network.py against Algorithm 1",
)
def layer_kept() -> Figures:
    """Algorithm 1 folds a layer whose units are all stable into the next one. The published code only takes out
    inactive units and those whose weights depend on others': a layer of always active ones stays. (Before that it
    stops in a debugger that was left in.)"""
    net, box = mlp(6, 4, 3), Box(torch.zeros(6), torch.ones(6))
    nn.init.constant_(net[0].bias, 10.0)
    state = analyse(net, box)
    active = net[0].weight[state.codes[0].flatten() == 1]
    left = int(torch.linalg.matrix_rank(active))  # all four: they are independent
    small, x = compress(net, state), box.sample(50)
    assert off(net(x), small(x)) < EQUAL
    return int(left > 0), sum(isinstance(m, nn.Linear) for m in small.modules()) - 1, 0


@erratum(
    "ExactCompression (yuxwind)",
    "fault",
    "weights and biases read of the network to compress",
    "get_activation_patterns.py; numpy, called",
)
def numbers_not_read() -> Figures:
    """Networks go to the solver as text, and each line becomes numbers by numpy.float. numpy took that name away in
    1.24, of 2022: the first line of weights stops the script. Here networks are torch's, and files of weights are read
    by what wrote them."""
    net = mlp(6, 4, 3)
    lines = [",".join(map(str, row)) for p in net.parameters() for row in p.detach().view(len(p), -1).tolist()]
    try:
        theirs = sum(np.array(line.split(",")).astype(getattr(np, "float")).size for line in lines)  # noqa: B009
    except AttributeError:
        theirs = 0
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), Path(folder) / "weights.pt")
        load_weights_(read := mlp(6, 4, 3), Path(folder) / "weights.pt")
    same = zip(net.parameters(), read.parameters(), strict=True)
    return theirs, sum(int((a == b).sum()) for a, b in same), 6 * 4 + 4 + 4 * 3 + 3


@erratum(
    "ExactCompression (yuxwind), counting",
    "fault",
    "linear regions of ReLU(x), ReLU(−x) on [−1, 1]",
    "get_activation_patterns.py",
)
def half_a_region() -> Figures:
    """A pattern counts if some slack f > 0 lies below every active unit's input; nothing is asked of inactive ones.
    So "both inactive" counts, although only x = 0 has it: no region but a point. An interior needs both sides."""
    import scipy.optimize

    weights, found = np.array([1.0, -1.0]), 0
    for pattern in itertools.product((True, False), repeat=2):
        on = np.array(pattern)
        rows = [[-w, float(active)] for w, active in zip(np.where(on, weights, -weights), on, strict=True)]
        best = scipy.optimize.linprog([0, -1], A_ub=rows, b_ub=[0, 0], bounds=[(-1, 1), (0, 1)])
        found += best.status == 0 and best.x[1] > 1e-9
    net = mlp(1, 2, 1)
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0], [-1.0]]).double(), torch.zeros(2).double()
    return found, count(net, Box(-torch.ones(1), torch.ones(1))).count, 2


class _Tent(nn.Module):
    """Two logits; the loss of class 0 is largest where x is 0.55."""

    def forward(self, x: Tensor) -> Tensor:
        margin = (x - 0.55).abs().flatten(1)
        return torch.cat([margin, torch.zeros_like(margin)], 1)


@erratum(
    "Kumar et al., Serra et al. (ExactCompression's trainer)",
    "fault",
    "loss reached from x = 0.5, ε = 0.15",
    "train_fcnn.py, pgd_attack",
    within=0.01,
)
def gradient_taken_once() -> Figures:
    """Adversarial training is called PGD with 200 steps; the gradient is never computed anew within them, so that it
    is one step of size ε. Where the loss turns on the way it ends beyond, here below where it started."""
    how = SimpleNamespace(eps=0.15, attack_step=0.01, attack_steps=60, loss="cross_entropy")
    x, label = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    limits = (torch.zeros(1), torch.ones(1), torch.ones(1))
    net = _Tent().eval()

    def loss(at: Tensor) -> float:
        return F.cross_entropy(net(at), label).item()

    once, again = single_gradient(net, x, label, how, limits)[1], pgd(net, x, label, how, limits)[0]
    return loss(once), loss(again), loss(torch.full_like(x, 0.55))
