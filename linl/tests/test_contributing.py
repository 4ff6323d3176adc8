"""The examples of CONTRIBUTING.md, line by line as they stand there."""

import re

import nbformat
import pytest
import torch
import yaml
from torch import nn

import linl
from linl import models, pieces, study, units
from linl.data import PROJECT

TEXT = (PROJECT / "CONTRIBUTING.md").read_text()


def blocks(title, kind="python"):
    """The code under a heading."""
    part = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", part, re.M | re.S)


def run(source, **names):
    names = {"__name__": "example", **names}
    exec(source, names)
    return names


@pytest.mark.parametrize("title", ["A network", "A unit", "A bound rule", "An experiment"])
def test_an_example_is_short(title):
    assert all(block.strip().count("\n") < 40 for kind in ("python", "yaml") for block in blocks(title, kind))


def test_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    run(blocks("A network")[0])
    net = linl.models.create("plain", 10, (3, 16, 16), width=0.5)
    twin = linl.linearize(net, "linlu")
    assert len(linl.nonlinearity(twin)) == 3
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    hard = linl.harden(twin.double().eval())
    assert linl.verify(hard, linl.fold(hard, x), x).equal
    path = tmp_path / "study.yaml"
    path.write_text("profiles:\n" + blocks("A network", "yaml")[0])
    assert yaml.safe_load(path.read_text())
    (job,) = study.jobs("mine", path)
    assert job.params["network"] == "plain"


def test_a_unit(monkeypatch):
    monkeypatch.setattr(units, "UNITS", dict(units.UNITS))
    run(blocks("A unit")[0])
    digits = linl.data.load("digits", limit=128)
    twin = linl.linearize(linl.models.create("mlp", 10, digits.input_size, width=0.125), "leak", start=0.9)
    linl.train.fit(twin, digits, linl.train.recipe("linlnet-digits", 2), verbose=False)
    rows = linl.nonlinearity(twin)
    assert set(rows["kind"]) == {"leak"} and rows["parameter"].between(0, 1).all() and (rows["parameter"] != 0.9).all()
    x = torch.randn(4, *digits.input_size)
    with torch.no_grad():
        torch.testing.assert_close(linl.harden(twin.eval())(x), twin(x))
        for unit in units.units_of(twin).values():
            unit.s.fill_(1.0)
    kinds = units.FixedTwoSlope | nn.LeakyReLU | nn.ReLU
    assert not [m for m in linl.harden(twin).modules() if isinstance(m, kinds)], "linear: gone"


def test_a_bound_rule(monkeypatch):
    monkeypatch.setattr(pieces, "RULES", dict(pieces.RULES))
    net = nn.Sequential(nn.Linear(3, 8), nn.Softshrink(0.3), nn.Linear(8, 6), nn.Softshrink(), nn.Linear(6, 2))
    net = net.double().eval()
    box = linl.Box(-torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="Softshrink"):
        linl.analyse(net, box)
    run(blocks("A bound rule")[0])
    state = linl.analyse(net, box)
    assert set(state.table["state"]) <= {"active", "inactive", "saturated", "unstable"}
    x = box.sample(2000).double()
    first = net[0](x)
    mine = state.table.iloc[:8]
    assert (first >= torch.tensor(mine["lower"].to_numpy()) - 1e-5).all()
    assert (first <= torch.tensor(mine["upper"].to_numpy()) + 1e-5).all()
    small = linl.compress(net, state)
    assert (small(x) - net(x)).abs().max() < 1e-10
    again = linl.verify_stability(net, state).table
    assert not again[["not_proved", "not_shown"]].to_numpy().any()


def test_an_experiment(monkeypatch, tmp_path):
    """The cells in one kernel's names; then its table."""
    parameters, work, table = blocks("An experiment")
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, work)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
    assert linl.notebooks.notebook_defaults(tmp_path / "mine.ipynb")["dataset"] == "digits"
    names = run(parameters + work)
    assert 0 <= names["record"]["figures"]["test_accuracy"] <= 1 and names["run"].finished
    shown = 'source: str = "runs"\nprofile: str = ""\nout_dir: str = ""\nimport linl\n'
    made = run(shown + table)
    assert made["groups"][0]["test_accuracy"].iloc[0] == names["record"]["figures"]["test_accuracy"]
    row = linl.tables.lines(made["groups"], made["line"]).iloc[0]
    assert row["data"] == "digits" and row["run"] == linl.tables.short(names["run"].key)
