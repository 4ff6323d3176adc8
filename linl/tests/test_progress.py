"""How far a profile has got, told by its folders alone; and locks that die with their process."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linl import locks, progress, provenance, results, study

HOLD = """
import sys, time
from pathlib import Path
from linl import locks
locks.hold(Path(sys.argv[1]))
print(1, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def elsewhere(path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds a lock, until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "1\n"
            yield other
        finally:
            other.kill()


@pytest.fixture
def profile(tmp_path):
    """Four runs of one experiment and one of another."""
    path = tmp_path / "study.yaml"
    path.write_text(
        "profiles:\n  p:\n    about: x\n    runs:\n"
        "      - notebook: experiments/linlnet.ipynb\n        seeds: [0, 1, 2, 3, 4, 5]\n"
        "      - notebook: benchmarks.ipynb\n"
    )
    return path


def finish(job: study.Job, seconds: float) -> None:
    """As if it had run."""
    job.folder.mkdir(parents=True)
    (job.folder / "params.json").write_text(json.dumps(job.params))
    record = {"experiment": job.experiment, "key": job.folder.parent.name, "figures": {}, "versions": {}}
    job.result.write_text(json.dumps(record | {"how": {"seconds": seconds}, "finished": "then"}))


def test_every_state_by_its_folder(profile):
    done, running, failed, killed, begun, *_ = study.jobs("p", profile)
    finish(done, 100.0)
    for job in (running, failed, killed, begun):
        job.folder.mkdir(parents=True)
    (failed.folder / "log.txt").write_text(
        "Executing Cell 3---\nepoch 1: loss 2\nTraceback (most recent call last):\n  x\n"
        "papermill.exceptions.PapermillExecutionError: \n\x1b[31mValueError\x1b[39m: width = 0: must be above 0\n\n"
        "[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel.\n"
    )
    (killed.folder / "log.txt").write_text("epoch 1: loss 2\nEnding Cell 3---\n")
    (running.folder / "log.txt").write_text("epoch 7: loss 1\n")
    (begun.folder / "params.json").write_text("{}")
    with elsewhere(running.folder / results.LOCK):
        found = progress.status("p", profile)
        assert found.table["state"].tolist() == [
            "done",
            "running",
            "failed",
            "stopped",
            "stopped",
            "waiting",
            "waiting",
        ]
        assert found.table["told"][1:4].tolist() == [
            "epoch 7: loss 1", "ValueError: width = 0: must be above 0", "epoch 1: loss 2",
        ]  # fmt: skip
        assert (found.left, found.unknown) == (500.0, 1)
        assert "1 done, 1 running, 1 failed, 2 stopped, 2 waiting; about 8 min left with 1 at once" in str(found)
        assert "not counting 1 run" in str(found) and "benchmarks" in found._repr_html_()
    assert progress.state_of(running) == "stopped", "a lock dies with its process"


def test_nothing_done_and_all_done(profile):
    assert "nothing is finished yet" in str(progress.status("p", profile))
    for job in study.jobs("p", profile):
        finish(job, 1.0)
    assert str(progress.status("p", profile)) == "7 done"


def test_other_seeds_tell_better_than_other_settings(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "profiles:\n  p:\n    runs:\n      - notebook: experiments/linlnet.ipynb\n"
        "        each: [{epochs: 1}, {epochs: 100}]\n        seeds: [0, 1]\n"
    )
    short, _, long, _ = study.jobs("p", path)
    finish(short, 10.0)
    finish(long, 1000.0)
    assert progress.status("p", path).left == 1010.0


def test_the_command_prints_it(capsys):
    assert progress.main(["smoke"]) == 0
    told = capsys.readouterr().out
    assert "waiting" in told and "benchmarks" in told
    assert progress.main(["smok"]) == 2 and "unknown profile 'smok'" in capsys.readouterr().err


def test_a_run_that_someone_is_at_work_on_is_refused_in_a_line(tmp_path):
    """Two kernels in one folder would write over each other."""
    params = {"network": "mlp", "dataset": "digits", "profile": "custom", "seed": 0, "overwrite": False}
    folder = results.run_folder("linlnet", params)
    with elsewhere(folder / results.LOCK) as other:
        with pytest.raises(results.Busy, match=f"process {other.pid} on .* is at work on .*: wait until it is done"):
            results.begin("linlnet", params)
        with pytest.raises(results.Busy):
            results.begin("linlnet", params | {"overwrite": True})
    run = results.begin("linlnet", params)
    assert locks.held(folder / results.LOCK)
    results.begin("linlnet", params)  # a cell that is run twice
    run.finish({})
    assert not locks.held(folder / results.LOCK)
    with elsewhere(folder / results.LOCK) as other:
        assert results.begin("linlnet", params).finished, "a finished run is only shown, whoever is at work"


def test_overwriting_leaves_nothing_but_the_lock(tmp_path):
    params = {"network": "mlp", "dataset": "digits", "profile": "custom", "seed": 0, "overwrite": True}
    run = results.begin("linlnet", params)
    (run.folder / "sub").mkdir()
    (run.folder / "sub" / "x").write_text("x")
    run.finish({})
    again = results.begin("linlnet", params)
    assert not again.finished
    assert sorted(path.name for path in again.folder.iterdir()) == [results.LOCK, "params.json"]


def test_stale_runs_are_told_and_done_again_only_when_asked(profile, monkeypatch, capsys):
    """By git: files that changed since the run's revision, uncommitted edits included."""
    files = ["linl/train.py", "linl/two_slope.cpp", "linl/tables.py", "linl/errata.py", "linl/tests/test_train.py"]
    files += [f"notebooks/{name}.ipynb" for name in ("experiments/linlnet", "tables/linlnet", "experiments/regions")]
    changed = {"aaa": files, "bbb": ()}
    monkeypatch.setattr(provenance, "_changed", changed.get)
    wanted = study.jobs("p", profile)
    made = [("aaa", True), ("bbb", True), ("bbb", False), ("ccc", True), (None, None)]
    for job, (revision, clean) in zip(wanted, made, strict=False):
        finish(job, 1.0)
        record = json.loads(job.result.read_text()) | {"source": {"revision": revision, "clean": clean}}
        job.result.write_text(json.dumps(record))
    found = progress.stale("p", profile)
    assert found["run"].tolist() == [wanted[i].label for i in (0, 2, 3, 4)]
    assert found["changed"].tolist() == [
        ["linl/train.py", "linl/two_slope.cpp", "notebooks/experiments/linlnet.ipynb"],
        ["(made with uncommitted changes)"],
        ["revision ccc isn't known here (a shallow clone, or another repository?)"], ["made outside of a git checkout"],
    ]  # fmt: skip
    monkeypatch.setattr(study, "profiles", lambda path=None, given=study.profiles: given(profile))
    monkeypatch.setattr(study.engine, "command", lambda *_: [sys.executable, "-c", ""])  # does nothing
    assert study.main(["run", "p"]) == 1 and all(job.done for job in wanted[:5]), "nothing is done again unasked"
    assert study.main(["run", "p", "--redo", "stale"]) == 1
    assert [job.done for job in wanted[:5]] == [False, True, False, False, False]
    assert f"once more: {wanted[0].label}; the earlier one is in s0-until-" in capsys.readouterr().out
    aside = [path.name for path in wanted[0].folder.parent.iterdir() if "-until-" in path.name]
    assert len(aside) == 4
    assert len(results.runs("linlnet", "runs")) == 1, "what is set aside is in no table"


def test_the_changed_files_are_gits(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)  # fmt: skip

    (tmp_path / "linl").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "linl" / "a.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    provenance._changed.cache_clear()
    assert provenance._changed(head.strip()[:12]) == ()
    (tmp_path / "linl" / "a.py").write_text("2")
    (tmp_path / "README.md").write_text("2")
    provenance._changed.cache_clear()
    assert provenance._changed(head.strip()[:12]) == ("linl/a.py",)
    assert provenance._changed("0123456789ab") is None
    provenance._changed.cache_clear()


FORKS = """
import os, subprocess, sys
from pathlib import Path
from linl import locks

path = Path(sys.argv[1])
look = "import sys, pathlib; from linl import locks; print(locks.held(pathlib.Path(sys.argv[1])))"

def seen():
    return subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True).stdout.strip()

locks.hold(path)
ready, go = os.pipe(), os.pipe()
if os.fork() == 0:
    locks.release(path)
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
print(seen())
locks.release(path)
print(seen())
os.write(go[1], b"x")
"""


def test_a_lock_that_a_child_has_a_copy_of(tmp_path):
    """What the child lets go stays the parent's; given back, it is free though the child lives."""
    command = [sys.executable, "-c", FORKS, str(tmp_path / results.LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "False"]
