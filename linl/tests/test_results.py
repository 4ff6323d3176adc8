"""Runs and records: what counts as done, what a key is, tables that come out the same."""

import json

import pandas as pd
import pytest

from linl import results, tables
from linl.results import ParameterError, key_of, mean_sd, parameters

CELL = 'network: str = "mlp"\nepochs: int = 10\nlr: float = 0.1\noverwrite: bool = False\n'


def namespace(cell=CELL, injected=None):
    found = {"In": ["import linl", cell, *([injected] if injected else [])]}
    exec(cell, found)
    if injected:
        exec(injected, found)
    return found


def test_parameters_are_what_is_annotated():
    found = parameters(namespace(injected="# Parameters\nepochs = 3\nlr = 1\n"))
    assert found == {"network": "mlp", "epochs": 3, "lr": 1.0, "overwrite": False}
    assert type(found["lr"]) is float


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("epoch = 3", r"unknown parameter: epoch. This notebook has: network, epochs, lr, overwrite"),
        ("a = 1\nb = 2", "unknown parameters: a, b"),
        ("epochs = 3.5", "epochs = 3.5: must be of type int"),
        ("epochs = True", "epochs = True: must be of type int"),
        ("network = 3", "network = 3: must be of type str"),
        ('overwrite = "true"', "overwrite = 'true': must be True or False"),
    ],
)
def test_wrong_parameters_are_refused(injected, message):
    with pytest.raises(ParameterError, match=message):
        parameters(namespace(injected=f"# Parameters\n{injected}\n"))


def test_a_key_says_what_is_run_not_how():
    base = {"network": "mlp", "dataset": "digits", "profile": "quick", "epochs": 10, "seed": 0, "device": "cpu"}
    key = key_of(base)
    assert key.startswith("mlp-digits-quick-") and len(key.rsplit("-", 1)[1]) == 8
    for name, value in {"seed": 7, "device": "cuda", "threads": 4, "overwrite": True, "results_dir": "/x"}.items():
        assert key_of({**base, name: value}) == key
    assert key_of({**base, "epochs": 11}) != key and key_of({**base, "width": 0.5}) != key
    assert key_of(dict(reversed(base.items()))) == key
    there, here = (key_of({**base, "dataset": f"imagefolder:/{where}/imagenette"}) for where in ("a/b", "c"))
    assert here == there and here.startswith("mlp-imagefolder_imagenette-quick-"), "the folder's place is no setting"


def begun(**extra):
    return results.begin("demo", {"network": "mlp", "dataset": "digits", "profile": "t", "seed": 1, **extra})


def test_a_run_counts_only_with_its_result():
    run = begun()
    assert not run.finished and (run.folder / "params.json").is_file() and run.folder.name == "s1"
    assert results.runs("demo", "runs").empty
    with pytest.raises(FileNotFoundError, match="isn't finished"):
        results.record(run.folder)
    (run.folder / "relu").mkdir()
    (run.folder / "relu" / "checkpoint.pt").write_bytes(b"x")
    record = run.finish({"accuracy": 0.5, "bad": float("nan"), "list": [1, 2]}, device="cpu")
    assert run.finished and not (run.folder / "relu" / "checkpoint.pt").exists()
    assert record["figures"] == {"accuracy": 0.5, "bad": None, "list": [1, 2]}
    assert {"experiment", "key", "seed", "how", "versions", "source", "finished"} <= set(record)
    assert record["how"]["peak_memory_mb"] > 10 and set(record["source"]) == {"revision", "clean"}
    assert results.runs("demo", "runs")["accuracy"].tolist() == [0.5]
    assert results.runs("demo", "runs", profile="other").empty


def test_a_finished_run_keeps_its_bytes():
    run = begun()
    run.finish({"accuracy": 0.5})
    before = (run.folder / "result.json").read_bytes()
    assert begun().finished and begun().finish({"accuracy": 0.9})["figures"]["accuracy"] == 0.5
    assert (run.folder / "result.json").read_bytes() == before
    fresh = begun(overwrite=True)
    assert not fresh.finished and fresh.folder == run.folder


def test_records_hold_small_text_files_and_no_paths(tmp_path):
    run = begun(results_dir=str(tmp_path / "elsewhere"))
    for name in ("metrics.csv", "units.csv", "model.safetensors", "notebook.ipynb", "relu/metrics.csv"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("x")
    run.finish({"accuracy": 0.5})
    target = results.record(run.folder)
    names = sorted(str(f.relative_to(target)) for f in target.rglob("*") if f.is_file())
    assert names == ["metrics.csv", "params.json", "relu/metrics.csv", "result.json", "units.csv"]
    assert str(tmp_path) not in "".join(f.read_text() for f in target.rglob("*") if f.is_file())
    assert "results_dir" not in json.loads((target / "params.json").read_text())
    assert results.runs("demo", "records")["accuracy"].tolist() == [0.5]


def test_to_overwrite_is_to_do_a_finished_run_again_once():
    """Killed in the middle of that, while it emptied the folder or later, it goes on."""
    run = begun()
    run.finish({"accuracy": 0.5})
    old = run.folder / "start"
    old.mkdir()
    (run.folder / "result.json").rename(run.folder / ".anew")  # killed while emptying
    fresh = begun(overwrite=True)
    assert not fresh.finished and not old.exists() and not (run.folder / ".anew").exists()
    (run.folder / "checkpoint.pt").write_bytes(b"x")
    (run.folder / ".checkpoint.pt.123.part").write_bytes(b"half")  # killed while writing
    assert not begun(overwrite=True).finished
    assert (run.folder / "checkpoint.pt").exists() and not (run.folder / ".checkpoint.pt.123.part").exists()


def test_a_run_that_is_finished_while_one_waits_for_it_stays(monkeypatch):
    """Between the look for its result and the lock."""
    run = begun()
    (run.folder / "metrics.csv").write_text("x")
    hold = results.hold
    results.release(run.folder / results.LOCK)

    def late(path):
        (run.folder / "result.json").write_text("{}")
        hold(path)

    monkeypatch.setattr(results, "hold", late)
    assert begun().finished and (run.folder / "metrics.csv").is_file()


def test_a_record_says_how_busy_the_machine_was(monkeypatch):
    loads = iter([(0.123, 0.2, 0.3), (2.0, 1.0, 0.5)])
    monkeypatch.setattr(results.os, "getloadavg", lambda: next(loads))
    how = begun().finish({})["how"]
    assert how["load_before"] == [0.12, 0.2, 0.3] and how["load_after"] == [2.0, 1.0, 0.5]
    row = results.runs("demo", "runs").iloc[0]
    assert tables.loaded(row) == "load 0.1 before, 2.0 after"
    assert tables.loaded(row.drop("how_load_before")) == tables.loaded(pd.Series({"how_load_before": float("nan")}))


def test_where_nobody_counts_a_load_a_run_is_done_all_the_same(monkeypatch):
    def unknown():
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(results.os, "getloadavg", unknown)
    assert begun().finish({})["how"]["load_before"] is None
    assert tables.loaded(results.runs("demo", "runs").iloc[0]) == "load unknown"


def test_a_finished_runs_parameters_stay_as_they_were():
    run = begun(threads=1)
    run.finish({})
    begun(threads=2)
    assert json.loads((run.folder / "params.json").read_text())["threads"] == 1


def test_a_record_made_anew_has_nothing_of_the_one_before():
    run = begun()
    for name in ("metrics.csv", "relu/metrics.csv"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("x")
    run.finish({})
    target = results.record(run.folder)
    assert (target / "relu" / "metrics.csv").is_file()
    (run.folder / "relu" / "metrics.csv").unlink()
    results.record(run.folder)
    assert (target / "metrics.csv").is_file() and not (target / "relu" / "metrics.csv").exists()


def test_two_folders_of_pictures_with_one_name(tmp_path):
    """A run is the same one wherever its pictures lie; with others it is refused."""

    def pictures(place, *classes, size=1):
        for name in classes:
            (tmp_path / place / "birds" / "train" / name).mkdir(parents=True)
            (tmp_path / place / "birds" / "train" / name / "1.png").write_bytes(b"x" * size)
        return f"imagefolder:{tmp_path / place / 'birds'}"

    run = begun(dataset=pictures("here", "owl", "wren"))
    run.finish({})
    assert begun(dataset=pictures("moved", "owl", "wren")).finished
    train = tmp_path / "moved" / "birds" / "train"
    (train / ".ipynb_checkpoints").mkdir()
    (train / "owl" / ".DS_Store").write_bytes(b"x")
    (train / "owl" / "0.txt").symlink_to(tmp_path / "nowhere")
    assert begun(dataset=f"imagefolder:{train.parent}").finished, "what is no picture doesn't count"
    for other in (pictures("there", "owl", "lark"), pictures("larger", "owl", "wren", size=2)):
        with pytest.raises(results.ParameterError, match="imagefolder:.*birds: .* was begun with another folder"):
            begun(dataset=other)
    assert not begun(dataset=other, overwrite=True).finished


def test_mean_and_sd():
    assert mean_sd([0.5, 0.7], factor=100) == "60.00 ± 14.14"
    assert mean_sd([0.5]) == "0.50" and mean_sd([]) == "" and mean_sd([None, float("nan")]) == ""


def test_tables_come_out_the_same(tmp_path):
    table = pd.DataFrame({"network": ["mlp"], "accuracy": ["60.00 ± 14.14"], "paper": [""]})
    for folder in ("a", "b"):
        results.write_table(table, "demo", tmp_path / folder, note="A note.")
    assert (tmp_path / "a/demo.md").read_bytes() == (tmp_path / "b/demo.md").read_bytes()
    text = (tmp_path / "a/demo.md").read_text()
    assert "60.00 ± 14.14" in text and text.endswith("A note.\n")
    assert (tmp_path / "a/demo.csv").read_text().splitlines()[0] == "network,accuracy,paper"


def test_published_figures_carry_their_source():
    paper = results.paper("linlnet")
    assert len(paper) == 7 and (paper["source"] != "").all()
    row = paper[(paper["network"] == "alexnet") & (paper["dataset"] == "cifar10")].iloc[0]
    assert (row["accuracy"], row["sd"], row["linear"]) == ("87.71", "0.08", "2")
    assert (paper.loc[paper["network"] == "resnet18", "units"] == "").all(), "16 or 17: unknown stays empty"
