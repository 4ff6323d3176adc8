"""What is asked about regions: inputs of every shape, limits, programs; what is wrong is told in clear words."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import linl
from linl import Box
from linl.reading import program
from linl.regions import affine_at, along, count, draw_slice, in_plane, maps
from linl.shallowing import compare


def dense(*widths: int) -> nn.Sequential:
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


def cube(n: int) -> Box:
    return Box(-torch.ones(n), torch.ones(n))


def test_a_leading_one_is_dropped_unless_the_network_wants_it():
    signal = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    cases = [(dense(3, 5, 2), (3,)), (signal, (1, 6)), (nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU()).eval(), (1, 3, 3))]
    for net, shape in cases:
        x = torch.randn(3, *shape)
        for given in (x, x[:, None]):
            assert in_plane(net, *given).corners.shape == (3, *shape)
            assert along(net, *given[:2]).ends.shape == (2, *shape)
            assert affine_at(net, given[0]).point.shape == shape
            assert affine_at(program(net, shape), given[0]).point.shape == shape


def test_inputs_that_do_not_fit_are_refused_in_clear_words():
    net = dense(3, 5, 2)
    read, x = program(net, (3,)), torch.randn(3, 4)
    for ask in (lambda: in_plane(read, *x), lambda: along(read, *x[:2]), lambda: affine_at(read, x[0])):
        with pytest.raises(ValueError, match=r"takes inputs of shape \(3,\), not \(4,\)"):
            ask()
    with pytest.raises(ValueError, match=r"takes inputs of shape \(3,\), not \(4,\)"):
        count(read, cube(4))
    with pytest.raises(ValueError, match="5 examples of shape"):
        affine_at(net, torch.randn(5, 3))
    with pytest.raises(ValueError, match="no finite numbers"):
        affine_at(net, torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="make a linl.Box"):
        count(net, torch.zeros(3))
    with pytest.raises(ValueError, match="seconds above 0"):
        count(net, cube(3), time_limit="5")
    with pytest.raises(ValueError, match="a number, or"):
        in_plane(net, *torch.randn(3, 3), window="big")
    assert in_plane(net, *torch.randn(3, 3), window=torch.tensor(2.0)).areas.sum() == pytest.approx(4)


def test_nothing_found_is_an_answer_too():
    """Time limits so short that nothing is found: every question about what was found has its answer."""
    net = dense(3, 7, 5, 2)
    none = count(net, cube(3), time_limit=1e-9)
    assert none.lower == 0 and none.count is None
    assert [len(t) for t in maps(net, none)] == [0, 0, 0]
    made = in_plane(net, *torch.randn(3, 3), time_limit=1e-9)
    for color in ("region", "class"):
        ax = draw_slice(made, color=color, classes=["one", "two"] if color == "class" else None)
        assert "unfinished" in ax.get_title()
    line = along(net, *torch.randn(2, 3), time_limit=1e-9)
    with pytest.raises(ValueError, match="the pieces known go from 0 to 0"):
        line(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="go from 0 to 1"):
        along(net, *torch.randn(2, 3))(torch.tensor([1.5]))


def test_an_upper_bound_beyond_floats_is_shown():
    many = count(dense(50, 400, 400, 400, 400, 400, 2), cube(50), time_limit=0.01)
    assert many.upper > 10**308 and "e+3" in repr(many) and many._repr_html_()


def test_a_state_is_left_alone():
    net = dense(3, 7, 5, 2)
    whole, state = count(net, cube(3)), count(net, cube(3), time_limit=1e-9)
    while not 3 < state.lower < whole.count:  # some found, some waiting
        state = count(net, cube(3), time_limit=0.01, state=state if state.count is None else None)
    before = [len(part) for part in state.patterns], state.lower, state.upper
    for _ in range(2):
        again = count(net, cube(3), state=state)
        assert again.count == whole.count and len(again.patterns[0]) == len(again.points)
        assert ([len(part) for part in state.patterns], state.lower, state.upper) == before


def test_a_network_without_parameters_and_one_that_begins_with_an_activation():
    square = cube(2)
    bare = nn.Sequential(nn.ReLU()).eval()
    assert count(bare, square).count == in_plane(bare, *torch.eye(3, 2) - 0.5, window=9.0).count == 4
    assert affine_at(bare, torch.tensor([0.5, -0.25])).radius == pytest.approx(0.25)
    row = compare(bare, linl.shallow(bare, square), square, 1000).iloc[0]
    assert row["error_exact"] < 1e-10
    first = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU()).double().eval()
    assert count(first, square).count >= 4
    read = program(dense(2, 3, 1), (2,))
    assert linl.shallow(read, square)[1].weight.dtype == torch.float64


def test_a_name_for_each_class():
    net = dense(3, 5, 3)
    with pytest.raises(ValueError, match="2 classes: the network has 3 outputs"):
        draw_slice(net, *torch.randn(3, 3), color="class", classes=["one", "two"])


def test_cells_too_thin_to_tell_are_reported_not_an_error():
    """Faces nearer to each other than the search can tell, and one more between them."""
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double().eval()
    net[0].weight.data.fill_(1.0)
    for gap in (3e-8, 3e-9, 3e-12):
        net[0].bias.data = torch.tensor([0.1, 0.1 - gap, 0.1 - gap / 2], dtype=torch.float64)
        found = count(net, cube(1))
        assert found.lower <= 4 <= found.upper < math.inf, found
