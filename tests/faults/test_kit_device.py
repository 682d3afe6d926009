"""The conformance kit runs on the device of ``PHOSPHENE_DEVICE``."""

from __future__ import annotations

import pytest
from tests.faults.pretend_device import DEVICE, pretend_device

from phosphene import methods
from phosphene.testing import check_method

#: Dispatch modes are a thread's own, so the pretend device does not exist in the threads of a check.
IN_THREADS = {"concurrent_runs_equal"}


@pytest.mark.parametrize(
    "name",
    [
        "attribution.grad_cam",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("attacks.pgd", "embeddings.embed")),
    ],
)
def test_kit_runs_on_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOSPHENE_DEVICE", DEVICE)
    with pretend_device():
        report = check_method(name, profile="quick")
    failures = [outcome for outcome in report.failures if outcome.check not in IN_THREADS]
    assert not failures, "\n".join(map(str, failures))
    assert methods[name].spec.name == report.method
