"""The page of public names, made from signatures and docstrings: `python -m linl.api` writes results/tables/api.md.

Public is what `linl.__all__` names and, of the modules in it, what `MODULES` names here. The rest may change.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linl
from linl.files import atomic
from linl.results import results_folder

MODULES = {
    "models": ("create",),
    "data": ("load", "find_weights"),
    "train": ("recipe", "fit", "evaluate", "Recipe", "History", "Score"),
    "distributed": ("fit",),
    "units": ("units_of", "Unit", "TwoSlope"),
    "merge": ("dense", "conv", "batchnorm", "average_pool", "merge", "merge_sum", "compose", "compose_sum"),
    "cost": ("depth", "latencies"),
    "bounds": ("bound", "Bounds"),
    "published_proofs": ("program_a_unit", "one_program", "Settled"),
    "regions": ("count", "maps", "along", "in_plane", "draw_slice", "affine_at", "Regions"),
    "dead_rates": ("watch", "DeadRate"),
    "signals": ("read", "without", "by_chance"),
    "masks": ("masks_of", "mask_", "prunable"),
    "weights": ("restore_norms_", "only_classes_"),
    "components": ("principal",),
    "connections": ("count", "between", "widths"),
    "devices": ("pick_device", "pick_precision"),
    "machines": ("machine", "versions", "versions_of", "load_average"),
    "results": ("parameters", "begin", "Run", "runs", "paper", "mean_sd", "write_figure"),
    "tables": ("Tables", "settings", "lines", "newest", "unfolded"),
    "sliders": ("picture",),
    "notebooks": ("run_here", "notebook_defaults"),
}
"""Public functions and classes by module, in the order of a study."""

SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Warns")
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):(?: (.*))?")
_ENTRY = re.compile(r"(\S.*?): (.*)")

HEAD = """# Public names of linl

Made by `python -m linl.api` from signatures and docstrings. Images are (N, C, H, W); a function leaves its
arguments alone unless its name ends in `_`. Longer words stand in the docstrings: `help(linl.fold)`.
"""


def public() -> dict[str, dict[str, Callable]]:
    """Public functions and classes, by module ("linl" first) and name."""
    top = {name: getattr(linl, name) for name in linl.__all__ if callable(getattr(linl, name))}
    below = {f"linl.{m}": {name: getattr(getattr(linl, m), name) for name in names} for m, names in MODULES.items()}
    return {"linl": top, **below}


def signature(of: Callable) -> str:
    """ "(x: Tensor, *, eps: float = 0.1) → Tensor", the same in every version of Python; "" where there is none."""
    try:
        found = inspect.signature(of)
    except ValueError:
        return ""
    words, after_star = [], False
    for p in found.parameters.values():
        if p.name in ("self", "cls") or p.name.startswith("_"):
            continue
        if p.kind is p.KEYWORD_ONLY and not after_star:
            words.append("*")
        after_star |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = "" if p.annotation is p.empty else f": {_type(p.annotation)}"
        given = "" if p.default is p.empty else f" = {_default(p.default)}" if kind else f"={_default(p.default)}"
        words.append(f"{star}{p.name}{kind}{given}")
    back = found.return_annotation
    told = "" if back in (found.empty, None, "None") or inspect.isclass(of) else f" → {_type(back)}"
    return f"({', '.join(words)}){told}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(value: Any) -> str:
    made = re.fullmatch(r"<factory>|<.*>", repr(value))
    return "…" if made else repr(value)


def sections(doc: str) -> dict[str, list[str]]:
    """A docstring's lines by section; what stands before the first, and between and after them, is under ""."""
    found: dict[str, list[str]] = {"": []}
    at = ""
    for line in inspect.cleandoc(doc).splitlines():
        if head := _SECTION.fullmatch(line):
            at = head[1]
            found[at] = [head[2]] if head[2] else []
        elif line and not line.startswith(" ") and at:
            at = ""
            found[at] += ["", line]
        else:
            found[at].append(line)
    return found


def entries(lines: list[str]) -> list[tuple[str, str]]:
    """The entries of a section, (name or names, text); a section that is one text has no name."""
    lines = inspect.cleandoc("\n".join(["", *lines])).splitlines()
    made: list[tuple[str, str]] = []
    for line in filter(str.strip, lines):
        entry = None if line.startswith(" ") else _ENTRY.fullmatch(line)
        if entry and re.fullmatch(r"[\w*, ]+", entry[1]):
            made.append((entry[1], entry[2]))
        elif made:
            made[-1] = (made[-1][0], f"{made[-1][1]} {line.strip()}")
        else:
            made.append(("", line.strip()))
    return made


def documentation(of: Callable) -> str:
    """The docstring; of a class with its constructor's, where that has one of its own."""
    doc = inspect.getdoc(of) or ""
    start = vars(of).get("__init__") if inspect.isclass(of) else None
    return f"{doc}\n\n{inspect.cleandoc(start.__doc__)}" if getattr(start, "__doc__", None) else doc


def described(of: Callable) -> Iterator[str]:
    """Markdown of one name, without its heading: signature, first paragraph, sections."""
    yield f"```python\n{of.__name__}{signature(of)}\n```\n"
    parts = sections(documentation(of))
    yield "\n".join(parts[""]).strip().split("\n\n")[0].replace("\n", " ") + "\n"
    for title in SECTIONS:
        found = entries(parts.get(title, []))
        if found:
            bullets = [f"- `{name}`: {text}" if name else f"- {text}" for name, text in found]
            yield f"*{title}*\n\n" + "\n".join(bullets) + "\n"
    if inspect.isclass(of) and (rows := methods(of)):
        lines = [f"- `.{name}{told}`: {text}" for name, told, text in rows]
        yield "*Also*\n\n" + "\n".join(lines) + "\n"


def methods(of: type) -> list[tuple[str, str, str]]:
    """Public methods and properties of a class that have a docstring: name, signature, first paragraph."""
    rows = []
    for name, member in vars(of).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        doc = inspect.getdoc(plain) if inspect.isfunction(plain) or isinstance(member, property) else None
        if doc and not name.startswith("_") and name not in ("forward", "extra_repr"):
            first = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
            rows.append((name, "" if isinstance(member, property) else signature(plain), first))
    return rows


def page() -> str:
    """The whole page, Markdown."""
    text = [HEAD]
    for module, names in public().items():
        about = inspect.cleandoc(inspect.getmodule(linl if module == "linl" else getattr(linl, module[5:])).__doc__)
        first = about.split("\n\n")[0].replace("\n", " ")
        text.append(f"## {module}\n\n{first}\n")
        for name, of in names.items():
            text += [f"### {module}.{name}\n", *described(of)]
    return "\n".join(text)


def write(folder: Path) -> Path:
    """The page into a folder, as api.md; the same bytes from the same package."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "api.md") as part:
        part.write_text(page(), encoding="utf-8")
    return folder / "api.md"


if __name__ == "__main__":
    print(write(results_folder() / "tables"))
