"""Targets are judged by their figures, each way."""

import pandas as pd
import pytest

from linl import targets
from linl.data import PROJECT
from linl.results import runs

NONE = pd.DataFrame()
RUN = {
    "key": "linl-a-1", "seed": 0, "finished": "1", "how_gpu": "", "how_cpu": "cpu", "how_threads": 2, "limit": 0,
    "version_torch": "2",
}  # fmt: skip


def reached(rows):
    return {row["what"]: row["reached"] for row in rows}


@pytest.mark.parametrize(
    "judge",
    [targets.units, targets.epochs, targets.seconds_to, targets.peers, targets.folded, targets.last_layer,
     targets.bounds, targets.compression],
)  # fmt: skip
def test_what_was_never_run_says_so(judge):
    rows = judge(NONE)
    assert rows and all(row["reached"] == "not run" and row["measured"] == row["run"] == "" for row in rows)
    assert all(row["what"] and row["rival"] and row["asked"] and row["where"] for row in rows)


def measured(ratio, peak=2.0, error=1e-5, seed=0, chain=1.0):
    """A run of `benchmarks`, every unit alike."""
    run = {**RUN, "seed": seed, "keep_memory": True, "batch": 1, "channels": 1, "side": 1, "chain_mb/nn.ReLU": 1.0}
    for dtype in ("float32", "bfloat16"):
        run[f"{dtype}/nn.ReLU/peak_mb"] = 2.0
        for unit in targets.OURS:
            run[f"chain_mb/{unit}, fused"] = run[f"chain_mb/{unit}, eager"] = chain
            for way, factor in (("fused", 1), ("eager", 2)):
                run[f"{dtype}/{unit}, {way}/ratio"] = factor * ratio
                run[f"{dtype}/{unit}, {way}/peak_mb"] = peak
        for way in ("fused", "eager"):
            run[f"bfloat16/LiNLU, {way}/gradient_error"] = error
    return run


def test_units():
    good = reached(targets.units(pd.DataFrame([measured(1.05)])))
    assert set(good.values()) == {"yes"} and len(good) == 6
    bad = reached(targets.units(pd.DataFrame([measured(1.6, peak=3.0, error=0.01, chain=1.2)])))
    assert set(bad.values()) == {"no"}
    both = targets.units(pd.DataFrame([measured(1.04), measured(1.14, seed=1)]))
    assert both[0]["measured"] == "1.09" and both[0]["reached"] == "yes", "the mean of two days"
    worse = measured(1.0) | {"float32/LiNLU, fused/ratio": 1.3}
    row = targets.units(pd.DataFrame([worse]))[0]
    assert (row["measured"], row["reached"]) == ("1.00 to 1.30", "in 3 of 4")


def test_an_older_run_without_peaks():
    old = {name: value for name, value in measured(1.0).items() if "peak" not in name}
    rows = reached(targets.units(pd.DataFrame([old])))
    assert [name for name, word in rows.items() if word == "not run"] == [
        "memory at the peak of a step, fused, × nn.ReLU"
    ]


def test_epochs():
    rows = [{"network": "vgg16", "ratio": ratio} for ratio in (1.9, 2.1, 2.2)]
    run = {**RUN, "networks": "vgg16", "width": 1.0, "rows": rows}
    assert reached(targets.epochs(pd.DataFrame([{**run, "targets": {"vgg16": 2.0}}]))) == {
        "an epoch of vgg16 with units, × as fast": "yes"
    }
    assert set(reached(targets.epochs(pd.DataFrame([{**run, "targets": {"vgg16": 2.2}}]))).values()) == {"no"}


def raced(accuracy=0.945, seconds=60.0, gpu="a GPU", seeds=5):
    run = {**RUN, "how_gpu": gpu, "network": "resnet18", "dataset": "cifar10", "width": 1.0}
    run |= {"relu_test_accuracy": accuracy, "relu_seconds": seconds, "linl_test_accuracy": 0.93, "linl_seconds": 70.0}
    return pd.DataFrame([{**run, "seed": seed} for seed in range(seeds)])


def test_seconds_to_an_accuracy_count_on_a_gpu_only_with_all_seeds():
    def words(*runs):
        return [row["reached"] for row in targets.seconds_to(pd.concat(runs))]

    assert words(raced()) == ["yes", "no"], "LiNLUs at 93 %"
    assert words(raced(gpu="")) == ["not run", "not run"]
    assert words(raced(seeds=4)) == ["no", "no"]
    assert words(raced(seconds=121.0)) == ["no", "no"]
    assert words(raced(accuracy=0.939)) == ["no", "no"]
    assert words(raced().assign(network="resnet18_cifar")) == ["yes", "no"], "without the paper's max-pool"
    longer = raced(accuracy=0.95, seconds=9000.0, seeds=5).assign(key="paper", finished="2")
    assert words(raced(), longer)[0] == "yes", "a longer schedule, later, takes nothing away"


def test_a_folded_network_must_be_fast_in_every_way_and_keep_its_accuracy():
    def judged(*made):
        scores = {"as given": 0.9, "30% of the channels cut": 0.1}
        times = []
        for name, ways, score in made:
            scores[name] = score
            times += [{"network": name, "way": way, "times": t} for way, t in zip("ab", ways, strict=True)]
        run = {**RUN, "network": "m", "dataset": "d", "image_size": 1, "width": 1.0, "within": 0.5, "times": times}
        return targets.folded(pd.DataFrame([{**run, "scores": scores}]))[0]

    def words(ways, score):
        return judged(("blocks 1", ways, score))["reached"]

    assert words((1.5, 1.4), 0.896) == "yes"
    assert words((1.5, 1.39), 0.896) == "no"
    assert words((1.5, 1.4), 0.894) == "no"
    two = judged(("blocks 1", (1.5, 1.45), 0.896), ("blocks 1 2", (1.9, 1.8), 0.8))
    assert two["reached"] == "yes" and "(blocks 1)" in two["measured"], "the best that kept its accuracy"
    assert judged()["reached"] == "not run" and judged()["run"] == ""


def test_the_last_layer():
    case = {"network": "alexnet", "side": 224, "width": 1.0, "parameters_before": 1000.0}
    for after, word in ((731.0, "yes"), (700.0, "no")):
        (row,) = targets.last_layer(pd.DataFrame([{**RUN, "cases": [{**case, "parameters_after": after}]}]))
        assert row["reached"] == word and row["run"] == "1"
    (row,) = targets.last_layer(pd.DataFrame([{**RUN, "cases": [{**case, "side": 32, "parameters_after": 1.0}]}]))
    assert row["reached"] == "not run"


def test_bounds_need_time_and_tightness():
    def words(ms, width, deep=1.0):
        case = {"domain": "d", "bounds": "auto_LiRPA, CROWN, float64", "ms": 2.0, "output": 1.0}
        cases = [case, {**case, "bounds": "linl, CROWN, float64", "ms": ms, "output": width}]
        residual = [{"bounds": f"{who}, float32", "ms": t, "output": 1.0}
                    for who, t in (("linl, intervals", deep), ("auto_LiRPA, IBP", 2.0))]  # fmt: skip
        run = {**RUN, "dataset": "d", "hidden": "1", "cases": cases, "residual": residual}
        rows = reached(targets.bounds(pd.DataFrame([run])))
        assert rows["CROWN, float32, × its time"] == "not run"
        names = "CROWN, float64, × its time", "CROWN, float64, width of the outputs", "intervals, float32, × its time"
        return [rows[name] for name in names]

    assert words(1.9, 1.0) == ["yes", "yes", "yes"]
    assert words(2.1, 1.01, deep=3.0) == ["no", "no", "no"]


def peers(*lines):
    run = pd.DataFrame([{**RUN, "networks": "n", "hidden": "h", "rows": list(lines)}])
    return {row["what"].partition(":")[0] + row["rival"]: row for row in targets.peers(run)}


NORMS = {"part": "norms", "rival": "torch.fx fuse", "targets": [["ours_left", "<=", 0], ["times", ">=", 1]]}
PLANE = {"part": "regions", "what": "c", "rival": "r", "targets": [["found", ">=", 1]], "found": 1}
START = {"part": "start", "what": "import torch, linl", "rival": "import torch", "targets": []}


def test_peers():
    two = {**NORMS, "what": "a", "ours_left": 0, "times": 1.2}, {**NORMS, "what": "b", "ours_left": 2, "times": 1.5}
    rows = peers(*two, {**PLANE, "times": 0.5}, {**START, "beyond_ms": 1100.0})
    norms = rows["every BatchNorm gonetorch.fx fuse"]
    assert norms["what"] == "every BatchNorm gone: 2 networks" and norms["reached"] == "in 1 of 2"
    assert norms["measured"] == "BatchNorms left 0.00 to 2.00; × as fast 1.20 to 1.50"
    assert rows["regions in a planer"]["reached"] == "no", "found, and slower"
    assert rows["import linl, beyond torch's ownimport torch"]["reached"] == "no"
    assert sum(row["reached"] == "not run" and row["run"] == row["hardware"] == "" for row in rows.values()) == 3


def test_a_rival_that_failed_and_a_start_that_was_not_timed():
    """As the profile smoke leaves them."""
    failed = {**NORMS, "what": "a", "ours_left": 0, "ours_ms": 3.0, "note": "it failed"}
    rows = peers(failed, {**START, "note": "not timed"})
    norms = rows["every BatchNorm gonetorch.fx fuse"]
    assert norms["reached"] == "no" and norms["measured"] == "BatchNorms left 0.00"
    assert rows["import linl, beyond torch's ownimport torch"]["reached"] == "not run"


def test_compression_is_judged_where_the_paper_removes_something(monkeypatch):
    monkeypatch.setenv("LINL_RESULTS", str(PROJECT / "results"))
    done = runs("stability", "records", "")
    for row in targets.compression(done):
        assert row["reached"] != "not run" and "settings" in row["measured"]
    neurons, _ = targets.compression(done.assign(neurons_removed=0.0))
    assert neurons["reached"] == "no"
    all_gone = done.assign(neurons_removed=1.0, hidden_connections_removed=1.0)
    assert [row["reached"] for row in targets.compression(all_gone)] == ["yes", "yes"]


def test_figures_of_two_machines_are_not_mixed():
    slow = {**measured(1.4), "how_gpu": "a GPU"}
    row = targets.units(pd.DataFrame([measured(1.0), slow]))[0]
    assert row["measured"] == "1.00 to 1.40" and row["reached"] == "in 4 of 8"


def test_a_figure_beside_the_limit_shows_on_which_side_it_is():
    assert targets.spread([1.005, 1.1024], limit=1.1) == "1.005 to 1.102"
    assert targets.spread([1.0, 1.1], limit=1.1) == "1.00 to 1.10"
    assert targets.spread([2.0, 2.0]) == "2.00"


def test_quartiles_of_what_was_measured_side_by_side():
    pair = {"ratio_low": 0.7, "ratio": 0.8, "ratio_high": 0.9}
    bounds = {"cases": [{"domain": "d", "bounds": "ours", **pair}, {"domain": "d", "bounds": "theirs"}], "residual": []}
    assert list(targets.quartiles(pd.Series({"experiment": "bounds_speed", **bounds}))) == [("ours, d", 0.7, 0.8, 0.9)]
    times = [{"network": name, "way": "eager", "batch": 1, "times_low": 1, "times": 2, "times_high": 3}
             for name in ("as given", "blocks 2")]  # fmt: skip
    kept = {"experiment": "kept_accuracy", "network": "net", "times": [*times, {"network": "old", "times": 2}]}
    assert list(targets.quartiles(pd.Series(kept))) == [("net, blocks 2: eager, batch 1", 1, 2, 3)]
    rows = [{"network": "a", "ratio": ratio} for ratio in (1.0, 2.0, 3.0)]
    assert list(targets.quartiles(pd.Series({"experiment": "epoch_speed", "rows": rows}))) == [
        ("an epoch of a", 1.5, 2, 2.5)
    ]
