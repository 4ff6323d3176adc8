"""The notebooks in a real browser: `make browser`.

pytest doesn't collect this file by itself, so that `make test` neither needs a browser nor waits for one.
"""

import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest

from linl import study
from linl.data import PROJECT
from linl.tests import lab as labs
from linl.tests.test_notebooks import LINLNET, TEACHING, cells, papermill

if why := labs.missing():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For screenshots: SCREENSHOTS if that is set, else one of pytest's."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots")).absolute()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks."""
    root = tmp_path_factory.mktemp("root") / "notebooks"
    shutil.copytree(PROJECT / "notebooks", root, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with labs.jupyterlab(root, tmp_path_factory.mktemp("lab")) as running:
        running.root = root
        yield running


def say(text):
    print(f"\n{text}", flush=True)


@pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.stem)
def test_a_lesson(path, lab, folder):
    """Runs from top to bottom; every slider changes its picture; nothing on the page is wrong before or after."""
    promised = sum(len(re.findall(r"\w*Slider\(", "".join(cell["source"]))) for cell in cells(path))
    with lab.open(str(path.relative_to(PROJECT / "notebooks")), folder / path.stem) as notebook:
        begun = time.monotonic()
        notebook.run()
        took = time.monotonic() - begun
        pages = notebook.photograph()
        assert notebook.faults() == []
        sliders = notebook.sliders()
        assert len(sliders) == promised, "every widget is shown"
        assert [wrong for slider in sliders if (wrong := notebook.move(slider))] == []
        assert notebook.faults() == []
        pictures = notebook.pictures().count()
        assert pictures >= 3
    say(f"{path.stem}: {took:.0f} s, {pictures} pictures, {len(sliders)} sliders, {pages} pages in {folder}")


def test_an_executed_experiment(lab, folder, tmp_path):
    """As `make study` leaves it: opened, not run again."""
    job = study.jobs("tiny")[0]
    given = [str(part) for name, value in job.params.items() for part in ("-p", name, value)]
    done = papermill(LINLNET, tmp_path / "out.ipynb", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copy(tmp_path / "out.ipynb", lab.root / "executed.ipynb")
    with lab.open("executed.ipynb", folder / "executed") as notebook:
        pages = notebook.photograph()
        assert notebook.faults() == []
        pictures = notebook.pictures().count()
        assert pictures >= 2
    say(f"executed: {pictures} pictures, {pages} pages in {folder}")


BROKEN = [
    "import matplotlib.pyplot as plt, sys\nfrom ipywidgets import IntSlider, interactive_output",
    "def moved(n):\n    plt.plot([1, 2])\n    plt.show()\n\n\n"
    "slider = IntSlider(value=1, description='deaf')\ndisplay(slider, interactive_output(moved, {'n': slider}))",
    "from PIL import Image\n\nImage.new('RGB', (200, 100), 'white')",
    "print('a warning', file=sys.stderr)",
    "import pandas as pd\n\npd.DataFrame([['wide'] * 40])",
    "1 / 0",
    "'never run'",
]


def test_whatever_is_wrong_is_seen(lab, folder):
    """A test of these tests: a notebook with one fault of each kind."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in BROKEN])
    book.cells.append(nbformat.v4.new_markdown_cell(r"$\frac{1}$"))
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(book, lab.root / "broken.ipynb")
    with lab.open("broken.ipynb", folder / "broken") as notebook:
        notebook.run()
        notebook.photograph()
        (slider,) = notebook.sliders()
        found = [notebook.move(slider, seconds=5), *notebook.faults()]
    kinds = "'deaf'", "ZeroDivisionError", "stderr: a warning", "1 cells were not run", "picture 2 is empty", "formula:"
    for word in (*kinds, "too wide"):
        assert any(word in fault for fault in found), (word, found)
    assert len(found) == 7, "\n".join(found)
