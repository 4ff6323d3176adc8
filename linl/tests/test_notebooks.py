"""The notebooks: clean as committed, and each runs from top to bottom."""

import ast
import json
import re
import subprocess
import sys

import pytest

from linl.data import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
TEACHING = [path for path in NOTEBOOKS if path.parent.name == "teach" or path.stem == "0-start-here"]


def name(path):
    """As the map in the README calls it: "teach/1-linlu"."""
    return str(path.relative_to(PROJECT / "notebooks").with_suffix(""))


def test_the_readme_names_every_notebook():
    """The map's links, and no others: a notebook that moved is missed at once."""
    linked = set(re.findall(r"\]\(notebooks/(\S+)\.ipynb\)", (PROJECT / "README.md").read_text()))
    assert linked == set(map(name, NOTEBOOKS))


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_committed_notebooks_are_clean(path):
    content = json.loads(path.read_text())
    kernel = content["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python"), "papermill refuses it otherwise"
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None, "committed with outputs"
        long = "parameters" in cell["metadata"].get("tags", [])  # a line a parameter
        assert long or len("".join(cell["source"]).splitlines()) <= 15, "".join(cell["source"])[:80]
    assert 8 <= len(content["cells"]) <= 64


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_notebook_makes_papermill_wait_for_ever(path):
    """As Output widgets now and then do (nbclient's issue 312); `linl.sliders.picture` doesn't."""
    code = "\n".join("".join(cell["source"]) for cell in cells(path))
    assert not re.search(r"\b(interact|interactive|interactive_output|interact_manual|Output)\b", code)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in TEACHING], ids=name)
def test_parameters_are_annotated_literals_with_a_comment(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    source = "".join(tagged[0]["source"])
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)
        assert "  # " in source.splitlines()[statement.lineno - 1], f"{statement.target.id} is not explained"


def papermill(notebook, out, *parameters):
    """A notebook that hasn't come to its end in ten minutes is stopped: `subprocess.TimeoutExpired` names it."""
    return subprocess.run(
        [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", *parameters],
        capture_output=True, text=True, check=False, cwd=out.parent, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("path", TEACHING, ids=lambda p: p.stem)
def test_teaching_notebooks_run(path, tmp_path):
    done = papermill(path, tmp_path / "out.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = "".join("".join(out.get("data", {}).get("text/plain", "")) for out in outputs(tmp_path / "out.ipynb"))
    assert "with 0 Axes" not in shown and "<matplotlib" not in shown, "a picture that one cell begins and another ends"


@pytest.mark.parametrize("path", TEACHING, ids=lambda p: p.stem)
def test_solutions_are_folded_away(path):
    """Whoever scrolls on from an exercise doesn't see its solution in the code that checks the check."""
    for cell in cells(path):
        if "solution" in "".join(cell["source"]).lower():
            assert cell["metadata"].get("jupyter", {}).get("source_hidden"), "".join(cell["source"])[:80]
            assert "lambda" not in cell["source"][0], "JupyterLab shows the first line all the same"


def outputs(path):
    """All outputs of an executed notebook, cell by cell."""
    return [out for cell in cells(path) for out in cell["outputs"]]


LINLNET = PROJECT / "notebooks" / "experiments" / "linlnet.ipynb"


def checked(path, **changes):
    """A notebook's cells up to the one that opens the run, carried out here with some parameters changed."""
    found = {"In": []}
    for cell in cells(path):
        source = "".join(cell["source"])
        exec(source, found)
        if "parameters" in cell["metadata"].get("tags", []):
            found["In"].append("# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in changes.items()))
            exec(found["In"][-1], found)
        if "linl.results.begin" in source:
            return found
    raise AssertionError("the notebook opens no run")


def test_a_misspelt_parameter_stops_papermill_before_it_works(tmp_path):
    done = papermill(LINLNET, tmp_path / "out.ipynb", "-p", "epoch", "3")
    assert done.returncode != 0 and "unknown parameter: epoch" in done.stderr
    assert not list((tmp_path / "results").rglob("*.csv")), "nothing was trained"


@pytest.mark.parametrize(
    ("notebook", "changes", "message"),
    [
        ("linlnet", {"network": "lenet"}, "unknown network 'lenet'"),
        ("linlnet", {"epochs": 0}, "epochs = 0: must be at least 1"),
        ("stability", {"network": "vgg16"}, "unknown network 'vgg16': mlp or autoencoder"),
        ("proof_speed", {"hidden": "100-100"}, "hidden = '100-100': whole numbers such as"),
        ("proof_speed", {"l1": ""}, "l1 = '': penalties such as"),
        ("last_layer", {"networks": "alexnet"}, "'alexnet' is no network and side, such as"),
        ("last_layer", {"width": 0.0}, "width = 0.0: at least 0, and above 0"),
        ("imagenet_cost", {"networks": "lenet"}, "lenet isn't in the profile; it has alexnet, vgg16"),
        ("imagenet_cost", {"batch": 0}, "batch = 0: must be at least 1"),
        ("study_cost", {"asked": "smoke"}, "asked = 'smoke' holds this notebook"),
        ("study_cost", {"asked": "everything"}, "unknown profile 'everything'"),
        ("regions", {"hidden": "8x8"}, "hidden = '8x8': widths such as"),
        ("regions", {"components": 65}, "components = 65: must be from 1 to 64"),
        ("regions", {"count_limit": 0.0}, "count_limit = 0.0"),
        ("regions", {"adversary": "fgsm"}, "adversary = 'fgsm': choose from none, pgd, single"),
        ("regions", {"l1": "0.1, 0.2"}, "l1 = '0.1, 0.2': numbers such as"),
    ],
)
def test_wrong_parameters_are_refused_before_any_work(notebook, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checked(PROJECT / "notebooks" / "experiments" / f"{notebook}.ipynb", **changes)
    assert not list(tmp_path.rglob("params.json")), "a run was opened"
