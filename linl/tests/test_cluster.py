"""A profile through a real Slurm, on this machine: `python -m pytest linl/tests/test_cluster.py`.

A minute or two. Skipped, with words, where Slurm isn't installed; see `linl.tests.loopback`.
"""

import os
import subprocess
import sys
import time

import pytest

from linl import lending, study
from linl.tests import loopback


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A running Slurm of one node, its commands on the PATH."""
    if why := loopback.missing():
        pytest.skip(why)
    with loopback.slurm(tmp_path_factory.mktemp("slurm") / "it") as env:
        monkeypatch.setenv("PATH", env["PATH"])
        yield


def queue() -> list[list[str]]:
    """Number and state of every job."""
    told = subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in told.splitlines()]


def test_a_sweep_recovers_from_a_job_that_is_killed(slurm, tmp_path):
    """Slurm without accounting; one job is cancelled while it runs, and sent again."""
    options = "--slurm-init-seconds-before-status-checks 5 --latency-wait 5"
    command = [sys.executable, "-m", "linl.study", "run", "tiny", "--executor", "slurm", "--cores", "1"]
    with open(tmp_path / "told", "w") as told:
        sweep = subprocess.Popen([*command, "--options", options], stdout=told, stderr=subprocess.STDOUT)
    cancelled, end = "", time.monotonic() + 400
    while sweep.poll() is None and time.monotonic() < end:
        time.sleep(0.5)
        running = [number for number, state in queue() if state == "RUNNING"]
        if running and not cancelled:
            time.sleep(3)  # its notebook has begun
            cancelled = running[0]
            subprocess.run(["scancel", cancelled], check=True)
    sweep.kill()
    said = (tmp_path / "told").read_text()
    assert sweep.wait() == 0, said[-3000:]
    assert cancelled and "Trying to restart job" in said, "nothing was killed, or nobody noticed"
    assert all(job.done for job in study.jobs("tiny")) and "| mlp " in said
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all 2 runs are done" in again.stdout


def test_without_slurm_it_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert study.main(["run", "tiny", "--executor", "slurm"]) == 2
    assert "no Slurm here (scontrol isn't found)" in capsys.readouterr().err


# --- what a run may have ---------------------------------------------------------------------------


def test_runs_get_what_they_ask_for_and_never_more_than_there_is(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "profiles:\n  p:\n    runs:\n      - notebook: experiments/linlnet.ipynb\n        threads: all\n"
        "        memory: 40\n        gpus: 2\n        minutes: 9\n"
        "      - {notebook: benchmarks.ipynb}\n"
    )
    large, small = study.jobs("p", path)
    assert (large.memory, large.gpus, large.minutes, small.memory, small.gpus) == (40.0, 2, 9, 2.0, 0)
    machine = study.engine.capacity({"cores": "4", "memory": "8", "gpus": "1"})
    assert [machine.threads(job.threads) for job in (large, small)] == [4, 1]
    assert [machine.megabytes(job.memory) for job in (large, small)] == [8192, 2048]
    assert [machine.gpus_of(job.gpus) for job in (large, small)] == [1, 0]
    cluster = study.engine.capacity({"cores": "16", "memory": "inf", "gpus": "-1"})
    assert (cluster.threads(large.threads), cluster.megabytes(large.memory), cluster.gpus_of(large.gpus)) == (
        16,
        40 * 1024,
        2,
    )


def test_every_process_has_a_gpu_of_its_own(tmp_path):
    """Three processes, two devices: the third waits until one ends; the lock survives becoming another program."""
    code = (
        "import sys; from pathlib import Path; from linl.lending import lend; import os, time\n"
        "got = lend(1, ['0', '1'], Path(sys.argv[1]), patience=30)\n"
        "os.execv(sys.executable, [sys.executable, '-c', f'print({got[0]}, flush=True); input()'])"
    )

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as one, start() as two:
        assert {one.stdout.readline(), two.stdout.readline()} == {"0\n", "1\n"}
        with pytest.raises(TimeoutError, match="no 1 GPUs became free"):
            lending.lend(1, ["0", "1"], tmp_path, patience=0)
        with start() as three:
            one.stdin.close()
            assert one.wait() is not None
            assert three.stdout.readline() in ("0\n", "1\n")
            three.stdin.close()
        two.stdin.close()
    with pytest.raises(ValueError, match="3 GPUs are asked for, 2 are here"):
        lending.lend(3, ["0", "1"], tmp_path)
