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
    def words(done):
        return [row["reached"] for row in targets.seconds_to(done)]

    assert words(raced()) == ["yes", "no"], "LiNLUs at 93 %"
    assert words(raced(gpu="")) == ["not run", "not run"]
    assert words(raced(seeds=4)) == ["no", "no"]
    assert words(raced(seconds=121.0)) == ["no", "no"]
    assert words(raced(accuracy=0.939)) == ["no", "no"]


def test_a_folded_network_must_be_fast_in_every_way_and_keep_its_accuracy():
    def words(times, score):
        network = "blocks 1"
        found = [{"network": network, "way": way, "times": t} for way, t in zip("ab", times, strict=True)]
        run = {**RUN, "network": "m", "dataset": "d", "image_size": 1, "width": 1.0, "within": 0.5, "times": found}
        return targets.folded(pd.DataFrame([{**run, "scores": {"as given": 0.9, network: score}}]))[0]["reached"]

    assert words((1.5, 1.4), 0.896) == "yes"
    assert words((1.5, 1.39), 0.896) == "no"
    assert words((1.5, 1.4), 0.894) == "no"


def test_bounds_need_time_and_tightness():
    def words(ms, width):
        case = {"domain": "d", "bounds": "auto_LiRPA, CROWN, float64", "ms": 2.0, "output": 1.0}
        cases = [case, {**case, "bounds": "linl, CROWN, float64", "ms": ms, "output": width}]
        rows = reached(targets.bounds(pd.DataFrame([{**RUN, "dataset": "d", "hidden": "1", "cases": cases}])))
        assert rows.pop("CROWN, float32, × its time") == "not run"
        return rows["CROWN, float64, × its time"], rows["CROWN, float64, width of the outputs"]

    assert words(1.9, 1.0) == ("yes", "yes")
    assert words(2.1, 1.01) == ("no", "no")


def test_peers():
    one = {
        "part": "norms",
        "what": "a",
        "rival": "torch.fx fuse",
        "targets": [["ours_left", "<=", 0], ["times", ">=", 1]],
    }
    lines = [{**one, "ours_left": 0, "times": 1.2}, {**one, "what": "b", "ours_left": 2, "times": 1.5}]
    lines.append(
        {"part": "regions", "what": "c", "rival": "r", "targets": [["found", ">=", 1]], "found": 1, "times": 0.5}
    )
    lines.append({"part": "start", "what": "import torch, linl", "rival": "r", "targets": [], "beyond_ms": 1100.0})
    run = pd.DataFrame([{**RUN, "networks": "n", "hidden": "h", "rows": lines}])
    words = [(row["measured"], row["reached"]) for row in targets.peers(run)]
    assert words == [
        ("1.2 to 1.5 × as fast", "in 1 of 2"), ("", "not run"), ("", "not run"), ("", "not run"),
        ("0.5 × as fast", "no"), ("1100 ms", "no"),
    ]  # fmt: skip


def test_compression_is_judged_by_the_published_share(monkeypatch):
    """The records' own: neurons are removed as published nearly everywhere."""
    monkeypatch.setenv("LINL_RESULTS", str(PROJECT / "results"))
    done = runs("stability", "records", "")
    neurons, connections = targets.compression(done)
    assert neurons["reached"].startswith("in ") or neurons["reached"] == "yes"
    assert connections["reached"] != "not run"
    none = done.assign(neurons_removed=0.0, connections_removed=0.0)
    fewer = [int(row["reached"].split()[1]) for row in targets.compression(none)]
    full = [int(row["reached"].split()[1]) for row in (neurons, connections)]
    assert all(a < b for a, b in zip(fewer, full, strict=True)), "where the published share is 0, 0 is enough"
