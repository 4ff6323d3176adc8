"""The page of a profile: tables, figures, runs and notebooks in one file."""

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from linl import results, study, webpage
from linl.results import ParameterError


@pytest.fixture
def profile(monkeypatch, tmp_path):
    """Three runs, two of them of one setting and finished, with a table and a picture."""
    path = tmp_path / "study.yaml"
    path.write_text(
        "profiles:\n  p:\n    about: a < b\n    runs:\n"
        "      - notebook: experiments/linlnet.ipynb\n        seeds: [0, 1]\n"
        "      - notebook: benchmarks.ipynb\n"
    )
    wanted = study.jobs("p", path)
    monkeypatch.setattr(webpage, "jobs", lambda name: wanted)
    monkeypatch.setattr(webpage, "profiles", lambda: study.profiles(path))
    return wanted


def finish(job, said):
    job.folder.mkdir(parents=True)
    job.result.write_text("{}")
    cells = [nbformat.v4.new_markdown_cell(f"# {said}"), nbformat.v4.new_code_cell("1 < 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), job.folder / "notebook.ipynb")


def test_a_page_holds_everything_and_links_it(profile):
    folder, run = study.tables_folder("p"), webpage.short(profile[0].folder.parent.name)
    for job, said in zip(profile[:2], ("first seed", "second seed"), strict=True):
        finish(job, said)
    results.write_table(
        pd.DataFrame({"a": ["x < y", "z"], "run": [f"{run} 0123abcd", ""]}), "demo", folder, "A *note*."
    )
    results.write_table(pd.DataFrame({"b": [1]}), "demo_more", folder)
    for name in ("demo", "demo-course", "demo_more"):
        results.write_figure(plt.figure(figsize=(1, 1)), name, folder)
    results.write_table(pd.DataFrame({"c": ["of before"]}), "stale", folder)
    (folder / "index.md").write_text("- [demo.csv](demo.csv)\n- [demo.md](demo.md)\n- [demo_more.csv](demo_more.csv)\n")
    page = webpage.report("p").read_text()
    assert "a &lt; b" in page and "x &lt; y" in page, "what is text stays text"
    assert f"<a href='#run-{run}'>{run}</a> 0123abcd<" in page and page.count("href='#run-") == 1, (
        "no link leads nowhere"
    )
    assert "of before" not in page and page.count(f"id='run-{run}'") == 1
    assert "first seed" in page and "second seed" not in page, "one notebook a setting"
    assert "2 of 3 runs are finished. Missing: benchmarks" in page and "<em>note</em>" in page
    assert page.count("data:image/png;base64,") == 3
    more = page.index("id='table-demo_more'")
    pictures = [page.index(f"<img alt='{name}'") for name in ("demo", "demo-course", "demo_more")]
    assert [at > more for at in pictures] == [False, False, True], "each below its own table"
    assert page.rstrip().endswith("</html>")


def test_nothing_to_show_is_said(profile, capsys):
    with pytest.raises(ParameterError, match="no run of p is finished: `make study PROFILE=p` first"):
        webpage.report("p")
    finish(profile[0], "x")
    assert webpage.main(["p"]) == 2
    assert "p has no tables yet" in capsys.readouterr().err
