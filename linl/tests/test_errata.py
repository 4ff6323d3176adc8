"""Errata: each is one (theirs is wrong), and linl's answer is right; the page is the one that is committed."""

import highspy
import pytest
import torch

import linl
from linl import errata, milp, notebooks, results
from linl.faults import EQUAL, KINDS, digits, mlp
from linl.ranges import Range
from linl.reading import program
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


def _other_threads():
    """As if somebody else in this process had been the first to ask HiGHS: two threads from now on."""
    highspy.Highs.resetGlobalScheduler(True)
    solver = milp.solver_with(threads=2)
    solver.addVar(0.0, 1.0)
    assert solver.run() == highspy.HighsStatus.kOk


def test_not_set_is_refused_where_it_can_not_be_asked_again(monkeypatch):
    """What threads_changed says of linl: where HiGHS really says "Not Set" nothing is proved, and nothing shown."""
    net, box = mlp(2, 3, 1), linl.Box(-torch.ones(2), torch.ones(2))
    read = program(net, (2,))
    known = dict(enumerate(linl.bounds.bound(read, box, "interval").inputs))
    model = milp.Model(read, Range(box.lower, box.upper), known, 0)
    _other_threads()
    with monkeypatch.context() as once:
        once.setattr(milp, "run", lambda solver: solver.run())
        answer = model.cross(0, 100.0, True, known[0])
    assert (answer.verdict, answer.point, answer.status) == ("open", None, "Not Set")
    answer = model.cross(0, 100.0, True, known[0])
    assert (answer.verdict, answer.status) == ("impossible", "Infeasible"), "asked again, it is a proof"


def test_threads_of_others_change_no_count():
    """Regions are counted by the same solver: with somebody else's threads in the process it told cells too thin."""
    net, box = mlp(2, 3, 1), linl.Box(-torch.ones(2), torch.ones(2))
    wanted = linl.regions.count(net, box).count
    _other_threads()
    assert linl.regions.count(net, box).count == wanted and wanted is not None


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
