"""What speed, size and tightness were to be, beside what the records say: a row a target, judged by rule.

Each function takes the finished runs of one experiment (as `linl.results.runs` gives them) and returns rows: what,
rival, asked, measured, middle half of pairs, reached, runs, hardware, where (the table that has all of it), how (the
notebook that measured it, and tells what was tried), run.

One rule for all rows (`linl.judging`): every run of the newest setting counts, so that a second one can only take away.
*Measured* goes from the smallest median of any run to the largest, the middle half from the lowest lower quartile to
the highest upper one, and a figure reaches what was asked if it does in each of its runs. `reached` is "yes", "no",
"in 3 of 4" (figures), "stated" (nothing was asked), "not comparable" or "not run".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd

from linl.connections import with_hidden
from linl.judging import SENSES, STATED, Found, every, figures, half_of, judged, row, spread, worst
from linl.repeats import faster_by, known, quartiles, three
from linl.results import mean_sd, paper
from linl.stability_claims import MEASURES, stable_setting
from linl.tables import newest
from linl.training_claims import alexnet_smaller
from linl.verdicts import Figure

# --- units and training ----------------------------------------------------------------------------

OURS, DTYPES = ("LiNLU", "PartialLinear"), ("float32", "bfloat16")


def units(done: pd.DataFrame) -> list[dict]:
    """Time and memory of a step, with freed memory kept and returned, in float32 and bf16: a figure each."""
    if len(done):
        done = done.assign(keep_memory=done["keep_memory"].fillna(True).astype(bool))
        last = newest(done, ["keep_memory", "how_gpu", "batch", "channels", "side"])
        done = done[done["key"].isin(last["key"])]
    say, control = partial(_unit_row, done), _control(done)
    peak = partial(_of, way="fused", quantity="peak_mb", over_relu=True)
    return [
        *(say(f"a unit's step, {way}, × nn.ReLU", limit, partial(_of, way=way, quantity="ratio"), more=control)
          for way, limit in (("fused", 1.1), ("eager", 3.0))),
        say("memory at the peak of a step, fused, × nn.ReLU", 1.1, peak),
        say("kept for backward by a chain with units, × nn.ReLU", 1.05, _chains, digits=3),
        *(say(f"relative error of p's gradient in bf16, {way}", 1e-3, partial(_of, way=way, quantity="gradient_error"),
              digits=5, rival="float64") for way in ("eager", "fused")),
    ]  # fmt: skip


def _unit_row(done: pd.DataFrame, what: str, limit: float, of, rival: str = "nn.ReLU", **how: Any) -> dict:
    return judged(what, rival, "<=", limit, "benchmark-units", figures(done, of), done, **how)


def _control(done: pd.DataFrame) -> str:
    """Where nn.ReLU beside itself isn't 1 within its middle half, the run can't tell a difference as small."""
    halves = [three(run, f"{dtype}/nn.ReLU/ratio") for _, run in done.iterrows() for dtype in DTYPES]
    halves = [half for half in halves if not math.isnan(half["middle"])]
    off = sum(not half["low"] <= 1 <= half["high"] for half in halves)
    return f"; nn.ReLU beside itself isn't 1 within its middle half in {off} of {len(halves)}" if off else ""


def _of(run: pd.Series, way: str, quantity: str, over_relu: bool = False) -> Found:
    """A quantity of every unit in every precision, where it was measured."""
    for dtype in DTYPES:
        relu = known(run, f"{dtype}/nn.ReLU/{quantity}") if over_relu else 1.0
        for unit in OURS:
            values = three(run, f"{dtype}/{unit}, {way}/{quantity}")
            yield (
                f"{run['key']} {run['how_gpu']} {dtype}/{unit}",
                {name: value / relu for name, value in values.items()},
            )


def _chains(run: pd.Series) -> Found:
    for name in (f"{unit}, {way}" for unit in OURS for way in ("fused", "eager")):
        yield (
            f"{run['key']} {run['how_gpu']} {name}",
            {"middle": known(run, f"chain_mb/{name}") / known(run, "chain_mb/nn.ReLU")},
        )


def epochs(done: pd.DataFrame) -> list[dict]:
    """Images a second with units, in those of the usual loop, a row a network; and what the loader costs on a GPU."""
    runs, where = every(done), "benchmark-epoch"
    wanted = runs.iloc[-1].get("targets") if len(runs) else None
    if not isinstance(wanted, Mapping):
        rows = [row("an epoch with units, × as fast", "the usual loop", "≥ 2", where)]
    else:
        found = figures(runs, _raced)
        rows = [judged(f"an epoch of {name} with units, × as fast", "the usual loop", ">=", limit, where,
                       found[found["figure"] == name], runs) for name, limit in wanted.items()]  # fmt: skip
    return [*rows, _loader(done)]


def _raced(run: pd.Series) -> Found:
    for name, group in pd.DataFrame(run["rows"]).groupby("network", sort=False):
        yield name, quartiles(group["ratio"])


def _loader(done: pd.DataFrame, limit: float = 0.01) -> dict:
    """Seconds to read an epoch's images as batches, in those of the whole epoch, where a GPU trained."""
    runs = every(done[done["how_gpu"] != ""]) if len(done) else done
    what = ("an epoch on a GPU: reading alone, share of it", "the whole epoch", "<=", limit, "benchmark-epoch")
    return judged(*what, figures(runs, _read), runs, digits=4)


def _read(run: pd.Series) -> Found:
    for name, group in pd.DataFrame(run["rows"]).groupby("network", sort=False):
        yield name, {"middle": run["seen"] / run["reading"]["linl"] / group["linl"].median()}


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
    """LiNL-AlexNet at 224 pixels: parameters; bytes and latency, of which nothing was asked."""
    what, where = "LiNL-AlexNet, 224 px: {}".format, "last_layer"
    change, run = alexnet_smaller(done)
    if change is None:
        names = ("bytes", "times as fast, batch 1")
        return [
            row(what("parameters"), "AlexNet", f"{asked:g} %", where),
            *(row(what(n), "AlexNet", STATED, where) for n in names),
        ]
    runs = done[done["key"] == run.iloc[0]["key"]]
    size, speed = figures(runs, _bytes), figures(runs, _latency)
    told, holds = spread(speed["middle"]) if len(speed) else "", [abs(change - asked) < 0.05]
    return [
        row(what("parameters"), "AlexNet", f"{asked:g} %", where, f"{change:.2f} %", holds, done=runs),
        row(what("bytes"), "AlexNet", STATED, where, spread(size["middle"]) + " %", done=runs, reached="stated"),
        row(what("times as fast, batch 1"), "AlexNet", STATED, where, told, half=half_of(speed), done=runs,
            reached="stated" if told else "not run"),
    ]  # fmt: skip


def _alexnet(run: pd.Series) -> dict:
    is_it = {"network": "alexnet", "side": 224, "width": 1.0}
    return next(case for case in run["cases"] if is_it.items() <= case.items())


def _bytes(run: pd.Series) -> Found:
    case = _alexnet(run)
    yield "bytes", {"middle": 100 * (known(case, "mbytes_after") / known(case, "mbytes_before") - 1)}


def _latency(run: pd.Series) -> Found:
    yield "ms", faster_by(_alexnet(run), "ms_1")


def folded(done: pd.DataFrame, asked: float = 1.4) -> list[dict]:
    """How fast a network with folded blocks is, by the slowest of its ways and batches: the fastest of those that have
    kept their accuracy, else the one that has lost least; where that is slower than asked, who is fast enough as well,
    or nearest to it. Then the same beside pruned channels."""
    runs = every(done)
    run = runs.iloc[-1] if len(runs) else {"network": "mobilenetv2", "within": 0.5}
    table = _kept(runs)
    rows = [
        (f"{run['network']}, blocks folded, × as fast", "itself"),
        (f"{run['network']}, blocks folded, at equal accuracy", "torch-pruning, channels cut"),
    ]
    blocks, pruned = (
        table[table["network"].str.startswith("blocks")],
        table[table["network"].str.contains("channels cut")],
    )
    first = (*rows[0], f"≥ {asked:g} in every way, for {run['within']:g} points", "benchmark-folded")
    second = (*rows[1], f"faster, within {run['within']:g} points of each other", "benchmark-folded")
    if blocks.empty:
        return [row(*first), row(*second)]
    kept = blocks[blocks["lost"] <= run["within"]]
    best = kept.loc[kept["slowest"].idxmax()] if len(kept) else blocks.loc[blocks["lost"].idxmin()]
    told, fast = _told(best, asked), blocks[blocks["slowest"] >= asked]
    reaches = len(kept) > 0 and best["slowest"] >= asked
    also = fast.loc[fast["lost"].idxmin()] if len(fast) else blocks.loc[blocks["slowest"].idxmax()]
    if also["slowest"] > best["slowest"] and best["slowest"] < asked:
        told += f"; {_told(also, asked)}"
    return [
        row(*first, told, [reaches], half=best["half"], done=runs),
        _beside_pruned(second, best, pruned, run["within"], runs),
    ]


def _told(one: pd.Series, asked: float) -> str:
    return f"{spread([one['slowest']], limit=asked)} for {one['lost']:.1f} points{one['new']} ({one['network']})"


def _kept(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a network: points lost at most, how many times as fast it is at least, and that way's middle half."""
    rows = []
    for name in runs.iloc[-1]["scores"] if len(runs) else ():
        lost = max(100 * (run["scores"]["as given"] - run["scores"][name]) for _, run in runs.iterrows())
        found = figures(runs, partial(_ways, name=name))
        if found.empty:  # timed in no way, or only scored
            continue
        slowest = found.loc[found["middle"].idxmin(), "figure"]
        half = half_of(found[found["figure"] == slowest])
        new = _lost_on_new(runs.iloc[-1], name)
        rows.append({"network": name, "lost": lost, "new": new, "slowest": found["middle"].min(), "half": half})
    return pd.DataFrame(rows, columns=["network", "lost", "new", "slowest", "half"])


def _lost_on_new(run: pd.Series, name: str) -> str:
    """The same on the pictures that the weights as given weren't trained on either, in words; "" where the record
    doesn't tell them from the others."""
    if not isinstance(run.get("new_lost_sd"), dict) or not 0 < run["new_images"] < run["test_images"]:
        return ""
    lost = 100 * (run["new_scores"]["as given"] - run["new_scores"][name])
    return f", {lost:.1f} ± {run['new_lost_sd'][name]:.1f} on {run['new_images']:.0f} pictures new to both"


def _ways(run: pd.Series, name: str) -> Found:
    for one in run["times"]:
        if one["network"] == name:
            yield f"{one['way']}, {one.get('batch')}", three(one, "times")


def _beside_pruned(what, best: pd.Series, pruned: pd.DataFrame, within: float, runs: pd.DataFrame) -> dict:
    """Whether the folded network is faster than what is pruned to its accuracy; of several that nearest to it."""
    if pruned.empty:
        return row(*what)
    nearest = pruned.loc[(pruned["lost"] - best["lost"]).abs().idxmin()]
    told = "; ".join(
        f"{one['network']}: {one['slowest']:.2f} × for {one['lost']:.1f} points" for one in (best, nearest)
    )
    if abs(nearest["lost"] - best["lost"]) > within:
        return row(*what, told, done=runs, reached="not comparable")
    return row(*what, told, [best["slowest"] > nearest["slowest"]], done=runs)


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
                found.append((line, group, factor * group[mine].mean() - (theirs.mean - theirs.sd)))
        what = (f"exact compression of MLPs: {name} removed", "published", "no fewer than its mean less its sd")
        told = f"{len(found)} settings, by {spread([over for *_, over in found], 1)} points" if found else ""
        short_of = [f"{_named(line)} by {over:.2f}" for line, _, over in found if over < -1e-9]
        told += f"; not {', '.join(short_of)}" if short_of else ""
        used = pd.concat([group for _, group, _ in found]) if found else None
        rows.append(row(*what, "reproduction", told, [over >= -1e-9 for *_, over in found], done=used) | {"run": ""})
    return rows


def _named(line: pd.Series) -> str:
    """A published setting in words."""
    return f"{line['dataset']} {line['hidden'].replace(' ', '-')}, l1 {float(line['l1']):g}"


def solver_times(done: pd.DataFrame) -> list[dict]:
    """The published seconds of exact stability (a commercial solver on their machine) over ours, a figure a published
    setting that was run; of the two machines nothing is known, so nothing is asked."""
    done = with_hidden(done)
    found = []
    for _, line in paper("stability").query("seconds != ''").iterrows():
        group = stable_setting(line, done)
        if group is not None and group["seconds"].mean() > 0:
            found.append((group, Figure.read(line["seconds"]).mean / group["seconds"].mean()))
    solver = "published: Gurobi, on their machine"
    what = ("exact stability, × as fast", solver, STATED, "stability")
    if not found:
        return [row(*what)]
    times, open_ = pd.Series([times for _, times in found]), sum((group["undecided"] > 0).any() for group, _ in found)
    told = f"median {times.median():.2f}, {spread(times)} over {len(times)} settings"
    told += f"; in {open_} of them ours left units open when its time was up" if open_ else ""
    return [row(*what, told, done=pd.concat([group for group, _ in found]), reached="stated") | {"run": ""}]


# --- the same answers as others --------------------------------------------------------------------


BESIDE = {  # ours, and whose bounds they are compared with
    "CROWN, float64": "CROWN, float64",
    "CROWN, float32": "CROWN, float32",
    "intervals, float64": "IBP, float64",
    "intervals, float32": "IBP, float32",
}
DENSE, DEEP = "a dense network", "ResNet18"
RACES = [
    *((DENSE, ours, theirs) for ours, theirs in BESIDE.items()),
    (DENSE, "intervals, float64", "IBP, float32"),
    (DEEP, "intervals, float64", "IBP, float64"),
    (DEEP, "intervals, float32", "IBP, float32"),
    (DEEP, "intervals, float64", "IBP, float32"),
    (DEEP, "local, float32", "CROWN-IBP, float32"),
]
"""Network, our bounds, the rival's. In float64 our intervals are as tight as the rival's in float32, so they are beside
those as well; `local` is beside what of the rival's comes nearest."""


def bounds(done: pd.DataFrame) -> list[dict]:
    """Bounds beside auto_LiRPA's, a figure a domain of a dense network, and a ResNet18: time, and the mean widths of
    the bounds on the last hidden layer and on the outputs."""
    runs, rows = every(done), []
    for net, ours, theirs in RACES:
        mine, rival = f"linl, {ours}", f"auto_LiRPA, {theirs}"
        cases = partial(_both, net=net, mine=mine, rival=rival)
        times, widths = figures(runs, partial(_bound_times, cases=cases)), figures(runs, partial(_widths, cases=cases))
        rows.append(judged(f"{ours}, {net}: × its time", rival, "<=", 1, "bounds_speed", times, runs))
        by = [f"{of} {spread(part['middle'], 4)}" for of in WIDTHS
              if len(part := widths[widths["figure"].str.startswith(of)])]  # fmt: skip
        holds = worst(widths, lambda times_as_wide: times_as_wide <= 1 + 1e-6)
        what = (f"{ours}, {net}: × as wide", rival, "≤ 1, to 1e-6", "bounds_speed")
        rows.append(row(*what, "; ".join(by), holds, done=runs if len(widths) else None))
    return rows


WIDTHS = {"outputs": "output", "last hidden layer": "hidden"}


def _both(run: pd.Series, net: str, mine: str, rival: str) -> Iterator[tuple[str, Mapping, Mapping]]:
    """Domain, our line and the rival's, where both were measured."""
    lines = run["cases"] if net == DENSE else [{**line, "domain": DEEP} for line in run["residual"]]
    by = {(line["domain"], line["bounds"]): line for line in lines if not math.isnan(known(line, "ms"))}
    for domain in dict.fromkeys(line["domain"] for line in lines):
        if (domain, mine) in by and (domain, rival) in by:
            yield domain, by[domain, mine], by[domain, rival]


def _bound_times(run: pd.Series, cases) -> Found:
    for domain, ours, theirs in cases(run):
        paired = (
            three(ours, "ratio") if ours.get("beside", theirs["bounds"]) == theirs["bounds"] else {"middle": math.nan}
        )
        yield domain, paired if not math.isnan(paired["middle"]) else {"middle": ours["ms"] / theirs["ms"]}


def _widths(run: pd.Series, cases) -> Found:
    for domain, ours, theirs in cases(run):
        for name, column in WIDTHS.items():
            yield f"{name}, {domain}", {"middle": known(ours, column) / known(theirs, column)}


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


def place_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a row of experiment `peers` from the others, in any run."""
    return tuple(str(line.get(name, "")) for name in ("part", "what", "rival", "memory"))


def lines_of(runs: pd.DataFrame) -> dict[tuple[str, ...], list[dict]]:
    """The rows of experiment `peers`, those of all runs together, as the newest has them."""
    found: dict[tuple[str, ...], list[dict]] = {
        place_of(line): [] for line in (runs.iloc[-1]["rows"] if len(runs) else ())
    }
    for rows in runs["rows"] if len(runs) else ():
        for line in rows:
            if place_of(line) in found:
                found[place_of(line)].append(line)
    return found


PARTS = [  # part, how the rival's name begins, what is done with freed memory, and what to call it
    ("norms", "torch.fx fuse", "kept", "every BatchNorm gone, freed memory kept"),
    ("norms", "torch.fx fuse", "returned", "every BatchNorm gone, freed memory returned"),
    ("norms", "timm reparameterize_model", "kept", "every BatchNorm gone"),
    ("branches", "timm reparameterize_model", "", "branches made one convolution"),
    ("merge", "convolution of the kernels, float32", "", "two convolutions made one, in float64"),
    ("merge", "convolution of the kernels, float64", "", "two convolutions made one, in float64"),
    ("merge", "one-hot outputs through 13", "", "two convolutions made one, in float64"),
    ("merge", "one-hot outputs through 5", "", "two convolutions made one, in float64"),
    ("stability", "", "", "exact stability"),
    ("regions", "", "", "regions in a plane"),
]


def peers(done: pd.DataFrame) -> list[dict]:
    """BatchNorms, merges, exact stability, regions, import: a figure a network, pair or net, by the record's own
    targets, in every run. A rival that failed has no time; what was asked of the time isn't reached then."""
    runs = every(done)
    places = lines_of(runs)
    return [*(_part(*part, places, runs) for part in PARTS), *_starts(places, runs)]


def _part(part: str, rival: str, memory: str, what: str, places: dict, runs: pd.DataFrame) -> dict:
    mine = {place: lines for place, lines in places.items() if place[0] == part and lines[0]["targets"]}
    groups = [lines for (_, _, by, kept), lines in mine.items()
              if by.startswith(rival) and memory in ("", kept or "kept")]  # fmt: skip
    faster = [["times", ">=", 1.0]] if part == "regions" else []  # the record asks for their number alone
    groups = [[{**one, "targets": [*one["targets"], *faster]} for one in lines] for lines in groups]
    if not groups:
        return row(what, rival or "see there", "see there", "benchmark-peers")
    some = [one for lines in groups for one in lines]
    wanted = {of: (of, sense, value) for one in some for of, sense, value in one["targets"]}
    limits = {"times": None} | {of: value for of, (_, _, value) in wanted.items()}  # how fast is told, asked or not
    told = [f"{ASKED[of]} {spread(values, 0 if of in ('ours_left', 'ours_ms') else 2, limit)}"
            for of, limit in limits.items() if (values := [float(one[of]) for one in some if of in one])]  # fmt: skip
    told += _untouched(groups)
    paired = pd.DataFrame([three(one, "times") for one in some if "times" in one], columns=["middle", "low", "high"])
    names = [lines[0]["what"] for lines in groups]
    what = f"{what}: {names[0] if len(names) == 1 else f'{len(names)} networks'}"
    holds = [all(map(met, lines)) for lines in groups]
    return row(what, some[0]["rival"], asked_of(wanted.values()), "benchmark-peers", "; ".join(told), holds,
               half=half_of(paired), done=runs)  # fmt: skip


def _untouched(groups: list[list[dict]]) -> list[str]:
    """A word on a rival that left networks as they were."""
    same = [all(one.get("rival_left") == one.get("before") is not None for one in lines) for lines in groups]
    return [f"the rival left every BatchNorm in {sum(same)} of {len(same)}"] if any(same) else []


def study(done: pd.DataFrame) -> list[dict]:
    """Seconds from a clone to the tables of `make study`, packages included, and of a second start."""
    own = done[done["environment"].astype(bool) & (done["asked"] == "quick")] if len(done) else done
    runs = every(own)
    what = ("`make study` from a clone", "itself, again", STATED, "study_cost")
    if runs.empty:
        return [row(*what)]
    by = pd.DataFrame([{one["step"]: one["seconds"] for one in steps} for steps in runs["steps"]])
    *first, again = by.columns
    told = ", ".join(f"{step} {spread(by[step], 1)}" for step in first)
    told = f"{spread(by[first].sum(axis=1), 1)} s ({told}); started again {spread(by[again], 1)} s"
    return [row(*what, told, reached="stated", done=runs)]


def _starts(places: dict, runs: pd.DataFrame) -> list[dict]:
    """What an import and a notebook cost, in milliseconds beyond what they need anyway."""
    by = {what: [one for one in lines if "beyond_ms" in one] for (_, what, _, _), lines in places.items()}
    found = {what: pd.DataFrame([{"figure": what, **three(one, "beyond_ms")} for one in lines],
                                columns=["figure", "middle", "low", "high"]) for what, lines in by.items()}  # fmt: skip
    nothing = figures(pd.DataFrame(), lambda run: iter(()))
    imported, ran = (found.get(name, nothing) for name in ("import torch, linl", "papermill, one cell"))
    asked = ("import linl, beyond torch's own", "import torch", "<=", 1000.0, "benchmark-peers")
    papermill = ("a notebook of one cell, beyond a bare kernel", "a bare kernel", STATED, "benchmark-peers")
    told = {"measured": f"{spread(ran['middle'], 0)} ms", "half": half_of(ran, 0), "done": runs} if len(ran) else {}
    return [
        judged(*asked, imported, runs, digits=0, unit=" ms"),
        row(*papermill, **told, reached="stated" if told else "not run"),
    ]
