"""Claims: which runs one is compared with, and what is said where there are none."""

import pandas as pd
import pytest

from linl import (
    claims,
    folding_claims,
    proof_claims,
    pruning_claims,
    region_claims,
    stability_claims,
    training_claims,
    verdicts,
)
from linl.published_proofs import A_UNIT, ONE

HOW = {"how_gpu": "", "how_cpu": "a processor", "how_threads": 1, "limit": 0}


def linlnet(key, epochs, accuracy, linear, finished="1", seed=0, recipe="linlnet", **more):
    row = {"network": "alexnet", "dataset": "cifar10", "width": 1.0, "key": key, "epochs": epochs, "seed": seed}
    row |= {"linl_test_accuracy": accuracy, "linear": linear, "p": [0.5] * (7 - linear) + [1.0] * linear}
    row |= {"relu_test_accuracy": accuracy, "p_last": 1.0 if linear else 0.6}
    return {**row, "finished": finished, "recipe": recipe, **HOW, **more}


def of_alexnet(rows):
    (found,) = [row for row in training_claims.linlnet(pd.DataFrame(rows)) if row["claim"] == "alexnet, cifar10"]
    return found


def test_one_setting_the_longest_then_the_newest():
    short, full = linlnet("a-short", 3, 0.60, 0, recipe="linlnet-short"), linlnet("a-full", 200, 0.8771, 2)
    found = of_alexnet([full, short, linlnet("a-full", 200, 0.8775, 2, seed=1)])
    assert found["verdict"] == "reproduced" and found["run"] == "full" and found["seeds"] == 2
    found = of_alexnet([short, linlnet("a-newer", 3, 0.61, 0, "2", recipe="linlnet-short")])
    assert found["run"] == "newer" and found["schedule"] == "3 of 200 epochs, linlnet-short"
    assert found["verdict"] == "accuracy: -26.71, on a shorter schedule; linear layers: -2, on a shorter schedule"
    assert of_alexnet([linlnet("a-part", 200, 0.8771, 2, limit=100)])["verdict"] == "not run", "not on all images"
    almost = of_alexnet([{**full, "linear": 1, "p": [0.5] * 5 + [1.0, 0.995]}])
    assert almost["ours"] == "87.71 %, 1 linear (2 from 0.99 on)" and "differs by -1" in almost["verdict"]
    seeds = of_alexnet([full, {**full, "seed": 1, "linear": 1, "p": [0.5] * 5 + [1.0, 0.995]}])
    assert (
        seeds["ours"] == "87.71 ± 0.00 %, 2/1 linear (2 from 0.99 on)"
        and "linear layers: differs by -0.5" in seeds["verdict"]
    )
    rows = training_claims.linlnet(pd.DataFrame())
    assert {row["verdict"] for row in rows} == {"not run", "needs ImageNet"} and len(rows) == 9


def test_the_size_of_alexnet_needs_no_training():
    case = {"network": "alexnet", "side": 224, "width": 1.0, "parameters_before": 1000, "parameters_after": 731}
    done = pd.DataFrame([{"cases": [case], "finished": "1", "key": "x-run", "seed": 0, **HOW}])
    found = training_claims.memory(done)
    assert found["verdict"] == "reproduced" and found["ours"] == "-26.9 % of the parameters" and found["run"] == "run"
    assert training_claims.memory(pd.DataFrame())["verdict"] == "not run"
    smaller = pd.DataFrame([{"cases": [{**case, "width": 0.125}], "finished": "1", "key": "x-run", "seed": 0, **HOW}])
    assert training_claims.memory(smaller)["verdict"] == "not run"


def counted(key, plain, strong, column="l1", **more):
    """A setting's runs: of each seed the regions of a plain and of a strongly trained network, (lower, upper) each."""
    rows = []
    for seed, (before, after) in enumerate(zip(plain, strong, strict=True)):
        how = {"way": ["plain", "other"], "l1": [0.0, 0.1 * (column == "l1")], "eps": [0.0, 0.1 * (column == "eps")]}
        ends = {"lower": [before[0], after[0]], "upper": [before[1], after[1]]}
        found = pd.DataFrame({**how, **ends, "unstable": [8, 4 - seed % 2], "accuracy": [0.9, 0.9], **more})
        rows.append({"key": f"k-{key}", "seed": seed, "counts": found.to_dict("records"), "shallow_sizes": [], **HOW})
    return rows


EVEN, HALF, TWICE = [(10, 10)] * 3, [(5, 5), (6, 6), (4, 4)], [(20, 20), (21, 21), (19, 19)]
ANY = [(2, 2), (60, 60), (10, 10)]


@pytest.mark.parametrize(
    ("settings", "word", "said"),
    [
        ([(EVEN, HALF)], "reproduced", "0.50 to 0.50 times as many in 1 settings; fewer in 1, more in 0, not told"),
        ([(EVEN, HALF), (EVEN, TWICE)], "in 1 of 2 settings", "fewer in 1, more in 1, not told apart in 0"),
        ([(EVEN, ANY)], "not reproduced", "fewer in 0, more in 0, not told apart in 1"),
        ([(EVEN, HALF), ([(10, 900)] * 3, TWICE)], "reproduced", "1 more with too few seeds or not counted to the end"),
        ([([(10, 900)] * 3, HALF)], "not run", ""),
        ([(EVEN[:2], HALF[:2])], "not run", ""),
    ],
)  # fmt: skip
def test_regions_are_fewer_only_if_seeds_tell(settings, word, said):
    done = pd.DataFrame([run for i, (a, b) in enumerate(settings) for run in counted(i, a, b)])
    found = region_claims.regions(done)[0]
    assert found["claim"] == "l1 makes fewer regions" and found["verdict"] == word and said in found["ours"]
    assert region_claims.regions(done)[1]["verdict"] == "not run", "no adversarial training among them"


def test_a_network_that_learnt_nothing_is_told():
    done = pd.DataFrame(counted(0, EVEN, HALF, "eps", accuracy=[0.9, 0.1]))
    found = region_claims.regions(done)[1]
    assert found["verdict"] == "reproduced" and found["ours"].endswith("accuracy lost, over 10 points, in 1")
    stable = region_claims.regions(done)[3]
    assert stable["claim"] == "adversarial training makes more units stable" and stable["verdict"] == "reproduced"


def test_a_direction_needs_seeds_that_agree():
    tell = region_claims.direction
    assert tell([-1.0, -1.1, -0.9]) == -1 and tell([1.0, 1.1, 0.9]) == 1 and tell([-2.0, 1.0, 0.4]) == 0
    assert tell([-1.0, -1.0]) == 0 and tell([-1.0] * 3) == -1 and tell([0.0] * 3) == 0


def shallow(exact, error=1e-16):
    errors = [{"sharpness": 10.0**i, "exact": e, "error_exact": error, "way": "plain"} for i, e in enumerate(exact)]
    sizes = [{"first": 3, "second": 2, "first, all patterns": 30, "second, all patterns": 20}]
    run = {"key": "k-a", "seed": 0, "counts": counted(0, EVEN, EVEN)[0]["counts"], **HOW}
    return pd.DataFrame([{**run, "shallow_errors": errors, "shallow_sizes": sizes}])


def test_two_hidden_layers_are_judged_by_where_they_are_equal():
    equal, smaller = region_claims.regions(shallow([0.1, 0.5, 0.99]))[-2:]
    assert equal["verdict"] == "reproduced" and equal["ours"].startswith(
        "equal at 99.0 to 99.0 % of points for H = 100,"
    )
    assert smaller["verdict"] == "reproduced" and smaller["ours"] == "10 to 10 % of the units, 1 networks"
    assert region_claims.regions(shallow([0.5, 0.4]))[-2]["verdict"] == "not reproduced", "less with a greater H"
    assert region_claims.regions(shallow([0.5, 0.9], 1e-3))[-2]["verdict"] == "not reproduced", (
        "promised, and not equal"
    )


def test_a_smaller_domain_is_judged_by_networks_with_relus():
    def run(near, way="ReLU"):
        states = [{"way": way, "domain": name, "layer": "a", "linear": 0.0, "active": share, "inactive": 0.0}
                  for name, share in (("all pixels", 0.1), ("around one", near))]  # fmt: skip
        return {"key": "k-a", "seed": 0, "states": states, **HOW}

    (found,) = region_claims.domains(pd.DataFrame([run(0.4)]))
    assert found["verdict"] == "reproduced" and found["ours"].startswith("10 to 10 % stable on all images, 40 to 40 %")
    assert region_claims.domains(pd.DataFrame([run(0.1)]))[0]["verdict"] == "not reproduced"
    assert region_claims.domains(pd.DataFrame([run(0.4, "LiNLU")]))[0]["verdict"] == "not run"


def pruned(key="a", data="cifar10", x=(0.6, 0.5), lite=0.51, dynamic=(0.5, 0.4), **how):
    """A run of `activating_pruning`: X's accuracy and dynamic dead rate before and after, AP-Lite's accuracy after."""
    table = [{"arm": "X", "cycle": 3 * i, "test_accuracy": x[i], "dynamic": dynamic[i]} for i in (0, 1)]
    table.append({"arm": "AP-Lite", "cycle": 3, "test_accuracy": lite, "dynamic": dynamic[1]})
    run = {
        "key": f"k-{key}",
        "seed": 0,
        "dataset": data,
        "network": "resnet20",
        "cycles": 25,
        "epochs": 50,
        "rate": 0.2,
    }
    run |= {"ap": 0.02, "rewind": "weights", "recipe": "ap", "weights": "", "cycles_table": table, **HOW}
    return {**run, **how}


def gain(*runs):
    return next(r for r in pruning_claims.pruning(pd.DataFrame(runs)) if r["claim"] == "gain in accuracy, CIFAR-10")


def test_a_gain_that_is_unlike_says_so():
    found = gain(pruned(cycles=3, epochs=2))
    assert found["verdict"] == "-2.00, on a shorter schedule"
    assert found["schedule"] == "resnet20, 3 cycles of 2 epochs, p 0.2, q 0.02, rewound"
    assert gain(pruned())["verdict"] == "differs by -2.00" and gain(pruned(lite=0.55))["verdict"] == "reproduced"
    assert gain(pruned(lite=0.4))["verdict"] == "no gain"
    unlike = {"recipe": "prune-short"}, {"rate": 0.5}, {"ap": 0.05}, {"rewind": "fine-tune"}
    assert {gain(pruned(**how))["verdict"] for how in unlike} == {"-2.00, by another recipe"}
    tuned = gain(pruned(rewind="fine-tune", weights="w.th", lite=0.4))
    assert (
        tuned["schedule"] == "resnet20, public weights, 25 cycles of 50 epochs, p 0.2, q 0.02, fine-tuned, not rewound"
    )
    assert tuned["verdict"] == "no gain, by another recipe"
    both = gain(pruned(), pruned("b", cycles=3, epochs=2))
    assert both["verdict"] == "-2.00, on a shorter schedule", "one of the two is"
    assert "; " in both["schedule"]
    found = {row["claim"]: row["verdict"] for row in pruning_claims.pruning(pd.DataFrame([pruned()]))}
    assert found["gain in accuracy, ImageNet"] == "needs ImageNet" and found["gain in accuracy, CIFAR-100"] == "not run"


def test_the_dead_rate_falls_or_doesnt():
    claim = lambda *runs: pruning_claims.pruning(pd.DataFrame(runs))[-1]  # noqa: E731
    falls, rises = pruned(), pruned("b", dynamic=(0.5, 0.6))
    assert claim(falls)["verdict"] == "reproduced" and claim(rises)["verdict"] == "not reproduced"
    assert claim(falls, rises)["verdict"] == "in 1 of 2 settings"
    assert claim(falls, {**rises, "key": "k-a", "seed": 1})["verdict"] == "not reproduced", "in one seed it rises"
    assert claim(pruned(data="digits"))["verdict"] == "not run", "published data, not ours"


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
        "weights": "",
        "pretrain_epochs": 20,
        "start_test_accuracy": 0.9,
        "epochs": 100,
        "recipe": "layer-folding",
        "depth_published": depth,
        "activations": layers - 1,
        **folding_claims.AS_LEARNT,
    }
    return pd.DataFrame([{**run, **HOW, **more}])


def test_similar_depths_are_those_of_three_networks_within_two_layers():
    def found(*runs):
        rows = folding_claims.layer_folding(pd.concat(runs))
        return next(row for row in rows if row["claim"] == "similar depths, cifar10")

    two = learnt(44, 9), learnt(20, 11)
    assert found(*two)["verdict"] == "not run"
    three = found(*two, learnt(32, 10))
    assert (
        three["verdict"] == "reproduced"
        and three["ours"] == "depths: resnet20 11 of 20, resnet32 10 of 32, resnet44 9 of 44"
    )
    assert found(*two, learnt(32, 12))["verdict"] == "not reproduced"
    assert found(*two, learnt(32, 12, epochs=12))["verdict"] == "not reproduced, on a shorter schedule"


def test_a_learnt_depth_is_beside_the_table_and_the_checkpoint():
    rows = {row["claim"]: row for row in folding_claims.layer_folding(learnt(20, 10))}
    beside = rows["resnet20, cifar10, learnt"], rows["resnet20, cifar10, learnt, the published checkpoint"]
    assert [row["verdict"] for row in beside] == ["differs by +1", "reproduced"]
    assert beside[0]["schedule"].startswith("λ 0.25, from 90.00 % (trained here, 20 epochs); 100 of 100 epochs")
    public = folding_claims.layer_folding(learnt(20, 10, weights="w.th"))
    assert any("from 90.00 % (public weights)" in row["schedule"] for row in public)
    none = {row["claim"]: row["verdict"] for row in folding_claims.layer_folding(pd.DataFrame())}
    assert none["resnet20, cifar10, learnt, the published checkpoint"] == "not run"
    assert "needs ImageNet" in none.values()


def test_a_published_twin_and_the_last_layer():
    mlp = {"network": "mlp", "relu_test_accuracy": 0.6770}
    rows = {row["claim"]: row for row in training_claims.linlnet(pd.DataFrame([linlnet("a-x", 200, 0.68, 1, **mlp)]))}
    assert (
        rows["mlp with ReLUs, cifar10"]["verdict"] == "reproduced"
        and rows["mlp with ReLUs, cifar10"]["ours"] == "67.70 %"
    )
    last = rows["the last hidden layer ends linear"]
    assert (last["verdict"], last["ours"], last["settings"]) == ("reproduced", "its p: mlp 1.000", 4)
    bent = training_claims.linlnet(pd.DataFrame([linlnet("a-x", 3, 0.68, 0, **mlp)]))[-1]
    assert bent["verdict"] == "not reproduced, on a shorter schedule"


def test_hardware_is_that_of_every_seed():
    one, two = ({"key": "k-a", "how_cpu": "a", "how_gpu": "", "how_threads": n} for n in (1, 2))
    told = claims.row("s", "c", "p", "w", "reproduced", "o", "how", pd.DataFrame([one, two]), pd.DataFrame([one]))
    assert told["hardware"] == "a, 1 thread; a, 2 threads" and told["seeds"] == "1 to 2" and told["settings"] == 1


def test_a_schedule_tells_images_and_precision_where_they_are_known():
    run = pd.Series({"epochs": 3, "recipe": "r", "train_images": 45000, "how_precision": "bf16"})
    assert claims.Trained(200, ("r",)).told(run) == "3 of 200 epochs, r, 45,000 images, bf16"
    assert claims.Trained(200, ("r",)).told(run.drop("train_images")) == "3 of 200 epochs, r, bf16"


# --- exact compression -----------------------------------------------------------------------------


def stable(key, hidden="100 100", l1=0.0002, seed=0, data="mnist", network="mlp", by_layer=None, **figures):
    """A run of `stability`: half of each layer stable, unless told otherwise."""
    widths = [int(width) for width in hidden.split()]
    half = {"inactive": [w // 2 for w in widths], "unstable": [w - w // 2 for w in widths]}
    half |= {name: [0] * len(widths) for name in ("active", "undecided")}
    states = by_layer or half
    run = {"key": f"k-{key}", "seed": seed, "dataset": data, "network": network, "hidden": hidden, "l1": l1, **HOW}
    run |= {
        "adversary": "none",
        "stability_loss": 0.0,
        "epochs": 120,
        "finished": "1",
        "by_layer": states,
        "units": sum(widths),
    }
    run |= {"recipe": "stability" if data == "mnist" else "stability-cifar", "left": states["unstable"], "seconds": 2.0}
    run |= {name: sum(states[name]) for name in ("inactive", "active", "undecided")}
    run |= {"test_accuracy": 0.98, "test_loss": 0.1, "neurons_removed": 0.18, "hidden_connections_removed": 0.31}
    return {**run, "connections_removed": 0.25, **figures}


def said(*runs):
    return {row["claim"]: row for row in stability_claims.stability(pd.DataFrame(runs))}


def test_a_row_of_the_appendix_and_one_for_the_rest():
    rows = said(stable("a"))
    found, rest = rows["mlp 100-100, mnist, l1 0.0002"], rows["mlp 100-100, mnist, 16 more of l1"]
    assert found["verdict"] == "reproduced" and rest["settings"] == 16 and found["settings"] == 1
    assert found["ours"] == "accuracy 98.00; neurons 18.00; connections 31.00"
    off = said(stable("a", neurons_removed=0.21))["mlp 100-100, mnist, l1 0.0002"]
    assert off["verdict"] == "accuracy, connections: reproduced; neurons: differs by +3.00"
    fine = said(
        stable("a", "200 200", 0.00005, neurons_removed=0.004, hidden_connections_removed=0.002, test_accuracy=0.9815)
    )
    assert fine["mlp 200-200, mnist, l1 5e-05"]["verdict"].endswith("neurons: differs by +0.30"), "printed to a tenth"
    open_ = said(stable("a", undecided=7))["mlp 100-100, mnist, l1 0.0002"]
    assert open_["ours"].endswith("; 7 units undecided")


def test_what_the_paper_says_in_words():
    none = {row["claim"]: row for row in stability_claims.stability(pd.DataFrame())}
    claim = "removed at no loss of accuracy, mnist"
    assert {none[name]["verdict"] for name in (claim, "no l1, hardly a stable unit")} == {"not run"}
    without = stable("b", l1=0.0, inactive=0, neurons_removed=0.0, hidden_connections_removed=0.0)
    rows = said(stable("a"), without)
    assert rows["no l1, hardly a stable unit"]["verdict"] == "reproduced"
    assert said({**without, "inactive": 3})["no l1, hardly a stable unit"]["verdict"] == "not reproduced"
    assert rows[claim]["verdict"] == "neurons: differs by -2.00; connections: differs by -9.00"
    assert "l1 above 0.0002 not run" in rows[claim]["ours"]
    more = said(stable("a", neurons_removed=0.2, hidden_connections_removed=0.4), without)
    assert more[claim]["verdict"] == "reproduced"
    assert said(stable("a", test_accuracy=0.9), without)[claim]["verdict"] == "not run", "it lost accuracy"
    assert said(stable("a"))[claim]["verdict"] == "not run", "nothing to compare its accuracy with"


def test_whole_layers_minutes_and_autoencoders():
    whole = {"inactive": [100, 50], "active": [0, 0], "unstable": [0, 50], "undecided": [0, 0]}
    claim = "no classifier's whole layer is stable"
    assert said(stable("a"))[claim]["verdict"] == "reproduced"
    assert said(stable("a", by_layer=whole))[claim]["verdict"] == "not reproduced"
    deep = said(
        stable("a", "800 800", 0.000075, seconds=100.0), stable("a", "800 800", 0.000075, seed=1, seconds=700.0)
    )
    assert deep["mlp 800-800: exact states"]["verdict"] == "in 1 of 2 networks"
    assert deep["mlp 100-100-100-100-100: exact states"]["verdict"] == "not run"
    left = said(stable("a", "800 800", 0.000075, seconds=100.0, undecided=2))["mlp 800-800: exact states"]
    assert left["verdict"] == "not reproduced" and left["ours"] == "100.0 s; 2 units undecided"
    all_ = {"inactive": [100, 10, 100, 0], "active": [0] * 4, "unstable": [0, 0, 0, 784], "undecided": [0] * 4}
    some = {**all_, "inactive": [100, 10, 99, 0], "undecided": [0, 0, 1, 0]}

    def seeds(*states):
        how = {"network": "autoencoder", "recipe": "stability-autoencoder"}
        runs = [stable("a", "100 10 100", seed=i, by_layer=state, **how) for i, state in enumerate(states)]
        return said(*runs)["autoencoders, l1 0.0002: all hidden layers stable"]["verdict"]

    assert seeds(all_, all_, some) == "reproduced" and seeds(all_, some) == "not reproduced"


def raced(*seconds, data="mnist", late=(), **figures):
    """A run of `proof_speed`: of each network the seconds of a program a unit, of one program, and of linl."""
    ways = dict(zip((A_UNIT, ONE, "linl"), range(3), strict=True))
    cases = [
        {"name": f"network {n}", "way": way, "seconds": took[place], "undecided": int((n, way) in late)}
        for n, took in enumerate(seconds)
        for way, place in ways.items()
    ]
    run = {"key": "mnist-a-1", "seed": 0, "dataset": data, "hidden": "100 100", "limit": 0, "cases": cases}
    run |= {"recipe": "stability" if data == "mnist" else "stability-cifar", "epochs": 120, "finished": "1"}
    return pd.DataFrame([{**run, "how_cpu": "p", "how_threads": 1, "how_gpu": "", **figures}])


def test_one_program_for_all_units_or_one_a_unit():
    on_mnist, on_cifar = proof_claims.faster(raced((100, 1, 0.1), (300, 2, 0.1), (80, 1, 0.1)))
    assert on_mnist["ours"] == "80 to 150 ×; linl: 800 to 3e+03 ×; 3 networks" and on_cifar["verdict"] == "not run"
    assert on_mnist["verdict"] == "reproduced, by another solver"
    slower = proof_claims.faster(raced((100, 10, 0.5), data="cifar10"))[1]
    assert slower["ours"] == "10 ×; linl: 200 ×; 1 network"
    assert slower["verdict"] == "not reproduced, by another solver"
    assert slower["schedule"] == "120 of 120 epochs, stability-cifar"
    some = proof_claims.faster(raced((100, 1, 0.1), (100, 50, 0.1)))[0]["verdict"]
    assert some == "in 1 of 2 networks, by another solver" and verdicts.kind(some) == "another solver"


def test_a_way_that_ran_out_of_time_is_no_winner():
    unit = proof_claims.faster(raced((600, 6, 1), late=[(0, A_UNIT)]))[0]
    assert unit["ours"] == "at least 100 ×; linl: at least 600 ×; 1 network"
    assert unit["verdict"] == "reproduced, by another solver"
    one = proof_claims.faster(raced((60000, 600, 1), (5000, 10, 1), late=[(0, ONE)]))[0]
    assert one["ours"] == "at most 100 to 500 ×; linl: 5e+03 to 6e+04 ×; 2 networks"
    assert one["verdict"] == "in 1 of 2 networks, by another solver", "100 × is the most that it can be"
    neither = proof_claims.faster(raced((600, 600, 1), (80, 1, 1), late=[(0, ONE), (0, A_UNIT)]))[0]
    assert neither["ours"] == "80 ×; linl: 80 ×; 1 network"
    none = proof_claims.faster(raced((600, 600, 1), late=[(0, ONE), (0, A_UNIT)]))[0]
    assert none["verdict"] == "not reproduced, by another solver" and none["run"]
    ours = proof_claims.faster(raced((100, 1, 600), late=[(0, "linl")]))[0]["ours"]
    assert ours == "100 ×; linl: at most 0.167 ×; 1 network"


def test_leo_is_compared_by_layers():
    rows = stability_claims.leo(pd.DataFrame([stable("a", l1=0.0001, left=[82, 89], test_accuracy=0.9814)]))
    assert [row["settings"] for row in rows] == [1, 8] and rows[1]["verdict"] == "not run"
    assert rows[0]["ours"] == "accuracy 98.14; units 18.0 and 11.0"
    assert rows[0]["verdict"] == (
        "accuracy, units of layer 2: reproduced, by another recipe; units of layer 1: -0.6, by another recipe"
    )
    assert [row["verdict"] for row in stability_claims.leo(pd.DataFrame())] == ["not run"]
