"""How the papers prove a ReLU stable, re-enacted with HiGHS: a program a unit, and one program for all units.

Both ask a mixed-integer solver, of the whole box: each ReLU h = max(0, a) before the one in question is a = h − χ with
h ≤ M·z, χ ≤ μ·(1 − z) and a binary z, M and μ from intervals, or from what was bounded before. `program_a_unit` is the
baseline (Serra et al., CPAIOR 2020, arXiv 2001.00218): layer by layer, for each unit its largest and its smallest
input, stopped as soon as the sign is known. `one_program` is their faster way (NeurIPS 2021, arXiv 2102.07804):
training images show most units in both states; then one program looks for an input that shows as many of the missing
states as can be, until there is none.
They stand here to be compared with `linl.analyse`, which is surer (the solver's tolerances count for nothing there)
and takes any network. What differs from the published code: HiGHS for Gurobi; as HiGHS takes no lazy constraints, the
one program is put again without the states that an input has shown, rather than gone on with; and a state counts as
shown only beyond a margin, since the solver likes inputs at which a ReLU's input is zero, and calls those either. In
the end the program is put with the margin on the other side: a unit that comes so near is called neither.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from linl.bounds import bound
from linl.boxes import Box
from linl.milp import has_point, linear_program, run, solver_with
from linl.program import Dense, Program, Reshape
from linl.ranges import Range
from linl.reading import program
from linl.witnesses import Witnesses

A_UNIT, ONE = "a program a unit (2020)", "one program (2021)"
"""What the two ways are called in tables."""
SIGN = 1e-5
"""Inputs of a ReLU nearer to zero than that are left undecided: the solver's own tolerance is 1e-6."""


@dataclass
class Settled:
    """What a published way found.

    Attributes:
        states: "inactive", "active", "unstable" or "undecided", a unit each, as in `linl.analyse`'s table.
        programs: how often the solver was asked.
        asked: states (a unit inactive, a unit active) that were left for it, after intervals and images.
        seconds: spent.
    """

    states: list[str]
    programs: int
    asked: int
    seconds: float


def program_a_unit(
    net: nn.Module, box: Box, *, unit_time_limit: float = 60.0, time_limit: float | None = None
) -> Settled:
    """The state of every ReLU, by two programs a unit at most, layer by layer (Serra et al., CPAIOR 2020).

    Args:
        net: linear layers with ReLUs between, in eval mode.
        box: the domain, one box.
        unit_time_limit: seconds for one program.
        time_limit: seconds for all; None for no limit.

    Raises:
        ValueError: another kind of network, several boxes, a limit that isn't above 0.
    """
    clock, layers = _Clock(time_limit, unit_time_limit), _Layers(net, box)
    states: list[str] = []
    programs = asked = 0
    for site, (weight, bias) in enumerate(layers.dense):
        lower, upper = layers.ranges[site]
        found = layers.by_intervals(site)
        open_units = np.flatnonzero(found == "undecided")
        asked += 2 * len(open_units)
        model = _Model(layers, site) if len(open_units) else None
        for unit in open_units:
            for sign, never in ((1, "inactive"), (-1, "active")):
                if not clock.left:
                    break
                programs += 1
                answer = model.most(sign * weight[unit], sign * bias[unit], clock.left)
                if sign > 0:
                    upper[unit] = min(upper[unit], answer.most + SIGN)
                else:
                    lower[unit] = max(lower[unit], -answer.most - SIGN)
                if not answer.sign:
                    found[unit] = "undecided" if answer.sign is None else never
                    break
                found[unit] = "unstable" if sign < 0 else "undecided"
        states += found.tolist()
    return Settled(states, programs, asked, clock.spent)


def one_program(net: nn.Module, box: Box, *, images: Tensor | None = None, time_limit: float | None = None) -> Settled:
    """The state of every ReLU, by a program over all of them (Serra et al., NeurIPS 2021, section 4).

    Args:
        net, box, time_limit: as in `program_a_unit`.
        images: (n, *shape), inputs that show units in both states; those outside the box are moved to its border.

    Raises:
        ValueError: as `program_a_unit`; images of another shape.
    """
    clock, layers = _Clock(time_limit), _Layers(net, box)
    seen = Witnesses(layers.program, box)
    if images is not None:
        if images.shape[1:] != box.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}, the box has {tuple(box.shape)}")
        seen.look(box.clip(images), "images")
    by_intervals = np.concatenate([layers.by_intervals(site) for site in range(len(layers.dense))])
    candidates = _Candidates(by_intervals)
    candidates.show(seen)
    asked, programs = candidates.count, 0
    if asked:
        model = _Model(layers, len(layers.dense))
        model.add_states(candidates.missing)
    while candidates.count and clock.left:
        programs += 1
        answer = model.shown(candidates.missing, clock.left)
        if answer is None and (model.near or not model.proved):
            break
        if answer is None:  # no input shows any of them; does one come near?
            model.look_near(candidates.missing)
            continue
        point, claimed = answer
        before = candidates.count
        seen.look(box.clip(torch.from_numpy(point).view(1, *box.shape)), "solver")
        candidates.show(seen)
        if candidates.count == before:  # by the solver's word alone, or by less than its tolerance
            candidates.give_up(claimed)
    proved = not candidates.count or (programs > 0 and model.near and model.proved)
    return Settled(candidates.states(proved), programs, asked, clock.spent)


# --- the network and what intervals say ------------------------------------------------------------


class _Clock:
    """Seconds spent and left."""

    def __init__(self, limit: float | None, each: float = float("inf")) -> None:
        for name, seconds in (("time_limit", limit), ("unit_time_limit", each)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} = {seconds}: seconds above 0, or None")
        self.began, self.limit, self.each = time.perf_counter(), limit or float("inf"), each

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        """For the next program; 0 where time is up."""
        return max(0.0, min(self.each, self.limit - self.spent))


class _Layers:
    """A chain of dense layers with ReLUs between, in float64.

    Attributes:
        dense: weight (units, inputs) and bias (units,) before each ReLU.
        ranges: [lower, upper], (units,) each, of each ReLU's input, from intervals.
    """

    def __init__(self, net: nn.Module, box: Box) -> None:
        if len(box) != 1:
            raise ValueError(f"{len(box)} boxes: a unit's state is of one box; take box[0], or the hull of them all")
        self.program, self.box = program(net, box.shape), box
        self.dense = _dense(self.program)
        inputs: list[Range] = bound(self.program, box, "interval").inputs
        self.ranges = [[t.flatten().numpy().copy() for t in (r.lower, r.upper)] for r in inputs]

    def by_intervals(self, site: int) -> np.ndarray:
        """States that the ranges settle; exact for the first layer, where each unit alone takes both ends."""
        lower, upper = self.ranges[site]
        open_ = "unstable" if site == 0 else "undecided"
        return np.where(upper <= 0, "inactive", np.where(lower >= 0, "active", open_)).astype(object)


def _dense(read: Program) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases before each ReLU.

    Raises:
        ValueError: anything but linear layers and ReLUs, one after the other.
    """
    ops = [op for op in read.ops if not isinstance(op, Reshape)]
    kinds = [type(op).__name__ for op in ops]
    chain = ["Dense", "Bend"] * len(read.bends) + ["Dense"]
    if not read.bends or kinds != chain or any(len(op.sources) > 1 for op in ops):
        raise ValueError("the published programs are for linear layers with a ReLU after each but the last")
    for op in read.bends:
        if op.pieces.clamp != (0.0, None):
            raise ValueError(f"{op.name} is no ReLU: the published programs know none but those")
    return [op.arrays for op in ops[:-1] if isinstance(op, Dense)]


class _Candidates:
    """States that no input has shown yet.

    Attributes:
        missing: (2, units) bool: units never seen active (the paper's P), units never seen inactive (its Q).
    """

    def __init__(self, states: np.ndarray) -> None:
        self.given = states
        self.missing = np.stack([states == "undecided"] * 2)
        self.ties = np.zeros(len(states), dtype=bool)

    @property
    def count(self) -> int:
        return int(self.missing.sum())

    def show(self, seen: Witnesses) -> None:
        """Takes out what the witnesses have seen."""
        self.missing &= np.stack([torch.cat(side).numpy() < 0 for side in (seen.high, seen.low)])

    def give_up(self, claimed: np.ndarray) -> None:
        """Takes out states (2, units) that the solver claims to see and arithmetic doesn't: nobody can tell."""
        self.ties |= (self.missing & claimed).any(0)
        self.missing &= ~claimed

    def states(self, proved: bool) -> list[str]:
        """Every unit's; what is missing is stable if that is proved."""
        found = np.where(self.given == "undecided", "unstable", self.given).astype(object)
        for missing, state in zip(self.missing, ("inactive", "active"), strict=True):
            found[missing] = state if proved else "undecided"
        found[self.ties | self.missing.all(0)] = "undecided"
        return found.tolist()


# --- the programs ----------------------------------------------------------------------------------


@dataclass
class _Answer:
    """Whether the sign was reached (None: not known), and the bound on it that the solver had by then."""

    sign: bool | None
    most: float


class _Model:
    """The first `sites` layers with their ReLUs, in HiGHS; columns: the inputs, then h, χ and z of each layer."""

    def __init__(self, layers: _Layers, sites: int) -> None:
        from scipy.sparse import csr_matrix, diags, hstack, identity, vstack

        inputs = layers.box.lower[0].numel()
        sizes = [len(bias) for _, bias in layers.dense[:sites]]
        starts = np.cumsum([inputs, *(3 * n for n in sizes)])
        self.width, self.inputs = int(starts[-1]), inputs
        self.last = starts[-2] + np.arange(sizes[-1])
        at = [[s + k * n + np.arange(n) for s, n in zip(starts, sizes, strict=False)] for k in range(3)]
        *self.parts, self.binaries = (np.concatenate(columns) for columns in at)
        low, high = (t.flatten().double().numpy() for t in (layers.box.lower[0], layers.box.upper[0]))
        columns, rows, sides = [(low, high)], [], []
        for site, (weight, bias) in enumerate(layers.dense[:sites]):
            lower, upper, n = *layers.ranges[site], sizes[site]
            most, least = np.maximum(upper, 0), np.maximum(-lower, 0)
            on, off = lower >= 0, upper <= 0
            columns += [(np.zeros(n), most), (np.zeros(n), least), ((on & ~off).astype(float), (~off).astype(float))]
            before = int(starts[site - 1]) if site else 0
            one, none = identity(n), csr_matrix((n, n))
            blocks = [
                (csr_matrix(weight), [-one, one, none], -bias, -bias),  # a = h − χ
                (csr_matrix(weight.shape), [one, none, -diags(most)], -np.inf, np.zeros(n)),  # h ≤ M·z
                (csr_matrix(weight.shape), [none, one, diags(least)], -np.inf, least),  # χ ≤ μ·(1 − z)
            ]
            for left, right, at_least, at_most in blocks:
                gap = csr_matrix((n, int(starts[site]) - before - left.shape[1]))
                row = hstack([csr_matrix((n, before)), left, gap, *right])
                row.resize((n, self.width))
                rows.append(row)
                sides.append((np.broadcast_to(at_least, n), at_most))
        self.solver = solver_with(threads=1)
        self.proved, self._reached, self._refuted = False, 0.0, 0.0
        self.ends, ends = (tuple(map(np.concatenate, zip(*pairs, strict=True))) for pairs in (columns, sides))
        cost, matrix = np.zeros(self.width), vstack(rows).tocsr()
        self.solver.passModel(linear_program(cost, self.ends, matrix, ends, self.binaries))
        self.solver.cbMipInterrupt += self._known

    def _known(self, event) -> None:
        """Ends a search whose question is answered, as soon as there is a bound at all."""
        said = event.data_out
        answered = said.mip_primal_bound <= self._reached or said.mip_dual_bound > self._refuted
        event.data_in.user_interrupt = bool(answered and np.isfinite(said.mip_dual_bound))  # or it keeps its last value

    def _ask(self, cost: np.ndarray, constant: float, reached: float, refuted: float, seconds: float):
        """Makes cost·columns + constant small, until a point has at most `reached`, or all have more than `refuted`."""
        self._reached, self._refuted = reached, refuted
        self.solver.changeColsCost(self.width, np.arange(self.width, dtype=np.int32), cost)
        self.solver.changeObjectiveOffset(float(constant))
        self.solver.clearSolver()
        self.solver.setOptionValue("time_limit", float(seconds))
        run(self.solver)
        return self.solver.getInfo()

    def most(self, weight: np.ndarray, bias: float, seconds: float) -> _Answer:
        """Whether weight·v + bias gets above zero, for the values v after the last of the ReLUs."""
        cost = np.zeros(self.width)
        cost[self.last] = -weight
        info = self._ask(cost, -bias, -SIGN, SIGN, seconds)
        most = -info.mip_dual_bound if np.isfinite(info.mip_dual_bound) else np.inf
        if has_point(info) and info.objective_function_value <= -SIGN:
            return _Answer(True, most)
        return _Answer(False if most < -SIGN else None, most)

    def add_states(self, asked: np.ndarray) -> None:
        """Binaries p and q for states (2, units) that are asked for: 1 only where a unit is (in)active by SIGN."""
        import highspy

        self.near, self.rows = False, self.solver.getNumRow()
        self.shows = np.full(asked.shape, -1)
        count = int(asked.sum())
        self.shows[asked] = self.width + np.arange(count)
        self.solver.addVars(count, np.zeros(count), np.ones(count))
        for column in range(self.width, self.width + count):
            self.solver.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        for state, units in enumerate(asked):
            for unit in np.flatnonzero(units):
                mine, z = self.shows[state, unit], self.binaries[unit]
                part = self.parts[state][unit]  # h of an active unit, χ of an inactive one
                at_most, sign = (0.0, -1.0) if state == 0 else (1.0, 1.0)
                self.solver.addRow(-highspy.kHighsInf, at_most, 2, np.array([mine, z]), np.array([1.0, sign]))
                self.solver.addRow(-highspy.kHighsInf, 0.0, 2, np.array([mine, part]), np.array([1.0, -1.0 / SIGN]))
        self.width += count

    def look_near(self, missing: np.ndarray) -> None:
        """From here on a state that is missing (2, units) counts as shown where SIGN is short of it, too."""
        import highspy

        self.near, inf = True, highspy.kHighsInf
        for row in range(self.rows, self.solver.getNumRow()):
            self.solver.changeRowBounds(row, -inf, inf)
        for state, units in enumerate(missing):
            for unit in np.flatnonzero(units):
                h, chi = (part[unit] for part in self.parts)
                own, other = (h, chi) if state == 0 else (chi, h)
                far = self.ends[1][other]  # p·far ≤ far + SIGN + what it is active, inactive by
                columns = np.array([self.shows[state, unit], own, other])
                self.solver.addRow(-inf, far + SIGN, 3, columns, np.array([far, -1.0, 1.0]))

    def shown(self, missing: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray] | None:
        """An input (inputs,) that shows some of the missing states (2, units), and which it shows by the solver's word;
        None where there is none (then `proved`) or time was up."""
        cost = np.zeros(self.width)
        cost[self.shows[missing]] = -1.0
        info = self._ask(cost, 0.0, -0.5, -0.5, seconds)
        if has_point(info) and info.objective_function_value <= -0.5:
            values = np.array(self.solver.getSolution().col_value)
            return values[: self.inputs], missing & (values[self.shows] >= 0.5)
        self.proved = info.mip_dual_bound > -0.5
        return None
