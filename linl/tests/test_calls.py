"""Calls as people write them: operands by name, values without channels, casts inside, parametrized layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import linl
from linl.tests import small_nets


def made(forward, **layers):
    """A network in float64."""
    return small_nets.made(forward, **layers).double()


def two(**more):
    """Two dense layers."""
    torch.manual_seed(1)
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), **more}


SUMS = {
    "place": lambda s, x: torch.add(F.relu(s.a(x)), s.b(x)),
    "other": lambda s, x: torch.add(F.relu(s.a(x)), other=s.b(x)),
    "both": lambda s, x: torch.add(other=s.b(x), input=F.relu(s.a(x))),
    "method": lambda s, x: F.relu(s.a(x)).add(other=s.b(x)),
    "less": lambda s, x: torch.sub(input=F.relu(s.a(x)), other=-s.b(x)),
    "subtract": lambda s, x: F.relu(s.a(x)).subtract(-s.b(x)),
}
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", SUMS)
def test_a_sum_is_a_sum_however_it_is_written(how):
    """Folded, pruned, bounded and counted alike."""
    net, plain = made(SUMS[how], **two()), made(SUMS["place"], **two())
    assert torch.allclose(net(X), plain(X), atol=1e-12)
    assert torch.allclose(linl.fold(net, X)(X), net(X), atol=1e-10)
    small = linl.shrink(linl.prune(net, "magnitude", 0.5), X)
    assert torch.allclose(small(X), linl.shrink(linl.prune(plain, "magnitude", 0.5), X)(X), atol=1e-10)
    box = linl.Box(-torch.ones(4), torch.ones(4))
    assert linl.bounds.bound(net, box, "crown").output.upper[0].tolist() == pytest.approx(
        linl.bounds.bound(plain, box, "crown").output.upper[0].tolist()
    )
    assert linl.dead_rate(net, X).table.equals(linl.dead_rate(plain, X).table)


def test_operands_by_name_in_somebody_elses_graph():
    graph = fx.symbolic_trace(made(SUMS["both"], **two()))
    assert torch.allclose(linl.fold(graph, X)(X), graph(X), atol=1e-10)


def test_a_join_by_name():
    net = made(lambda s, x: s.c(torch.cat(tensors=[F.relu(s.a(x)), s.b(x)], dim=1)), **two(c=nn.Linear(8, 3)))
    pruned = linl.prune(net, "magnitude", 0.6)
    assert torch.allclose(linl.shrink(pruned, X)(X), linl.harden_masks(pruned)(X), atol=1e-10)


@pytest.mark.parametrize(
    "forward", [lambda s, x: F.relu(s.a(x)).mean(1) * 2, lambda s, x: -s.c(F.relu(s.a(x))).squeeze(1)]
)
def test_values_without_channels(forward):
    net = made(forward, **two(c=nn.Linear(4, 1)))
    assert torch.allclose(linl.fold(net, X)(X), net(X), atol=1e-10)


def test_a_network_that_casts_by_itself():
    """Compared in float64 all the same."""
    net = made(lambda s, x: s.c(F.relu(s.b(s.a(x.float())))), **two(c=nn.Linear(4, 2))).float()
    x = torch.randint(0, 9, (3, 4)).byte()
    folded = linl.fold(net, x, objective="depth")
    assert folded.fold_report.merged == 1 and folded.fold_report.table["error_interior"].max() < 1e-12
    assert linl.shrink(linl.prune(net, "magnitude", 0.5), x)(x).shape == (3, 2)


def test_a_parametrized_layer_keeps_its_weight():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    lin = linl.linearize(nn.Sequential(normed, nn.ReLU(), nn.Linear(4, 2)).double().eval(), "linlu", start=0.7)
    hard = linl.harden(lin, threshold=0.9)
    assert torch.allclose(linl.fold(hard, X)(X), hard(X), atol=1e-10)


def test_batches_of_different_shapes_are_told_apart_from_labels():
    net = made(lambda s, x: F.relu(s.a(x)), **two())
    with pytest.raises(ValueError, match=r"images of shape \(\) behind others of \(4,\).*one pair"):
        linl.dead_rate(net, [X, torch.zeros(3)])
    with pytest.raises(ValueError, match="doesn't run on this example"):
        linl.dead_rate(net, torch.zeros(3, 7))
