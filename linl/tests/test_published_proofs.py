"""The papers' programs, re-enacted: right by enumeration on small networks, the same as linl's on a trained one."""

import numpy as np
import pytest
import torch
from torch import nn

import linl
from linl import Box, models
from linl.published_proofs import one_program, program_a_unit
from linl.tests.brute import extremes, small_net

NEAR = 2e-5  # such inputs of a unit are left undecided


def right_states(net, inputs):
    """Every unit's state by enumeration, and which are too near to a bend to ask for."""
    found = extremes(net, -np.ones(inputs), np.ones(inputs))
    low, high = (np.concatenate(side) for side in zip(*found, strict=True))
    states = np.where(high <= 0, "inactive", np.where(low >= 0, "active", "unstable"))
    return states, (np.abs(low) < NEAR) | (np.abs(high) < NEAR)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("way", [program_a_unit, one_program])
def test_states_are_those_of_enumeration(way, seed):
    net, inputs = small_net(seed)
    found = way(net, Box(-torch.ones(inputs), torch.ones(inputs)))
    right, tie = right_states(net, inputs)
    assert ((np.array(found.states) == right) | tie).all(), (found.states, right)


def test_the_small_networks_ask_for_every_answer():
    """The test above would pass for a way that never asks: here each of three answers came from a program."""
    answers = set()
    for seed in range(16):
        net, inputs = small_net(seed)
        box = Box(-torch.ones(inputs), torch.ones(inputs))
        found, table = one_program(net, box), linl.analyse(net, box, "interval").table
        assert (found.programs > 0) == (found.asked > 0)
        asked = (table["layer"] != table["layer"].iloc[0]) & (table["proof"] != "interval")
        answers |= {state for state, open_ in zip(found.states, asked, strict=True) if open_}
    assert answers == {"inactive", "active", "unstable"}


def test_images_leave_fewer_states_to_the_one_program():
    net, inputs = small_net(1)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    without, given = one_program(net, box), one_program(net, box, images=box.sample(500))
    assert given.states == without.states and given.asked < without.asked


def trained():
    torch.manual_seed(0)
    data = linl.data.load("digits", limit=400, normalize="none")
    training = linl.train.recipe("stability-digits", 25, l1=0.02)
    net = models.create("mlp", 10, data.input_size, hidden=(12, 12), norm=False, dropout=0.0, init=training.init)
    linl.train.fit(net, data, training, device="cpu", verbose=False)
    return net.eval(), Box.unit(data.input_size), data.normalize(data.train[0])


def test_three_ways_agree_on_a_trained_network():
    net, box, images = trained()
    ours = linl.analyse(net, box).table["state"].tolist()
    assert program_a_unit(net, box).states == ours == one_program(net, box, images=images).states
    assert {"unstable", "inactive", "active"} == set(ours)


def test_without_time_nothing_is_claimed():
    net, inputs = small_net(7)
    box = Box(-torch.ones(inputs), torch.ones(inputs))
    right, tie = right_states(net, inputs)
    hurried = [(one_program, "time_limit"), (program_a_unit, "time_limit"), (program_a_unit, "unit_time_limit")]
    for way, limit in hurried:
        found = np.array(way(net, box, **{limit: 1e-9}).states)
        assert "undecided" in found
        assert ((found == right) | (found == "undecided") | tie).all()


@pytest.mark.parametrize("reach", [0.0, 5e-6, -5e-6])
@pytest.mark.parametrize("way", [program_a_unit, one_program])
def test_a_near_tie_is_never_claimed_wrongly(way, reach):
    """A unit whose input goes down to zero, a little above or below it; and one that is that, whatever comes."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    net[0].weight.data, net[0].bias.data = torch.ones(2, 1).double(), torch.full((2,), 0.5).double()
    net[2].weight.data = torch.tensor([[-0.5, -0.5], [1.0, -1.0]]).double()
    net[2].bias.data = torch.tensor([1.5, 0.0]).double() + reach
    down, flat = way(net, Box(-torch.ones(1), torch.ones(1))).states[2:]
    assert down in ({"unstable", "undecided"} if reach < 0 else {"active", "undecided"})
    assert flat in ({"undecided", "inactive"} if reach < 0 else {"undecided", "active", "inactive"} - {"inactive"})
    assert reach or "undecided" in (down, flat)


def test_three_near_ties_end():
    """Each may be reached by less than the margin: none is shown, and none is claimed for ever."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double().eval()
    net[0].weight.data, net[0].bias.data = torch.ones(2, 1).double(), torch.full((2,), 1e9).double()
    net[2].weight.data = torch.tensor([[1.0, -1.0]]).double().repeat(3, 1)
    net[2].bias.data.fill_(4e-6)
    found = one_program(net, Box(-torch.ones(1), torch.ones(1)), time_limit=20.0)
    assert found.programs < 20 and set(found.states[2:]) <= {"undecided", "active"}


@pytest.mark.parametrize("way", [program_a_unit, one_program])
def test_what_they_cannot_take_is_refused(way):
    box, net = Box.unit((2,)), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with pytest.raises(ValueError, match="linear layers with a ReLU"):
        way(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), box)
    with pytest.raises(ValueError, match="linear layers with a ReLU"):
        way(nn.Sequential(nn.Linear(2, 2)).eval(), box)
    with pytest.raises(ValueError, match="is no ReLU"):
        way(nn.Sequential(nn.Linear(2, 2), nn.ReLU6(), nn.Linear(2, 1)).eval(), box)
    with pytest.raises(ValueError, match="2 boxes"):
        way(net, Box(torch.zeros(2, 2), torch.ones(2, 2), batch=True))
    with pytest.raises(ValueError, match="time_limit"):
        way(net, box, time_limit=0)


def test_images_of_another_shape_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with pytest.raises(ValueError, match=r"images of shape \(3,\)"):
        one_program(net, Box.unit((2,)), images=torch.zeros(4, 3))
