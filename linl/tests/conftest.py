"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder():
    """The folder with real data; tests that need it are skipped where there is none."""
    named = os.environ.get("LINL_DATA")
    if not named or not (Path(named) / "cifar-10-batches-py").is_dir():
        pytest.skip("no real data: set LINL_DATA to a folder with cifar-10-batches-py")
    return Path(named)


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test writes into the project's results."""
    monkeypatch.setenv("LINL_RESULTS", str(tmp_path / "results"))
