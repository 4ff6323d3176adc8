"""What a run's log says last: its error in one line, without what papermill and the kernel say of themselves."""

from __future__ import annotations

import re
from pathlib import Path


def last_words(log: Path) -> str:
    """A log's error in one line, or else its last line; empty where there is none."""
    lines = _lines(log) if log.is_file() else []
    return (_named(lines) or (lines[-1] if lines else ""))[:300]


def error_of(log: Path) -> str:
    """The last line that names an error; empty where none does."""
    return _named(_lines(log))


def _lines(log: Path) -> list[str]:
    """What a log says, without colours and without what papermill, the kernel and Jupyter say of themselves."""
    found = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    return [line for line in found if line and not _ASIDE.match(line)]


def _named(lines: list[str]) -> str:
    """The last line that names an error; empty where none does."""
    named = (line for line in reversed(lines) if _ERROR.match(line))
    return next((line for line in named if "PapermillExecutionError" not in line), "")


_ERROR = re.compile(r"([A-Za-z_][\w.]*\.)?([A-Z]\w*(Error|Exception|Interrupt|Exit|Warning)|Busy|DeadKernel\w*)(:|$)")
_ASIDE = re.compile(r"\[IPKernelApp\]|(Executing|Ending) Cell|(Input|Output) Notebook:|Executing notebook|Black is not")
