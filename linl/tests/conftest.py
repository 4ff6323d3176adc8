"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# Several workers (pytest -n) share the cores. The variable is for the kernels and processes that a test starts; here
# it comes too late, since importing this file has imported linl, and so torch.
if (WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


LONG = ("test_the_smoke_profile_from_start_to_table", "test_a_sweep_recovers_from_a_job_that_is_killed")


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.name not in LONG)


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
