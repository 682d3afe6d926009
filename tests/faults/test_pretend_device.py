"""Every method and the conformance kit on a device that refuses CPU tensors, and on one without float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("device_checks.py")


def run_checks(marks: str) -> None:
    """Run the checks with these marks in a process of their own; the report names each that failed."""
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
        "-m", marks, str(CHECKS),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.timeout(1500)
def test_methods_and_kit_run_on_a_device() -> None:
    run_checks("not nightly")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_all_methods_run_on_a_device() -> None:
    run_checks("nightly")
