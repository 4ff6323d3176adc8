"""A Slurm of one controller and one node on this machine, for as long as a test takes.

Debian: `apt install slurm-wlm munge`. It wants root, as slurmd does; nothing outside its own folder is written, and
the machine's own Slurm, if it has one, is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct")
"""What is called with this Slurm's configuration, inside of jobs as well, where its variable is gone."""


def missing() -> str:
    """Why there can be no Slurm here, in words; empty if there can be."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} missing): apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd wants root: run this test as root, in a container for instance"


@contextlib.contextmanager
def slurm(folder: Path, cores: int = 2) -> Iterator[dict[str, str]]:
    """Starts munged, slurmctld and slurmd, waits until the node is up, and stops them afterwards.

    Args:
        folder: empty, for everything that they write.
        cores: of the node.

    Yields: the PATH for whoever submits.

    Raises:
        RuntimeError: a daemon didn't start; the message ends with its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    conf.write_text(_conf(folder, cores))
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": os.environ.get("PATH", "") + ":/usr/sbin"}
    started: list[subprocess.Popen] = []
    try:
        _munge(folder, env, started)
        for name in ("slurmctld", "slurmd"):
            with open(folder / f"{name}.out", "w") as out:
                command = [name, "-D", "-c"] if name == "slurmctld" else [name, "-D"]
                started.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        _wait(folder, env, started)
        yield {"PATH": f"{_commands(folder, env)}:{env['PATH']}"}
    finally:
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def _commands(folder: Path, env: dict) -> Path:
    """A folder with Slurm's commands, each told where the configuration is."""
    made = folder / "bin"
    made.mkdir()
    for name in COMMANDS:
        real = shutil.which(name, path=env["PATH"])
        (made / name).write_text(f'#!/bin/sh\nSLURM_CONF={env["SLURM_CONF"]} exec {real} "$@"\n')
        (made / name).chmod(0o755)
    return made


def _conf(folder: Path, cores: int) -> str:
    host = socket.gethostname().split(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    ports = _free_ports(2)
    return f"""ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _munge(folder: Path, env: dict, started: list[subprocess.Popen]) -> None:
    """munged, with a key and a socket of its own."""
    home = folder / "munge"
    home.mkdir(mode=0o700)
    key = home / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    command = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket",
               f"--pid-file={home}/pid", f"--log-file={home}/log", f"--seed-file={home}/seed", "--force"]  # fmt: skip
    started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for _ in range(100):
        if (folder / "munge.socket").exists():
            return
        time.sleep(0.05)
    raise RuntimeError(f"munged didn't start: {(home / 'log').read_text() if (home / 'log').exists() else 'no log'}")


def _wait(folder: Path, env: dict, started: list[subprocess.Popen]) -> None:
    """Until the node is idle."""
    for _ in range(300):
        told = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False).stdout
        if told.strip() == "idle":
            return
        if any(daemon.poll() is not None for daemon in started):
            break
        time.sleep(0.1)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.out")))
    raise RuntimeError(f"Slurm didn't start:\n{logs}")
