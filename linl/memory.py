"""How much memory a call needs at its worst moment."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

KINDS = ("cpu", "cuda")
"""Devices whose peak can be told."""


def peak(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that are there at once during a call, beyond those that were there before it.

    What the allocator is asked for, whoever asks: eager code, compiled code, a kernel of ours. On a GPU by the caching
    allocator's own count, on a processor from the profiler's record of every allocation; there, room that the call
    makes by freeing what was there before isn't seen.

    Args:
        call: without arguments; it is called once, so warm it up before.
        device: where its tensors are.

    Returns: bytes.

    Raises:
        ValueError: a device that is neither.
    """
    if (kind := torch.device(device).type) not in KINDS:
        raise ValueError(f"the peak on {kind!r} isn't known: only {' and '.join(KINDS)} tell it")
    if kind == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    processor = [torch.profiler.ProfilerActivity.CPU]
    with _unheard(), torch.profiler.profile(activities=processor, profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max([0, *accumulate(changes)])


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Without the profiler's own log, which goes past Python to the process's standard error, and so into notebooks."""
    with contextlib.ExitStack() as back:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        for descriptor in (kept, nowhere):
            back.callback(os.close, descriptor)
        os.dup2(nowhere, 2)
        back.callback(os.dup2, kept, 2)
        yield
