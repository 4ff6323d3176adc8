"""The page of public names: current, complete, and every name in it documented."""

import inspect
import re

import pytest
from torch import nn

import linl
from linl import api
from linl.data import PROJECT

NAMES = [(f"{module}.{name}", of) for module, names in api.public().items() for name, of in names.items()]
TOLD_ELSEWHERE = {"linl.units.Unit": {"args", "kwargs"}}  # torch's own
TEXTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(PROJECT)) for p in PROJECT.glob("notebooks/teach/*.ipynb")),
]


def test_the_committed_page_is_todays(tmp_path):
    page = api.write(tmp_path)
    committed = PROJECT / "results" / "tables" / "api.md"
    assert page.read_bytes() == committed.read_bytes(), "python -m linl.api"
    assert "0x" not in page.read_text(), "an address in memory is another every time"


@pytest.mark.parametrize(("name", "of"), NAMES, ids=[name for name, _ in NAMES])
def test_a_public_name_is_documented(name, of):
    """What it is, every argument, and its errors where it raises any."""
    doc = vars(of).get("__doc__") if inspect.isclass(of) else of.__doc__
    assert doc and len(doc.split("\n")[0]) > 15, "its own docstring, not an inherited one"
    told = api.documentation(of)
    parts = api.sections(told)
    arguments = {n for n in inspect.signature(of).parameters if n not in ("self", "cls") and not n.startswith("_")}
    listed = set(re.findall(r"\w+", " ".join([*parts.get("Args", []), *parts.get("Attributes", [])])))
    assert arguments - TOLD_ELSEWHERE.get(name, set()) <= listed, f"{name}: Args or Attributes say nothing of these"
    body = inspect.unwrap(vars(of).get("__init__", of) if inspect.isclass(of) else of)
    written = inspect.isfunction(body) and body.__code__.co_filename.endswith(".py")  # not made by a dataclass
    raises = written and re.search(r"^\s+raise [A-Z]", inspect.getsource(body), re.M)
    assert not raises or parts.get("Raises"), f"{name} raises and doesn't say so"


def test_every_public_class_tells_its_methods():
    for name, of in NAMES:
        if inspect.isclass(of) and not issubclass(of, nn.Module):
            own = {n for n, m in vars(of).items() if inspect.isfunction(m) and not n.startswith("_")}
            assert {row[0] for row in api.methods(of)} >= own, f"{name}: a method without a docstring"


def test_what_users_are_shown_is_public():
    """What users are shown: README, CONTRIBUTING and the teaching notebooks call nothing that may change tomorrow."""
    used = set()
    for path in TEXTS:
        used |= set(re.findall(r"\blinl\.([a-z_]+)\.([A-Za-z]\w*)", (PROJECT / path).read_text()))
    listed = {(module.removeprefix("linl."), name) for module, names in api.public().items() for name in names}
    modules = {name for name in linl.__all__ if inspect.ismodule(getattr(linl, name))}
    called = {(m, n) for m, n in used if m in modules and callable(getattr(getattr(linl, m), n))}
    assert called and called <= listed, sorted(called - listed)


def test_the_order_is_that_of_all():
    assert list(api.public()["linl"]) == [n for n in linl.__all__ if callable(getattr(linl, n))]
    assert set(api.MODULES) <= set(linl.__all__)


def test_signatures_and_sections():
    def example(x: int, *rest, flag: bool = False, **options) -> str:
        """First line.

        More.

        Args:
            x, flag: two of them,
                on two lines.
            rest: others.

        Returns: a word.

        Last words.
        """

    assert api.signature(example) == "(x: int, *rest, flag: bool = False, **options) → str"
    parts = api.sections(example.__doc__)
    assert api.entries(parts["Args"]) == [("x, flag", "two of them, on two lines."), ("rest", "others.")]
    assert api.entries(parts["Returns"]) == [("", "a word.")]
    assert "Last words." in parts[""] and "Raises" not in parts

    def keyword(a, *, b=1):
        """Nothing."""

    assert api.signature(keyword) == "(a, *, b=1)"
