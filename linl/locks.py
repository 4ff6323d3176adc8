"""Locks that die with their process: a kill -9 leaves none behind, and nobody has to clean up.

`flock` on a file that stays: the file says who holds it, the lock whether anyone does. On network file systems it
works wherever the file system passes flock on (NFS since version 4).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class Held(RuntimeError):  # noqa: N818 - an answer, not a fault
    """Another process holds a lock; the message says which."""


_HELD: dict[Path, IO] = {}
"""Locks of this process; they would shut out each other."""


def _not_the_childs() -> None:
    """A forked child shares its parent's locks; it lets its own copies go, which gives nothing back."""
    for file in _HELD.values():
        file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_not_the_childs)


def hold(path: Path, inherit: bool = False) -> None:
    """Takes a lock until `release`, or until the process ends. Taken already by this process: nothing happens.

    Args:
        path: of a file that is made, and stays.
        inherit: whether the lock survives an exec, which makes this process another program.

    Raises:
        Held: another process has it.
        OSError: the file can't be written.
    """
    path = path.absolute()
    if path in _HELD:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - open as long as it is held
    except OSError as error:
        raise OSError(
            f"{path.parent} can't be written ({error.strerror}): make it writable, or name another folder for results, "
            "by LINL_RESULTS"
        ) from error
    try:
        taken = _lock(file)
    except BaseException:
        file.close()
        raise
    if not taken:
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise Held(f"{who} is at work on {path.parent}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    os.set_inheritable(file.fileno(), inherit)
    _HELD[path] = file


def _lock(file: IO) -> bool:
    """Tries for a moment: `held` has the lock for an instant when it looks."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def release(path: Path) -> None:
    """Gives a lock of this process back."""
    file = _HELD.pop(path.absolute(), None)
    if file is not None:
        fcntl.flock(file, fcntl.LOCK_UN)  # of a child's copy as well, which closing would leave locked
        file.close()


def held(path: Path) -> bool:
    """Whether any process holds a lock, this one included."""
    if path.absolute() in _HELD:
        return True
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """A lock for as long as a block takes.

    Raises:
        Held: as `hold`, and where this process has it already.
    """
    if path.absolute() in _HELD:
        raise Held(f"this process is at work on {path.parent} already")
    hold(path)
    try:
        yield
    finally:
        release(path)
