"""The house: imports one way, a light import, a clean lock, code and notebooks in order."""

import ast
import re
import subprocess
import sys

import pytest

from linl.data import PROJECT

ORDER = [
    "files",
    "identities",
    "affine",
    "merge",
    "whole",
    "native",
    "kernels",
    "devices",
    "machines",
    "products",
    "small_images",
    "calls",
    "aliases",
    "graph",
    "sites",
    "masks",
    "units",
    "cost",
    "constants",
    "obstacles",
    "operations",
    "chains",
    "joining",
    "sizes",
    "planning",
    "rewriting",
    "timing",
    "memory",
    "checking",
    "reports",
    "folding",
    "padding",
    "advice",
    "regression",
    "refitting",
    "boxes",
    "pieces",
    "program",
    "reading",
    "ranges",
    "ties",
    "windows",
    "crown",
    "bounds",
    "milp",
    "triangles",
    "reliability",
    "branching",
    "witnesses",
    "states",
    "evidence",
    "settling",
    "stability",
    "published_proofs",
    "certificates",
    "emitting",
    "compression",
    "guarding",
    "asking",
    "sweep",
    "winners",
    "segments",
    "cutting",
    "slices",
    "drawing",
    "linearized",
    "locality",
    "rationals",
    "cells",
    "contexts",
    "regions",
    "shallowing",
    "weights",
    "networks",
    "inits",
    "models",
    "sources",
    "distortions",
    "images",
    "crops",
    "pictures",
    "class_folders",
    "data",
    "components",
    "connections",
    "losses",
    "recipes",
    "worlds",
    "epochs",
    "checkpoints",
    "teaching",
    "train",
    "distributed",
    "worker",
    "dead_rates",
    "signals",
    "lookahead",
    "scores",
    "pruning",
    "cycles",
    "channels",
    "shrinking",
    "reconstruction",
    "locks",
    "lending",
    "logs",
    "results",
    "provenance",
    "verdicts",
    "tables",
    "claims",
    "training_claims",
    "folding_claims",
    "stability_claims",
    "proof_claims",
    "region_claims",
    "pruning_claims",
    "repeats",
    "judging",
    "targets",
    "faults",
    "training_faults",
    "folding_faults",
    "proof_faults",
    "pruning_faults",
    "errata",
    "api",
    "sliders",
    "notebooks",
    "engine",
    "study",
    "progress",
    "webpage",
]
"""DESIGN's list, the files of this repository: each may import only from those before it."""


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    tree = ast.parse((PROJECT / "linl" / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "linl":
            parts = node.module.split(".")
            imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    assert imported <= set(ORDER[: ORDER.index(name)]), f"{name} imports {imported}"


def test_every_file_has_its_place():
    files = {path.stem for path in (PROJECT / "linl").glob("*.py")} - {"__init__"}
    assert files == set(ORDER)


def test_no_file_bears_the_name_of_a_public_function():
    import linl

    functions = {name for name in linl.__all__ if callable(getattr(linl, name))}
    assert not functions & set(ORDER)


def test_import_is_light():
    heavy = ("torchvision", "timm", "seaborn", "sklearn", "matplotlib", "scipy", "torch._inductor")
    code = f"import sys, linl; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


def test_no_file_is_opened_in_a_way_that_could_run_code():
    """torch.load only with weights_only=True; no pickle, no yaml.load."""
    for path in (PROJECT / "linl").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"pickle", "joblib", "dill", "cloudpickle"} & set(names), path.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whole, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                loader = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
                assert whole != "yaml.load" or loader == "_Once", path.name  # study's own SafeLoader
                assert given.get("allow_pickle", "False") == "False", path.name
                assert whole != "torch.load" or given.get("weights_only") == "True", path.name


def test_the_changelog_is_kept_in_its_form():
    """Keep a Changelog: newest first, its six headings, every entry below one; the version is the package's."""
    import linl

    text = (PROJECT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.M)
    assert versions[0][0] == "Unreleased" and linl.__version__ in text
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in versions[1:])
    headings = re.findall(r"^### (.+)$", text, re.M)
    assert headings and set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for part in re.split(r"^### .+$", text, flags=re.M)[1:]:
        assert re.search(r"^- ", part, re.M), "a heading without entries"
    assert f'version = "{linl.__version__}"' in (PROJECT / "pyproject.toml").read_text()


def test_the_lock_pins_everything_with_hashes_and_names_no_host():
    text = (PROJECT / "requirements.lock").read_text()
    assert "://" not in text
    pins = re.findall(r"^([a-z0-9._-]+)==\S+", text, flags=re.M)
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert len(pins) == len(blocks) and all("--hash=sha256:" in block for block in blocks)
    wanted = re.findall(r'^  "([a-z0-9-]+)>=', (PROJECT / "pyproject.toml").read_text(), flags=re.M)
    assert len(wanted) >= 14 and set(wanted) <= set(pins)
    assert {"appnope"} <= set(pins), "macOS's own packages are in it as well"


def test_ruff_is_content_with_code_and_notebooks():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, check=False, cwd=PROJECT
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_table_is_the_committed_one():
    import pandas as pd

    from linl.study import README_COLUMNS

    shown = (PROJECT / "README.md").read_text().split("made by `make tables` -->")[1].split("<!-- end -->")[0]
    table = pd.read_csv(PROJECT / "results" / "tables" / "linlnet.csv", dtype=str, keep_default_na=False)
    assert shown.strip() == table[README_COLUMNS].to_markdown(index=False, disable_numparse=True)
