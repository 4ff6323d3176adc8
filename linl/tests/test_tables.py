"""Tables: the words in their cells, each notebook of tables alone, and all of them as one."""

import json
import math
import re
import shutil
import types

import nbformat
import pandas as pd
import pytest

import linl
from linl import notebooks, results, study, tables
from linl.results import ParameterError

WHOLE = results.PROJECT / "notebooks" / "tables.ipynb"
PARTS = results.PROJECT / "notebooks" / "tables"
MADE = {
    "linlnet": {
        "linlnet": ["linlnet.csv", "linlnet.md", "linlnet.png", "linlnet-course.png"],
        "last_layer": ["last_layer.csv", "last_layer.md"],
    },
    "layer_folding": {"layer_folding": ["layer_folding.csv", "layer_folding.md", "layer_folding.png"]},
    "blocks": {
        "mobile_blocks": ["mobile_blocks.csv", "mobile_blocks.md", "mobile_blocks.png"],
        "fold_pays": ["fold_pays.csv", "fold_pays.md", "fold_pays.png"],
    },
    "stability": {
        "stability": [
            "stability.csv", "stability.md", "stability.png", "stability_stages.csv", "stability_stages.md",
            "stability_counting.csv", "stability_counting.md", "stability_counting.png",
        ],
        "linear_stable": ["linear_stable.csv", "linear_stable.md", "linear_stable.png"],
        "proof_speed": ["proof_speed.csv", "proof_speed.md"],
    },
    "regions": {
        "regions": ["regions.csv", "regions.md", "regions.png", "regions_shallow.csv", "regions_shallow.md",
                    "regions_shallow.png"],
        "region_paths": ["region_paths.csv", "region_paths.md", "region_paths.png"],
    },
    "pruning": {
        "activating_pruning": [
            "activating_pruning.csv", "activating_pruning.md", "activating_pruning.png", "activating_pruning_step.csv",
            "activating_pruning_step.md", "activating_pruning_smaller.csv", "activating_pruning_smaller.md",
            "activating_pruning-mnist-mlp.png",
        ],
    },
    "agreement": {
        "agreement": [
            "agreement.csv", "agreement.md", "agreement.png", "agreement_sets.csv", "agreement_sets.md",
        ],
    },
    "benchmarks": {
        "bounds_speed": ["bounds_speed.csv", "bounds_speed.md"],
        "benchmarks": [
            "benchmark-units.csv", "benchmark-units.md", "benchmark-again.csv", "benchmark-again.md",
        ],
        "epoch_speed": ["benchmark-epoch.csv", "benchmark-epoch.md"],
        "kept_accuracy": ["benchmark-folded.csv", "benchmark-folded.md"],
        "imagenet_cost": ["imagenet_cost.csv", "imagenet_cost.md"],
        "study_cost": ["study_cost.csv", "study_cost.md"],
        "peers": ["benchmark-peers.csv", "benchmark-peers.md", "benchmark-peers-growth.png"],
        **dict.fromkeys(("last_layer", "fold_pays"), ()),  # only whether they were repeated
    },
    "targets": {
        "benchmarks": ["benchmark-targets.csv", "benchmark-targets.md"],
        **dict.fromkeys(("epoch_speed", "linlnet", "peers", "kept_accuracy", "last_layer", "bounds_speed"), ()),
        **dict.fromkeys(("stability", "study_cost"), ()),
    },
    "reproduction": {
        "linlnet": ["reproduction.csv", "reproduction.md", "reproduction.png"],
        **dict.fromkeys(
            ("last_layer", "layer_folding", "stability", "proof_speed", "regions", "linear_stable"), ()
        ),
        "activating_pruning": (),
    },
    "runs": {"fold_pays": ["runs.csv", "runs.md"]},  # any will do
}  # fmt: skip
"""What each part makes of each experiment."""
FROM_CODE = {"errata": ["errata.csv", "errata.md"]}
"""Parts that read no runs; `test_errata.py` tests them."""


# --- words -----------------------------------------------------------------------------------------


def test_words_of_a_cell():
    assert tables.change(1100, 1000) == "+10.0 %" and tables.change(1, 2) == "-50.0 %"
    assert tables.counted(1100, 1000) == "1,100 (+10.0 %)"
    assert tables.told([12, 12]) == "12" and tables.told([12, 13]) == "12/13" and tables.told("ab", " / ") == "a / b"
    assert tables.numbers([0, 3]) == "0 3" and tables.numbers([]) == "none"
    run = pd.Series({"how_gpu": "", "how_cpu": "a processor", "how_threads": 2, "width": 1.0, "limit": 0})
    assert tables.hardware(run) == "a processor, 2 threads" and tables.device(run) == "a processor"
    assert tables.hardware(pd.Series({**run, "how_gpu": "a GPU"})) == "a GPU, 2 threads"
    assert tables.reduced(run) == []
    assert tables.reduced(run.replace({1.0: 0.25})) == ["width 0.25"]
    assert tables.reduced(pd.Series({**run, "limit": 64})) == ["first 64 images"]


def test_latency_is_told_where_it_was_measured():
    group = pd.DataFrame({"start_ms_1": [4.0, 6.0], "folded_ms_1": [3.0, 3.0], "start_ms_8": [1.0, 1.0]})
    assert tables.latency(group, 1) == "5.00 ± 1.41 → 3.00 ± 0.00"
    assert tables.latency(group, 8) == "" and tables.latency(group, 64) == ""
    assert tables.latency(group.assign(folded_ms_8=float("nan")), 8) == ""
    assert tables.latency(group.rename(columns=lambda name: name.replace("folded", "cut")), 1, after="cut") != ""


def runs():
    rows = [("b", 1, "x", 2), ("b", 0, "x", 2), ("a", 0, "y", 1), ("c", 0, "x", 1)]
    return pd.DataFrame(rows, columns=["key", "seed", "dataset", "size"]).assign(
        version_torch=["2", "2", "1", "2"], how_cpu="p", how_threads=[2, 2, 2, 1], finished=["4", "3", "1", "2"]
    )


def test_settings_are_ordered_and_their_seeds_too():
    def keys(groups):
        return ["".join(group["key"].unique()) for group in groups]

    groups = tables.settings(runs())
    assert keys(groups) == ["a", "b", "c"] and groups[1]["seed"].tolist() == [0, 1]
    assert keys(tables.settings(runs(), ["dataset", "size"])) == ["c", "b", "a"]
    assert keys(tables.settings(runs(), ["dataset", "size"], descending=["dataset"])) == ["a", "c", "b"]
    assert keys(tables.settings(runs(), ["less"], less=lambda t: -t["size"])) == ["b", "a", "c"]
    assert tables.settings(pd.DataFrame(), ["dataset"], less=lambda t: t["size"]) == []


def test_the_newest_run_of_each():
    assert tables.newest(runs())["key"].tolist() == ["b"]
    assert tables.newest(runs(), ["dataset"])["finished"].tolist() == ["1", "4"]
    assert tables.newest(pd.DataFrame(), ["dataset"]).empty


def test_what_runs_were_made_with():
    assert tables.made_with(runs()) == {
        "versions": "1, 2", "processors": "p", "hardware": "p, 1 thread; p, 2 threads"
    }  # fmt: skip


def test_tables_write_only_where_they_are_told_to(tmp_path, capsys):
    shown = tables.Tables()
    assert shown.write([{"a": 1}, {"b": "x"}], "demo")["b"].tolist() == ["", "x"] and shown.written == []
    there = tables.Tables("runs", "quick", tmp_path)
    there.write([{"a": 1}], "demo", "torch {versions}, {hardware}", runs())
    there.write([{"a": 1}], "braces", "{as it is}")
    assert there.write([], "nothing", "torch {versions}", pd.DataFrame()) is None
    assert [path.name for path in there.written] == ["demo.csv", "demo.md", "braces.csv", "braces.md"]
    assert (tmp_path / "demo.md").read_text().endswith("\ntorch 1, 2, p, 1 thread; p, 2 threads\n")
    assert (tmp_path / "braces.md").read_text().endswith("\n{as it is}\n")
    assert there.runs("demo").empty and there.counts().empty
    assert capsys.readouterr().out == "no finished runs of demo among the runs of profile quick\n"
    with pytest.raises(ParameterError, match="unknown source 'record': choose from records, runs"):
        tables.Tables("record")


def test_growth_has_the_power_of_its_upper_half():
    import matplotlib.pyplot as plt

    sizes = [2, 4, 8, 16, 32]
    rows = [{"what": "a", "along": "width", "size": n, "ms": 0.5 * n**3 if n >= 8 else 256.0} for n in sizes]
    rows += [{"what": "b", "along": "depth", "size": n, "ms": 7.0 * n} for n in sizes[:2]]
    rows += [{"what": "a", "along": "depth", "size": 2, "ms": 1.0}]
    growth = pd.DataFrame(rows)
    powers = tables.exponents(growth).set_index(["what", "along"])
    a, b, one = (powers.loc[place] for place in (("a", "width"), ("b", "depth"), ("a", "depth")))
    assert (a["power"], a["error"], a["sizes"]) == (pytest.approx(3), pytest.approx(0, abs=1e-9), 3)
    assert b["sizes"] == 1 and pd.isna(b["power"]), "the upper half of two sizes is one, which has no slope"
    assert pd.isna(one["power"]) and pd.isna(one["error"])
    drawn = tables.growth_picture(growth, {"width": "units", "depth": "layers"})
    told = [text.get_text() for ax in drawn.axes for text in ax.get_legend().get_texts()]
    assert told == ["a (width^3.00 ± 0.00)", "b (depth^nan)", "a (depth^nan)"]
    assert [ax.get_xlabel() for ax in drawn.axes] == ["units", "layers"]
    assert [sum(line.get_linestyle() == "--" for line in ax.lines) for ax in drawn.axes] == [1, 0]
    plt.close(drawn)


def test_the_standard_error_of_a_power():
    """As the textbook has it: residuals of (1, -2, 1) around a line through x = 0, 1, 2."""
    rows = [{"what": "a", "along": "width", "size": n, "ms": ms} for n, ms in ((1, 9.0), (2, 9.0))]
    fitted = [(math.e**x, math.e ** (2 * x + off)) for x, off in ((3, 0.1), (4, -0.2), (5, 0.1))]
    rows += [{"what": "a", "along": "width", "size": n, "ms": ms} for n, ms in fitted]
    (found,) = tables.exponents(pd.DataFrame(rows)).to_dict("records")
    assert found["power"] == pytest.approx(2) and found["error"] == pytest.approx((0.06 / 1 / 2) ** 0.5)


# --- notebooks inside notebooks --------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """What a kernel has, in this process: notebooks that run inside others need no other."""
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    config = Config(
        {"HistoryManager": {"enabled": False}, "InteractiveShell": {"warn_venv": False, "colors": "nocolor"}}
    )
    made = InteractiveShell.instance(config=config, user_module=types.ModuleType("a_kernels_own"))
    yield made
    made.restore_sys_module_state()
    InteractiveShell.clear_instance()
    plt.close("all")


def notebook(path, *sources):
    """A notebook with one parameter, then these cells."""
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A title"), new.new_code_cell("n: int = 1  # a number")]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new.new_notebook(cells=[*cells, *map(new.new_code_cell, sources)]), path)
    return path


def test_a_notebook_runs_inside_another(shell, tmp_path, capsys):
    shell.run_cell("n, other, text = 7, 8, 'the caller'")
    asks = "import linl\nfound = linl.results.parameters(globals())"
    path = notebook(tmp_path / "part.ipynb", asks, "other = n + 1\ntext.upper()")
    names = notebooks.run_here(path, n=3)
    assert names["found"] == {"n": 3} and names["other"] == 4
    assert "'THE CALLER'" in capsys.readouterr().out, "the last expression of a cell is shown"
    assert shell.user_ns["n"] == 7 and shell.user_ns["other"] == 8 and "found" not in shell.user_ns
    assert notebooks.run_here(path)["other"] == 2, "its own value where none is given"


def test_an_error_in_a_part_stops_the_whole(shell, tmp_path):
    path = notebook(tmp_path / "part.ipynb", "n = 1 / 0", f"open({str(tmp_path / 'after')!r}, 'w')")
    with pytest.raises(ZeroDivisionError):
        notebooks.run_here(path)
    assert not (tmp_path / "after").exists() and "n" not in shell.user_ns
    with pytest.raises(ParameterError, match=r"part\.ipynb: unknown parameter m"):
        notebooks.run_here(path, m=1)
    with pytest.raises(ParameterError, match=r"no notebook .*none\.ipynb"):
        notebooks.run_here(tmp_path / "none.ipynb")


def test_outside_of_a_notebook_nothing_runs_inside(tmp_path):
    with pytest.raises(RuntimeError, match="inside another"):
        notebooks.run_here(notebook(tmp_path / "part.ipynb"))


# --- the tables' notebooks -------------------------------------------------------------------------


def a_few_records(*experiments):
    """Records that never were, a setting with two seeds of each experiment: like one that is committed."""
    pictured = {"mobile_blocks": "mobilenetv2-*", "stability": "mlp-*", "activating_pruning": "mlp-*"}
    for experiment in experiments:
        committed = results.PROJECT / "results" / "records" / experiment
        first = min(committed.glob(f"{pictured.get(experiment, '*')}/*/result.json")).parent
        for seed in (0, 1):
            made = results.results_folder() / "records" / experiment / "a-key" / f"s{seed}"
            shutil.copytree(first, made)
            params, result = (json.loads((made / name).read_text()) for name in ("params.json", "result.json"))
            (made / "params.json").write_text(json.dumps(params | {"seed": seed, "profile": "made-up"}))
            result |= {"key": "a-key", "seed": seed, "versions": {**result["versions"], "torch": f"{seed}.0"}}
            (made / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("part", MADE)
def test_a_part_makes_its_tables_alone(part, shell, tmp_path, capsys):
    """Shown and not written; then written; and a system without runs says so in one line."""
    experiments = MADE[part]
    made = notebooks.run_here(PARTS / f"{part}.ipynb")["tables"]
    told = re.findall("no finished runs of .*", capsys.readouterr().out)
    silent = [f"no finished runs of {name} among the records" for name in experiments if part != "runs"]
    assert made.written == [] and told == silent
    a_few_records(*experiments)
    made = notebooks.run_here(PARTS / f"{part}.ipynb")["tables"]
    assert made.written == [] and "no finished runs" not in capsys.readouterr().out
    made = notebooks.run_here(PARTS / f"{part}.ipynb", profile="made-up", out_dir=str(tmp_path / "out"))["tables"]
    wanted = sorted(name for names in experiments.values() for name in names)
    assert sorted(path.name for path in made.written) == wanted == sorted(p.name for p in (tmp_path / "out").iterdir())
    for table in (tmp_path / "out").glob("*.csv"):
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
        assert len(rows), table.name
        if table.stem == "stability_counting":  # what the papers' own figures tell of how they are counted
            assert "run" not in rows
            continue
        judged = part in ("reproduction", "targets")  # which have rows that no run made
        told = rows[rows["run"] != ""] if judged else rows
        seeds = set(told.get("seeds", ["2"])) - ({"1"} if part == "reproduction" else set())
        assert seeds == {"2"}, f"{table.name}: a setting's seeds are one row"
        assert set(told["run"]) == {"key"}, f"{table.name}: each row names its run"


def agreeing(name, n, **signs):
    """A record of the agreement of signs on a network of n activations, whose referee goes up from the first on."""
    committed = results.PROJECT / "results" / "records" / "agreement"
    made = results.results_folder() / "records" / "agreement" / f"a-{name}" / "s0"
    shutil.copytree(min(committed.glob("mlp-cifar10-*/s0/result.json")).parent, made)
    params, result = (json.loads((made / f"{file}.json").read_text()) for file in ("params", "result"))
    columns = {"referee": range(n), "p": range(n), "rate": range(n), "certified": [None] * n} | signs
    blank = dict.fromkeys((*linl.signals.SIGNS, "alpha", "lost", "grown"), [0.0] * n)
    columns = {
        "dynamic": [rate - 1 for rate in columns["rate"]],
        **{k: v for k, v in blank.items() if k != "dynamic"},
    } | columns
    layers = (
        pd.DataFrame(columns).astype(object).where(lambda t: t.notna(), None).assign(layer=list(map(str, range(n))))
    )
    result["figures"] |= {"activations": n, "layers": layers.to_dict("records")}
    (made / "params.json").write_text(json.dumps(params | {"network": name}))
    (made / "result.json").write_text(json.dumps(result | {"key": f"a-{name}"}))


def test_agreement_says_no_more_than_chance_allows(shell, tmp_path):
    """Four activations are too few; a sign heard twice is in no general sentence; what is beyond chance is marked."""
    turned, up = list(range(12))[::-1], list(range(12))
    for name, steady in (("mlp", [0.0] * 12), ("vgg16", up), ("resnet20", up)):
        agreeing(name, 12, p=turned, pull=[*up[6:], *up[:6]], steady=steady)
    agreeing("alexnet", 4)
    names = notebooks.run_here(PARTS / "agreement.ipynb", out_dir=str(tmp_path))
    beyond, general = names["said"].split("\n\n")
    assert "on 3 networks" in beyond and "rate on 3 of 3, steady on 2 of 2; the wrong way p on 3" in beyond
    assert "on none pull (of 3)" in beyond and "about 1 of 11" in beyond and "alexnet on cifar10 (4)" in beyond
    assert "Above 0 on all of them: rate (3, a coin: 1 in 8)." in general, "steady was heard on two networks"
    assert "p -1.00" in general and "*steady* is 0 for every activation of mlp on cifar10" in general
    table = pd.read_csv(tmp_path / "agreement.csv", dtype=str, keep_default_na=False).set_index("network")
    assert table.loc["alexnet", ["activations", "p", "certified"]].tolist() == ["4, too few", "1.00", "–"]
    assert table.loc["mlp", ["activations", "p", "rate", "steady"]].tolist() == ["12", "-1.00 *", "1.00 *", "same"]
    assert "dynamic" not in table, "which is the rate once more"


def test_agreement_shows_dynamic_where_it_is_not_the_rate(shell, tmp_path):
    agreeing("mlp", 6, dynamic=[-0.1, -0.3, -0.2, 0.0, 0.0, 0.0])
    names = notebooks.run_here(PARTS / "agreement.ipynb", out_dir=str(tmp_path))
    assert not names["twins"] and "*dynamic*: the dead-neuron rate" in (tmp_path / "agreement.md").read_text()
    assert "dynamic" in pd.read_csv(tmp_path / "agreement.csv").columns


def test_linlnet_tells_what_a_record_has(shell, tmp_path):
    """A depth that wasn't counted is an empty cell, with the reason; what wasn't tried isn't spoken of."""

    def made(**figures):
        shutil.rmtree(results.results_folder() / "records", ignore_errors=True)
        a_few_records("linlnet")
        for path in (results.results_folder() / "records").rglob("result.json"):
            result = json.loads(path.read_text())
            result["figures"] |= {"relu_depth": 18.0, "merged_depth": 16.0} | figures
            path.write_text(json.dumps(result))
        notebooks.run_here(PARTS / "linlnet.ipynb", out_dir=str(tmp_path))
        table = pd.read_csv(tmp_path / "linlnet.csv", dtype=str, keep_default_na=False)
        return table["depth"].tolist(), " ".join((tmp_path / "linlnet.md").read_text().split())

    cells, note = made()
    assert cells == ["18 → 16"] and "couldn't count" not in note and "become linear" not in note
    cells, note = made(merged_depth=None)
    assert cells == [""] and "empty where the run, an earlier one, couldn't count it" in note
    cells, note = made(near=1, near_parameters=1000, near_test_accuracy=0.5)
    assert cells == ["18 → 16"] and "if those become linear too. *last p*" in note


def pruned_by(score, *, less=0.0):
    """Three seeds of a method X on an MLP, the committed record of one; a seed's accuracies are a little less."""
    committed = results.PROJECT / "results" / "records" / "activating_pruning"
    one = min(committed.glob("mlp-*/s0/result.json")).parent
    for seed in range(3):
        made = results.results_folder() / "records" / "activating_pruning" / f"a-{score}" / f"s{seed}"
        shutil.copytree(one, made)
        params, result = (json.loads((made / f"{file}.json").read_text()) for file in ("params", "result"))
        for number, row in enumerate(result["figures"]["cycles_table"]):
            row["test_accuracy"] -= less + seed * number * 1e-4
        (made / "params.json").write_text(json.dumps(params | {"score": score, "seed": seed}))
        (made / "result.json").write_text(json.dumps(result | {"key": f"a-{score}", "seed": seed}))


def test_methods_that_coincide_count_once(shell, tmp_path):
    """gradient and snip without BatchNorm: alike in every figure, down to the last arm."""

    def told():
        notebooks.run_here(PARTS / "pruning.ipynb", out_dir=str(tmp_path))
        table = pd.read_csv(tmp_path / "activating_pruning.csv", dtype=str, keep_default_na=False)
        return table, " ".join((tmp_path / "activating_pruning.md").read_text().split())

    pruned_by("gradient"), pruned_by("snip"), pruned_by("magnitude", less=0.01)
    table, note = told()
    assert "of 2 methods" in note and "of 3 methods" not in note
    assert re.search(r"its figures all the same, counts once: \*snip\* and \*gradient\* on mlp [\d-]+\.", note)
    mine, twin = (table[table["X"] == X].drop(columns=["X", "run"]).to_numpy() for X in ("gradient", "snip"))
    assert (mine == twin).all() and len(mine) > 1 and (table["p"] != "").any(), "both are in the table, tests too"
    shutil.rmtree(results.results_folder() / "records" / "activating_pruning" / "a-snip")
    pruned_by("snip", less=0.001)
    _, note = told()
    assert "of 3 methods" in note and "counts once" not in note


def test_the_whole_is_all_its_parts(shell, tmp_path):
    """Parts with runs write, the others are silent; index.md names what was written; profiles are kept apart."""
    a_few_records("fold_pays", "layer_folding", "benchmarks")
    names = notebooks.run_here(WHOLE, out_dir=str(tmp_path / "out"))
    wanted = sorted([*MADE["blocks"]["fold_pays"], *MADE["layer_folding"]["layer_folding"],
                     *MADE["reproduction"]["linlnet"],
                     *MADE["benchmarks"]["benchmarks"], *MADE["targets"]["benchmarks"],
                     *MADE["runs"]["fold_pays"], *FROM_CODE["errata"]])  # fmt: skip
    assert (tmp_path / "out" / "index.md").read_text() == "".join(f"- [{name}]({name})\n" for name in wanted)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*wanted, "index.md"])
    assert dict(names["counts"]) == {"benchmarks": 2, "fold_pays": 2, "layer_folding": 2}
    assert "torch 0.0, 1.0." in (tmp_path / "out" / "layer_folding.md").read_text()
    called = re.findall(r'made_by\("(\w+)"\)', WHOLE.read_text().replace('\\"', '"'))
    assert called == [*MADE, *FROM_CODE] and set(called) == {path.stem for path in PARTS.glob("*.ipynb")}


@pytest.mark.filterwarnings("ignore:To exit")
def test_without_runs_there_are_no_tables(shell, tmp_path):
    with pytest.raises(SystemExit, match="no finished runs among the records$"):
        notebooks.run_here(WHOLE, out_dir=str(tmp_path / "out"))
    a_few_records("fold_pays")
    with pytest.raises(SystemExit, match="no finished runs among the records of profile none$"):
        notebooks.run_here(WHOLE, out_dir=str(tmp_path / "out"), profile="none")
    assert not (tmp_path / "out").exists()


def test_an_empty_results_folder_is_said(tmp_path):
    """As `make tables` says it, from a kernel."""
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match="SystemExit: no finished runs among the records"):
        study.make_tables(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
