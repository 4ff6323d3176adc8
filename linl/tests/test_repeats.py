"""What a benchmark's runs compare, and what two of them say of each other."""

import math

import pandas as pd
import pytest

from linl import provenance, repeats
from linl.data import PROJECT
from linl.repeats import Again, Compared
from linl.results import runs


def of(experiment, **run):
    return list(repeats.compared(pd.Series({"experiment": experiment, **run})))


def test_what_a_step_of_a_unit_took_and_the_control():
    run = {"float32/nn.ReLU/ms": 2.0, "float32/LiNLU, fused/ms": 3.0, "float32/judges": True}
    for unit, ratio in (("nn.ReLU", 1.0), ("LiNLU, fused", 1.5)):
        run |= {f"float32/{unit}/ratio{end}": ratio + off for end, off in (("", 0), ("_low", -0.1), ("_high", 0.1))}
    control, unit = of("benchmarks", **run)
    assert control.control and not unit.control
    assert unit == Compared("a step, float32/LiNLU, fused, × nn.ReLU", 1.5, 1.4, 1.6, "×", 3.0, 2.0)


def test_an_epoch_is_told_by_its_pairs():
    rows = [{"network": "a", "ratio": r, "linl": 1.0, "usual": r} for r in (1.0, 2.0, 3.0)]
    assert of("epoch_speed", rows=rows) == [Compared("an epoch of a", 2.0, 1.5, 2.5, "×", 1000.0, 2000.0)]
    (alone,) = of("epoch_speed", rows=rows[:1])
    assert alone.middle == 1.0 and not alone.paired, "one pair is no spread"


def test_bounds_only_where_both_were_measured():
    pair = {"ms": 4.0, "ratio_low": 0.7, "ratio": 0.8, "ratio_high": 0.9}
    cases = [{"domain": "d", "bounds": "ours", **pair}, {"domain": "d", "bounds": "theirs", "ms": 5.0},
             {"domain": "d", "bounds": "missing", "note": "not installed"}]  # fmt: skip
    (found,) = of("bounds_speed", cases=cases, residual=[{"bounds": "deep", "ms": 1.0}])
    assert found == Compared("ours, d, × its time", 0.8, 0.7, 0.9, "×", 4.0, 5.0)


def test_a_folded_network_is_beside_the_one_as_given():
    times = [{"network": name, "way": "eager", "batch": 1, "times": 2, "ms": ms, **ends}
             for name, ms, ends in (("as given", 6.0, {}), ("blocks 2", 3.0, {"times_low": 1, "times_high": 3}),
                                    ("old", 3.0, {}))]  # fmt: skip
    new, old = of("kept_accuracy", network="net", times=times)
    assert new == Compared("net, blocks 2: eager, batch 1", 2.0, 1.0, 3.0, "×", 3.0, 6.0)
    assert old.middle == 2.0 and not old.paired


def test_of_peers_what_the_target_asks_for():
    """Milliseconds of the merge and beyond the rival's start; a ratio of one pair has no quartiles, though recorded."""
    times = {"ours_ms": 2.0, "rival_ms": 6.0, "times": 3.0, "times_low": 3.0, "times_high": 3.0, "pairs": 1}
    rows = [
        {"part": "merge", "what": "m", "rival": "r", **times, "ours_ms_low": 1.0, "ours_ms_high": 3.0},
        {"part": "start", "what": "s", "rival": "r", **times, "pairs": 3, "beyond_ms": 5.0, "beyond_ms_low": 4.0,
         "beyond_ms_high": 6.0},
        {"part": "norms", "what": "n", "rival": "r", "memory": "kept", **times},
        {"part": "norms", "what": "failed", "rival": "r", "ours_ms": 1.0, "note": "it fails"},
    ]  # fmt: skip
    found = {one.what: one for one in of("peers", rows=rows)}
    assert set(found) == {"m: r, ours", "m: r", "s: r, beyond", "s: r", "n: r, freed memory kept"}
    assert (found["m: r, ours"].middle, found["m: r, ours"].unit, found["m: r, ours"].paired) == (2.0, "ms", False)
    assert (found["s: r, beyond"].middle, found["s: r, beyond"].low, found["s: r, beyond"].high) == (5.0, 4.0, 6.0)
    assert not found["n: r, freed memory kept"].paired and found["s: r"].paired


def test_layers_before_and_after():
    case = {"network": "a", "side": 224, "ms_1_before": 6.0, "ms_1_after": 3.0}
    (old,) = of("last_layer", cases=[case])
    assert (old.middle, old.paired, old.ours, old.rival) == (2.0, False, 3.0, 6.0)
    (new,) = of("last_layer", cases=[case | {"ms_1_ratio": 1.9, "ms_1_ratio_low": 1.8, "ms_1_ratio_high": 2.0}])
    assert (new.middle, new.low, new.high) == (1.9, 1.8, 2.0)
    assert of("last_layer", cases=[{"network": "a", "side": 224}]) == [], "not timed"
    folds = {"kind": "k", "layers": "l", **{f"ms_{n}_{when}": 1.0 for n in (1, 8) for when in ("before", "after")}}
    assert [one.what for one in of("fold_pays", cases=[folds], batch=8)] == ["k, l, batch 1", "k, l, batch 8"]
    (bill,) = of("imagenet_cost", bill=[{"network": "a", "width": 1.0, "system": "s", "images/s": 3.0}])
    assert bill.unit == "images/s" and bill.middle == 3.0
    (step,) = of("study_cost", steps=[{"step": "clone", "seconds": 2.0, "core_seconds": 1.0}])
    assert (step.what, step.unit, step.middle, step.paired) == ("clone", "s", 2.0, False)


@pytest.mark.parametrize("experiment", repeats.COMPARED)
def test_committed_records_can_be_compared(experiment, monkeypatch):
    monkeypatch.setenv("LINL_RESULTS", str(PROJECT / "results"))
    done = runs(experiment)
    assert len(done)
    for _, run in done.iterrows():
        found = of(experiment, **run)
        names = [one.what for one in found]
        assert found and len(set(names)) == len(names), "two quantities of one name"
        assert all(one.middle > 0 for one in found)


def test_two_runs_agree_or_not():
    first, last = Compared("a", 2.0, 1.5, 2.5, ours=4.0, rival=8.0), Compared("a", 2.4, 2.1, 3.0, ours=5.0, rival=12.0)
    both = Again(first, last)
    assert both.apart == pytest.approx(0.2) and both.overlap is True
    assert both.within is False, "2.4 lies in the first's half, 2.0 not in the last's"
    assert both.changed == "ours +25.0 %, rival +50.0 %"
    assert Again(first, Compared("a", 2.4, 1.9, 3.0)).within is True
    assert Again(first, Compared("a", 3.0, 2.6, 3.0)).overlap is False
    alone = Again(first, Compared("a", 2.0))
    assert alone.overlap is None and alone.within is None and alone.changed == ""


def test_only_what_both_runs_measured():
    def run(*networks):
        rows = [{"network": name, "ratio": 1.0, "linl": 1.0, "usual": 1.0} for name in networks]
        return pd.Series({"experiment": "epoch_speed", "rows": rows})

    assert [one.first.what for one in repeats.again(run("a", "b"), run("b", "c"))] == ["an epoch of b"]


def test_revisions_and_whether_the_code_differs(monkeypatch):
    def told(before, after, clean=True, files=()):
        monkeypatch.setattr(repeats, "between", lambda experiment, a, b: None if files is None else list(files))
        runs = ({"experiment": "peers", "source_revision": one, "source_clean": clean} for one in (before, after))
        return repeats.code_of(*map(pd.Series, runs))

    assert told("a", "a", files=None) == {"revisions": "a", "code": "the same"}
    assert told("a", "b") == {"revisions": "a, b", "code": "the same"}
    assert told("a", "b", files=["linl/x.py"])["code"] == "1 file differs"
    assert told("a", "b", files=["x", "y"])["code"] == "2 files differ"
    assert told("a", "b", files=None)["code"] == told("a", "a", clean=False)["code"] == "unknown"
    assert told(None, "b") == {"revisions": "none, b", "code": "unknown"}


def test_code_between_two_revisions(monkeypatch):
    changed = ("linl/merge.py", "linl/targets.py", "notebooks/experiments/peers.ipynb", "notebooks/tables/peers.ipynb")
    monkeypatch.setattr(provenance, "_changed", lambda *revisions: changed if "lost" not in revisions else None)
    assert provenance.between("peers", "a", "b") == ["linl/merge.py", "notebooks/experiments/peers.ipynb"]
    assert provenance.between("bounds_speed", "a", "b") == ["linl/merge.py"]
    assert provenance.between("peers", "a", "lost") is None


def test_a_missing_figure_is_nan():
    assert math.isnan(repeats.known({"a": None}, "a")) and math.isnan(repeats.known({}, "a"))
    assert repeats.known(pd.Series({"a": 1}), "a") == 1.0
