"""Every method under another default device of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.faults.method_sample import cases, every_method, run_first_accepted

from phosphene import PhospheneError, load_model, methods
from phosphene.testing.observation import tensors_in


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

    model = load_model(Network(), input_size=(3, 2, 2))
    torch.set_default_device("meta")
    try:
        methods["saliency"](model, torch.rand(1, 3, 2, 2, device="cpu"), 0)
    finally:
        torch.set_default_device(None)
    assert set(devices) == {"meta"}
