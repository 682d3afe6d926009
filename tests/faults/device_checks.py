"""Methods and the conformance kit on a device that refuses CPU tensors: run by test_pretend_device.py.

In a process of their own: a device must be registered before the first backward pass, after which torch's
autograd engine accepts no new one, and cannot be removed.
"""

from __future__ import annotations

import pytest
import torch
from tests.faults.method_sample import every_method, run_first_accepted
from tests.faults.pretend_device import DEVICE, pretend_device, register_device

from phosphene import methods, unit_centers
from phosphene.testing import check_method
from phosphene.testing.cases import Case
from phosphene.testing.observation import tensors_in

register_device()

#: Checks beyond the pretend device: it exists in one thread only, and has no sparse tensors.
UNSUPPORTED = {"concurrent_runs_equal", "refuses_bad_input"}


def test_pretend_device_refuses_what_cuda_refuses() -> None:
    with pretend_device(float64=False) as device:
        ours = torch.ones(2, device=device)
        assert (ours * 2).device.type == DEVICE and ours.cpu().device.type == "cpu"
        assert torch.tensor([1, 2], device=device).tolist() == [1, 2]
        with pytest.raises(RuntimeError, match="same device"):
            ours + torch.ones(2)
        with pytest.raises(TypeError, match="numpy"):
            ours.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator(), device=device)
        with pytest.raises(TypeError, match="float64"):
            ours.double()


@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no-float64"])
@pytest.mark.parametrize("name", every_method())
def test_method_runs_on_a_device(name: str, float64: bool) -> None:
    with pretend_device(float64=float64) as device:
        result = run_first_accepted(name, device)
        has_model = methods[name].spec.input("model") is not None
        wrong = [path for path, tensor in tensors_in(result) if tensor.device.type != DEVICE]
        assert not (has_model and wrong), f"on the CPU: {wrong}"
        result.panels()


@pytest.mark.parametrize("network", ["tokens", "nhwc", "shapes-vgg"])
def test_units_have_the_centers_of_the_cpu(network: str) -> None:
    model = Case(network=network).model()
    expected = [unit_centers(model, layer, model.input_size[1:]) for layer in model.stages]
    assert any(centers is not None for centers in expected)
    with pretend_device(float64=False) as device:
        moved = Case(network=network).model()
        moved.module.to(device)
        assert [unit_centers(moved, layer, moved.input_size[1:]) for layer in moved.stages] == expected


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
