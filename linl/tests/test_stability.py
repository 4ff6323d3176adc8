"""States of units: equal to enumeration on small networks, never contradicted by points, honest when time is up."""

import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

import linl
from linl import Box, Stability
from linl.bounds import bound
from linl.crown import Pass
from linl.milp import Model
from linl.reading import program
from linl.states import PROOFS, UNDECIDED, UNSTABLE
from linl.tests.brute import extremes, small_net
from linl.tests.small_nets import ACTIVATIONS, NETS, make
from linl.witnesses import Witnesses

NEAR = 1e-7  # the enumeration's linear programs aren't surer than that


def agrees_with_enumeration(seed: int) -> Stability:
    net, inputs = small_net(seed)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    state = linl.analyse(net, box, seed=seed)
    assert state.decided, state.notes
    for site, (low, high) in enumerate(extremes(net, -np.ones(inputs), np.ones(inputs))):
        right = np.where(high <= 0, 0, np.where(low >= 0, 1, UNSTABLE))
        tie = (np.abs(low) < NEAR) | (np.abs(high) < NEAR)
        assert ((state.codes[site].numpy() == right) | tie).all(), (seed, site)
        assert (state.lower[site].numpy() <= low + NEAR).all() and (state.upper[site].numpy() >= high - NEAR).all()
    return state


@pytest.mark.parametrize("seed", range(24))
def test_exact_agrees_with_enumeration(seed):
    agrees_with_enumeration(seed)


def test_every_stage_of_the_funnel_is_needed():
    """Seeds in which CROWN, optimized slopes and branch and bound have the last word."""
    proofs = set()
    for seed in (38, 13, 7, 1):
        net, inputs = small_net(seed)
        proofs |= set(linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs))).table["proof"])
    assert {"interval", "samples", "corners", "crown", "optimized", "branching"} <= proofs


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_claims_hold_at_points(kind, activation):
    net, shape = make(kind, activation)
    box = Box.around(4 * torch.rand(*shape), 0.5)
    state = linl.analyse(net, box, "exact" if kind == "dense" else "crown", time_limit=20)
    read = program(net, shape)
    values = read.run(torch.cat([box.sample(5000), box.corners(5000)]))
    for op in read.bends:
        seen = values[op.sources[0]].flatten(1)
        edges = torch.tensor(op.pieces.edges, dtype=torch.float64)
        codes = state.codes[op.site]
        for piece in range(len(op.pieces.slopes)):
            mine = seen[:, codes == piece]
            assert (mine >= edges[piece]).all() and (mine <= edges[piece + 1]).all()
    checked = linl.verify_stability(net, state)
    assert checked.ok, checked.table
    assert kind != "dense" or state.decided, state.table


def test_large_networks_are_settled_from_one_activation_back(tmp_path):
    """What CROWN would take an hour for: a residual network's units on a small box, proved, saved and proved again."""
    torch.manual_seed(0)
    net = linl.models.create("resnet18", width=0.125, stem="cifar").eval()
    box = Box.around(torch.rand(3, 16, 16), 0.5 / 255)
    plain, state = (linl.analyse(net, box, method) for method in ("interval", "local"))
    stable = [sum(int((codes >= 0).sum()) for codes in found.codes) for found in (plain, state)]
    assert stable[1] > 1.5 * stable[0], "the way back proves no more"
    assert "local" in set(state.table["proof"])
    state.save(tmp_path)
    assert linl.verify_stability(net, Stability.load(tmp_path)).complete
    read, points = program(net, box.shape), box.sample(200)
    values = read.run(points)
    for op in read.bends:
        seen, codes = values[op.sources[0]].flatten(1), state.codes[op.site]
        assert (seen[:, codes == 0] <= 0).all() and (seen[:, codes == 1] >= 0).all()


def test_the_table_says_what_decided_each_unit():
    net, inputs = small_net(3)
    state = linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    table = state.table
    assert list(table.columns) == ["layer", "unit", "lower", "upper", "state", "proof", "seconds"]
    assert set(table["state"]) <= {"active", "inactive", "unstable"}
    assert (table["proof"] != "").all() and table["seconds"].notna().all()
    stable = table["state"].isin(["active", "inactive"])
    assert (table.loc[table["state"] == "active", "lower"] >= 0).all()
    assert (table.loc[table["state"] == "inactive", "upper"] <= 0).all()
    assert set(table.loc[stable, "proof"]) <= {"interval", "crown", "optimized", "branching", "solver"}
    assert "<table" in state._repr_html_()


def test_images_alone_never_make_a_unit_stable():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    images = torch.rand(500, 2) * 0.01  # near a corner, where nothing bends
    wide = linl.analyse(net, Box.around(torch.zeros(2), 5.0), images=images)
    assert (wide.codes[0] == UNSTABLE).all()


def test_a_saved_state_is_the_same_and_is_checked_again(tmp_path):
    net, inputs = small_net(3)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    state = linl.analyse(net, box)
    state.save(tmp_path)
    again = Stability.load(tmp_path)
    assert again.table.equals(state.table) and again.method == "exact"
    assert linl.verify_stability(net, again).ok
    assert linl.analyse(net, box, state=again).decided


def test_a_forged_claim_is_found():
    net, inputs = small_net(0)
    state = linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    unstable = (state.codes[0] == UNSTABLE).nonzero()[0]
    state.codes[0][unstable], state.proofs[0][unstable] = 1, 1
    assert linl.verify_stability(net, state).table["not_proved"].sum() == 1
    state = linl.analyse(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    state.witnesses.points = torch.zeros_like(state.witnesses.points)
    assert linl.verify_stability(net, state).table["not_shown"].sum() > 0
    with pytest.raises(ValueError, match="another network"):
        linl.verify_stability(small_net(2)[0], state)


def test_time_that_is_up_leaves_units_undecided_and_can_be_gone_on_from():
    net, inputs = small_net(7)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    cheap = linl.analyse(net, box, "interval")
    assert (torch.cat(cheap.codes) == UNDECIDED).any()
    stopped = linl.analyse(net, box, time_limit=1e-9)
    assert any("stopped after" in note for note in stopped.notes)
    done = linl.analyse(net, box, state=cheap)
    assert done.decided and done.table["state"].tolist() == linl.analyse(net, box).table["state"].tolist()


def test_a_solver_that_says_not_set_decides_nothing(monkeypatch):
    """HiGHS answers "Not Set" after its threads were changed, and its figures then look like proofs."""
    highspy = pytest.importorskip("highspy")
    net, inputs = small_net(7)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: highspy.HighsModelStatus.kNotset)
    monkeypatch.setattr(linl.settling.Branching, "run", lambda self, seconds: None)
    monkeypatch.setattr(linl.settling.Model, "cross", _without_a_point(linl.settling.Model.cross))
    state = linl.analyse(net, box)
    assert not state.decided and any("Not Set" in note for note in state.notes)
    assert "solver" not in set(state.table["proof"])


def _without_a_point(cross):
    def crossed(*args, **kwargs):
        answer = cross(*args, **kwargs)
        answer.point = None
        return answer

    return crossed


def test_forgeries_that_would_crash_are_refused_and_the_solvers_word_can_be_contradicted(tmp_path):
    net, inputs = small_net(0)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    state = linl.analyse(net, box)
    state.codes[0][:], state.proofs[0][:] = 1, PROOFS.index("solver")
    assert not linl.verify_stability(net, state).ok, "a point of the box says otherwise"
    state = linl.analyse(net, box)
    for code in (-3, 2):
        state.codes[0][0] = code
        with pytest.raises(ValueError, match="codes of 1 that no unit can have"):
            linl.verify_stability(net, state)
    state = linl.analyse(net, box)
    state.witnesses.low[0][:] = 999
    with pytest.raises(ValueError, match="without a point"):
        linl.verify_stability(net, state)
    state.codes = state.codes[:-1]
    with pytest.raises(ValueError, match="activations"):
        linl.verify_stability(net, state)
    linl.analyse(net, box).save(tmp_path)
    words = tmp_path / "stability.json"
    words.write_text(words.read_text().replace('"names"', '"name"'))
    with pytest.raises(ValueError, match="lacks 'names'"):
        Stability.load(tmp_path)


@pytest.mark.parametrize("at", [0, 1])
def test_saving_over_another_state_is_all_or_nothing(at, tmp_path, monkeypatch):
    """Stopped while the numbers are written, or between them and the words: the state from before is still there."""
    net, inputs = small_net(0)
    states = [linl.analyse(net, Box(-r * torch.ones(inputs), r * torch.ones(inputs))) for r in (1.0, 2.0)]
    states[0].save(tmp_path)
    replace, calls = os.replace, []

    def stopped(part, path):
        calls.append(path)
        if len(calls) > at:
            raise KeyboardInterrupt
        replace(part, path)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        states[1].save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(Stability.load(tmp_path).box.upper, states[0].box.upper)
    states[1].save(tmp_path)
    assert torch.equal(Stability.load(tmp_path).box.upper, states[1].box.upper)
    assert len(list(tmp_path.iterdir())) == 2, "nothing of the others is left lying about"


def test_witnesses_lie_in_boxes_thinner_than_float32(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU()).eval()
    x = torch.randn(6, dtype=torch.float64)
    box = Box(x, x + torch.tensor([0, 0, 0, 1, 1, 1]))
    state = linl.analyse(net, box, images=box.sample(9))
    assert box.contains(state.witnesses.points).all() and linl.verify_stability(net, state).ok
    point = linl.analyse(net, Box(x, x))
    point.save(tmp_path)
    assert point.decided and linl.verify_stability(net, Stability.load(tmp_path)).ok


def test_a_network_without_activations_claims_nothing():
    net = nn.Sequential(nn.Linear(3, 2)).eval()
    state = linl.analyse(net, Box.unit((3,)))
    assert state.decided and linl.verify_stability(net, state).complete


def test_the_centre_is_looked_at():
    """A unit that is above 0 near the centre alone: chance finds no such point in 40 dimensions."""
    net = nn.Sequential(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 1), nn.ReLU()).double().eval()
    net[0].weight.data = torch.cat([torch.eye(40), -torch.eye(40)]).double()
    net[0].bias.data.zero_()
    net[2].weight.data.fill_(-1.0)
    net[2].bias.data.fill_(0.1)
    state = linl.analyse(net, Box.around(torch.zeros(40), 1.0), "crown")
    assert state.codes[1].tolist() == [UNSTABLE]


@pytest.mark.parametrize(("small", "scale"), [(1e-10, 1.0), (1.0, 1e-10), (1e-8, 1e-4)])
def test_the_solver_drops_no_small_numbers(small, scale):
    """Weights below 1e-9 on large inputs, or undone by large weights: HiGHS takes them for 0 unless they are scaled."""
    for seed in (38, 7, 1):
        net, inputs = small_net(seed)
        exact = extremes(net, -np.ones(inputs), np.ones(inputs))
        net[0].weight.data *= small * scale
        net[0].bias.data *= scale
        net[2].weight.data /= scale
        read = program(net, (inputs,))
        box = Box(-torch.ones(inputs).double() / small, torch.ones(inputs).double() / small)
        known = dict(enumerate(bound(read, box, "interval").inputs))
        for op in read.bends[1:]:
            model, (low, high) = Model(read, Pass(read, box).ranges[0], known, op.site), exact[op.site]
            for unit in range(len(low)):
                for up, can in ((True, high[unit] > 1e-4), (False, low[unit] < -1e-4)):
                    verdict = model.cross(unit, 0.0, up, known[op.site], 10).verdict
                    assert not (can and verdict == "impossible"), (seed, op.name, unit, up)


def test_bad_input_is_refused():
    net, inputs = small_net(0)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    with pytest.raises(ValueError, match="unknown method"):
        linl.analyse(net, box, "milp")
    with pytest.raises(ValueError, match="2 boxes"):
        linl.analyse(net, Box(-torch.ones(2, inputs), torch.ones(2, inputs), batch=True))
    with pytest.raises(ValueError, match="can't take"):
        linl.analyse(net, Box.unit((inputs + 1,)))
    with pytest.raises(ValueError, match="time_limit"):
        linl.analyse(net, box, time_limit=0)
    with pytest.raises(ValueError, match="unit_time_limit"):
        linl.analyse(net, box, unit_time_limit=None)
    with pytest.raises(ValueError, match="no finite numbers"):
        linl.analyse(net, box, images=torch.full((3, inputs), torch.nan))
    with pytest.raises(ValueError, match="images have shape"):
        linl.analyse(net, box, images=torch.zeros(3, inputs + 1))
    with pytest.raises(ValueError, match="train mode"):
        linl.analyse(net.train(), box)
    with pytest.raises(FileNotFoundError, match="stability.json"):
        Stability.load("/nowhere")


if __name__ == "__main__":  # python -m linl.tests.test_stability 200
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    counts: dict = {}
    for number in range(count):
        for row in agrees_with_enumeration(number).table.itertuples():
            counts[row.state, row.proof] = counts.get((row.state, row.proof), 0) + 1
    print(f"{count} networks, every unit decided as enumeration decides it: {counts}")


def test_what_no_solver_can_tell_is_undecided_and_says_why():
    """−x + (1 − 1e-12)·x − y/10 is never above 0, by less than floats can show: no claim either way, and a reason."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
        net[2].weight.copy_(torch.tensor([[-1.0, 1 - 1e-12, -0.1]]))
        net[0].bias.zero_(), net[2].bias.zero_()
    state = linl.analyse(net, Box.unit((2,)))
    assert state.codes[1].tolist() in ([UNDECIDED], [0])
    assert state.decided or "less than the solver's tolerance" in state.notes[0]


def test_a_unit_that_only_touches_its_bend_is_stable():
    """As training leaves units that never fire: no bias, weights of one sign. Exact arithmetic tells 0 from 1e-14."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:2] = -layer.weight[:2].abs()
            layer.weight[2:4] = layer.weight[2:4].abs()
            layer.bias[:4] = 0.0
        net[0].weight[0] *= 1e-9
        net[2].bias[1] = 1e-300  # not stable at all: it fires where everything before it is off
        net[0].bias[4:] = 0.0  # at the corner 0 the first layer gives nothing
    state = linl.analyse(net, Box.unit((40,)), "interval")
    assert state.codes[0][:4].tolist() == [0, 0, 1, 1]
    assert state.codes[1][:4].tolist() == [0, UNDECIDED, 1, 1], "1e-300 above its bend is above it"
    assert (state.codes[0][4:] == -1).all()
    assert linl.verify_stability(net, state).complete
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(50, 1)).double().eval()
    with torch.no_grad():
        net[0].weight[0].abs_().neg_()
        net[0].bias[0] = 0.0
    state = linl.analyse(net, Box.unit((1, 5, 5)), "interval")
    assert (state.codes[0].view(2, -1)[0] == 0).all()


def test_a_layer_that_nothing_is_open_in_before_one_that_is():
    """What lies before an open unit is bounded more sharply; of a layer that is settled there is nothing to bound."""
    torch.manual_seed(0)
    layers = [part for i in range(6) for part in (nn.Linear(8 if i else 16, 8), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(8, 10)).eval()
    state = linl.analyse(net, Box.unit((16,)), "exact")
    assert "undecided" not in set(state.table["state"]) and linl.verify_stability(net, state).ok


def test_a_claim_by_slopes_is_proved_again_though_others_were_kept_since():
    """Of a unit's layers the analysis keeps the newest slopes; those that proved it may rest on others."""
    torch.manual_seed(2)
    layers = [part for i in range(3) for part in (nn.Linear(10 if i else 8, 10), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(10, 10)).eval()
    state = linl.analyse(net, Box.unit((8,)), "exact")
    assert "optimized" in set(state.table["proof"]) and linl.verify_stability(net, state).ok


def test_looks_that_show_nothing_cost_no_interval_evaluation(monkeypatch):
    """Points at which a unit is where it was before; but a crossing by a millionth of the layer's size is found."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.copy_(torch.tensor([1e-6, 5.0]))
    seen = Witnesses(program(net, (2,)), Box(-torch.ones(2), torch.ones(2)))
    asked, plain = [], Witnesses.pieces_at
    monkeypatch.setattr(Witnesses, "pieces_at", lambda self, points: asked.append(len(points)) or plain(self, points))
    seen.look(torch.tensor([[0.5, 0.5]]), "samples")
    assert asked == [1] and seen.high[0].tolist() == [0, 0] and seen.low[0].tolist() == [-1, -1]
    seen.look(torch.tensor([[0.7, -0.9], [0.2, 0.9]]), "samples")
    assert asked == [1] and len(seen.points) == 1
    seen.look(torch.tensor([[-2e-6, 0.0]]), "corners")
    assert asked == [1, 1] and seen.unstable(0).tolist() == [True, False]
