"""What speed, size and tightness were to be, beside what the records say: a row a target, judged by rule.

Each function takes the finished runs of one experiment (as `linl.results.runs` gives them) and returns rows: what,
rival, asked, measured, reached, hardware, where (the table that has all of it), run. `reached` is "yes", "no",
"in 3 of 4" or "not run".
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from linl.claims import MEASURES, setting
from linl.results import mean_sd, paper
from linl.tables import hardware, newest, short
from linl.verdicts import Figure

SENSES = {"<=": ("≤", operator.le), ">=": ("≥", operator.ge)}


def row(
    what: str, rival: str, asked: str, where: str, measured: str = "", holds: Sequence[bool] = (), *, done=None
) -> dict[str, Any]:
    """One target; `holds`: of every figure whether it reaches it; `done`: the runs that they are from."""
    reached = (
        "not run"
        if not len(holds)
        else "yes"
        if all(holds)
        else f"in {sum(holds)} of {len(holds)}"
        if any(holds)
        else "no"
    )
    how = {"hardware": "", "where": f"[{where}]({where}.md)", "run": ""}
    if done is not None and len(done):
        how |= {"hardware": hardware(done.iloc[-1]), "run": " ".join(dict.fromkeys(map(short, done["key"])))}
    return {"what": what, "rival": rival, "asked": asked, "measured": measured, "reached": reached, **how}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "0.98 to 1.11", or the one figure that all are."""
    low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


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
    runs = days.groupby("key").mean(numeric_only=True) if len(days) else days
    return [
        _below("a unit's step, fused, × nn.ReLU", 1.1, _of(runs, "fused", "ratio"), days),
        _below("a unit's step, eager, × nn.ReLU", 3.0, _of(runs, "eager", "ratio"), days),
        _below("memory at the peak of a step, fused, × nn.ReLU", 1.1, _of(runs, "fused", "peak_mb", True), days),
        _below("kept for backward by a chain with units, × nn.ReLU", 1.05, _chains(runs), days, 3),
        _below(
            "relative error of p's gradient in bf16, eager",
            1e-3,
            _of(runs, "eager", "gradient_error"),
            days,
            5,
            "float64",
        ),
        _below(
            "relative error of p's gradient in bf16, fused",
            1e-3,
            _of(runs, "fused", "gradient_error"),
            days,
            5,
            "float64",
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


def _chains(runs: pd.DataFrame) -> list[float]:
    names = [f"chain_mb/{unit}, {way}" for unit in OURS for way in ("fused", "eager")]
    return [run[name] / run["chain_mb/nn.ReLU"] for _, run in runs.iterrows() for name in names]


def _below(
    what: str, limit: float, found: Sequence[float], done: pd.DataFrame, digits: int = 2, rival: str = "nn.ReLU"
) -> dict:
    told, holds = spread(found, digits) if found else "", [figure <= limit for figure in found]
    return row(what, rival, f"≤ {limit:g}", "benchmark-units", told, holds, done=done if found else None)


def epochs(done: pd.DataFrame) -> list[dict]:
    """Images a second with units, in those of the usual loop: a row a network."""
    last = newest(done, ["how_gpu", "how_cpu", "networks", "width"]).tail(1)
    if last.empty or not isinstance(wanted := last.iloc[0].get("targets"), Mapping):
        return [row("an epoch with units, × as fast", "the usual loop", "≥ 2", "benchmark-epoch")]
    ratio = pd.DataFrame(last.iloc[0]["rows"]).groupby("network", sort=False)["ratio"].median()
    return [
        row(f"an epoch of {name} with units, × as fast", "the usual loop", f"≥ {wanted[name]:g}", "benchmark-epoch",
            f"{times:.2f}", [times >= wanted[name]], done=last)
        for name, times in ratio.items()
    ]  # fmt: skip


def seconds_to(done: pd.DataFrame, accuracy: float = 0.94, seconds: float = 120, seeds: int = 5) -> list[dict]:
    """ResNet18's seconds of training to a test accuracy on CIFAR-10, at the last epoch, on a GPU: a row a twin."""
    rows = []
    for twin, name in (("relu", "with ReLUs"), ("linl", "with LiNLUs")):
        what = f"seconds to {accuracy:.0%} on CIFAR-10, ResNet18 {name}"
        asked = ("200 epochs", f"≤ {seconds:g} s on a GPU, {seeds} seeds", "linlnet")
        group = None
        if len(done):
            group = setting(done[done["how_gpu"] != ""], "finished", network="resnet18", dataset="cifar10", width=1.0)
        if group is None:
            rows.append(row(what, *asked))
            continue
        reached, took = group[f"{twin}_test_accuracy"], group[f"{twin}_seconds"]
        told = f"{mean_sd(took, 0)} s, {mean_sd(100 * reached)} %, {len(group)} seeds"
        good = len(group) >= seeds and reached.mean() >= accuracy and took.mean() <= seconds
        rows.append(row(what, *asked, told, [good], done=group))
    return rows


# --- size ------------------------------------------------------------------------------------------


def last_layer(done: pd.DataFrame, asked: float = -26.9) -> list[dict]:
    """LiNL-AlexNet's parameters at 224 pixels."""
    what = ("LiNL-AlexNet, 224 px: parameters", "AlexNet", f"{asked:g} %", "last_layer")
    for _, run in done.sort_values("finished", ascending=False).iterrows() if len(done) else ():
        cases = pd.DataFrame(run["cases"]).query("network == 'alexnet' and side == 224 and width == 1")
        if len(cases):
            change = 100 * (cases["parameters_after"] / cases["parameters_before"] - 1).iloc[0]
            return [row(*what, f"{change:.2f} %", [abs(change - asked) < 0.05], done=done.loc[[run.name]])]
    return [row(*what)]


def folded(done: pd.DataFrame, asked: float = 1.4) -> list[dict]:
    """How fast the fastest network is that has kept its accuracy: the slowest of its ways and batches."""
    last = newest(done, ["how_gpu", "how_cpu", "network", "dataset", "image_size", "width"]).tail(1)
    what = "MobileNetV2, blocks folded, × as fast"
    if last.empty:
        return [row(what, "itself; torch-pruning", f"≥ {asked:g}", "benchmark-folded")]
    run = last.iloc[0]
    lost = {name: 100 * (run["scores"]["as given"] - score) for name, score in run["scores"].items()}
    slowest = pd.DataFrame(run["times"]).groupby("network")["times"].min()
    named = [name for name in lost if name.startswith("blocks")]
    good = [slowest[name] >= asked and lost[name] <= run["within"] for name in named]
    told = "; ".join(f"{slowest[name]:.2f} for {lost[name]:.1f} points ({name})" for name in named)
    limit = f"≥ {asked:g} in every way, for {run['within']:g} points"
    return [row(what, "itself; torch-pruning", limit, "benchmark-folded", told, good, done=last)]


def compression(done: pd.DataFrame) -> list[dict]:
    """Neurons and connections that exact compression removes from the published MLPs, a figure a published setting that
    was run: at least the published share, less its standard deviation."""
    rows = []
    for name in ("neurons", "connections"):
        column, mine, factor, _ = MEASURES[name]
        published = paper("stability").query(f"network == 'mlp' and {column} != ''")
        holds, used = [], []
        for _, line in published.iterrows():
            where = {key: line[key] for key in ("network", "dataset", "hidden")}
            group = setting(done, "epochs", l1=float(line["l1"]), adversary="none", **where)
            if group is not None:
                theirs, ours = Figure.read(line[column]), factor * group[mine].mean()
                holds.append(ours >= theirs.mean - theirs.sd - 1e-9)
                used.append(group)
        told = f"{len(holds)} settings of MNIST and CIFAR-10" if holds else ""
        what = f"exact compression of MLPs: {name} removed"
        asked = ("published", "no fewer than its mean less its sd", "reproduction")
        rows.append(row(what, *asked, told, holds, done=pd.concat(used) if used else None) | {"run": ""})
    return rows


# --- the same answers as others --------------------------------------------------------------------


BESIDE = {  # ours, and whose bounds they are compared with
    "CROWN, float64": "CROWN, float64",
    "CROWN, float32": "CROWN, float32",
    "intervals, float64": "IBP, float32",
}


def bounds(done: pd.DataFrame) -> list[dict]:
    """CROWN and intervals beside auto_LiRPA, a figure a domain: time, and the mean width of the outputs' bounds."""
    last = newest(done, ["how_cpu", "dataset", "hidden"]).tail(1)
    cases = pd.DataFrame(last.iloc[0]["cases"] if len(last) else [], columns=["domain", "bounds", "ms", "output"])
    wide = cases.pivot(index="domain", columns="bounds", values=["ms", "output"])
    rows = []
    for ours, theirs in BESIDE.items():
        known = ("ms", f"auto_LiRPA, {theirs}") in wide
        times, width = ([
            (wide[of, f"linl, {ours}"] / wide[of, f"auto_LiRPA, {theirs}"]).dropna().tolist() if known else []
            for of in ("ms", "output")
        ])  # fmt: skip
        how = {"done": last if times else None}
        told = spread(times) if times else ""
        rows.append(
            row(f"{ours}, × its time", "auto_LiRPA", "≤ 1", "bounds_speed", told, [t <= 1 for t in times], **how)
        )
        told = f"{spread(width, 4)} times as wide" if width else ""
        what = (f"{ours}, width of the outputs", "auto_LiRPA", "≤ 1, to 1e-6", "bounds_speed")
        rows.append(row(*what, told, [w <= 1 + 1e-6 for w in width], **how))
    return rows


def met(line: Mapping[str, Any]) -> bool:
    """Whether a row of experiment `peers` reaches all that it was to."""
    return all(what in line and SENSES[sense][1](line[what], value) for what, sense, value in line["targets"])


PARTS = {
    ("norms", "torch.fx fuse"): ("every BatchNorm gone, whole networks", "torch.fx fuse", "none left; as fast"),
    ("norms", "timm reparameterize_model"): ("every BatchNorm gone, whole networks", "timm's walker", "none left"),
    ("merge", ""): ("two 3×3 convolutions of 512 channels, float64", "convolution of the kernels", "≤ 300 ms"),
    ("stability", ""): ("exact stability, × as fast", "HiGHS, a program a unit", "≥ 50"),
    ("regions", ""): ("regions in a plane: no fewer, and × as fast", "a grid of samples", "≥ 1"),
}


def peers(done: pd.DataFrame) -> list[dict]:
    """BatchNorms, merges, exact stability, regions, import: a figure a network, pair or net."""
    last = newest(done, ["how_gpu", "how_cpu", "how_threads", "networks", "hidden"]).tail(1)
    lines = last.iloc[0]["rows"] if len(last) else []
    rows = []
    for (part, rival), words in PARTS.items():
        some = [one for one in lines if one["part"] == part and one["rival"].startswith(rival) and one["targets"]]
        told = spread([one["ours_ms"] for one in some], 0) + " ms" if some and part == "merge" else ""
        if some and part != "merge":
            told = f"{spread([one['times'] for one in some], 1)} × as fast"
        holds = [met(one) and (part != "regions" or one["times"] >= 1) for one in some]
        rows.append(row(*words, "benchmark-peers", told, holds, done=last))
    beyond = [one["beyond_ms"] for one in lines if one["what"] == "import torch, linl"]
    told = spread(beyond, 0) + " ms" if beyond else ""
    asked = ("import linl, beyond torch's own", "import torch", "≤ 1,000 ms", "benchmark-peers")
    return [*rows, row(*asked, told, [ms <= 1000 for ms in beyond], done=last)]
