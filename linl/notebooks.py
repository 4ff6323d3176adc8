"""Notebooks as things with parameters: what they are by default, and one run inside another.

papermill gives each notebook a kernel of its own, which costs seconds. Where one notebook consists of others,
`run_here` carries them out in the kernel that asks, and shows there what they show.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linl.results import ParameterError


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """A notebook's parameters with their default values, by its cell tagged "parameters".

    Args:
        notebook: its path.

    Raises:
        ParameterError: no such notebook, or none that can be read.
    """
    tagged = [cell.source for cell in _cells(notebook) if _is_parameters(cell)]
    if not tagged:
        raise ParameterError(f"{notebook.name} has no cell tagged parameters")
    return {
        statement.target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(tagged[0]).body
        if isinstance(statement, ast.AnnAssign)
    }


def run_here(notebook: Path, **parameters: Any) -> dict[str, Any]:
    """Runs a notebook in the kernel that calls this, with these parameters in place of its own.

    Its texts, tables and pictures are shown below the calling cell (`%run` would show no last expression of a cell).
    The caller's names are as they were when it is over.

    Args:
        notebook: its path.
        parameters: values for parameters that it has; the others keep their defaults.

    Returns: the names the notebook left, with their values.

    Raises:
        ParameterError: no such notebook, or a parameter that it doesn't have.
        RuntimeError: called where there is no kernel.
        Exception: the first that a cell raises; the cells after it are not run.
    """
    from IPython import get_ipython
    from IPython.display import Markdown, display

    if unknown := sorted(set(parameters) - set(notebook_defaults(notebook))):
        raise ParameterError(f"{notebook.name}: unknown parameter {', '.join(unknown)}")
    shell = get_ipython()
    if shell is None:
        raise RuntimeError("run_here runs a notebook inside another: call it there")
    with _names_put_back(shell.user_ns):
        for cell in _cells(notebook):
            if cell.cell_type == "markdown":
                display(Markdown(cell.source))
            elif cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
                if _is_parameters(cell):
                    shell.user_ns.update(parameters)
        return dict(shell.user_ns)


@contextlib.contextmanager
def _names_put_back(names: dict[str, Any]) -> Iterator[None]:
    """The dictionary as it was, and no annotations but the notebook's own: `results.parameters` asks for them."""
    before = dict(names)
    names["__annotations__"] = {}
    try:
        yield
    finally:
        names.clear()
        names.update(before)


def _cells(notebook: Path) -> list:
    if not notebook.is_file():
        raise ParameterError(f"no notebook {notebook}")
    import nbformat

    return nbformat.read(notebook, as_version=4).cells


def _is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])
