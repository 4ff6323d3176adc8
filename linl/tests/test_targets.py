"""Targets are judged by their figures, each way, and by every run."""

import pandas as pd
import pytest

from linl import judging, targets
from linl.data import PROJECT
from linl.results import runs

NONE = pd.DataFrame()
RUN = {
    "key": "linl-a-1", "seed": 0, "finished": "1", "how_gpu": "", "how_cpu": "cpu", "how_threads": 2, "limit": 0,
    "version_torch": "2",
}  # fmt: skip


def reached(rows):
    return {row["what"]: row["reached"] for row in rows}


def again(run, **other):
    """The same run once more, with other figures."""
    return pd.DataFrame([run, {**run, "seed": 1, "finished": "2", **other}])


@pytest.mark.parametrize(
    "judge",
    [targets.units, targets.epochs, targets.seconds_to, targets.peers, targets.folded, targets.last_layer,
     targets.bounds, targets.compression, targets.solver_times, targets.study],
)  # fmt: skip
def test_what_was_never_run_says_so(judge):
    rows = judge(NONE)
    assert rows and all(row["reached"] == "not run" for row in rows)
    assert all(row["measured"] == row["run"] == row["runs"] == "" and row["what"] and row["asked"] for row in rows)
    assert all(row["rival"] and row["where"] for row in rows)


def test_every_row_links_its_table_and_the_notebook_that_measured_it():
    tables = [targets.units, targets.epochs, targets.seconds_to, targets.peers, targets.folded, targets.last_layer,
              targets.bounds, targets.compression, targets.solver_times, targets.study]  # fmt: skip
    for row in (row for judge in tables for row in judge(NONE)):
        path = (PROJECT / "results" / "tables" / row["how"].partition("](")[2].rstrip(")")).resolve()
        assert path.is_file() and path.suffix == ".ipynb", row["how"]


# --- the rule --------------------------------------------------------------------------------------


def test_every_run_of_the_newest_setting_on_its_machine_counts():
    made = [("old", "1", ""), ("new", "2", ""), ("new", "4", ""), ("new", "3", "a GPU")]
    done = pd.DataFrame([{**RUN, "key": key, "finished": at, "how_gpu": gpu} for key, at, gpu in made])
    assert judging.every(done)["finished"].tolist() == ["2", "4"]
    assert judging.every(NONE).empty


def test_the_worst_run_decides_and_the_range_is_told():
    def of(run):
        yield "a", {"middle": run["a"], "low": run["a"] - 1, "high": run["a"] + 1}
        yield "b", {"middle": run["b"]}
        yield "c", {"middle": float("nan")}

    done = pd.DataFrame([{**RUN, "a": 3.0, "b": 5.0}, {**RUN, "a": 7.0, "b": 5.5}])
    found = judging.figures(done, of)
    assert found["figure"].tolist() == ["a", "b", "a", "b"], "what wasn't measured is left out"
    row = judging.judged("w", "r", "<=", 6.0, "benchmark-units", found, done, unit=" ms", digits=1)
    assert row["measured"] == "3.0 to 7.0 ms" and row["asked"] == "≤ 6 ms"
    assert row["middle half of pairs"] == "2 to 8", "from the lowest quartile of any run to the highest"
    assert row["reached"] == "in 1 of 2" and row["runs"] == 2, "a was reached in one run of two: it isn't"
    assert judging.judged("w", "r", ">=", 3.0, "benchmark-units", found, done)["reached"] == "yes"


# --- units and training ----------------------------------------------------------------------------


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
    assert (both[0]["measured"], both[0]["reached"], both[0]["runs"]) == ("1.04 to 1.14", "no", 2)
    worse = measured(1.0) | {"float32/LiNLU, fused/ratio": 1.3}
    row = targets.units(pd.DataFrame([worse]))[0]
    assert (row["measured"], row["reached"]) == ("1.00 to 1.30", "in 3 of 4")


def test_where_the_control_is_off_the_units_row_says_so():
    def told(low):
        control = {f"float32/nn.ReLU/ratio{end}": ratio for end, ratio in (("", 1.1), ("_low", low), ("_high", 1.2))}
        return targets.units(pd.DataFrame([measured(1.05) | control]))[0]["measured"]

    assert told(0.9) == "1.05"
    assert told(1.05) == "1.05; nn.ReLU beside itself isn't 1 within its middle half in 1 of 1"


def test_an_older_run_without_peaks():
    old = {name: value for name, value in measured(1.0).items() if "peak" not in name}
    rows = reached(targets.units(pd.DataFrame([old])))
    assert [name for name, word in rows.items() if word == "not run"] == [
        "memory at the peak of a step, fused, × nn.ReLU"
    ]


def test_figures_of_two_machines_are_not_mixed():
    slow = {**measured(1.4), "how_gpu": "a GPU"}
    row = targets.units(pd.DataFrame([measured(1.0), slow]))[0]
    assert row["measured"] == "1.00 to 1.40" and row["reached"] == "in 4 of 8"
    assert row["hardware"] == "cpu, 2 threads; a GPU, 2 threads"


def raced_epochs(ratios=(1.9, 2.1, 2.2), gpu=""):
    rows = [{"network": "vgg16", "ratio": ratio, "linl": 2.0, "usual": 2 * ratio} for ratio in ratios]
    kept = {"networks": "vgg16", "width": 1.0, "seen": 1000, "reading": {"linl": 50_000.0, "usual": 1.0}}
    return {**RUN, **kept, "how_gpu": gpu, "rows": rows, "targets": {"vgg16": 2.0}}


def test_epochs():
    name = "an epoch of vgg16 with units, × as fast"
    assert reached(targets.epochs(pd.DataFrame([raced_epochs()])))[name] == "yes"
    assert reached(targets.epochs(pd.DataFrame([raced_epochs() | {"targets": {"vgg16": 2.2}}])))[name] == "no"
    row = targets.epochs(again(raced_epochs(), rows=raced_epochs((1.8, 1.9, 1.95))["rows"]))[0]
    assert (row["reached"], row["measured"], row["runs"]) == ("no", "1.90 to 2.10", 2)
    assert row["middle half of pairs"] == "1.85 to 2.15"


def test_the_loader_is_judged_on_a_gpu_alone():
    def loader(run):
        return targets.epochs(pd.DataFrame([run]))[-1]

    assert loader(raced_epochs())["reached"] == "not run"
    row = loader(raced_epochs(gpu="a GPU"))
    assert (row["measured"], row["reached"]) == ("0.0100", "yes")
    slow = raced_epochs(gpu="a GPU") | {"reading": {"linl": 10_000.0, "usual": 1.0}}
    assert (loader(slow)["measured"], loader(slow)["reached"]) == ("0.0500", "no")


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


# --- size ------------------------------------------------------------------------------------------


def refitted(*made):
    """A run of `kept_accuracy`: networks with their times in two ways and their accuracy."""
    scores, times = {"as given": 0.9}, []
    for name, ways, score in made:
        scores[name] = score
        times += [{"network": name, "way": way, "batch": 1, "times": t, "times_low": t - 0.1, "times_high": t + 0.1}
                  for way, t in zip("ab", ways, strict=True)]  # fmt: skip
    kept = {"network": "m", "dataset": "d", "image_size": 1, "width": 1.0, "within": 0.5}
    return {**RUN, **kept, "times": times, "scores": scores}


def test_a_folded_network_must_be_fast_in_every_way_and_keep_its_accuracy():
    def judged(*made):
        return targets.folded(pd.DataFrame([refitted(*made)]))[0]

    def words(ways, score):
        return judged(("blocks 1", ways, score))["reached"]

    assert words((1.5, 1.4), 0.896) == "yes"
    assert words((1.5, 1.39), 0.896) == "no"
    assert words((1.5, 1.4), 0.894) == "no"
    two = judged(("blocks 1", (1.5, 1.45), 0.896), ("blocks 1 2", (1.9, 1.8), 0.8))
    assert two["reached"] == "yes" and "(blocks 1)" in two["measured"], "the best that kept its accuracy"
    assert two["middle half of pairs"] == "1.35 to 1.55", "of its slowest way"
    slow = judged(("blocks 1", (1.5, 1.2), 0.896), ("blocks 1 2", (1.9, 1.8), 0.8), ("blocks 3", (1.6, 1.5), 0.85))
    assert slow["measured"] == "1.20 for 0.4 points (blocks 1); 1.50 for 5.0 points (blocks 3)"
    assert slow["reached"] == "no" and slow["middle half of pairs"] == "1.10 to 1.30", "of the first"
    slow = judged(("blocks 1", (1.5, 1.2), 0.896), ("blocks 1 2", (1.9, 1.3), 0.8), ("blocks 3", (1.6, 1.35), 0.7))
    assert slow["measured"] == "1.20 for 0.4 points (blocks 1); 1.35 for 20.0 points (blocks 3)", "nearest to it"
    assert judged(("blocks 1", (1.5, 1.2), 0.896))["measured"] == "1.20 for 0.4 points (blocks 1)", "told once"
    assert judged()["reached"] == "not run" and judged()["run"] == ""
    first, second = (refitted(("blocks 1", (1.5, fast), score)) for fast, score in ((1.45, 0.896), (1.41, 0.88)))
    row = targets.folded(again(first, times=second["times"], scores=second["scores"]))[0]
    assert row["reached"] == "no" and row["measured"] == "1.41 for 2.0 points (blocks 1)", "the worse of two runs"
    new = {"new_scores": {"as given": 0.8, "blocks 1": 0.84}, "new_lost_sd": {"blocks 1": 2.5}, "test_images": 400}
    for count, said in ((50, ", -4.0 ± 2.5 on 50 pictures new to both"), (400, "")):  # all are: none is known to be old
        row = targets.folded(pd.DataFrame([{**first, **new, "new_images": count}]))[0]
        assert row["measured"] == f"1.45 for 0.4 points{said} (blocks 1)" and row["reached"] == "yes"


@pytest.mark.parametrize(
    ("fast", "score", "word"), [(1.4, 0.897, "yes"), (1.6, 0.897, "no"), (1.4, 0.8, "not comparable")]
)
def test_pruned_channels_are_compared_at_equal_accuracy(fast, score, word):
    made = ("blocks 1", (1.5, 1.5), 0.896), ("30% of the channels cut", (fast, 9.0), score)
    row = targets.folded(pd.DataFrame([refitted(*made)]))[1]
    assert row["reached"] == word
    assert row["measured"].startswith("blocks 1: 1.50 × for 0.4 points; 30% of the channels cut: ")
    assert targets.folded(pd.DataFrame([refitted(made[0])]))[1]["reached"] == "not run"


def test_the_last_layer():
    case = {"network": "alexnet", "side": 224, "width": 1.0, "parameters_before": 1000.0, "mbytes_before": 4.0,
            "mbytes_after": 3.0, "ms_1_before": 3.0, "ms_1_after": 2.0}  # fmt: skip
    for after, word in ((731.0, "yes"), (700.0, "no")):
        rows = targets.last_layer(pd.DataFrame([{**RUN, "cases": [{**case, "parameters_after": after}]}]))
        assert [row["reached"] for row in rows] == [word, "stated", "stated"] and rows[0]["run"] == "1"
        assert [row["measured"] for row in rows[1:]] == ["-25.00 %", "1.50"]
    rows = targets.last_layer(pd.DataFrame([{**RUN, "cases": [{**case, "side": 32, "parameters_after": 1.0}]}]))
    assert [row["reached"] for row in rows] == ["not run"] * 3
    paired = {**case, "parameters_after": 731.0, "ms_1_ratio": 1.4, "ms_1_ratio_low": 1.3, "ms_1_ratio_high": 1.6}
    untimed = {name: value for name, value in paired.items() if not name.startswith("ms_")}
    row = targets.last_layer(pd.DataFrame([{**RUN, "cases": [paired]}]))[2]
    assert (row["measured"], row["middle half of pairs"]) == ("1.40", "1.30 to 1.60")
    assert targets.last_layer(pd.DataFrame([{**RUN, "cases": [untimed]}]))[2]["reached"] == "not run"


@pytest.fixture
def committed(monkeypatch):
    monkeypatch.setenv("LINL_RESULTS", str(PROJECT / "results"))
    return runs("stability", "records", "")


def test_compression_is_judged_where_the_paper_removes_something(committed):
    for row in targets.compression(committed):
        assert row["reached"] != "not run" and "settings" in row["measured"]
    neurons, _ = targets.compression(committed.assign(neurons_removed=0.0))
    assert neurons["reached"] == "no"
    all_gone = committed.assign(neurons_removed=1.0, hidden_connections_removed=1.0)
    rows = targets.compression(all_gone)
    assert [row["reached"] for row in rows] == ["yes", "yes"] and not any("; not" in row["measured"] for row in rows)


def test_compression_names_the_settings_that_miss(committed):
    row, _ = targets.compression(committed)
    kept, of = int(row["reached"].split()[1]), int(row["reached"].split(" of ")[1])
    assert kept < of and row["measured"].partition("; not ")[2].count(", l1 ") == of - kept
    none_gone, _ = targets.compression(committed.assign(neurons_removed=0.0))
    assert none_gone["measured"].count(", l1 ") == of, "all of them"


def test_published_seconds_are_stated_over_ours(committed):
    (row,) = targets.solver_times(committed)
    assert row["reached"] == "stated" and "Gurobi" in row["rival"]
    (twice,) = targets.solver_times(committed.assign(seconds=2 * committed["seconds"], undecided=1))
    one, half = (float(found["measured"].split()[1].rstrip(",")) for found in (row, twice))
    assert half == pytest.approx(one / 2, abs=0.01)
    settings = twice["measured"].split(" over ")[1].split()[0]
    assert f"in {settings} of them ours left units open" in twice["measured"]


# --- the same answers as others --------------------------------------------------------------------


def bounded(ms=1.9, width=1.0, deep=1.0, hidden=1.0):
    dense = {"domain": "d", "bounds": "auto_LiRPA, CROWN, float64", "ms": 2.0, "output": 1.0, "hidden": 1.0}
    cases = [dense, {**dense, "bounds": "linl, CROWN, float64", "ms": ms, "output": width, "hidden": hidden}]
    cases.append({"domain": "d", "bounds": "auto_LiRPA, CROWN, float32", "note": "not installed"})
    residual = [{"bounds": f"{who}, float32", "ms": t, "output": 1.0, "hidden": 1.0}
                for who, t in (("linl, intervals", deep), ("auto_LiRPA, IBP", 2.0))]  # fmt: skip
    return {**RUN, "dataset": "d", "hidden": "1", "cases": cases, "residual": residual}


def test_bounds_need_time_and_tightness():
    def words(*figures, **of):
        rows = reached(targets.bounds(pd.DataFrame([bounded(*figures, **of)])))
        assert rows["CROWN, float32, a dense network: × its time"] == "not run"
        names = ("CROWN, float64, a dense network: × its time", "CROWN, float64, a dense network: × as wide",
                 "intervals, float32, ResNet18: × its time")  # fmt: skip
        return [rows[name] for name in names]

    assert words() == ["yes", "yes", "yes"]
    assert words(2.1, 1.01, deep=3.0, hidden=1.01) == ["no", "no", "no"]
    assert words(hidden=1.02) == ["yes", "in 1 of 2", "yes"], "the last hidden layer's bounds count too"


def test_bounds_of_two_runs():
    rows = {row["what"]: row for row in targets.bounds(again(bounded(), cases=bounded(ms=2.2)["cases"]))}
    row = rows["CROWN, float64, a dense network: × its time"]
    assert (row["measured"], row["reached"], row["runs"]) == ("0.95 to 1.10", "no", 2)


def test_what_was_timed_in_pairs_is_judged_by_them_and_only_beside_its_own_rival():
    run = bounded()
    run["cases"][1] |= {"beside": "auto_LiRPA, CROWN, float64", "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    name = "CROWN, float64, a dense network: × its time"
    row = {row["what"]: row for row in targets.bounds(pd.DataFrame([run]))}[name]
    assert (row["measured"], row["middle half of pairs"]) == ("1.50", "1.40 to 1.60")
    run["cases"][1]["beside"] = "another"
    row = {row["what"]: row for row in targets.bounds(pd.DataFrame([run]))}[name]
    assert (row["measured"], row["middle half of pairs"]) == ("0.95", "")


def peers(*lines, **more):
    run = {**RUN, "networks": "n", "hidden": "h", "rows": list(lines)}
    done = again(run, **more) if more else pd.DataFrame([run])
    return {row["what"].partition(":")[0] + row["rival"]: row for row in targets.peers(done)}


NORMS = {"part": "norms", "rival": "torch.fx fuse", "targets": [["ours_left", "<=", 0], ["times", ">=", 1]]}
PLANE = {"part": "regions", "what": "c", "rival": "r", "targets": [["found", ">=", 1]], "found": 1}
START = {"part": "start", "what": "import torch, linl", "rival": "import torch", "targets": []}
GONE = "every BatchNorm gone, freed memory kepttorch.fx fuse"
IMPORT = "import linl, beyond torch's ownimport torch"


def test_peers():
    two = {**NORMS, "what": "a", "ours_left": 0, "times": 1.2}, {**NORMS, "what": "b", "ours_left": 2, "times": 1.5}
    rows = peers(*two, {**PLANE, "times": 0.5}, {**START, "beyond_ms": 1100.0})
    norms = rows[GONE]
    assert norms["what"] == "every BatchNorm gone, freed memory kept: 2 networks" and norms["reached"] == "in 1 of 2"
    assert norms["measured"] == "× as fast 1.20 to 1.50; BatchNorms left 0 to 2"
    assert rows["regions in a planer"]["reached"] == "no", "found, and slower"
    assert (rows[IMPORT]["reached"], rows[IMPORT]["measured"]) == ("no", "1100 ms")
    assert sum(row["reached"] == "not run" and row["run"] == row["hardware"] == "" for row in rows.values()) == 9


def test_a_slow_run_of_peers_isnt_forgotten():
    """Exact stability at 15 times in one run and 52 in another is no 50 times."""
    hard = {"part": "stability", "what": "ReLUs", "rival": "HiGHS", "targets": [["times", ">=", 50]]}
    other = {**hard, "what": "other ReLUs", "times": 80.0, "times_low": 70.0, "times_high": 95.0, "pairs": 3}
    fast, slow = {**hard, "times": 51.8, "pairs": 1, "times_low": 51.8}, {**hard, "times": 14.9, "pairs": 1}
    row = peers(slow, other, rows=[fast, other])["exact stabilityHiGHS"]
    assert (row["reached"], row["measured"], row["runs"]) == ("in 1 of 2", "× as fast 14.90 to 80.00", 2)
    assert row["middle half of pairs"] == "70.00 to 95.00", "one pair is no spread"
    assert peers(fast, other, rows=[slow, other])["exact stabilityHiGHS"]["reached"] == "in 1 of 2"


def test_what_the_allocator_does_is_a_row_of_its_own():
    kept, returned = ({**NORMS, "what": "a", "memory": memory, "ours_left": 0, "times": times}
                      for memory, times in (("kept", 0.9), ("returned", 2.0)))  # fmt: skip
    rows = peers(kept, returned)
    assert rows[GONE]["reached"] == "no"
    assert rows["every BatchNorm gone, freed memory returnedtorch.fx fuse"]["reached"] == "yes"


def test_a_rival_that_leaves_everything_is_told():
    walker = {**NORMS, "rival": "timm reparameterize_model", "targets": [["ours_left", "<=", 0]], "ours_left": 0}
    same, done = ({**walker, "what": name, "before": 5, "rival_left": left, "times": 0.4}
                  for name, left in (("a", 5), ("b", 0)))  # fmt: skip
    told = peers(same, done)["every BatchNorm gonetimm reparameterize_model"]["measured"]
    assert told.endswith("; the rival left every BatchNorm in 1 of 2")
    assert "left every" not in peers(done)["every BatchNorm gonetimm reparameterize_model"]["measured"]


def test_the_merge_is_judged_in_milliseconds_and_tells_who_was_faster():
    line = {"part": "merge", "what": "512 channels", "targets": [["ours_ms", "<=", 300]], "ours_ms": 150.0}
    direct = {**line, "rival": "convolution of the kernels, float32", "times": 0.8, "times_low": 0.7, "times_high": 0.9,
              "pairs": 9}  # fmt: skip
    row = peers(direct)["two convolutions made one, in float64convolution of the kernels, float32"]
    assert (row["reached"], row["measured"]) == ("yes", "× as fast 0.80; ours, ms 150")
    slow = peers(direct, rows=[{**direct, "ours_ms": 301.0}])
    assert slow["two convolutions made one, in float64convolution of the kernels, float32"]["reached"] == "no"


def test_a_notebooks_overhead_is_stated():
    bare = {"part": "start", "what": "papermill, one cell", "rival": "a bare kernel, one line", "targets": []}
    paired = {"pairs": 5, "beyond_ms": 1300.4, "beyond_ms_low": 1290.0, "beyond_ms_high": 1400.0}
    row = peers({**bare, **paired})["a notebook of one cell, beyond a bare kernela bare kernel"]
    assert (row["reached"], row["measured"], row["middle half of pairs"]) == ("stated", "1300 ms", "1290 to 1400")


def test_a_rival_that_failed_and_a_start_that_was_not_timed():
    """As the profile smoke leaves them."""
    failed = {**NORMS, "what": "a", "ours_left": 0, "ours_ms": 3.0, "note": "it failed"}
    rows = peers(failed, {**START, "note": "not timed"})
    assert rows[GONE]["reached"] == "no" and rows[GONE]["measured"] == "BatchNorms left 0"
    assert rows[IMPORT]["reached"] == "not run"


def test_what_a_study_takes_is_stated():
    def steps(*seconds):
        names = "clone", "environment", "study (quick)", "study (quick), again"
        return [{"step": name, "seconds": took} for name, took in zip(names, seconds, strict=True)]

    run = {**RUN, "asked": "quick", "environment": True, "steps": steps(1.0, 60.0, 300.0, 9.0)}
    (row,) = targets.study(again(run, steps=steps(1.0, 70.0, 310.0, 8.0)))
    parts = "clone 1.0, environment 60.0 to 70.0, study (quick) 300.0 to 310.0"
    assert row["measured"] == f"361.0 to 381.0 s ({parts}); started again 8.0 to 9.0 s"
    assert row["reached"] == "stated" and row["runs"] == 2
    for other in ({"environment": False}, {"asked": "tiny"}):
        assert [row["reached"] for row in targets.study(pd.DataFrame([run | other]))] == ["not run"], "another question"
    assert [row["reached"] for row in targets.study(NONE)] == ["not run"]


def test_rows_of_peers_are_found_again_in_every_run():
    new = [{"part": "a", "what": "w", "rival": "r", "times": 2.0}, {"part": "b", "what": "w", "rival": "r"}]
    done = again({**RUN, "rows": [{"part": "a", "what": "w", "rival": "r", "times": 1.0}, {"part": "gone"}]}, rows=new)
    places = targets.lines_of(judging.every(done))
    assert [[line.get("times") for line in lines] for lines in places.values()] == [[1.0, 2.0], [None]]
    assert targets.lines_of(NONE) == {}


def test_a_figure_beside_the_limit_shows_on_which_side_it_is():
    assert judging.spread([1.005, 1.1024], limit=1.1) == "1.005 to 1.102"
    assert judging.spread([1.0, 1.1], limit=1.1) == "1.00 to 1.10"
    assert judging.spread([2.0, 2.0]) == "2.00"
