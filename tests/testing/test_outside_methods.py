"""The conformance kit on methods by an author who had not read it: the defects that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import outside_right_methods
import outside_wrong_methods
import pytest

FOLDER = Path(__file__).parent
WRONG = {method.spec.short_name: defect for defect, method in outside_wrong_methods.WRONG}
RIGHT = [method.spec.short_name for method in outside_right_methods.RIGHT]

#: Defects that contradict only the text of the documentation: they meet every general expectation, and what
#: the method declares. An oracle or relations of the technique would report them, see docs/relations.md.
UNNOTICED = ("enlarged_cam", "recolored", "deletion_curve")

#: A process for each method: some leave process-wide switches changed.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from phosphene.testing import check_method
module = __import__(sys.argv[2])
methods = [m[1] if isinstance(m, tuple) else m for m in getattr(module, sys.argv[3])]
method = next(m for m in methods if m.spec.short_name == sys.argv[4])
report = check_method(method, profile="quick")
sys.__stdout__.write("REPORT" + json.dumps({o.check: o.reason for o in report.failures}))
"""


def failures(module: str, names: str, method: str, home: Path) -> dict[str, str]:
    """The failed checks of a method at the profile "quick", with the reasons."""
    command = [sys.executable, "-c", PROGRAM, str(FOLDER), module, names, method]
    environment = os.environ | {"HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "REPORT" in done.stdout, done.stdout + done.stderr
    report: dict[str, str] = json.loads(done.stdout.rpartition("REPORT")[2])
    return report


@pytest.mark.nightly
@pytest.mark.parametrize("name", WRONG)
def test_wrong_method_is_reported(name: str, tmp_path: Path) -> None:
    reported = failures("outside_wrong_methods", "WRONG", name, tmp_path)
    assert bool(reported) != (name in UNNOTICED), f"{WRONG[name]}: {reported}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", RIGHT)
def test_right_method_is_not_refused(name: str, tmp_path: Path) -> None:
    assert not failures("outside_right_methods", "RIGHT", name, tmp_path)


def test_most_defects_are_reported() -> None:
    assert len(WRONG) >= 60 and len(RIGHT) >= 20
    assert len(UNNOTICED) <= len(WRONG) / 4
