"""The conformance kit runs on the device of ``PHOSPHENE_DEVICE``."""

from __future__ import annotations

import pytest
from tests.faults.pretend_device import DEVICE, pretend_device

from phosphene import methods
from phosphene.testing import check_method

#: Checks beyond the pretend device: it exists in one thread only, and has no sparse tensors.
UNSUPPORTED = {"concurrent_runs_equal", "refuses_bad_input"}


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
    failures = [outcome for outcome in report.failures if outcome.check not in UNSUPPORTED]
    assert not failures, "\n".join(map(str, failures))
    assert methods[name].spec.name == report.method
