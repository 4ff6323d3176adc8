"""How far a profile has got, told by its folders alone; and locks that die with their process."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linl import locks, progress, results, study

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
    job.folder.mkdir(parents=True)
    job.result.write_text(json.dumps({"how": {"seconds": seconds}}))


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
