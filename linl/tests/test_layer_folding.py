"""The Layer Folding notebook and its tables: what is refused, what a run says, what the paper says."""

import json

import pandas as pd
import pytest

from linl import results, study
from linl.data import PROJECT
from linl.tests.test_notebooks import checked, papermill

NOTEBOOK = PROJECT / "notebooks" / "experiments" / "layer_folding.ipynb"
TINY = {"width": 0.5, "image_size": 8, "limit": 64, "pretrain_epochs": 1, "epochs": 1, "tune_epochs": 1,
        "time_latency": False, "threads": 1, "profile": "test"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_": 0.1}, "unknown parameter: lambda_"),
        ({"network": "lenet"}, "unknown network 'lenet': choose from mlp"),
        ({"dataset": "cifar"}, "unknown data set 'cifar'"),
        ({"normalize": "cifar"}, "unknown normalization 'cifar': choose from imagenet, half"),
        ({"recipe": "folding"}, "unknown recipe 'folding': choose from linlnet"),
        ({"tune_recipe": "tune"}, "unknown recipe 'tune'"),
        ({"pretrain_epochs": 0}, "epochs = 0: must be at least 1"),
        ({"weights": "weights/none.th"}, "no file weights/none.th in .*: put it there, or set LINL_DATA"),
        ({"weights": "/none.th"}, "'/none.th': name it below a data folder"),
        ({"keep": "0 3 19"}, "keep = '0 3 19': 19 isn't a number from 0 to 18, write it as 0 3 5"),
        ({"keep": "0-3"}, "keep = '0-3': 0-3 isn't a number from 0 to 18"),
        ({"keep": "-1"}, "keep = '-1': -1 isn't a number"),
        ({"penalty": -0.1}, "penalty = -0.1: must be at least 0"),
        ({"start": -0.1}, "alpha = -0.1 is negative"),
        ({"threshold": 1.5}, "threshold = 1.5: must be above 0 and at most 1"),
        ({"objective": "speed"}, "unknown objective 'speed': choose from"),
        ({"device": "tpu"}, "tpu"),
        ({"precision": "fp8"}, "precision 'fp8'"),
    ],
)
def test_wrong_parameters_are_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=message):
        checked(NOTEBOOK, **changes)
    assert not list(tmp_path.rglob("params.json")), "a run was opened"


def test_weights_of_another_network_are_refused(data_folder):
    file = "weights/cifar10/akamaster_resnet20-12fca82f.th"
    if not (data_folder / file).is_file():
        pytest.skip(f"no {file}")
    with pytest.raises(ValueError, match="holds weights of another network"):
        checked(NOTEBOOK, weights=file, network="resnet32", width=1.0)
    found = checked(NOTEBOOK, weights=file, width=1.0, normalize="imagenet", keep="3 0 3")
    assert found["imposed"] == [0, 3] and len(found["names"]) == 19
    assert found["params"]["weights"] == file, "a record names the file, not the folder"


def given(**changes):
    return [word for name, value in {**TINY, **changes}.items() for word in ("-p", name, str(value))]


def test_a_run_learns_records_and_is_shown_again(tmp_path):
    """A start beyond the threshold: everything goes, the network is one layer, and it all still holds."""
    words = given(start=0.95, penalty=1.0)
    first = papermill(NOTEBOOK, tmp_path / "out.ipynb", *words)
    assert first.returncode == 0, first.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("result.json")
    before = file.read_bytes()
    figures = json.loads(before)["figures"]
    assert figures["kept"] == len(figures["kept_list"]) and figures["depth_published"] == figures["kept"] + 1
    assert figures["activations"] == 19 and len(figures["alphas"]) == 19 and figures["layers_before"] == 20
    assert figures["kept_list"] == [i for i, alpha in enumerate(figures["alphas"]) if alpha < 0.9]
    assert figures["merged_runs"] > 0 and figures["layers_left"] < 20 and figures["merge_error"] < 1e-10
    assert figures["tuned_test_accuracy"] == pytest.approx(figures["folded_test_accuracy"], abs=1 / 64)
    assert {"start_test_accuracy", "hard_validation_accuracy", "folded_gmacs", "interior_error"} <= set(figures)
    for part in ("start", "prefold", "."):
        assert (file.parent / part / "metrics.csv").is_file() and (file.parent / part / "model.safetensors").is_file()
    weights = (file.parent / "model.safetensors").stat().st_mtime_ns
    again = papermill(NOTEBOOK, tmp_path / "again.ipynb", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert file.read_bytes() == before and (file.parent / "model.safetensors").stat().st_mtime_ns == weights


def test_published_figures_agree_with_themselves():
    paper = results.paper("layer_folding")
    assert len(paper) == 18 and (paper["source"] != "").all()
    assert not paper.duplicated(["network", "dataset", "width"]).any()
    for _, row in paper.iterrows():
        kept = [int(number) for number in row["kept"].split()]
        assert len(kept) + 1 == int(row["depth"]) and kept == sorted(set(kept))
        assert kept[-1] < int(row["activations"]) and 60 < float(row["accuracy"]) < 95


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56", "vgg16", "vgg19"])
def test_our_numbering_is_the_papers(name):
    import linl

    paper = results.paper("layer_folding")
    net = linl.models.create(name, width=0.125)
    counts = set(paper[paper["network"] == name]["activations"])
    assert counts == {str(len(linl.units.units_of(linl.linearize(net, "partial"))))}


def recorded(key, seed=0, **changes):
    """A record of a run that never was."""
    params = {"network": "resnet20", "dataset": "cifar10", "weights": "w.th", "recipe": "layer-folding", "epochs": 12,
              "penalty": 0.25, "start": 0.0, "keep": "", "tune_recipe": "fine-tune-short", "tune_epochs": 10,
              "pretrain_recipe": "linlnet", "pretrain_epochs": 5, "width": 1.0, "limit": 0, "profile": "t"}  # fmt: skip
    figures = {"start_test_accuracy": 0.92, "tuned_test_accuracy": 0.9, "activations": 19, "kept_list": [0, 3 + seed],
               "depth_published": 3, "layers_before": 20, "layers_left": 12 + seed, "start_parameters": 1000,
               "folded_parameters": 1100, "start_ms_1": 4.0, "folded_ms_1": 3.0}  # fmt: skip
    folder = results.results_folder() / "records" / "layer_folding" / key / f"s{seed}"
    folder.mkdir(parents=True)
    how = {"cpu": "a processor", "gpu": "", "threads": 2, "precision": "fp32", "seconds": 1.0, "peak_memory_mb": 1}
    versions = dict.fromkeys(("python", "torch", "torchvision", "timm"), "2")
    figures |= {name: changes.pop(name) for name in list(changes) if name in figures}
    (folder / "params.json").write_text(json.dumps({**params, **changes, "seed": seed}))
    result = {"figures": figures, "how": how, "versions": versions, "key": key, "finished": "now"}
    result["source"] = {"revision": "abc", "clean": True}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_table_says_what_was_done_beside_the_paper():
    recorded("a")
    recorded("a", seed=1, tuned_test_accuracy=0.88)
    recorded("b", keep="0 3", epochs=100, tune_epochs=100, kept_list=[0, 3])
    recorded("c", dataset="digits", weights="", width=0.5, kept_list=[])
    study.make_tables(out=results.results_folder() / "tables")
    made = results.results_folder() / "tables"
    table = pd.read_csv(made / "layer_folding.csv", dtype=str, keep_default_na=False)
    assert (made / "layer_folding.png").is_file() and not (made / "linlnet.csv").exists()
    learnt, imposed, digits = (row for _, row in table.iterrows())
    assert learnt["schedule"] == "12 + 10 epochs (100 + 100 in the paper), layer-folding, fine-tune-short"
    assert (learnt["λ"], learnt["seeds"], learnt["layers"]) == ("0.25", "2", "20 → 12/13")
    assert learnt["accuracy %"] == "92.00 ± 0.00 → 89.00 ± 1.41"
    assert learnt["ms, batch 1"] == "4.00 ± 0.00 → 3.00 ± 0.00"
    assert learnt["kept"] == "0 3 / 0 4 of 19" and learnt["parameters"] == "1,100 (+10.0 %)"
    assert (learnt["depth as published"], learnt["paper depth"], learnt["paper %"]) == ("3", "9", "89.82")
    assert imposed["λ"] == "imposed" and imposed["schedule"].startswith("100 epochs (100 + 100 in the paper)")
    assert digits["paper %"] == "" and digits["kept"] == "none of 19" and digits["from"] == "trained here"
    assert digits["ms, batch 64"] == "" and "5 of linlnet first" in digits["schedule"]
