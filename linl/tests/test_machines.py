"""What a machine says of itself, and the versions of what is installed."""

import platform
import subprocess

import numpy as np

from linl import machines


def test_versions_of_rivals(tmp_path, monkeypatch):
    """Installed, only found beside the code, and not there at all."""
    (tmp_path / "a_rival.py").write_text('__version__ = "1.2"')
    (tmp_path / "untold.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    told = machines.versions_of("numpy", "a-rival", "untold", "nobody-has-it")
    assert told == {"numpy": np.__version__, "a-rival": "1.2", "untold": "unknown", "nobody-has-it": "not installed"}
    assert set(machines.versions()) == {"python", "torch", "torchvision", "timm", "numpy"}


def test_the_processors_name(tmp_path, monkeypatch):
    """As Linux lists it; on a Mac its own question; else what Python knows."""
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nmodel name\t: Some Processor: 9\nprocessor : 1\nmodel name\t: Another\n")
    monkeypatch.setattr(machines, "Path", lambda path: listed)
    assert machines.processor() == machines.machine()["cpu"] == "Some Processor: 9"
    listed.unlink()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "Apple M9\n"))
    assert machines.processor() == "Apple M9"
    monkeypatch.setattr(platform, "system", lambda: "Plan 9")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "mips")
    assert machines.processor() == "mips"
