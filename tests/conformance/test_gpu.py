"""Every check of the conformance kit on CUDA: ``pytest -m gpu``, where there is a device."""

from __future__ import annotations

import pytest

from phosphene import methods
from phosphene.testing import check_method


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(methods))
def test_conformance_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOSPHENE_DEVICE", "cuda")
    report = check_method(name, profile="quick")
    assert report.ok, str(report)
