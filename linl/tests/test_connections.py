"""Connections as the papers count them: in networks, and in records that were made before we knew."""

import pandas as pd
import pytest
from torch import nn

from linl.connections import between, count, widths, with_hidden
from linl.results import runs
from linl.sources import PROJECT

COLUMN = "hidden_connections_removed"


def test_counted_in_a_network():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 3)
    )
    assert count(net) == (30 + 20 + 12, 20 + 12)
    assert count(net[1]) == (30, 0), "what leads from no hidden unit isn't counted"


def test_counted_by_widths():
    assert between([6, 5, 4, 3]) == [30, 20, 12]
    assert widths({"network": "mlp", "dataset": "mnist", "hidden": "100 50"}) == [784, 100, 50, 10]
    assert widths({"network": "mlp", "dataset": "cifar100", "hidden": "100"}) == [3072, 100, 100]
    assert widths({"network": "autoencoder", "dataset": "mnist", "hidden": "100 10 100"}) == [784, 100, 10, 100, 784]


def test_older_records_tell_it_by_what_is_left(monkeypatch):
    """Where no layer was folded, it is also the sum over layers of what is left of them: another way to the same."""
    monkeypatch.setenv("LINL_RESULTS", str(PROJECT / "results"))
    done = with_hidden(runs("stability", "records", ""))
    plain = done[(done["dropped"] == 0) & (done["network"] == "mlp")]
    assert len(plain) > 40 and (plain[COLUMN] > 0.2).sum() > 10
    for _, run in plain.iterrows():
        _, *hidden, last = widths(run)
        share = 1 - sum(between([*run["left"], last])) / sum(between([*hidden, last]))
        assert run[COLUMN] == pytest.approx(share, abs=1e-12), run["key"]


def test_where_layers_were_folded_the_first_one_that_is_left_counts():
    run = {"network": "autoencoder", "dataset": "mnist", "hidden": "100 10 100", "left": [0, 0, 2, 784]}
    given, left = 784 * 100 + 1000 + 1000 + 78400, 784 * 2 + 2 * 393  # 391 outputs are constant
    found = with_hidden(pd.DataFrame([run | {"connections_removed": 1 - left / given}]))
    assert found[COLUMN].item() == pytest.approx(1 - 2 * 393 / (1000 + 1000 + 78400), abs=1e-12)


def test_with_no_hidden_unit_left_nothing_leads_from_one():
    run = {"network": "mlp", "dataset": "digits", "hidden": "8 8", "left": [0, 0]}
    given = 64 * 8 + 8 * 8 + 8 * 10
    line, constant = (run | {"connections_removed": 1 - left / given} for left in (64 * 10, 0))
    assert with_hidden(pd.DataFrame([line, constant]))[COLUMN].tolist() == [1.0, 1.0]


def test_a_record_that_has_it_keeps_it():
    run = {"network": "mlp", "dataset": "digits", "hidden": "8 8", "left": [8, 4], "connections_removed": 0.5}
    both = with_hidden(pd.DataFrame([run | {COLUMN: 0.25}, run | {"connections_removed": (8 * 4 + 4 * 10) / 656}]))
    assert both[COLUMN].iloc[0] == 0.25
    assert both[COLUMN].iloc[1] == pytest.approx((8 * 4 + 4 * 10) / 144)
    assert with_hidden(pd.DataFrame()).empty
