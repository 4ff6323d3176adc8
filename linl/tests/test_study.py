"""Profiles: data that is checked before anything starts."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from linl import results, study
from linl.results import ParameterError
from linl.tests import kills


def test_every_profile_is_valid():
    found = {name: study.jobs(name) for name in study.profiles()}
    assert set(found) >= {"smoke", "quick", "cifar10", "paper", "imagenet"}
    linlnet = {name: [job.params for job in jobs if job.experiment == "linlnet"] for name, jobs in found.items()}
    assert {params["network"] for params in linlnet["quick"]} == {
        "mlp", "alexnet", "vgg16", "resnet18", "mobilenetv2", "efficientnet_lite0"
    }  # fmt: skip
    assert {params["epochs"] for params in linlnet["paper"]} == {200}
    assert {params["recipe"] for params in linlnet["paper"]} == {"linlnet"}
    for name, jobs in found.items():
        assert all(job.params["profile"] == name for job in jobs)
        assert len({job.folder for job in jobs}) == len(jobs)


def written(tmp_path, block):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"p": {"about": "x", "runs": [block]}}}))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"with": {"epoch": 3}}, r"profile p, linlnet: unknown parameter epoch; it has network, dataset"),
        ({"with": {"epochs": 0}}, "epochs = 0 must be at least 1"),
        ({"with": {"epochs": "ten"}}, "epochs = 'ten' must be of type int"),
        ({"with": {"network": "resnet"}}, "unknown network 'resnet'; choose from mlp"),
        ({"with": {"dataset": "cifar"}}, "unknown dataset 'cifar'"),
        ({"with": {"recipe": "fast"}}, "unknown recipe 'fast'"),
        ({"with": {"precision": "fp61"}}, "unknown precision 'fp61'; choose from auto, fp32, bf16"),
        ({"with": {"device": "gpu"}}, "unknown device 'gpu'"),
        (
            {"notebook": "experiments/stability.ipynb", "with": {"method": "milp"}},
            "unknown method 'milp'; choose",
        ),
        (
            {"notebook": "experiments/stability.ipynb", "with": {"adversary": "fgm"}},
            "unknown adversary 'fgm'",
        ),
        ({"notebook": "experiments/stability.ipynb", "with": {"hidden": "64x64"}}, "hidden = '64x64': whole numbers"),
        ({"notebook": "experiments/activating_pruning.ipynb", "with": {"score": "size"}}, "unknown score 'size'"),
        ({"notebook": "experiments/activating_pruning.ipynb", "with": {"rewind": "no"}}, "unknown rewind 'no'"),
        ({"notebook": "experiments/activating_pruning.ipynb", "with": {"certify": "x"}}, "unknown certify 'x'"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"keep": "0,3"}}, "keep = '0,3': whole numbers"),
        ({"notebook": "experiments/none.ipynb"}, r"no notebook .*none\.ipynb"),
        ({"sweep": {}}, "unknown key sweep"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"tune_recipe": "x"}}, "unknown tune_recipe 'x'"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"tune_epochs": 0}}, "tune_epochs = 0 must be at"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"penalty": -1}}, "penalty = -1.0 must be at least 0"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"objective": "x"}}, "unknown objective 'x'"),
        ({"notebook": "experiments/layer_folding.ipynb", "with": {"normalize": "x"}}, "unknown normalize 'x'"),
        ({"with": {"width": -1.0}}, "width = -1.0 must be above 0"),
        ({"with": {"validation": 1.5}}, "validation = 1.5 must be"),
        ({"with": {"limit": -5}}, "limit = -5 must be at least 0"),
        ({"seeds": 3}, "profile p is not written as the others are"),
        ({"threads": "many"}, "profile p is not written as the others are"),
        ({"each": [{"epochs": 2}, {"epochs": 2}]}, "the same run twice"),
    ],
)
def test_wrong_profiles_are_refused(tmp_path, change, message):
    path = written(tmp_path, {"notebook": "experiments/linlnet.ipynb", **change})
    with pytest.raises(ParameterError, match=message):
        study.jobs("p", path)


def test_unknown_profile_lists_the_known_ones(capsys):
    assert study.main(["run", "fast"]) == 2
    assert "unknown profile 'fast': choose from smoke, tiny, quick" in capsys.readouterr().err


def test_a_missing_kernel_is_said_first(monkeypatch, capsys):
    from jupyter_client import kernelspec

    def none(self, name):
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", none)
    assert study.main(["run", "smoke"]) == 2
    assert "no kernel named python3: install it with" in capsys.readouterr().err


def test_a_key_is_the_notebooks_own(tmp_path):
    """What Snakemake waits for is where the notebook writes: defaults and types are read alike."""
    job = study.jobs("smoke")[0]
    assert {*job.params, "results_dir"} == set(study.notebook_defaults(job.notebook))
    path = written(tmp_path, {"notebook": "experiments/linlnet.ipynb", "with": {"width": 1}})
    assert study.jobs("p", path)[0].params["width"] == 1.0 and isinstance(
        study.jobs("p", path)[0].params["width"], float
    )


def test_two_studies_on_one_folder(monkeypatch, capsys):
    """The second one is refused before it starts anything, and not by its own lock."""
    from linl import locks

    code = (
        "import sys, time; from pathlib import Path; from linl import locks\n"
        "locks.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    path = results.results_folder() / ".lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            monkeypatch.setattr(study, "check_kernel", lambda: None)
            assert study.main(["run", "smoke"]) == 2
            assert f"another study is running, process {other.pid} on " in capsys.readouterr().err
        finally:
            other.kill()
    with locks.only_one(path):
        assert locks.held(path)
    assert not locks.held(path)


def killed_on_the_way(profile):
    """kill -9 of all that a sweep has started, once a run is finished and others are at work. The short form of
    `python -m linl.tests.kills 50`."""
    folder = results.results_folder()
    with open(folder.parent / "killed.txt", "w") as said:
        sweep = kills.start(folder, profile, stdout=said, stderr=said)
    while not kills.bytes_of(folder):
        assert sweep.poll() is None, (folder.parent / "killed.txt").read_text()
        time.sleep(0.1)
    time.sleep(1.0)
    assert kills.kill(folder, "all")
    kills.end(sweep, folder)
    assert sweep.returncode == -signal.SIGKILL
    kills.check_whole(folder)
    return kills.bytes_of(folder)


def test_the_smoke_profile_from_start_to_table(capfd):
    """Snakemake, papermill, kernels, tables: all of it, killed on the way; once more when there is nothing to do."""
    before = killed_on_the_way("smoke")
    assert study.main(["run", "smoke"]) == 0
    after = kills.bytes_of(results.results_folder())
    assert 0 < len(before) < len(after) and before.items() <= after.items(), "what was finished is not done again"
    told = capfd.readouterr().out
    assert "| mlp " in told and "| resnet18 " in told and "executed notebooks:" in told
    jobs = study.jobs("smoke")
    stamps = [job.result.stat().st_mtime_ns for job in jobs]
    for job in jobs:
        result = json.loads(job.result.read_text())
        assert result["key"] == job.folder.parent.name
        assert result["figures"].get("merge_error", 0) < 1e-10
        assert (job.folder / "notebook.ipynb").is_file() and not list(job.folder.rglob("checkpoint.pt"))
    assert study.main(["run", "smoke"]) == 0
    assert f"all {len(jobs)} runs are done" in capfd.readouterr().out
    assert [job.result.stat().st_mtime_ns for job in jobs] == stamps
    jobs[0].result.unlink()
    command = [*study.engine.command("smoke", cores=2), "--dry-run"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"^run +1$", plan.stdout + plan.stderr, re.M), "what is missing is done, though tables are there"
    assert study.main(["record", "smoke"]) == 0 and study.main(["tables"]) == 0
    tables = results.results_folder() / "tables"
    first = {f.name: f.read_bytes() for f in tables.iterdir()}
    assert {"linlnet.csv", "linlnet.md", "linlnet.png", "benchmark-units.csv", "index.md"} <= set(first)
    assert {"layer_folding.csv", "layer_folding.md", "layer_folding.png"} <= set(first)
    shown = (results.results_folder() / "runs" / "tables" / "all" / "notebook.ipynb").read_text()
    pictures = [name for name in first if name.endswith(".png")]
    assert "## The course of p" in shown and shown.count('"image/png"') == len(pictures) >= 3, (
        "parts show, so the whole"
    )
    assert shown.count('"text/html"') >= 3, "their tables too, not pictures alone"
    assert study.main(["tables"]) == 0
    assert {f.name: f.read_bytes() for f in tables.iterdir()} == first, "the same records, the same bytes"


def test_results_that_cannot_be_written_are_said(monkeypatch, tmp_path, capsys):
    """A folder below a file: as good as a disk that can only be read, and for root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINL_RESULTS", str(tmp_path / "file" / "results"))
    assert study.main(["run", "tiny"]) == 2
    assert "can't be written (Not a directory): make it writable, or name another folder" in capsys.readouterr().err
    with pytest.raises(OSError, match="can't be written"):
        results.begin("linlnet", {"seed": 0})


def test_a_name_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("profiles:\n  a: {runs: []}\n  b: {runs: []}\n  a: {runs: []}\n")
    with pytest.raises(ParameterError, match="not valid YAML: a comes twice"):
        study.profiles(path)
    assert isinstance(study._Once(""), yaml.SafeLoader)


def test_small_numbers_reach_a_notebook_as_numbers():
    params = {"l1": 5e-05, "hidden": "100 100", "time_latency": True, "weights": "", "epochs": 3, "blocks": "2: 4 # x"}
    assert yaml.safe_load(study.as_yaml(params)) == params
    assert "\n" not in study.as_yaml(params)
