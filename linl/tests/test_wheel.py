"""The wheel: what is in it, and that the package works from it, away from any checkout.

Built by the backend that pip calls (setuptools, no network), installed as pip does: a wheel of pure Python is unpacked.
"""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from linl.data import PROJECT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
USE = """
import torch
from torch import nn

import linl
from linl import native

data = linl.data.load("digits", limit=128)
net = linl.models.create("mlp", 10, data.input_size, hidden=(16, 16), dropout=0.0)
lin = linl.linearize(net, "linlu", start=0.9)
linl.fuse_kernels_(lin)
history = linl.train.fit(lin, data, linl.train.recipe("linlnet-digits", 1), verbose=False)
assert len(history.metrics) == 1 and linl.train.evaluate(lin, data).images == 128
hard = linl.harden(lin.eval(), threshold=0.5)  # every unit is an identity: one layer is left
x = torch.randn(2, *data.input_size)
small = linl.fold(hard, x, objective="parameters")
assert linl.verify(hard, small, x).equal and linl.cost.depth(small) == 1, small

deep = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).double().eval()
box = linl.Box.unit((2,))
state = linl.analyse(deep, box)
points = box.sample(50)
assert state.decided and torch.allclose(linl.compress(deep, state)(points), deep(points), atol=1e-10)
assert linl.regions.count(deep, box).count >= 1
cut = linl.shrink(linl.prune(net.eval(), rate=0.5), x)
assert 0 <= linl.dead_rate(cut, x).dynamic <= 1
print(linl.__file__)
print(native.why_not() or "compiled")
"""
RUN = """
import contextlib
import io
from pathlib import Path

import linl
from linl import progress, study, webpage

for part, words in ((study, ["list"]), (study, ["run", "quick"]), (study, ["tables"]), (progress, ["quick"]),
                    (webpage, ["quick"])):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = part.main(words)
    print(code, said.getvalue().strip())
try:
    linl.results.paper("linlnet")
except FileNotFoundError as error:
    print(2, error)
assert not list(Path.cwd().iterdir()), "what can't be done begins nothing"
assert linl.results.results_folder() == Path("results").resolve()
run = linl.results.begin("mine", {"dataset": "digits", "seed": 0})
record = run.finish({"accuracy": 0.5})
print(run.folder.relative_to(Path.cwd()), record["source"]["revision"])
print(len(linl.results.runs("mine", "runs")))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the wheel is installed in, inside somebody else's git repository."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "linl", source / "linl", ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(work)], cwd=source, env=os.environ | {"PYTHONPATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = work.glob("*.whl")
    assert wheel.name == built.stdout.splitlines()[-1]
    other = work / "other"
    other.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "not linl"]):
        subprocess.run([*git, *words], cwd=other, check=True)
    zipfile.ZipFile(wheel).extractall(other / "site")
    return other / "site"


def python(site, *words, folder):
    """A process that has nothing of the checkout: neither its folder nor its variables."""
    folder.mkdir(exist_ok=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("LINL_")}
    environment = own | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_all_of_the_package_and_nothing_else(site):
    def files(folder):
        return {str(p.relative_to(folder)) for p in (folder / "linl").rglob("*") if p.suffix in (".py", ".cpp")}

    assert files(site) == files(PROJECT) and "linl/two_slope.cpp" in files(site)
    assert {path.name for path in site.iterdir()} == {"linl", next(site.glob("*.dist-info")).name}
    told = next(site.glob("*.dist-info")).joinpath("METADATA").read_text()
    assert "Requires-Dist: torch>=" in told and "License-Expression: MIT" in told
    assert next(site.glob("*.dist-info")).joinpath("licenses", "LICENSE").is_file()


def test_the_package_works_from_the_wheel(site, tmp_path):
    done = python(site, "-c", USE, folder=tmp_path / "away")
    assert done.returncode == 0, done.stderr
    where, kernels = done.stdout.splitlines()[-2:]
    assert where == str(site / "linl" / "__init__.py")
    compiler = os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))
    assert kernels == "compiled" if compiler else kernels.startswith("no C++ compiler")


def test_what_needs_a_clone_says_so_and_the_rest_works_in_the_current_folder(site, tmp_path):
    """Runs are written there; the repository that the installed package happens to lie in isn't linl's revision."""
    done = python(site, "-c", RUN, folder=tmp_path / "away")
    assert done.returncode == 0, done.stderr
    *refused, folder, count = done.stdout.splitlines()
    missing = ["study.yaml is missing"] * 5 + ["no published figures of 'linlnet'"]
    missing[2] = "the tables' notebooks are missing"
    for line, what in zip(refused, missing, strict=True):
        assert line.startswith("2 ") and what in line and "come with a clone of linl" in line, line
    assert folder.startswith("results/runs/mine/digits-") and folder.endswith("/s0 None") and count == "1"
