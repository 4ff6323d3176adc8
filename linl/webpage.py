"""One HTML file of a profile: tables, figures, every run with its origin, and the executed notebooks.

    python -m linl.webpage quick          what `make report` does

The file needs nothing beside it and can be sent to anyone (formulas want a network: the browser fetches what
sets them).
"""

from __future__ import annotations

import argparse
import base64
import html
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from linl.files import atomic
from linl.results import ParameterError
from linl.study import Job, jobs, profiles, tables_folder
from linl.tables import short

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem 2rem; color: #222}
table {border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; margin: .6rem 0}
td, th {border: 1px solid #ddd; padding: .2rem .5rem; text-align: left} th {background: #f4f4f4}
img {max-width: 100%} pre {background: #f7f7f7; padding: .5rem; overflow-x: auto; font-size: 12.5px; margin: .4rem 0}
summary {cursor: pointer; font-weight: 600; padding: .3rem 0} details {border-top: 1px solid #ddd}
.jp-InputPrompt, .jp-OutputPrompt, .prompt {display: none} .anchor-link {display: none}
"""


def report(profile: str, path: Path | None = None) -> Path:
    """Writes a profile's page; of runs that differ in their seed alone one notebook is in it, the first finished one's.

    Args:
        profile: a name in `study.yaml`; what isn't finished of it is named in the page.
        path: of the page; None: beside the profile's tables.

    Returns: its path.

    Raises:
        ParameterError: an unknown profile, or none of its runs is finished.
    """
    wanted = jobs(profile)
    done = [job for job in wanted if job.done]
    tables = tables_folder(profile)
    if not done:
        raise ParameterError(f"no run of {profile} is finished: `make study PROFILE={profile}` first")
    if not (tables / "index.md").is_file():
        raise ParameterError(f"{profile} has no tables yet: `make study PROFILE={profile}` makes them")
    path = path or tables / "report.html"
    shown = {short(job.folder.parent.name) for job in done}
    parts = [*_head(profile, wanted, done), *_tables(tables, shown), *_notebooks(done)]
    with atomic(path) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    return path


def _head(profile: str, wanted: list[Job], done: list[Job]) -> Iterator[str]:
    from nbconvert import HTMLExporter

    about = html.escape(profiles()[profile].get("about", ""))
    yield f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>linl: {html.escape(profile)}</title>"
    yield f"<style>{STYLE}</style>{FORMULAS}<script async src='{HTMLExporter().mathjax_url}'></script></head><body>"
    yield f"<h1>{html.escape(profile)}</h1><p>{about}</p>"
    missing = [job.label for job in wanted if not job.done]
    told = f" Missing: {html.escape(', '.join(missing))}." if missing else ""
    yield f"<p>{len(done)} of {len(wanted)} runs are finished.{told}</p>"


def _tables(folder: Path, shown: set[str]) -> Iterator[str]:
    """Every table with its note, the pictures of its name below it; the list of runs last."""
    from nbconvert.filters import markdown2html

    listed = re.findall(r"\[([^]]+\.csv)\]", (folder / "index.md").read_text())  # what else is there is of before
    named = sorted((folder / name for name in listed), key=lambda file: (file.stem == "runs", file.stem))
    for file in named:
        text = file.with_suffix(".md").read_text()
        _, _, note = text.partition("\n\n")
        yield f"<h2 id='table-{file.stem}'>{html.escape(file.stem.replace('_', ' '))}</h2>"
        yield _linked(pd.read_csv(file, dtype=str, keep_default_na=False), shown)
        yield markdown2html(note)
        for picture in sorted(folder.glob(f"{file.stem}*.png")):
            if _owner(picture, named) == file:
                data = base64.b64encode(picture.read_bytes()).decode()
                yield f"<p><img alt='{html.escape(picture.stem)}' src='data:image/png;base64,{data}'></p>"


def _owner(picture: Path, tables: list[Path]) -> Path:
    """The table with the longest name that a picture's begins with."""
    return max((t for t in tables if picture.stem.startswith(t.stem)), key=lambda t: len(t.stem))


def _linked(table: pd.DataFrame, shown: set[str]) -> str:
    """A table, each run whose notebook is in the page a link to it."""

    def link(runs: str) -> str:
        return " ".join(f"<a href='#run-{run}'>{run}</a>" if run in shown else run for run in runs.split())

    cells = table.map(html.escape)
    if "run" in cells:
        cells["run"] = cells["run"].map(link)
    return cells.to_html(index=False, escape=False, border=0)


def _notebooks(done: Iterable[Job]) -> Iterator[str]:
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    yield "<h2>Notebooks, executed</h2>"
    seen: dict[str, Job] = {}
    for job in done:
        seen.setdefault(job.folder.parent.name, job)
    for key, job in seen.items():
        file = job.folder / "notebook.ipynb"
        yield f"<details id='run-{short(key)}'><summary>{html.escape(job.label)}</summary>"
        if file.is_file():
            yield exporter.from_notebook_node(nbformat.read(file, as_version=4))[0]
        else:
            yield "<p>It was run by hand, in an open notebook: there is no executed copy.</p>"
        yield "</details>"
    yield OPEN


FORMULAS = """<script type="text/x-mathjax-config">
MathJax.Hub.Config({tex2jax: {inlineMath: [["$", "$"]], processEscapes: true}});
</script>"""

OPEN = """<script>
const open = () => {
  const e = document.getElementById(location.hash.slice(1));
  if (e && e.tagName === "DETAILS") e.open = true;
};
addEventListener("hashchange", open); open();
</script></body></html>"""
"""A link to a notebook opens it."""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m linl.webpage", description="one HTML file of a profile")
    parser.add_argument("profile")
    parser.add_argument("--out", type=Path, help="the file; beside the profile's tables if it isn't named")
    asked = parser.parse_args(arguments)
    try:
        made = report(asked.profile, asked.out)
    except (ParameterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made} ({made.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
