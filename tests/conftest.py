"""Shared fixtures: the folder of real weights and photographs."""

import gc
import os
from pathlib import Path

import pytest
import torch

ASSETS = Path(os.environ.get("PHOSPHENE_ASSETS", Path(__file__).parents[2] / "shared"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and photographs; tests that use it are skipped if it is absent."""
    if not (ASSETS / "weights").is_dir():
        pytest.skip(
            f"real weights and photographs are absent: no {ASSETS / 'weights'} (set PHOSPHENE_ASSETS)"
        )
    return ASSETS


def pytest_collection_finish() -> None:
    # Modules and tests stay until the end: garbage collection need not scan them again and again.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
