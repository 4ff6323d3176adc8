"""Errata: each is one (theirs is wrong), and linl's answer is right; the page is the one that is committed."""

import pytest
import torch

import linl
from linl import errata, notebooks, results
from linl.faults import EQUAL, KINDS, digits
from linl.tests.test_tables import shell  # noqa: F401 - a fixture

PAGE = results.PROJECT / "results" / "tables"


@pytest.mark.parametrize("entry", errata.ERRATA, ids=lambda entry: entry.name)
def test_theirs_is_wrong_and_ours_is_right(entry):
    torch.manual_seed(0)
    theirs, ours, right = entry.show()
    size = max(1.0, abs(right))
    assert abs(theirs - right) > 1e-3 * size, "no erratum (any more): what is installed may have been mended"
    assert abs(ours - right) <= entry.within * size


def test_each_is_told_in_full():
    entries = errata.ERRATA
    assert len(entries) >= 12 and len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.kind in KINDS and all((entry.system, entry.figure, entry.source)), entry.name
        assert entry.wrong.endswith((".", ".)")) and len(entry.wrong) > 80, entry.name
    loose = {entry.name for entry in entries if entry.within != EQUAL}
    assert loose == {"best_on_the_test_set", "gradient_taken_once"}, "elsewhere equal is equal"


def test_figures_are_told_in_a_few_digits():
    assert [digits(f) for f in (0, 3e-16, -1e-16, 17, 1592, 0.5934, 99.84, 4.07)] == [
        "0", "0", "0", "17", "1,592", "0.59", "99.84", "4.1"
    ]  # fmt: skip


def test_an_erratum_leaves_the_random_state_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    errata.ERRATA[0].row()
    assert torch.equal(torch.rand(3), wanted)


def test_training_never_reads_test_images():
    """What best_on_the_test_set says of linl."""
    digits_data = linl.data.load("digits", limit=64)
    asked, batches = [], type(digits_data).batches

    class Spy(type(digits_data)):
        def batches(self, split, *given, **more):
            asked.append(split)
            return batches(self, split, *given, **more)

    data = Spy(
        "digits", digits_data.train, digits_data.validation, digits_data.test, 10, digits_data.mean, digits_data.std
    )
    data.to = lambda device: data
    net = linl.models.create("mlp", 10, data.input_size, width=0.125)
    linl.train.fit(net, data, linl.train.recipe("linlnet-digits", 2), verbose=False)
    assert set(asked) == {"train", "validation"}


def test_the_committed_page_is_todays(shell, tmp_path):  # noqa: F811 - the fixture
    """Made anew by its notebook, byte by byte; and shown, not written, where no folder is named."""
    assert notebooks.run_here(PAGE.parents[1] / "notebooks" / "tables" / "errata.ipynb")["tables"].written == []
    notebook = PAGE.parents[1] / "notebooks" / "tables" / "errata.ipynb"
    written = notebooks.run_here(notebook, out_dir=str(tmp_path))["tables"].written
    assert [path.name for path in written] == ["errata.csv", "errata.md"]
    for path in written:
        assert path.read_bytes() == (PAGE / path.name).read_bytes(), f"{path.name}: make tables"
