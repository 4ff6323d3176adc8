"""Claims: which runs one is compared with, and what is said where there are none."""

import pandas as pd
import pytest

from linl import claims

HOW = {"how_gpu": "", "how_cpu": "a processor", "how_threads": 1, "limit": 0}


def linlnet(key, epochs, accuracy, linear, finished="1", seed=0, recipe="linlnet", **more):
    row = {"network": "alexnet", "dataset": "cifar10", "width": 1.0, "key": key, "epochs": epochs, "seed": seed}
    row |= {"linl_test_accuracy": accuracy, "linear": linear, "p": [0.5] * (7 - linear) + [1.0] * linear}
    return {**row, "finished": finished, "recipe": recipe, **HOW, **more}


def of_alexnet(rows):
    (found,) = [row for row in claims.linlnet(pd.DataFrame(rows)) if row["claim"] == "alexnet, cifar10"]
    return found


def test_one_setting_the_longest_then_the_newest():
    short, full = linlnet("a-short", 3, 0.60, 0, recipe="linlnet-short"), linlnet("a-full", 200, 0.8771, 2)
    found = of_alexnet([full, short, linlnet("a-full", 200, 0.8775, 2, seed=1)])
    assert found["verdict"] == "reproduced" and found["run"] == "full" and found["seeds"] == 2
    found = of_alexnet([short, linlnet("a-newer", 3, 0.61, 0, "2", recipe="linlnet-short")])
    assert found["run"] == "newer" and found["schedule"] == "3 of 200 epochs, linlnet-short"
    assert found["verdict"] == "accuracy: shorter schedule: -26.71; linear layers: shorter schedule: -2"
    assert of_alexnet([linlnet("a-part", 200, 0.8771, 2, limit=100)])["verdict"] == "not run", "not on all images"
    almost = of_alexnet([{**full, "linear": 1, "p": [0.5] * 5 + [1.0, 0.995]}])
    assert almost["ours"] == "87.71 %, 1 linear (2 from 0.99 on)" and "differs by -1" in almost["verdict"]
    rows = claims.linlnet(pd.DataFrame())
    assert {row["verdict"] for row in rows} == {"not run", "needs ImageNet"} and len(rows) == 7


def test_the_size_of_alexnet_needs_no_training():
    case = {"network": "alexnet", "side": 224, "width": 1.0, "parameters_before": 1000, "parameters_after": 731}
    done = pd.DataFrame([{"cases": [case], "finished": "1", "key": "x-run", "seed": 0, **HOW}])
    found = claims.memory(done)
    assert found["verdict"] == "reproduced" and found["ours"] == "-26.9 % of the parameters" and found["run"] == "run"
    assert claims.memory(pd.DataFrame())["verdict"] == "not run"
    smaller = pd.DataFrame([{"cases": [{**case, "width": 0.125}], "finished": "1", "key": "x-run", "seed": 0, **HOW}])
    assert claims.memory(smaller)["verdict"] == "not run"


def counts(plain, strong, column="l1"):
    rows = [("plain", *plain, 0.0, 0.0), ("other", *strong, 0.1 * (column == "l1"), 0.1 * (column == "eps"))]
    return pd.DataFrame(rows, columns=["way", "lower", "upper", "l1", "eps"]).to_dict("records")


@pytest.mark.parametrize(
    ("settings", "word", "ours"),
    [
        ([counts((10, 10), (5, 5))], "reproduced", "0.50 to 0.50 times as many, 1 settings"),
        ([counts((10, 10), (5, 5)), counts((10, 10), (20, 20))], "in 1 of 2 settings",
         "0.50 to 2.00 times as many, 2 settings"),
        ([counts((10, 10), (5, 5)), counts((10, 900), (20, 20))], "reproduced",
         "0.50 to 0.50 times as many, 1 settings; 1 not counted to the end"),
        ([counts((10, 900), (5, 5))], "not run", ""),
        ([counts((10, 10), (5, 5), "eps")], "not run", ""),
    ],
)  # fmt: skip
def test_bounds_decide_nothing(settings, word, ours):
    done = pd.DataFrame([{"key": f"k-{i}", "seed": 0, "counts": c, **HOW} for i, c in enumerate(settings)])
    found = claims.regions(done)[0]
    assert (found["verdict"], found["ours"]) == (word, ours)


def test_a_gain_on_a_shorter_schedule_says_so():
    table = [{"arm": arm, "cycle": 3, "test_accuracy": a} for arm, a in (("X", 0.5), ("AP-Lite", 0.51))]
    run = {"key": "k-a", "seed": 0, "dataset": "cifar10", "network": "resnet20", "cycles": 3, "epochs": 2, **HOW}
    run["recipe"] = "ap"
    found = {row["claim"]: row for row in claims.pruning(pd.DataFrame([{**run, "cycles_table": table}]))}
    assert found["accuracy, CIFAR-10"]["verdict"] == "shorter schedule: -2.00"
    assert found["accuracy, CIFAR-10"]["schedule"] == "resnet20, 3 cycles of 2 epochs"
    assert found["accuracy, ImageNet"]["verdict"] == "needs ImageNet"
    full = pd.DataFrame([{**run, "cycles": 25, "epochs": 50, "cycles_table": table}])
    assert claims.pruning(full)[0]["verdict"] == "differs by -2.00"
    assert claims.pruning(full.assign(recipe="prune-short"))[0]["verdict"] == "another recipe: -2.00"
    both = pd.concat([full, pd.DataFrame([{**run, "key": "k-b", "score": "lamp", "cycles_table": table}])])
    assert claims.pruning(both)[0]["verdict"] == "shorter schedule: -2.00", "one of the two is"
    assert "25 cycles of 50 epochs; resnet20, 3 cycles" in claims.pruning(both)[0]["schedule"]


def learnt(layers, depth, **more):
    run = {
        "key": f"k-{layers}",
        "seed": 0,
        "dataset": "cifar10",
        "network": f"resnet{layers}",
        "width": 1.0,
        "finished": "1",
    }
    run |= {
        "epochs": 100,
        "recipe": "layer-folding",
        "depth_published": depth,
        "activations": layers - 1,
        **claims.AS_LEARNT,
    }
    return pd.DataFrame([{**run, **HOW, **more}])


def test_similar_depths_are_those_of_three_networks_within_two_layers():
    def found(*runs):
        rows = claims.layer_folding(pd.concat(runs))
        return next(row for row in rows if row["claim"] == "similar depths, cifar10")

    two = learnt(44, 9), learnt(20, 11)
    assert found(*two)["verdict"] == "not run"
    three = found(*two, learnt(32, 10))
    assert (
        three["verdict"] == "reproduced"
        and three["ours"] == "depths: resnet20 11 of 20, resnet32 10 of 32, resnet44 9 of 44"
    )
    assert found(*two, learnt(32, 12))["verdict"] == "not reproduced"
    assert found(*two, learnt(32, 12, epochs=12))["verdict"] == "shorter schedule: not reproduced"
