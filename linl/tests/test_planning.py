"""The best set of merges: against every possible cut; timing, and undoing what is slower."""

import itertools
import json

import pytest
import torch
from torch import nn

import linl
from linl import folding, joining, planning
from linl.chains import find
from linl.folding import prepared
from linl.tests.test_folding import shaken

D = torch.float64


def links_of(net, x):
    traced, known = prepared(net.double().eval(), x.double())
    (chain,) = find(traced, known).chains
    return chain.links


def random_chain(seed):
    torch.manual_seed(seed)
    widths = torch.randint(2, 40, (7,)).tolist()
    layers = []
    for a, b in itertools.pairwise(widths):
        kind = int(torch.randint(0, 3, ()))
        layers.append([nn.Conv2d(a, b, 1), nn.Conv2d(a, b, 3), nn.Conv2d(a, b, (1, 3))][kind])
        layers += [nn.BatchNorm2d(b)] if torch.rand(()) < 0.4 else []
    return nn.Sequential(*layers), torch.randn(1, widths[0], 15, 14)


@pytest.mark.parametrize("objective", ["parameters", "macs", "depth"])
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_cuts(objective, seed):
    links = links_of(*random_chain(seed))
    price = planning.OBJECTIVES[objective]

    def cost(part):
        if len(part) == 1:
            return planning._kept(part[0], objective, "exact", None, None).after
        if not planning.layers_in(part):
            return None
        return planning.joint_cost(part, joining.geometry_of(part, "exact"))

    best = None
    for count in range(len(links)):
        for cuts in itertools.combinations(range(1, len(links)), count):
            parts = [links[a:b] for a, b in itertools.pairwise((0, *cuts, len(links)))]
            costs = [cost(part) for part in parts]
            if None not in costs:
                total = price(sum(costs, planning.Cost()))
                best = total if best is None else min(best, total)
    found = planning.plan(links, objective)
    assert price(sum((step.after for step in found), planning.Cost())) == best
    assert [link for step in found for link in step.links] == links


def test_greedy_would_be_worse():
    """4 → 64 → 4 → 64: the first pair pays and so does the last, but all three together don't."""
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4), nn.Linear(4, 64)).double().eval()
    small = linl.fold(net, torch.randn(3, 4, dtype=D), objective="parameters")
    assert [tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear)] == [(64, 4)]
    wide = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 32)).double().eval()
    small = linl.fold(wide, torch.randn(3, 32, dtype=D), objective="parameters")
    assert [tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear)] == [(2, 32), (32, 2)]


def test_no_objective_is_raised():
    net = shaken(linl.models.create("resnet20", 10, width=0.5).layer2)
    x = torch.randn(1, 8, 8, 8, dtype=D)
    hard = linl.harden(linl.linearize(net, "partial", start=1.0).double().eval())
    columns = {"parameters": "parameters", "macs": "gmacs", "depth": "depth"}
    padded = linl.pad_first(hard, x)
    for objective, column in columns.items():
        before, after = linl.measure(padded, linl.fold(padded, x, objective=objective), x, batches=()).table[column]
        assert after <= before and (objective != "depth" or (before, after) == (6, 1)), objective


class Stopwatch:
    """Stands in for `latencies`: says what it was told, so that a test doesn't hang on the machine's mood."""

    def __init__(self, *answers):
        self.answers = answers

    def __call__(self, nets, x, seconds=0.5):
        return list(self.answers)


@pytest.mark.parametrize(("before", "after", "layers"), [(2.0, 1.0, 1), (1.0, 2.0, 2)])
def test_a_merge_that_is_measured_to_be_slower_is_undone(before, after, layers, monkeypatch):
    monkeypatch.setattr(folding, "latencies", Stopwatch(before, after))
    monkeypatch.setattr(folding, "layer_timer", lambda batch, like: lambda geometry, *rest: geometry.weights())
    net = shaken(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))).double().eval()
    x = torch.randn(4, 8, dtype=D)
    small = linl.fold(net, x, objective="latency")
    assert linl.verify(net, small, x).equal and linl.cost.depth(small) == layers
    assert not [m for m in small.modules() if isinstance(m, nn.BatchNorm1d)], "the BatchNorm goes either way"
    row = small.fold_report.table.iloc[0]
    assert (row["ms_before"], row["ms_after"]) == (before, after)
    assert (row["verdict"], row["reason"]) == (
        ("exact", "") if layers == 1 else ("refused", "measured: one layer is slower")
    )


def test_latencies_are_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LINL_CACHE", str(tmp_path))
    monkeypatch.setattr(linl.cost.LatencyTable, "memory", {})
    table = linl.cost.LatencyTable()
    first = table.ms("a layer", lambda: nn.Linear(3, 2), (1, 3), torch.zeros(()))
    assert first > 0 and list(json.loads((tmp_path / "latency.json").read_text()).values()) == [first]
    monkeypatch.setattr(linl.cost.LatencyTable, "memory", {})
    again = linl.cost.LatencyTable()
    assert again.ms("a layer", lambda: pytest.fail("measured again"), (1, 3), torch.zeros(())) == first
    (tmp_path / "latency.json").write_text("{broken")
    assert linl.cost.LatencyTable().ms("another", lambda: nn.Linear(3, 2), (1, 3), torch.zeros(())) > 0


def test_foldable_tells_before_any_training():
    """MobileNetV2's blocks need both activations gone; the advice is what folding then does."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.features = shaken(linl.models.create("mobilenetv2", 10, width=0.25)).features[:6]
    x = torch.randn(1, 3, 16, 16)
    advice = linl.foldable(net, x, objective="macs")
    assert net.training and len(advice.table) == 10
    alone = advice.table.set_index("activation").loc["features.3.conv.0.2"]
    assert (alone["verdict"], alone["before"], alone["after"]) == (
        "nothing",
        "features.3.conv.0.0",
        "features.3.conv.1.0",
    )
    assert "would not pay (macs)" in alone["reason"]
    groups = advice.groups.set_index("activations")
    block = groups.loc["features.3.conv.0.2, features.3.conv.1.2"]
    assert block["verdict"] == "exact" and block["saves_layers"] == 2
    units = linl.linearize(net.eval(), "partial")
    for name in block.name.split(", "):
        units.get_submodule(name).alpha.data.fill_(1.0)
    bare = linl.harden(units)
    given, folded = (linl.fold(n, x, objective="macs") for n in (net, bare))
    before, after = (linl.measure(n, x, batches=()).table.iloc[0] for n in (given, folded))
    assert round((before["gmacs"] - after["gmacs"]) * 1e9) == block["saves_macs"]
    assert before["parameters"] - after["parameters"] == block["saves_numbers"]
    assert advice._repr_html_()


def test_foldable_says_what_stands_in_the_way():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    advice = linl.foldable(net, torch.randn(1, 2, 8, 8), objective="depth").table
    assert advice["verdict"].tolist() == ["pad first", "nothing", "exact"]
    assert "border" in advice["reason"][0] and "MaxPool2d in between" in advice["reason"][1]
    with pytest.raises(ValueError, match="unknown objective 'speed'"):
        linl.foldable(net, torch.randn(1, 2, 8, 8), objective="speed")


def test_foldable_names_activations_as_linearize_does():
    timm = pytest.importorskip("timm")
    net = timm.create_model("efficientnet_lite0", num_classes=10).eval()
    names = set(linl.units.units_of(linl.linearize(net, "partial")))
    advice = linl.foldable(net, torch.randn(1, 3, 64, 64), objective="macs")
    assert set(advice.table["activation"]) == names
    assert {name for group in advice.groups["activations"] for name in group.split(", ")} <= names
