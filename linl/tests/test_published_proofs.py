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
        found, known = one_program(net, box), linl.analyse(net, box, "interval").table["proof"] == "interval"
        assert found.programs >= (found.asked > 0)
        answers |= {state for state, sure in zip(found.states, known, strict=True) if not sure and found.asked}
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
    for way in (program_a_unit, one_program):
        found = np.array(way(net, box, time_limit=1e-9).states)
        assert "undecided" in found
        assert ((found == right) | (found == "undecided") | tie).all()


def test_a_tie_is_left_undecided():
    """A unit whose input is at most zero, and reaches it: no solver with tolerances can tell."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    for layer, weight, bias in ((net[0], 1.0, 0.0), (net[2], -1.0, 0.0)):
        layer.weight.data.fill_(weight)
        layer.bias.data.fill_(bias)
    net[0].bias.data.fill_(0.5)  # so that both states of the first are seen: its input runs from −½ to 1½
    net[2].bias.data.fill_(1.5)  # the second's from 0 to 1½, and 0 is reached
    assert program_a_unit(net, Box(-torch.ones(1), torch.ones(1))).states == ["unstable", "undecided"]


@pytest.mark.parametrize("way", [program_a_unit, one_program])
def test_what_they_cannot_take_is_refused(way):
    box, net = Box.unit((2,)), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with pytest.raises(ValueError, match="linear layers with a ReLU"):
        way(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), box)
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
