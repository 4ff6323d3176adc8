"""What speed, size and tightness were to be, beside what the records say: a row a target, judged by rule.

Each function takes the finished runs of one experiment (as `linl.results.runs` gives them) and returns rows: what,
rival, asked, measured, reached, hardware, where (the table that has all of it), run. `reached` is "yes", "no",
"in 3 of 4" or "not run".
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from linl.claims import MEASURES, alexnet_smaller, stable_setting
from linl.connections import with_hidden
from linl.results import mean_sd, paper
from linl.tables import hardware, newest, short
from linl.verdicts import Figure, share


def row(
    what: str,
    rival: str,
    asked: str,
    where: str,
    measured: str = "",
    holds: Sequence[bool] = (),
    *,
    half: str = "",
    done=None,
) -> dict[str, Any]:
    """One target; `holds`: of every figure whether it reaches it; `half`: how far its pairs went; `done`: the runs that
    they are from."""
    reached = share(holds, "", ("yes", "no"))
    how = {"hardware": "", "where": f"[{where}]({where}.md)", "run": ""}
    if done is not None and len(done):
        how |= {"hardware": hardware(done.iloc[-1]), "run": " ".join(dict.fromkeys(map(short, done["key"])))}
    told = {"what": what, "rival": rival, "asked": asked, "measured": measured, "middle half of pairs": half}
    return {**told, "reached": reached, **how}


def spread(values: Sequence[float], digits: int = 2, limit: float | None = None) -> str:
    """ "0.98 to 1.11", or the one figure that all are; a digit more where one rounds to the limit and isn't it."""
    ends = min(values), max(values)
    if limit is not None and any(round(end, digits) == limit != end for end in ends):
        digits += 1
    low, high = (f"{end:.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def half_of(pairs: pd.DataFrame, ratio: str) -> str:
    """From the lowest lower quartile of these ratios to the highest upper one; "" where there were no pairs."""
    low, high = (pairs[f"{ratio}_{end}"].dropna() if f"{ratio}_{end}" in pairs else [] for end in ("low", "high"))
    return f"{min(low):.2f} to {max(high):.2f}" if len(low) and len(high) else ""


def quartiles(run: pd.Series) -> Iterator[tuple[str, float, float, float]]:
    """What a benchmark's run compared side by side: name, and its ratio's lower quartile, median and upper quartile.

    Args:
        run: of `linl.results.runs`, with its `experiment`; an older one may lack the quartiles, and gives nothing.
    """
    kind = run["experiment"]
    if kind == "benchmarks":
        for name in run.filter(regex="/ratio$").dropna().index:
            what = f"a step, {name.removesuffix('/ratio')}, × nn.ReLU"
            yield what, *(run[f"{name}{end}"] for end in ("_low", "", "_high"))
    elif kind == "epoch_speed":
        for name, group in pd.DataFrame(run["rows"]).groupby("network", sort=False)["ratio"]:
            yield f"an epoch of {name}", *group.quantile([0.25, 0.5, 0.75])
    elif kind == "bounds_speed":
        for one in [*run["cases"], *({"domain": "ResNet18, 1/255", **deep} for deep in run["residual"])]:
            if pd.notna(one.get("ratio")):
                yield f"{one['bounds']}, {one['domain']}", one["ratio_low"], one["ratio"], one["ratio_high"]
    elif kind == "kept_accuracy":
        for one in run["times"]:
            if pd.notna(one.get("times_low")) and one["network"] != "as given":
                what = f"{run['network']}, {one['network']}: {one['way']}, batch {one['batch']}"
                yield what, one["times_low"], one["times"], one["times_high"]
    else:
        for one in run["rows"]:
            if one.get("pairs", 1) > 1:
                yield f"{one['what']}: {one['rival']}", one["times_low"], one["times"], one["times_high"]


# --- units and training ----------------------------------------------------------------------------

OURS = ("LiNLU", "PartialLinear")


def units(done: pd.DataFrame) -> list[dict]:
    """Time and memory of a step, with freed memory kept and returned, in float32 and bf16: a figure each, the mean of
    the days on which it was measured."""
    days = pd.DataFrame()
    if len(done):
        done = done.assign(keep_memory=done["keep_memory"].fillna(True).astype(bool))
        last = newest(done, ["keep_memory", "how_gpu", "batch", "channels", "side"])
        days = done[done["key"].isin(last["key"])]
    machine = ["key", "how_gpu", "how_cpu", "how_threads"]  # a setting may have been measured on several
    runs = days.groupby(machine).mean(numeric_only=True) if len(days) else days
    return [
        *(
            _below(f"a unit's step, {way}, × nn.ReLU", limit, _of(runs, way, "ratio"), days, half=_half(runs, way))
            for way, limit in (("fused", 1.1), ("eager", 3.0))
        ),
        _below("memory at the peak of a step, fused, × nn.ReLU", 1.1, _of(runs, "fused", "peak_mb", True), days),
        _below("kept for backward by a chain with units, × nn.ReLU", 1.05, _chains(runs), days, 3),
        *(
            _below(
                f"relative error of p's gradient in bf16, {way}",
                1e-3,
                _of(runs, way, "gradient_error"),
                days,
                5,
                "float64",
            )
            for way in ("eager", "fused")
        ),
    ]


def _of(runs: pd.DataFrame, way: str, quantity: str, over_relu: bool = False) -> list[float]:
    """A quantity of every unit in every precision, where it was measured."""
    found = []
    for _, run in runs.iterrows():
        for dtype in ("float32", "bfloat16"):
            relu = run.get(f"{dtype}/nn.ReLU/{quantity}") if over_relu else 1.0
            found += [
                run[name] / relu for unit in OURS if pd.notna(run.get(name := f"{dtype}/{unit}, {way}/{quantity}"))
            ]
    return found


def _half(runs: pd.DataFrame, way: str) -> str:
    ends = {f"ratio_{end}": _of(runs, way, f"ratio_{end}") for end in ("low", "high")}
    return half_of(pd.DataFrame(ends), "ratio")


def _chains(runs: pd.DataFrame) -> list[float]:
    names = [f"chain_mb/{unit}, {way}" for unit in OURS for way in ("fused", "eager")]
    return [run[name] / run["chain_mb/nn.ReLU"] for _, run in runs.iterrows() for name in names]


def _below(
    what: str,
    limit: float,
    found: Sequence[float],
    done: pd.DataFrame,
    digits: int = 2,
    rival: str = "nn.ReLU",
    half: str = "",
) -> dict:
    told, holds = spread(found, digits, limit) if found else "", [figure <= limit for figure in found]
    return row(what, rival, f"≤ {limit:g}", "benchmark-units", told, holds, half=half, done=done if found else None)


def epochs(done: pd.DataFrame) -> list[dict]:
    """Images a second with units, in those of the usual loop: a row a network."""
    last = newest(done, ["how_gpu", "how_cpu", "networks", "width"]).tail(1)
    if last.empty or not isinstance(wanted := last.iloc[0].get("targets"), Mapping):
        return [row("an epoch with units, × as fast", "the usual loop", "≥ 2", "benchmark-epoch")]
    ratio = pd.DataFrame(last.iloc[0]["rows"]).groupby("network", sort=False)["ratio"]
    return [
        row(f"an epoch of {name} with units, × as fast", "the usual loop", f"≥ {wanted[name]:g}", "benchmark-epoch",
            f"{pairs.median():.2f}", [pairs.median() >= wanted[name]],
            half="{:.2f} to {:.2f}".format(*pairs.quantile([0.25, 0.75])), done=last)
        for name, pairs in ratio
    ]  # fmt: skip


def seconds_to(done: pd.DataFrame, accuracy: float = 0.94, seconds: float = 120, seeds: int = 5) -> list[dict]:
    """ResNet18's seconds of training to a test accuracy on CIFAR-10, at the last epoch, on a GPU, with the paper's
    max-pool or without: a row a twin; of several schedules the fastest that reaches it with all seeds, else the one
    that comes nearest."""
    networks = "network in ('resnet18', 'resnet18_cifar')"
    where = f"{networks} and dataset == 'cifar10' and width == 1 and limit == 0 and how_gpu != ''"
    groups = [group for _, group in done.query(where).groupby(["key", "how_gpu"])] if len(done) else []
    return [_seconds_to(groups, *twin, accuracy, seconds, seeds) for twin in (("relu", "ReLUs"), ("linl", "LiNLUs"))]


def _seconds_to(groups: list[pd.DataFrame], twin: str, name: str, accuracy: float, seconds: float, seeds: int) -> dict:
    what = (f"seconds to {accuracy:.0%} on CIFAR-10, ResNet18 with {name}", "200 epochs")
    what = (*what, f"≤ {seconds:g} s on a GPU, {seeds} seeds", "runs")
    if not groups:
        return row(*what)
    reached, took = f"{twin}_test_accuracy", f"{twin}_seconds"
    there = [group for group in groups if len(group) >= seeds and (group[reached] >= accuracy).all()]
    best = min(there, key=lambda g: g[took].mean()) if there else max(groups, key=lambda g: g[reached].mean())
    told = f"{mean_sd(best[took], 0)} s, {mean_sd(100 * best[reached])} %, {len(best)} seeds, {best.iloc[0]['network']}"
    return row(*what, told, [bool(there) and best[took].mean() <= seconds], done=best)


# --- size ------------------------------------------------------------------------------------------


def last_layer(done: pd.DataFrame, asked: float = -26.9) -> list[dict]:
    """LiNL-AlexNet's parameters at 224 pixels."""
    what = ("LiNL-AlexNet, 224 px: parameters", "AlexNet", f"{asked:g} %", "last_layer")
    change, run = alexnet_smaller(done)
    if change is None:
        return [row(*what)]
    return [row(*what, f"{change:.2f} %", [abs(change - asked) < 0.05], done=run)]


def folded(done: pd.DataFrame, asked: float = 1.4) -> list[dict]:
    """How fast a network with folded blocks is, by the slowest of its ways and batches: the fastest of those that have
    kept their accuracy, else the one that has lost least."""
    last = newest(done, ["how_gpu", "how_cpu", "network", "dataset", "image_size", "width"]).tail(1)
    run = last.iloc[0] if len(last) else {"network": "mobilenetv2", "within": 0.5, "scores": {}, "times": []}
    what = (f"{run['network']}, blocks folded, × as fast", "itself")
    what = (*what, f"≥ {asked:g} in every way, for {run['within']:g} points", "benchmark-folded")
    lost = {
        name: 100 * (run["scores"]["as given"] - score)
        for name, score in run["scores"].items() if name.startswith("blocks")
    }  # fmt: skip
    if not lost:
        return [row(*what)]
    times = pd.DataFrame(run["times"])
    slowest = times.groupby("network")["times"].min()
    kept = [name for name in lost if lost[name] <= run["within"]]
    best = max(kept, key=lambda name: slowest[name]) if kept else min(lost, key=lambda name: lost[name])
    half = half_of(times[(times["network"] == best) & (times["times"] == slowest[best])], "times")
    told = f"{spread([slowest[best]], limit=asked)} for {lost[best]:.1f} points ({best})"
    return [row(*what, told, [best in kept and slowest[best] >= asked], half=half, done=last)]


def compression(done: pd.DataFrame) -> list[dict]:
    """Neurons and connections that exact compression removes from the published MLPs, a figure a published setting that
    was run: at least the published share, less its standard deviation. Where that is nothing, nothing is asked."""
    rows, done = [], with_hidden(done)
    for name in ("neurons", "connections"):
        column, mine, factor, _ = MEASURES[name]
        published = paper("stability").query(f"network == 'mlp' and {column} != ''")
        found = []
        for _, line in published.iterrows():
            group, theirs = None, Figure.read(line[column])
            if theirs.mean > theirs.sd:
                group = stable_setting(line, done)
            if group is not None:
                found.append((group, factor * group[mine].mean() - (theirs.mean - theirs.sd)))
        what = (f"exact compression of MLPs: {name} removed", "published", "no fewer than its mean less its sd")
        told = f"{len(found)} settings, by {spread([over for _, over in found], 1)} points" if found else ""
        used = pd.concat([group for group, _ in found]) if found else None
        rows.append(row(*what, "reproduction", told, [over >= -1e-9 for _, over in found], done=used) | {"run": ""})
    return rows


# --- the same answers as others --------------------------------------------------------------------


BESIDE = {  # ours, and whose bounds they are compared with
    "CROWN, float64": "CROWN, float64",
    "CROWN, float32": "CROWN, float32",
    "intervals, float32": "IBP, float32",
}


def bounds(done: pd.DataFrame) -> list[dict]:
    """CROWN and intervals beside auto_LiRPA in the same precision, a figure a domain of a dense network, and for
    intervals one of a ResNet18: time, and the mean width of the outputs' bounds."""
    last = newest(done, ["how_cpu", "dataset", "hidden"]).tail(1)
    cases = list(last.iloc[0]["cases"]) if len(last) else []
    cases += [{**case, "domain": "ResNet18"} for case in last.iloc[0]["residual"]] if len(last) else []
    cases = pd.DataFrame(cases, columns=["domain", "bounds", "ms", "output", "ratio", "ratio_low", "ratio_high"])
    wide = cases.pivot(index="domain", columns="bounds", values=["ms", "output"])
    rows = []
    for ours, theirs in BESIDE.items():
        mine, rival = f"linl, {ours}", f"auto_LiRPA, {theirs}"
        known = ("ms", mine) in wide and ("ms", rival) in wide
        times, width = (
            (wide[of, mine] / wide[of, rival]).dropna().tolist() if known else [] for of in ("ms", "output")
        )
        side_by_side = cases.loc[cases["bounds"] == mine, "ratio"].dropna().tolist()
        times = side_by_side or times  # an older record has medians alone
        how = {"done": last if times else None}
        half, told = half_of(cases[cases["bounds"] == mine], "ratio"), spread(times, limit=1) if times else ""
        what = (f"{ours}, × its time", rival, "≤ 1", "bounds_speed")
        rows.append(row(*what, told, [t <= 1 for t in times], half=half, **how))
        told = f"{spread(width, 4)} times as wide" if width else ""
        what = (f"{ours}, width of the outputs", rival, "≤ 1, to 1e-6", "bounds_speed")
        rows.append(row(*what, told, [w <= 1 + 1e-6 for w in width], **how))
    return rows


SENSES = {"<=": ("≤", operator.le), ">=": ("≥", operator.ge)}
ASKED = {
    "times": "× as fast", "ours_ms": "ours, ms", "ours_left": "BatchNorms left", "found": "regions, in the rival's",
}  # fmt: skip
"""What a target of experiment `peers` is about, in words."""


def asked_of(targets: Iterable[tuple[str, str, float]]) -> str:
    """Targets of experiment `peers` in words."""
    return "; ".join(f"{ASKED[what]} {SENSES[sense][0]} {value:g}" for what, sense, value in targets)


def met(line: Mapping[str, Any]) -> bool:
    """Whether a row of experiment `peers` reaches all that it was to."""
    return all(what in line and SENSES[sense][1](line[what], value) for what, sense, value in line["targets"])


PARTS = {  # part and rival's name in a record: what to call it, and how to tell it
    ("norms", "torch.fx fuse"): "every BatchNorm gone",
    ("norms", "timm reparameterize_model"): "every BatchNorm gone",
    ("merge", "convolution of the kernels, float64"): "two convolutions made one",
    ("stability", ""): "exact stability",
    ("regions", ""): "regions in a plane",
}


def peers(done: pd.DataFrame) -> list[dict]:
    """BatchNorms, merges, exact stability, regions, import: a figure a network, pair or net, by the record's own
    targets. A rival that failed has no time; what was asked of the time isn't reached then."""
    last = newest(done, ["how_gpu", "how_cpu", "how_threads", "networks", "hidden"]).tail(1)
    lines = last.iloc[0]["rows"] if len(last) else []
    rows = []
    for (part, rival), what in PARTS.items():
        faster = [["times", ">=", 1.0]] if part == "regions" else []  # the record asks for their number alone
        some = [one for one in lines if one["part"] == part and one["rival"].startswith(rival) and one["targets"]]
        some = [{**one, "targets": [*one["targets"], *faster]} for one in some]
        if not some:
            rows.append(row(what, rival or "see there", "see there", "benchmark-peers"))
            continue
        names = [one["what"] for one in some]
        what = f"{what}: {names[0] if len(set(names)) == 1 else f'{len(set(names))} networks'}"
        wanted = dict.fromkeys((of, sense, value) for one in some for of, sense, value in one["targets"])
        told = "; ".join(f"{ASKED[of]} {spread(known, limit=value)}" for of, _, value in wanted
                         if (known := [float(one[of]) for one in some if of in one]))  # fmt: skip
        half = half_of(pd.DataFrame([one for one in some if one.get("pairs", 1) > 1]), "times")
        half = half if any(of == "times" for of, _, _ in wanted) else ""
        what = (what, some[0]["rival"], asked_of(wanted), "benchmark-peers")
        rows.append(row(*what, told, list(map(met, some)), half=half, done=last))
    beyond = [one["beyond_ms"] for one in lines if one["what"] == "import torch, linl" and "beyond_ms" in one]
    told = spread(beyond, 0) + " ms" if beyond else ""
    asked = ("import linl, beyond torch's own", "import torch", "≤ 1,000 ms", "benchmark-peers")
    return [*rows, row(*asked, told, [ms <= 1000 for ms in beyond], done=last if beyond else None)]
