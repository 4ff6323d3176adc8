"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given, it is renamed at the end.

    Raises:
        OSError: it can't be written; what was at `path` stays, the half-written file is removed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        _remove(part)
        if not _is_write_error(error):
            raise
        raise OSError(
            f"could not write {path} ({first_line(error)}). What was there before is untouched: "
            "make room (or make it writable) and run the same command again, it goes on from there."
        ) from error
    except BaseException:
        _remove(part)
        raise


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # where not even that can be done
        part.unlink(missing_ok=True)


def _is_write_error(error: Exception) -> bool:
    """Whether a file couldn't be written; torch and safetensors have exceptions of their own for that."""
    torchs = isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("inline_container", "PytorchStreamWriter")
    )
    return isinstance(error, OSError) or torchs or type(error).__name__ == "SafetensorError"


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).splitlines() or [repr(error)])[0]
