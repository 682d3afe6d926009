"""Every method on a device that refuses CPU tensors, on one without float64, and under a default device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.faults.pretend_device import DEVICE, pretend_device

from phosphene import PhospheneError, methods
from phosphene.testing.cases import Case
from phosphene.testing.networks import network_names
from phosphene.testing.observation import tensors_in

#: One method per family, and those that once failed.
SAMPLE = (
    "top_patches", "activation_statistics", "channel_redundancy", "pgd", "occlusion", "saliency_segmentation",
    "interval_bounds", "lipschitz", "randomized_smoothing", "outliers", "set_distance", "first_layer_filters",
    "auto_attack", "compare_attributions", "fast_style_add", "class_visualization", "efros_leung",
)  # fmt: skip


def every_method() -> list[Any]:
    """All methods; those outside the sample are nightly."""
    return [
        pytest.param(name, marks=() if name.rpartition(".")[2] in SAMPLE else pytest.mark.nightly, id=name)
        for name in sorted(methods)
    ]


def cases() -> Iterator[Case]:
    """A case on each network in single precision: a method may accept few of them."""
    yield Case()
    yield from (Case(network=name) for name in network_names() if name not in ("gap", "double"))


def run_first_accepted(name: str, device: torch.device | None = None) -> Any:
    """The result of the first case that the method accepts, with the model on a device."""
    method, refusals = methods[name], []
    for case in cases():
        model = case.model()
        if device is not None:
            model.module.to(device)
        try:
            return method(**(case.inputs(method, model) | case.arguments(method)))
        except PhospheneError as refusal:
            refusals.append(str(refusal))
    raise AssertionError(f"{name} refused every network: {refusals[0]}")


@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no-float64"])
@pytest.mark.parametrize("name", every_method())
def test_method_runs_on_a_device(name: str, float64: bool) -> None:
    with pretend_device(float64=float64) as device:
        result = run_first_accepted(name, device)
        has_model = methods[name].spec.input("model") is not None
        wrong = [path for path, tensor in tensors_in(result) if tensor.device.type != DEVICE]
        assert not (has_model and wrong), f"on the CPU: {wrong}"
        result.panels()


@pytest.mark.parametrize("name", every_method())
def test_method_runs_under_another_default_device(name: str) -> None:
    method = methods[name]
    expected = run_first_accepted(name)
    for case in cases():
        model = case.model()
        inputs = case.inputs(method, model)
        torch.set_default_device("meta")
        try:
            result = method(**(inputs | case.arguments(method)))
            result.png()
            assert torch.get_default_device().type == "meta"
        except PhospheneError:
            continue
        finally:
            torch.set_default_device(None)
        break
    for (path, tensor), (_, other) in zip(tensors_in(result), tensors_in(expected), strict=True):
        assert tensor.device.type == "cpu", path
        assert torch.equal(tensor, other) or name == "embeddings.umap", path


def test_package_is_usable_under_another_default_device() -> None:
    program = """
import torch
torch.set_default_device("meta")
import tempfile
import phosphene
with tempfile.TemporaryDirectory() as folder:
    result = phosphene.run("saliency", out=folder + "/a")
    assert result.maps.device.type == "cpu"
    phosphene.load_result(folder + "/a").png()
    assert phosphene.replay(folder + "/a").same
assert torch.get_default_device().type == "meta"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_network_sees_the_default_device_of_the_caller() -> None:
    devices = []

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            devices.append(torch.zeros(1).device.type)
            return self.linear(x.flatten(1))

    from phosphene import load_model

    model = load_model(Network(), input_size=(3, 2, 2))
    torch.set_default_device("meta")
    try:
        methods["saliency"](model, torch.rand(1, 3, 2, 2, device="cpu"), 0)
    finally:
        torch.set_default_device(None)
    assert set(devices) == {"meta"}


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
